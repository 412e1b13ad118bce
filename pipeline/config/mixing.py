"""Settings of mixup and CutMix: timm's flags."""

from typing import Any

from pipeline.config.fields import frozen, in_loss, require, without_effect
from pipeline.config.optimisation import OptimisationConfig


@frozen
class MixingConfig(OptimisationConfig):
    """Settings of mixed images, off by default. The paper adds CutMix in one experiment."""

    mixup: float = in_loss(
        0.0,
        "mixup: blend each image with another, and mix their labels as the pixels; lambda is drawn "
        "from Beta(a, a), 0 is none. Not in the paper.",
        low=0,
    )
    cutmix: float | None = in_loss(
        None,
        "CutMix: paste a box of another image, and mix the labels by area; lambda is drawn from "
        "Beta(a, a).",
        shown="none",
        alias="cutmix_beta",
        low=0,
    )
    mixup_prob: float | None = in_loss(
        None,
        "Fraction of batches that mixup or CutMix mixes.",
        shown="1.0",
        alias="cutmix_prob",
        low=0,
        high=1,
    )
    mixup_switch_prob: float | None = in_loss(
        None,
        "With mixup and CutMix: fraction of the mixed batches that CutMix gets.",
        shown="0.5",
        low=0,
        high=1,
    )
    mixup_off_epoch: int = in_loss(0, "Epochs after which mixup and CutMix end; 0 is never.", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.mixes:
            names = ("mixup_prob", "mixup_switch_prob", "mixup_off_epoch")
            without_effect(self, "without --mixup or --cutmix", *names)
        if not (self.mixup and self.cutmix_alpha):
            without_effect(self, "without both --mixup and --cutmix", "mixup_switch_prob")
        message = f"--mixup-off-epoch {self.mixup_off_epoch} has no effect in {self.epochs} epochs"
        require(self.mixup_off_epoch < self.epochs, message)

    @property
    def cutmix_alpha(self) -> float:
        """Alpha of CutMix, 0 without it."""
        return self.cutmix or 0.0

    @property
    def mixes(self) -> bool:
        """Whether batches are mixed."""
        return bool(self.mixup or self.cutmix_alpha)

    @property
    def mixing(self) -> dict[str, Any]:
        """The parameters of mixed batches but who labels them (pipeline.training.spec.Mixing)."""
        of_cutmix = self.mixup_switch_prob
        return {
            "mixup": self.mixup,
            "cutmix": self.cutmix_alpha,
            "probability": 1.0 if self.mixup_prob is None else self.mixup_prob,
            "switch_probability": 0.5 if of_cutmix is None else of_cutmix,
            "off_epoch": self.mixup_off_epoch,
        }
