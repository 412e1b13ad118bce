"""Settings of every training run, and of `mealv2 finetune`."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mealv2.storage.urls import Location
from pipeline.config.base import (
    DATA_DIR,
    DEFAULT_EMA_DECAY,
    DEFAULT_IMG_SIZE,
    MAX_EPOCHS,
    NO_SPLIT,
    PAPER_EPOCHS,
    PAPER_MILESTONE,
    SIDE,
    CompileMode,
    CropConfig,
    NormalisationConfig,
    RuntimeConfig,
    SourceConfig,
)
from pipeline.config.fields import (
    MAX_SEED,
    REQUIRED,
    in_data,
    in_hardware,
    in_img_size,
    in_model,
    in_optimisation,
    in_run,
    in_views,
    require,
    without_effect,
)

# What may differ from the run when it is resumed (docs/how-to/resume.md has the table):
# settings of the machine, the log and the folder, which no checkpoint is compared with;
FREE_ON_RESUME = frozenset(
    {"resume", "output", "auto_resume", "dry_run", "workers", "device", "log_interval"}
    | {"recovery_interval", "checkpoint_hist", "cache_dir", "cache_size", "strict", "check_images"}
)
# and settings that the command line may change: paths, because contents are compared by their
# hashes, and choices that leave what the run has learned as it is.
CHANGEABLE_ON_RESUME = frozenset(
    {"epochs", "data_dir", "labels", "teacher", "initial_checkpoint", "on_bad_image"}
    | {"val_interval", "grad_accum_steps", "sync_bn"}
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(SourceConfig, NormalisationConfig, RuntimeConfig):
    """Settings of every training run."""

    in_ranks = True

    data_dir: Location = in_data(REQUIRED, DATA_DIR, path="data set")
    model: str = in_model(REQUIRED, "Student: a timm model name; its tag selects the weights.")
    val_split: str = in_data("val", "Split of --data-dir to validate on, or none.")
    pretrained: bool | None = in_model(
        None, "Start from timm's pretrained weights.", shown="yes, without --initial-checkpoint"
    )
    initial_checkpoint: Path | None = in_model(
        None, "Starting weights: file, run folder or model folder.", shown="timm's", path="weights"
    )
    epochs: int = in_optimisation(PAPER_EPOCHS, "Passes over the images.", low=1, high=MAX_EPOCHS)
    batch_size: int = in_optimisation(512, "Images per step, over all processes.", low=1)
    grad_accum_steps: int = in_optimisation(
        1, "Micro-batches per step and process; more of them need less GPU memory.", low=1
    )
    sync_bn: bool = in_hardware(
        False, "With torchrun on GPUs: batch normalisation over the images of all processes."
    )
    lr: float = in_optimisation(0.01, "Learning rate of SGD.", low=0)
    decay_milestones: tuple[int, ...] | None = in_optimisation(
        None,
        "Epoch at which the learning rate is multiplied by --decay-rate; repeat it for several.",
        shown="at 100/180 of --epochs, as in the paper",
        alias="lr_milestones",
    )
    decay_rate: float = in_optimisation(0.1, "Factor of the learning rate at a milestone.", low=0)
    sched: Literal["step", "cosine"] = in_optimisation(
        "step", "Learning rate schedule: steps (the paper's), or half a cosine down to zero."
    )
    momentum: float = in_optimisation(0.9, "Momentum of SGD.", low=0)
    weight_decay: float = in_optimisation(0.0, "Weight decay of SGD; the paper uses none.", low=0)
    views_per_image: int = in_views(
        1, "Views per image in a batch, cut from one decode (FKD); each counts as an epoch.", low=1
    )
    model_ema: bool = in_optimisation(
        False, "Average the student's weights over the steps and save the average as the model."
    )
    model_ema_decay: float | None = in_optimisation(
        None, "Decay per step, rising from 0 to this.", shown=str(DEFAULT_EMA_DECAY), low=0, high=1
    )
    torchcompile: CompileMode = in_hardware(
        "off", "Compile the student with torch.compile, in this mode.", alias="compile"
    )
    seed: int = in_run(0, "Seed of the image order, new weights and dropout.", low=0, high=MAX_SEED)
    output: Path | None = in_run(
        None, "Run folder to create.", shown="runs/COMMAND-MODEL-TIME", path="new folder"
    )
    resume: Path | None = in_run(None, "Run folder to continue with its settings.", shown="none")
    auto_resume: bool = in_run(
        False,
        "Continue the run in --output if there is one, also if only --epochs is larger.",
    )
    log_interval: int = in_run(50, "Steps between log lines.", low=1)
    val_interval: int = in_run(1, "Epochs between validations; the last epoch has one.", low=1)
    recovery_interval: int | None = in_run(
        None,
        "Steps between checkpoints, besides the one at the end of each epoch.",
        shown="none",
        alias="checkpoint_every",
        low=1,
    )
    checkpoint_hist: int | Literal["all"] = in_run(
        2,
        "Number of newest checkpoints to keep, or all; `--resume RUN --checkpoint-hist 1` removes "
        "old ones of a finished run.",
        alias="keep_checkpoints",
        low=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_resume()
        self._check_sizes()
        if self.val_split == NO_SPLIT:
            without_effect(self, "with --val-split none", "val_interval")
        if self.sched == "cosine":
            without_effect(self, "with --sched cosine", "decay_milestones", "decay_rate")
        if not self.model_ema:
            without_effect(self, "without --model-ema", "model_ema_decay")
        if self.initial_checkpoint:
            require(not self.pretrained, "give --pretrained or --initial-checkpoint, not both")
        for milestone in self.decay_milestones or ():
            message = f"--decay-milestones {milestone} has no effect in {self.epochs} epochs"
            require(0 < milestone < self.epochs, message)

    def _check_resume(self) -> None:
        if self.auto_resume:
            require(self.resume is None, "--auto-resume has no effect with --resume")
            require(self.output, "--auto-resume needs --output, the run folder to look for")

    def _check_sizes(self) -> None:
        views, steps, size = self.views_per_image, self.grad_accum_steps, self.batch_size
        require(views <= self.epochs, f"--views-per-image {views} exceeds --epochs {self.epochs}")
        require(views <= size, f"--views-per-image {views} exceeds --batch-size {size}")
        require(steps <= size, f"--grad-accum-steps {steps} exceeds --batch-size {size}")
        require(
            steps == 1 or self.torchcompile in ("off", "default"),
            f"--grad-accum-steps cannot be used with --torchcompile {self.torchcompile}, whose "
            "CUDA graphs can overwrite accumulated gradients; use --torchcompile default",
        )

    @property
    def from_pretrained(self) -> bool:
        """Whether the student starts from timm's weights."""
        return self.initial_checkpoint is None if self.pretrained is None else self.pretrained

    def lr_factor(self, epoch: int) -> float:
        """Return the factor of the learning rates in an epoch (counted from 0)."""
        if self.sched == "cosine":  # official FKD_train.py: lr / 2 (1 + cos(pi e / epochs))
            return 0.5 * (1.0 + math.cos(math.pi * epoch / self.epochs))
        milestones = self.decay_milestones
        if milestones is None:
            milestones = (paper_milestone(self.epochs),)
        return self.decay_rate ** sum(epoch >= milestone for milestone in milestones)


def paper_milestone(epochs: int) -> int:
    """Return the epoch at which the paper's schedule drops the learning rate: 100 of 180."""
    return round(epochs * PAPER_MILESTONE / PAPER_EPOCHS)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(CropConfig, TrainConfig):
    """Train on class labels: a teacher for your data, a student's start, or a control run."""

    example = "mealv2 finetune --data-dir pictures --model resnet18.tv_in1k --epochs 20"

    train_split: str = in_data("train", "Split of --data-dir to train on.", alias="split")
    img_size: int = in_img_size(DEFAULT_IMG_SIZE, SIDE)
    num_views: int | None = in_views(
        None,
        "Use the views of `distill` with a label set of this many views, in the same order.",
        shown="a new view every epoch",
        low=1,
    )
    view_seed: int = in_views(0, "Seed of the views.", low=0, high=MAX_SEED)
    epochs: int = in_optimisation(30, "Passes over the images.", low=1, high=MAX_EPOCHS)
    batch_size: int = in_optimisation(128, "Images per step, over all processes.", low=1)
    weight_decay: float = in_optimisation(1e-4, "Weight decay of SGD.", low=0)
