"""Settings of stage two."""

import math
from dataclasses import dataclass
from typing import Literal

from mealv2.errors import ConfigError
from mealv2.storage.urls import Location, is_url
from pipeline.config.base import DEFAULT_IMG_SIZE, EXACT_PIL, CropConfig
from pipeline.config.fields import (
    at_least,
    between,
    check_seed,
    recipe_setting,
    setting,
    teachers_setting,
    without_effect,
)
from pipeline.config.training import TrainConfig


@dataclass(frozen=True, kw_only=True)
class DistillConfig(CropConfig, TrainConfig):
    """Stage two: train a student from a label set, from teachers online, or both.

    Defaults are the paper's.
    """

    example = "mealv2 distill --data-dir imagenet --labels labels --model resnet50.ram_in1k"

    labels: Location | None = setting(
        None,
        "Label set that `mealv2 precompute` wrote; a path or a URL.",
        group="Labels",
        shown="none; then --online",
        path="label set",
        need="one of --labels and --online is required",
    )
    online: bool = setting(
        False,
        "Use no label set: the --teacher models label new views at every step.",
        group="Labels",
        need="one of --labels and --online is required",
    )
    teacher: tuple[str, ...] = teachers_setting(
        (),
        "timm model, NAME or NAME=CHECKPOINT, for --online and --missing teach; repeat it, or "
        "separate several by commas.",
        shown="with --missing teach, those the label set names",
    )
    missing: Literal["fail", "skip", "teach"] = setting(
        "fail",
        "Views without a stored label, such as those of images added later: stop, skip them, or "
        "let the teachers label them.",
        group="Labels",
    )
    reuse_views: bool | None = setting(
        None,
        "Cycle through the stored views; else epoch e uses view e, stored or not.",
        group="Views",
        shown="yes, unless --missing teach",
    )
    write_back: bool = setting(
        False,
        "With --missing teach: append the new labels to the label set.",
        group="Labels",
    )
    train_split: str | None = setting(
        None,
        "With --online: part of --data-dir to train on.",
        group="Data",
        shown="train",
        aliases=("split",),
    )
    img_size: int | None = setting(
        None,
        "With --online: side of a view in pixels.",
        group="Views",
        shown=str(DEFAULT_IMG_SIZE),
    )
    view_seed: int | None = setting(
        None, "With --online: seed of the views.", group="Views", shown="0"
    )
    exact_pil: bool | None = setting(  # type: ignore[assignment]  # here it may be left open
        None, EXACT_PIL, group="Views", shown="as the label set was made, else no"
    )
    discriminator: Literal["paper", "official", "adversarial", "off"] = setting(
        "paper",
        "The paper's (one sigmoid), the official code's (two outputs, last ReLU), the paper's "
        "behind a gradient reversal, or none.",
        group="Loss",
    )
    discriminator_lr: float | None = setting(
        None,
        "Learning rate of the discriminator, with the student's schedule.",
        group="Loss",
        shown="--lr",
    )
    discriminator_weight: float = setting(1.0, "Weight of the discriminator loss.", group="Loss")
    discriminator_input: Literal["logits", "log-probs", "probs"] | None = setting(
        None,
        "Input of the discriminator, of the student and of the labels.",
        group="Loss",
        shown="logits with --online or stored logits, else log-probs through the set's top-k",
    )
    cutmix_target: Literal["teachers", "mixed-labels"] | None = setting(
        None,
        "CutMix: the teachers label the mixed image (with --online), or labels mix by area.",
        group="Loss",
        shown="no CutMix",
    )
    cutmix_beta: float | None = setting(
        None, "CutMix: lambda is drawn from Beta(b, b).", group="Loss", shown="1.0"
    )
    cutmix_prob: float | None = setting(
        None, "CutMix: fraction of batches to mix.", group="Loss", shown="1.0"
    )
    label_temperature: float = setting(
        1.0, "Replace labels q by q^(1/T): softer above 1. The paper has 1.", group="Loss"
    )
    hard_label_weight: float = setting(
        0.0, "Weight w of the class ids: (1 - w) soft + w hard. The paper has 0.", group="Loss"
    )
    recipe: str | None = recipe_setting()
    dry_run: bool = setting(
        False,
        "Estimate steps, time and memory from a short sample; write nothing.",
        group="Run and checkpoints",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dry_run and self.resume is not None:
            raise ConfigError("--dry-run estimates a new run; leave out --resume")
        if self.dry_run:
            without_effect(self, "with --dry-run", "auto_resume")
        if self.online == (self.labels is not None):
            raise ConfigError("give --labels DIR, or --online with --teacher; not both")
        if self.online:
            if not self.teacher:
                raise ConfigError("--online needs --teacher")
            without_effect(self, "with --online", "missing", "reuse_views", "write_back")
        else:
            without_effect(self, "with --labels", "train_split", "img_size", "view_seed")
        if self.write_back and is_url(self.labels):
            raise ConfigError("--write-back appends to label sets of this machine, not at a URL")
        if not self.online and self.missing != "teach":
            without_effect(self, "without --online or --missing teach", "teacher", "write_back")
        self._check_discriminator()
        self._check_extras()

    def _check_discriminator(self) -> None:
        at_least(self, 0, "discriminator_weight")
        if self.discriminator_lr is not None:
            at_least(self, 0, "discriminator_lr")
        if self.discriminator == "off":
            without_effect(
                self,
                "with --discriminator off",
                "discriminator_lr",
                "discriminator_weight",
                "discriminator_input",
            )

    def _check_extras(self) -> None:
        if self.img_size is not None:
            at_least(self, 1, "img_size")
        if self.view_seed is not None:
            check_seed(self, "view_seed")
        if not 0 < self.label_temperature < math.inf:
            raise ConfigError(
                f"--label-temperature must be positive and finite, got {self.label_temperature}"
            )
        between(self, 0, 1, "hard_label_weight")
        if self.hard_label_weight == 1:
            without_effect(self, "with --hard-label-weight 1", "label_temperature")
        if self.cutmix_target is None:
            without_effect(self, "without --cutmix-target", "cutmix_beta", "cutmix_prob")
        if self.cutmix_beta is not None and not 0 < self.cutmix_beta < math.inf:
            raise ConfigError(f"--cutmix-beta must be positive and finite, got {self.cutmix_beta}")
        if self.cutmix_prob is not None:
            between(self, 0, 1, "cutmix_prob")
        if self.cutmix_target == "teachers" and not self.online:
            raise ConfigError(
                "--cutmix-target teachers needs --online: stored labels are of unmixed images; "
                "mixed-labels works from a label set"
            )

    @property
    def reuses_views(self) -> bool:
        """Whether stored views come round again."""
        return self.missing != "teach" if self.reuse_views is None else self.reuse_views
