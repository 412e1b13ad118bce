"""A view is a number: (seed, key, index) -> crop box and flip, by arithmetic no library can change.

The distribution is that of torchvision's RandomResizedCrop and RandomHorizontalFlip, the paper's
augmentation, unless a ViewRecipe says otherwise. The numbers come from BLAKE2b and from operations
that are exactly rounded everywhere (+, -, *, /, sqrt, Decimal.ln), so every machine, worker count
and library version gets the same box. docs/reference/views.md describes the algorithm.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from mealv2.hash_draws import below, exp, hash_words, log, uniform
from mealv2.view_operations import TRIES, Operation
from mealv2.view_recipe import RESIZE_OVER_CROP, ViewRecipe

# The entry of a manifest for the paper's views.
RECIPE = ViewRecipe().entry()

BOX_UNIT = 65_535  # a packed box is in units of 1/65,535 of the image's height and width

# The entry of a manifest for imported views: the shards contain packed boxes.
STORED_BOXES = {"name": "stored-boxes", "version": 1, "unit": BOX_UNIT}

PAPER_RECIPE = ViewRecipe()
_MAX_DENOMINATOR = 1_000_000  # a bound of the ratio is the nearest fraction: 4/3, not its double
_MAX_SMALL_PADDING = 32  # pixels
_TWO_32, _TWO_64 = 1 << 32, 1 << 64


@dataclass(frozen=True, slots=True)
class View:
    """One augmented instance of an image: a box in pixels of the original image, and its flips.

    What a box has outside of the image is black. ``is_centre`` is the crop of evaluation, whose box
    is the whole image. ``operations`` change the pixels after the flips.
    """

    top: int
    left: int
    height: int
    width: int
    flip: bool
    vflip: bool = False
    is_centre: bool = False
    operations: tuple[Operation, ...] = ()

    def box(self) -> tuple[int, int, int, int, int]:
        """Return top, left, height, width, and flips: 1 left-right, 2 upside down, 3 both.

        32 bits each: a negative number in two's complement.
        """
        flips = self.flip | self.vflip << 1
        return self.top % _TWO_32, self.left % _TWO_32, self.height, self.width, flips


class Views(Protocol):
    """Maps an image and an index to a view."""

    @property
    def draws_small_boxes(self) -> bool:
        """Whether each view is a box and flips, and the box leaves the image by little."""
        return False

    def view(self, key: str, index: int, *, width: int, height: int) -> View:
        """Return view ``index`` of an image of ``width`` x ``height`` pixels."""


@dataclass(frozen=True)
class DrawnViews(Views):
    """The views of a seed and a recipe, computed by ``view_of``."""

    seed: int
    recipe: ViewRecipe = PAPER_RECIPE

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> "DrawnViews":
        """Return the views of a manifest's entry; raises ValueError for an unknown recipe."""
        seed = entry.get("seed")
        if type(seed) is not int or not 0 <= seed < _TWO_64:
            raise ValueError("its seed is not an integer in [0, 2**64)")
        parameters = {name: value for name, value in entry.items() if name != "seed"}
        return cls(seed, ViewRecipe.from_entry(parameters))

    @property
    def draws_small_boxes(self) -> bool:
        recipe = self.recipe
        is_wide = recipe.crop == "pad" and recipe.padding > _MAX_SMALL_PADDING
        return recipe.crop != "center" and not recipe.has_operations and not is_wide

    def entry(self) -> dict[str, Any]:
        """Return the entry of a manifest."""
        return {**self.recipe.entry(), "seed": self.seed}

    def view(self, key: str, index: int, *, width: int, height: int) -> View:
        return view_of(key, index, seed=self.seed, width=width, height=height, recipe=self.recipe)


def view_of(
    key: str, index: int, *, seed: int, width: int, height: int, recipe: ViewRecipe = PAPER_RECIPE
) -> View:
    """Return view ``index`` of the image ``key`` of ``width`` x ``height`` pixels.

    By default box and flip follow torchvision's RandomResizedCrop(scale=(0.08, 1), ratio=(3/4,
    4/3)) and RandomHorizontalFlip(0.5) (paper section 4.2; official code, get_train_loader).
    Raises ValueError for an empty image, or unless ``seed`` and ``index`` lie in [0, 2**64).
    """
    box = _box_of(key, index, seed=seed, width=width, height=height, recipe=recipe)
    if not recipe.has_operations:
        return box
    return replace(box, operations=recipe.operations(key, seed, index))


def _box_of(
    key: str, index: int, *, seed: int, width: int, height: int, recipe: ViewRecipe
) -> View:
    """Return a view without its operations."""
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width}x{height} pixels has no views")
    draws = hash_words("view", key, seed, index)
    flip = uniform(next(draws)) < recipe.hflip
    vflip = False
    if recipe.vflip:  # from words of its own: the others stay those of the paper's recipe
        vflip = uniform(next(hash_words("vflip", key, seed, index))) < recipe.vflip
    if recipe.crop == "center":
        return View(0, 0, height, width, flip, vflip, is_centre=True)
    words = next(draws), next(draws)
    if recipe.crop == "pad":
        return View(*_padded_box(words, width, height, recipe.padding), flip, vflip)
    box_height, box_width = _box_size(draws, width, height, recipe)
    if box_height == 0:
        box_height, box_width = _fallback_size(width, height, recipe.ratio)
        top, left = (height - box_height) // 2, (width - box_width) // 2
    else:
        top = below(height - box_height + 1, words[0])
        left = below(width - box_width + 1, words[1])
    return View(top, left, box_height, box_width, flip, vflip)


