"""Settings of the views: crop, flips and what changes their pixels."""

from typing import Any, ClassVar

from mealv2.errors import ConfigError
from mealv2.view_operations import EraseMode
from mealv2.view_recipe import FLIP_PROBABILITY, PADDING, Crop, ViewRecipe
from pipeline.config.base import CropConfig
from pipeline.config.fields import flag, frozen, in_views, without_effect

Pair = tuple[float, float]


@frozen
class ViewsConfig(CropConfig):
    """Settings of commands that draw views. What is not given is as in the paper."""

    crop: Crop | None = in_views(
        None,
        "Crop of a view. rrc: a random box, resized (the paper). pad: a square as large as the "
        "image, moved by up to --padding pixels (CIFAR). center: the crop of validation.",
        shown="rrc",
    )
    scale: Pair | None = in_views(
        None, "Area of the box, as fractions of the image: MIN MAX (the paper).", shown="0.08 1"
    )
    ratio: Pair | None = in_views(
        None, "Width over height of the box: MIN MAX (the paper).", shown="0.75 1.3333"
    )
    padding: int | None = in_views(
        None, "With --crop pad: black pixels added to each side of the image.", shown=str(PADDING)
    )
    hflip: float | None = in_views(
        None, "Probability of a left-right flip (the paper).", shown=str(FLIP_PROBABILITY)
    )
    vflip: float | None = in_views(
        None, "Probability of a flip upside down; not in the paper.", shown="0.0"
    )
    color_jitter: float | None = in_views(
        None,
        "Change brightness, contrast and saturation by a factor in 1 - X to 1 + X; not in the "
        "paper.",
        shown="none",
    )
    aa: str | None = in_views(
        None,
        "RandAugment in timm's spelling: rand-m9-n2-mstd0.5-inc1; not in the paper.",
        shown="none",
    )
    reprob: float | None = in_views(
        None, "Probability of erasing random boxes; not in the paper.", shown="0.0"
    )
    remode: EraseMode | None = in_views(
        None,
        "What --reprob puts into a box: the mean colour, a random colour, or noise.",
        shown="const",
    )
    recount: int | None = in_views(
        None, "With --reprob: boxes of an image, from 1 to this number.", shown="1"
    )

    recipe_fields: ClassVar[tuple[str, ...]] = (
        *("crop", "scale", "ratio", "padding", "hflip", "vflip"),
        *("color_jitter", "aa", "reprob", "remode", "recount"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.crop or "rrc") != "rrc":
            without_effect(self, f"with --crop {self.crop}", "scale", "ratio")
        if self.crop != "pad":
            without_effect(self, "without --crop pad", "padding")
        if self.aa:
            without_effect(self, "with --aa, as in timm", "color_jitter")
        if not self.reprob:
            without_effect(self, "without --reprob", "remode", "recount")
        _ = self.view_recipe

    @property
    def view_recipe(self) -> ViewRecipe:
        """How views are drawn, unless a label set says it; raises ConfigError naming a flag."""
        given: dict[str, Any] = {
            name: value for name in self.recipe_fields if (value := getattr(self, name)) is not None
        }
        try:
            return ViewRecipe(**given)
        except ValueError as error:
            name, _, reason = str(error).partition(" ")
            raise ConfigError(f"{flag(name)} {reason}") from None

    @property
    def chooses_views(self) -> bool:
        """Whether a setting differs from the paper's views."""
        return any(getattr(self, name) is not None for name in self.recipe_fields)
