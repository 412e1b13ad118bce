"""Settings of every training run, and of hard-label training."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mealv2.errors import ConfigError
from pipeline.config.base import (
    DEFAULT_EMA_DECAY,
    DEFAULT_IMG_SIZE,
    NO_SPLIT,
    PAPER_EPOCHS,
    PAPER_MILESTONE,
    CompileMode,
    Cutting,
    Machine,
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


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Machine):
    """What every training run needs, whoever labels."""

    data_dir: Path = required("Data set: ROOT/SPLIT/CLASS/IMAGE, or tar shards.")
    model: str = required("Student: a timm model name, with its tag to pin the weights.")
    val_split: str = setting("val", "Part of --data-dir to validate on; or none.")
    pretrained: bool | None = setting(
        None,
        "Start from timm's pretrained weights.",
        shown="yes, unless --initial-checkpoint is given",
    )
    initial_checkpoint: Path | None = setting(
        None, "Start from this file or run folder instead.", shown="timm's weights"
    )
    epochs: int = setting(PAPER_EPOCHS, "Passes over the images.")
    batch_size: int = setting(512, "Images per step, in total.")
    grad_accum_steps: int = setting(
        1, "Micro-batches that a process cuts its share of a step into, for a GPU with less memory."
    )
    sync_bn: bool = setting(
        False, "Under torchrun on GPUs: batch normalisation over the images of all of them."
    )
    lr: float = setting(0.01, "Learning rate of SGD.")
    lr_milestones: tuple[int, ...] | None = setting(
        None,
        "Epochs at which the rate is multiplied by --decay-rate; repeat it for several.",
        shown="100/180 of the epochs, the paper's",
    )
    decay_rate: float = setting(0.1, "Factor at each milestone.")
    sched: Literal["step", "cosine"] = setting(
        "step", "Learning rate schedule: milestones (the paper's), or half a cosine to zero."
    )
    momentum: float = setting(0.9, "Momentum of SGD.")
    weight_decay: float = setting(0.0, "Weight decay of SGD; the paper uses none.")
    mean: tuple[float, float, float] | None = setting(
        None, "Per-channel mean the student's input is normalised with.", shown="the model's own"
    )
    std: tuple[float, float, float] | None = setting(
        None, "Per-channel std the student's input is normalised with.", shown="the model's own"
    )
    views_per_image: int = setting(
        1,
        "Views of an image in a batch, cut from one decode (FKD); each counts as an epoch.",
    )
    model_ema: bool = setting(
        False, "Keep a moving average of the student's weights, and make it the result."
    )
    model_ema_decay: float | None = setting(
        None,
        "Decay of the average at every step; it grows towards this from 0.",
        shown=str(DEFAULT_EMA_DECAY),
    )
    compile: CompileMode = setting("off", "Compile the student with torch.compile, in this mode.")
    seed: int = setting(0, "Seed of the image order, new weights, dropout.")
    output: Path | None = setting(None, "Run folder to make.", shown="runs/COMMAND-MODEL-TIME")
    resume: Path | None = setting(
        None, "Run folder to continue, with the settings it keeps.", shown="a new run"
    )
    auto_resume: bool = setting(
        False, "Continue the run in --output where one was begun, else begin it; for requeued jobs."
    )
    log_interval: int = setting(50, "Steps between log lines.")
    val_interval: int = setting(1, "Epochs between validations; the last epoch always has one.")
    checkpoint_every: int | None = setting(
        None, "Steps between checkpoints; the end of an epoch has one too.", shown="an epoch"
    )
    checkpoint_hist: int = setting(2, "Checkpoints kept, the newest.")

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
        if self.grad_accum_steps > 1 and self.compile in ("reduce-overhead", "max-autotune"):
            raise ConfigError(
                f"--grad-accum-steps does not go with --compile {self.compile}: its CUDA graphs "
                "may use the memory of gradients that are still added up; use --compile default"
            )
        if self.sched == "cosine":
            without_effect(self, "with --sched cosine", "lr_milestones", "decay_rate")
        if not self.model_ema:
            without_effect(self, "without --model-ema", "model_ema_decay")
        elif self.model_ema_decay is not None:
            between(self, 0, 1, "model_ema_decay")
        check_seed(self, "seed")
        if self.pretrained and self.initial_checkpoint:
            raise ConfigError("--pretrained and --initial-checkpoint exclude each other")
        check_normalisation(self)
        for milestone in self.lr_milestones or ():
            if not 0 < milestone < self.epochs:
                raise ConfigError(
                    f"--lr-milestones {milestone} has no effect in {self.epochs} epochs"
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
        milestones = self.lr_milestones
        if milestones is None:
            milestones = (round(self.epochs * PAPER_MILESTONE / PAPER_EPOCHS),)
        return self.decay_rate ** sum(epoch >= milestone for milestone in milestones)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Cutting, TrainConfig):
    """Hard-label training: teachers on own data, a student's start, a control run."""

    split: str = setting("train", "Part of --data-dir to train on.")
    img_size: int = setting(DEFAULT_IMG_SIZE, "Side of a view in pixels.")
    num_views: int | None = setting(
        None,
        "Use the views, in the order, that `distill` uses from a label set of so many.",
        shown="a new view every epoch",
    )
    view_seed: int = setting(0, "Seed of the views.")
    epochs: int = setting(30, "Passes over the images.")
    batch_size: int = setting(128, "Images per step, in total.")
    weight_decay: float = setting(1e-4, "Weight decay of SGD.")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "img_size")
        if self.num_views is not None:
            at_least(self, 1, "num_views")
        check_seed(self, "view_seed")
