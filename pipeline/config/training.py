"""Settings of every training run, and of hard-label training."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mealv2.errors import ConfigError
from mealv2.storage.urls import Location
from pipeline.config.base import (
    DATA_DIR,
    DEFAULT_EMA_DECAY,
    DEFAULT_IMG_SIZE,
    NO_SPLIT,
    PAPER_EPOCHS,
    PAPER_MILESTONE,
    CacheConfig,
    CompileMode,
    CropConfig,
    RuntimeConfig,
)
from pipeline.config.fields import (
    at_least,
    between,
    check_normalisation,
    check_seed,
    required,
    setting,
    without_effect,
)

_OWN = "the model's own"


@dataclass(frozen=True, kw_only=True)
class TrainConfig(CacheConfig, RuntimeConfig):
    """What every training run needs, whatever its targets."""

    in_ranks = True

    data_dir: Location = required(DATA_DIR, group="Data", path="data set")
    model: str = required(
        "Student: a timm model name, with its tag to pin the weights.", group="Model"
    )
    val_split: str = setting("val", "Part of --data-dir to validate on; or none.", group="Data")
    pretrained: bool | None = setting(
        None,
        "Start from timm's pretrained weights.",
        group="Model",
        shown="yes, unless --initial-checkpoint is given",
    )
    initial_checkpoint: Path | None = setting(
        None,
        "Weights that training starts from: a file, a run folder or a model folder.",
        group="Model",
        shown="timm's weights",
        path="weights",
    )
    epochs: int = setting(PAPER_EPOCHS, "Passes over the images.", group="Optimisation")
    batch_size: int = setting(
        512, "Images per optimiser step, over all processes.", group="Optimisation"
    )
    grad_accum_steps: int = setting(
        1,
        "Micro-batches per step and process; more of them need less GPU memory.",
        group="Optimisation",
    )
    sync_bn: bool = setting(
        False,
        "With torchrun on GPUs: batch normalisation over the images of all processes.",
        group="Hardware",
    )
    lr: float = setting(0.01, "Learning rate of SGD.", group="Optimisation")
    decay_milestones: tuple[int, ...] | None = setting(
        None,
        "Epoch at which --decay-rate multiplies the rate; repeat it for several.",
        group="Optimisation",
        shown="100/180 of the epochs, the paper's",
        aliases=("lr_milestones",),
    )
    decay_rate: float = setting(
        0.1, "Factor of the learning rate at each milestone.", group="Optimisation"
    )
    sched: Literal["step", "cosine"] = setting(
        "step",
        "Learning rate schedule: steps at the milestones (the paper's), or half a cosine to zero.",
        group="Optimisation",
    )
    momentum: float = setting(0.9, "Momentum of SGD.", group="Optimisation")
    weight_decay: float = setting(
        0.0, "Weight decay of SGD; the paper uses none.", group="Optimisation"
    )
    mean: tuple[float, float, float] | None = setting(
        None, "Per-channel mean of the input normalisation.", group="Model", shown=_OWN
    )
    std: tuple[float, float, float] | None = setting(
        None, "Per-channel std of the input normalisation.", group="Model", shown=_OWN
    )
    views_per_image: int = setting(
        1,
        "Views of an image in a batch, cut from one decode (FKD); each counts as an epoch.",
        group="Views",
    )
    model_ema: bool = setting(
        False,
        "Keep a moving average of the student's weights and return it as the model.",
        group="Optimisation",
    )
    model_ema_decay: float | None = setting(
        None,
        "Decay of the average per step; it rises from 0 to this value.",
        group="Optimisation",
        shown=str(DEFAULT_EMA_DECAY),
    )
    torchcompile: CompileMode = setting(
        "off",
        "Compile the student with torch.compile, in this mode.",
        group="Hardware",
        aliases=("compile",),
    )
    seed: int = setting(
        0, "Seed of the image order, new weights and dropout.", group="Run and checkpoints"
    )
    output: Path | None = setting(
        None,
        "Run folder to create.",
        group="Run and checkpoints",
        shown="runs/COMMAND-MODEL-TIME",
        path="new folder",
    )
    resume: Path | None = setting(
        None,
        "Run folder to continue, with its own settings.",
        group="Run and checkpoints",
        shown="a new run",
    )
    auto_resume: bool = setting(
        False,
        "Continue the run in --output if there is one, else start it; for requeued jobs.",
        group="Run and checkpoints",
    )
    log_interval: int = setting(50, "Steps between log lines.", group="Run and checkpoints")
    val_interval: int = setting(
        1,
        "Epochs between validations; the last epoch always has one.",
        group="Run and checkpoints",
    )
    checkpoint_every: int | None = setting(
        None,
        "Steps between checkpoints; the end of each epoch has one too.",
        group="Run and checkpoints",
        shown="an epoch",
    )
    checkpoint_hist: int = setting(
        2, "Number of newest checkpoints to keep.", group="Run and checkpoints"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "epochs", "batch_size", "log_interval", "checkpoint_hist")
        at_least(self, 1, "grad_accum_steps")
        self._check_resume()
        at_least(self, 1, "val_interval", "views_per_image")
        if self.val_split == NO_SPLIT:
            without_effect(self, "with --val-split none", "val_interval")
        at_least(self, 0, "lr", "momentum", "weight_decay", "decay_rate")
        if self.views_per_image > self.epochs:
            raise ConfigError(
                f"--views-per-image {self.views_per_image} counts as so many epochs; there are "
                f"only {self.epochs}"
            )
        if self.checkpoint_every is not None:
            at_least(self, 1, "checkpoint_every")
        if self.views_per_image > self.batch_size:
            raise ConfigError(
                f"--views-per-image {self.views_per_image} does not fit into --batch-size "
                f"{self.batch_size}"
            )
        if self.grad_accum_steps > self.batch_size:
            raise ConfigError(
                f"--grad-accum-steps {self.grad_accum_steps} does not fit into --batch-size "
                f"{self.batch_size}"
            )
        if self.grad_accum_steps > 1 and self.torchcompile in ("reduce-overhead", "max-autotune"):
            raise ConfigError(
                f"--grad-accum-steps does not go with --torchcompile {self.torchcompile}: its "
                "CUDA graphs may overwrite gradients that are still accumulated; use "
                "--torchcompile default"
            )
        if self.sched == "cosine":
            without_effect(self, "with --sched cosine", "decay_milestones", "decay_rate")
        if not self.model_ema:
            without_effect(self, "without --model-ema", "model_ema_decay")
        elif self.model_ema_decay is not None:
            between(self, 0, 1, "model_ema_decay")
        check_seed(self, "seed")
        if self.pretrained and self.initial_checkpoint:
            raise ConfigError("--pretrained and --initial-checkpoint exclude each other")
        check_normalisation(self)
        for milestone in self.decay_milestones or ():
            if not 0 < milestone < self.epochs:
                raise ConfigError(
                    f"--decay-milestones {milestone} has no effect in {self.epochs} epochs"
                )

    def _check_resume(self) -> None:
        if self.auto_resume and self.resume is not None:
            raise ConfigError("--auto-resume has no effect with --resume")
        if self.auto_resume and self.output is None:
            raise ConfigError("--auto-resume needs --output: the run folder to look into")

    @property
    def from_pretrained(self) -> bool:
        """Whether the student starts from timm's weights."""
        return self.initial_checkpoint is None if self.pretrained is None else self.pretrained

    def lr_factor(self, epoch: int) -> float:
        """Return what the learning rates are multiplied by in an epoch (counted from 0)."""
        if self.sched == "cosine":  # official FKD_train.py: lr / 2 (1 + cos(pi e / epochs))
            return 0.5 * (1.0 + math.cos(math.pi * epoch / self.epochs))
        milestones = self.decay_milestones
        if milestones is None:
            milestones = (round(self.epochs * PAPER_MILESTONE / PAPER_EPOCHS),)
        return self.decay_rate ** sum(epoch >= milestone for milestone in milestones)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(CropConfig, TrainConfig):
    """Hard-label training: teachers on own data, a student's start, a control run."""

    example = "mealv2 finetune --data-dir pictures --model resnet18.tv_in1k --epochs 20"

    train_split: str = setting(
        "train", "Part of --data-dir to train on.", group="Data", aliases=("split",)
    )
    img_size: int = setting(DEFAULT_IMG_SIZE, "Side of a view in pixels.", group="Views")
    num_views: int | None = setting(
        None,
        "Use the same views, in the same order, as `distill` with a label set of this many.",
        group="Views",
        shown="a new view every epoch",
    )
    view_seed: int = setting(0, "Seed of the views.", group="Views")
    epochs: int = setting(30, "Passes over the images.", group="Optimisation")
    batch_size: int = setting(
        128, "Images per optimiser step, over all processes.", group="Optimisation"
    )
    weight_decay: float = setting(1e-4, "Weight decay of SGD.", group="Optimisation")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "img_size")
        if self.num_views is not None:
            at_least(self, 1, "num_views")
        check_seed(self, "view_seed")