def scheduled_view(key: str, epoch: int, *, seed: int, num_views: int) -> int:
    """Return the stored view of ``key`` for an epoch: all ``num_views`` before any repeats.

    Pass ``epoch // num_views`` takes the views in the order (start + stride * position) mod
    num_views, with start and stride drawn per key and pass.
    """
    if num_views < 1:
        raise ValueError(f"num_views must be at least 1, got {num_views}")
    cycle, position = divmod(epoch, num_views)
    draws = hash_words("schedule", key, seed, cycle)
    start = next(draws) % num_views
    strides = _coprimes(num_views)
    stride = strides[next(draws) % len(strides)]
    return (start + stride * position) % num_views


def evaluation_resize(img_size: int) -> int:
    """Return the length of the shorter side before the centre crop (paper: 256 for 224)."""
    numerator, denominator = RESIZE_OVER_CROP
    return img_size * numerator // denominator


def fractions(view: View, *, width: int, height: int) -> tuple[float, float, float, float]:
    """Return a view's box as (top, left, height, width), fractions of the image's sides."""
    return view.top / height, view.left / width, view.height / height, view.width / width


def packed_boxes(boxes: np.ndarray) -> np.ndarray:
    """Convert boxes in fractions of an image, in [0, 1], to integer 65,535ths, uint16.

    The last axis is (top, left, height, width). unpacked_view recovers the box in pixels exactly,
    for images of up to 65,000 pixels a side from float32 or wider, 2,000 from float16.
    """
    return np.rint(boxes.astype(np.float64) * BOX_UNIT).astype(np.uint16)


def unpacked_view(box: np.ndarray, flip: bool, *, width: int, height: int) -> View:
    """Return the view of a packed box in an image of ``width`` x ``height`` pixels.

    Rounded to whole pixels, at least one pixel, inside the image.
    """
    top, left, box_height, box_width = (int(number) for number in box)
    rows = min(max(1, _part(box_height, height)), height)
    columns = min(max(1, _part(box_width, width)), width)
    top, left = min(_part(top, height), height - rows), min(_part(left, width), width - columns)
    return View(top, left, rows, columns, bool(flip))


def _part(number: int, length: int) -> int:
    """Return number / 65,535 of a length, rounded half up."""
    return (2 * number * length + BOX_UNIT) // (2 * BOX_UNIT)


def _padded_box(
    words: tuple[int, int], width: int, height: int, padding: int
) -> tuple[int, int, int, int]:
    """Return the box of RandomCrop(min(width, height), padding): CIFAR's, for square images."""
    side = min(width, height)
    top = below(height - side + 2 * padding + 1, words[0]) - padding
    left = below(width - side + 2 * padding + 1, words[1]) - padding
    return top, left, side, side


def _box_size(draws: Iterator[int], width: int, height: int, recipe: ViewRecipe) -> tuple[int, int]:
    """Draw up to ten (height, width) of a box; (0, 0) if none fits (torchvision: get_params)."""
    area, scale = float(width * height), recipe.scale
    centre, half = log_ratios(recipe.ratio)
    for _ in range(TRIES):
        box_area = area * (scale[0] + (scale[1] - scale[0]) * uniform(next(draws)))
        ratio = exp(centre + (2.0 * uniform(next(draws)) - 1.0) * half)
        box_width = round(math.sqrt(box_area * ratio))
        box_height = round(math.sqrt(box_area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            return box_height, box_width
    return 0, 0


def _fallback_size(width: int, height: int, ratio: tuple[float, float]) -> tuple[int, int]:
    """Return the (height, width) of the largest box with an allowed ratio (torchvision)."""
    image_ratio = width / height
    if image_ratio < ratio[0]:
        return max(1, min(height, round(width / ratio[0]))), width
    if image_ratio > ratio[1]:
        return height, max(1, min(width, round(height * ratio[1])))
    return height, width


@lru_cache(maxsize=64)
def log_ratios(ratio: tuple[float, float]) -> tuple[float, float]:
    """Return the middle of ln(MIN) and ln(MAX), and half their distance; 0 and ln(4/3)."""
    low, high = (log(Fraction(bound).limit_denominator(_MAX_DENOMINATOR)) for bound in ratio)
    return (high + low) / 2, (high - low) / 2


@lru_cache(maxsize=64)
def _coprimes(n: int) -> tuple[int, ...]:
    """Return the strides that visit all n views: those of 1..n-1 that are coprime to n."""
    return tuple(a for a in range(1, max(n, 2)) if math.gcd(a, n) == 1)
