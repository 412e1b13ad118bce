"""The recipe of the views: every parameter of crop, flips and operations, as a manifest has it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from mealv2.hash_draws import hash_words
from mealv2.view_operations import (
    ERASE_AREA,
    ERASE_RATIO,
    TRIES,
    EraseMode,
    Operation,
    RandAugment,
    colour_jitter,
    parse_rand_augment,
    rand_augment,
    random_erasing,
)

Crop = Literal["rrc", "pad", "center"]
FILL = (124, 116, 104)  # ImageNet's mean: what transforms and erasing put in
# timm erases after normalisation, to noise of mean 0 and deviation 1: of pixels from 0 to 1, these
NOISE_MEAN, NOISE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

SCALE = (0.08, 1.0)  # torchvision: area of the box over the area of the image
RATIO = (3 / 4, 4 / 3)  # torchvision: width over height of the box
FLIP_PROBABILITY = 0.5
PADDING = 4  # CIFAR's, in pixels of the image
RESIZE_OVER_CROP = (256, 224)  # paper: evaluation resizes the shorter side to int(256 / 224 * size)
MAX_RATIO = 100.0
MAX_PADDING = 4096
MAX_RECOUNT = 16

_HASH = "blake2b-512"
_NAMES: dict[Crop, str] = {
    "rrc": "random-resized-crop",
    "pad": "padded-crop",
    "center": "centre-crop",
}


@dataclass(frozen=True, kw_only=True)
class ViewRecipe:
    """How views are drawn; the defaults are the paper's (torchvision's RandomResizedCrop, flip).

    ``crop`` is ``rrc`` (a box of ``scale`` of the area and of width / height in ``ratio``), ``pad``
    (the largest square, moved inside the image with ``padding`` black pixels on each side) or
    ``center`` (the crop of evaluation). ``hflip`` and ``vflip`` are probabilities. Then come
    ``color_jitter`` (brightness, contrast, saturation), ``aa`` (timm's spelling of RandAugment) and
    ``reprob``, the probability of erasing 1 to ``recount`` boxes, to the mean colour, one random
    colour a box or noise (``remode`` ``const``, ``rand`` or ``pixel``). Raises ValueError for a
    parameter out of bounds.
    """

    crop: Crop = "rrc"
    scale: tuple[float, float] = SCALE
    ratio: tuple[float, float] = RATIO
    padding: int = PADDING
    hflip: float = FLIP_PROBABILITY
    vflip: float = 0.0
    color_jitter: float = 0.0
    aa: str = ""
    reprob: float = 0.0
    remode: EraseMode = "const"
    recount: int = 1

    def __post_init__(self) -> None:
        low, high = self.scale
        _require(0 < low <= high <= 1, "scale", self.scale, "0 < MIN <= MAX <= 1")
        low, high = self.ratio
        bounds = f"1/{MAX_RATIO:.0f} <= MIN <= MAX <= {MAX_RATIO:.0f}"
        _require(1 / MAX_RATIO <= low <= high <= MAX_RATIO, "ratio", self.ratio, bounds)
        in_bounds = 0 <= self.padding <= MAX_PADDING
        _require(in_bounds, "padding", self.padding, f"0 to {MAX_PADDING}")
        for name in ("hflip", "vflip", "reprob"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "0 to 1")
        _require(0 <= self.color_jitter <= 10, "color_jitter", self.color_jitter, "0 to 10")
        if self.remode not in get_args(EraseMode):
            raise ValueError(f"remode must be const, rand or pixel, got {self.remode!r}")
        in_bounds = 1 <= self.recount <= MAX_RECOUNT
        _require(in_bounds, "recount", self.recount, f"1 to {MAX_RECOUNT}")
        _ = self._rand_augment

    @property
    def is_random(self) -> bool:
        """Whether two views of an image can differ."""
        flips = {self.hflip, self.vflip}
        has_room = self.crop == "rrc" or (self.crop == "pad" and self.padding > 0)
        return has_room or not flips <= {0.0, 1.0} or self.has_operations

    @property
    def has_operations(self) -> bool:
        """Whether pixels change after crop and flips."""
        return bool(self.color_jitter or self.aa or self.reprob)

    @cached_property
    def _rand_augment(self) -> RandAugment | None:
        try:
            return parse_rand_augment(self.aa) if self.aa else None
        except ValueError as error:
            raise ValueError(
                f"aa must be like rand-m9-n2-mstd0.5, got {self.aa!r}: {error}"
            ) from None

    def operations(self, key: str, seed: int, index: int) -> tuple[Operation, ...]:
        """Return what changes the pixels of a view, in order; each kind has words of its own."""
        found: list[Operation] = []
        if self.color_jitter:
            words = hash_words("color-jitter", key, seed, index)
            found += colour_jitter(self.color_jitter, words)
        if self._rand_augment:
            found += rand_augment(self._rand_augment, hash_words("rand-augment", key, seed, index))
        if self.reprob:
            words = hash_words("random-erasing", key, seed, index)
            found += random_erasing(self.reprob, self.remode, self.recount, words)
        return tuple(found)

    @property
    def has_plain_boxes(self) -> bool:
        """Whether a view is a box inside the image and a left-right flip: what FKD can store."""
        return self.crop == "rrc" and self.vflip == 0 and not self.has_operations

    def entry(self) -> dict[str, Any]:
        """Return the entry of a manifest: the name, the version and every parameter in use.

        A change of what a parameter means is a new version.
        """
        parts: dict[Crop, dict[str, Any]] = {
            "rrc": {"scale": list(self.scale), "ratio": list(self.ratio), "tries": TRIES},
            "pad": {"padding": self.padding},
            "center": {"resize_over_crop": list(RESIZE_OVER_CROP)},
        }
        return {
            "name": _NAMES[self.crop],
            "version": 1,
            "hash": _HASH,
            **parts[self.crop],
            "flip_probability": self.hflip,
            **({"vertical_flip_probability": self.vflip} if self.vflip else {}),
            **self._operations_entry(),
        }

    def _operations_entry(self) -> dict[str, Any]:
        entry: dict[str, Any] = {}
        if self.color_jitter:
            entry["color_jitter"] = self.color_jitter
        if self._rand_augment:
            entry["rand_augment"] = {"text": self.aa, **self._rand_augment._asdict()}
        if self.reprob:
            entry["random_erasing"] = {
                "probability": self.reprob,
                "mode": self.remode,
                "max_count": self.recount,
                "area": list(ERASE_AREA),
                "ratio": list(map(float, ERASE_RATIO)),
                "tries": TRIES,
            }
            if self.remode != "const":
                noise = {"noise_mean": list(NOISE_MEAN), "noise_std": list(NOISE_STD)}
                entry["random_erasing"] |= noise
        return entry | ({"fill": list(FILL), "operations_version": 1} if entry else {})

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> "ViewRecipe":
        """Return the recipe of a manifest's entry; raises ValueError for an unknown one."""
        try:
            erasing = entry.get(
                "random_erasing", {"probability": 0, "mode": "const", "max_count": 1}
            )
            crop = next(crop for crop, name in _NAMES.items() if name == entry["name"])
            recipe = cls(
                crop=crop,
                scale=_pair(entry.get("scale", SCALE)),
                ratio=_pair(entry.get("ratio", RATIO)),
                padding=entry.get("padding", PADDING),
                hflip=_number(entry["flip_probability"]),
                vflip=_number(entry.get("vertical_flip_probability", 0.0)),
                color_jitter=_number(entry.get("color_jitter", 0.0)),
                aa=_text(entry.get("rand_augment", {"text": ""})["text"]),
                reprob=_number(erasing["probability"]),
                remode=erasing["mode"],
                recount=erasing["max_count"],
            )
        except (KeyError, TypeError, OverflowError, StopIteration, AttributeError):
            raise ValueError("a parameter is missing or has another type") from None
        are_integers = {type(recipe.padding), type(recipe.recount)} == {int}
        if recipe.entry() != entry or not are_integers:
            raise ValueError("it has other parameters")
        return recipe


def _require(holds: bool, name: str, value: object, bounds: str) -> None:
    if not holds:
        shown = " ".join(f"{part:g}" for part in (value if isinstance(value, tuple) else (value,)))
        raise ValueError(f"{name} must be {bounds}, got {shown}")


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _number(value: object) -> float:
    if type(value) not in (int, float):
        raise TypeError(f"{value!r} is not a number")
    return float(value)  # type: ignore[arg-type]


def _pair(values: Any) -> tuple[float, float]:
    low, high = map(_number, values)
    return low, high
