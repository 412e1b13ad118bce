"""A view is a number: (seed, key, index) -> crop box and flip, by arithmetic no library can change.

The distribution is that of torchvision's RandomResizedCrop and RandomHorizontalFlip, the paper's
augmentation. The numbers come from BLAKE2b and from IEEE double operations that are exactly rounded
everywhere (+, -, *, /, sqrt), so every machine, worker count and library version gets the same box.
docs/reference/views.md describes the algorithm.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Protocol

import numpy as np

SCALE = (0.08, 1.0)  # torchvision: area of the box over the area of the image
RATIO = (3 / 4, 4 / 3)  # torchvision: width over height of the box
TRIES = 10
FLIP_PROBABILITY = 0.5
RESIZE_OVER_CROP = (256, 224)  # paper: evaluation resizes the shorter side to int(256 / 224 * size)

# The entry of a manifest for its views; a change of any number here is a new version.
RECIPE = {
    "name": "random-resized-crop",
    "version": 1,
    "hash": "blake2b-512",
    "scale": list(SCALE),
    "ratio": list(RATIO),
    "tries": TRIES,
    "flip_probability": FLIP_PROBABILITY,
}

BOX_UNIT = 65_535  # a packed box is in units of 1/65,535 of the image's height and width

# The entry of a manifest for imported views: the shards contain packed boxes.
STORED_BOXES = {"name": "stored-boxes", "version": 1, "unit": BOX_UNIT}

_LOG_RATIO = 0.28768207245178090  # ln(4/3), the nearest double; ln(3/4) is its negative
_TWO_64 = 1 << 64


@dataclass(frozen=True, slots=True)
class View:
    """One augmented instance of an image: a box in pixels of the original image, and a flip."""

    top: int
    left: int
    height: int
    width: int
    flip: bool

    def box(self) -> tuple[int, int, int, int, int]:
        """Return top, left, height, width, and 1 for a flip."""
        return self.top, self.left, self.height, self.width, int(self.flip)


class Views(Protocol):
    """Maps an image and an index to a view."""

    def view(self, key: str, index: int, *, width: int, height: int) -> View:
        """Return view ``index`` of an image of ``width`` x ``height`` pixels."""


@dataclass(frozen=True)
class DrawnViews(Views):
    """The views of a seed, computed by ``view_of``."""

    seed: int

    def view(self, key: str, index: int, *, width: int, height: int) -> View:
        return view_of(key, index, seed=self.seed, width=width, height=height)


def view_of(key: str, index: int, *, seed: int, width: int, height: int) -> View:
    """Return view ``index`` of the image ``key`` of ``width`` x ``height`` pixels.

    Box and flip follow torchvision's RandomResizedCrop(scale=(0.08, 1), ratio=(3/4, 4/3)) and
    RandomHorizontalFlip(0.5) (paper section 4.2; official code, get_train_loader). Raises
    ValueError for an empty image, or unless ``seed`` and ``index`` lie in [0, 2**64).
    """
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width}x{height} pixels has no views")
    draws = _draws("view", key, seed, index)
    flip = _uniform(next(draws)) < FLIP_PROBABILITY
    top_draw, left_draw = next(draws), next(draws)
    box_height, box_width = _box_size(draws, width, height)
    if box_height == 0:
        box_height, box_width = _fallback_size(width, height)
        top, left = (height - box_height) // 2, (width - box_width) // 2
    else:
        # floor(word * n / 2**64): uniform on 0..n-1 to within n / 2**64
        top = top_draw * (height - box_height + 1) >> 64
        left = left_draw * (width - box_width + 1) >> 64
    return View(top, left, box_height, box_width, flip)


def scheduled_view(key: str, epoch: int, *, seed: int, num_views: int) -> int:
    """Return the stored view of ``key`` for an epoch: all ``num_views`` before any repeats.

    Pass ``epoch // num_views`` takes the views in the order (start + stride * position) mod
    num_views, with start and stride drawn per key and pass.
    """
    if num_views < 1:
        raise ValueError(f"num_views must be at least 1, got {num_views}")
    cycle, position = divmod(epoch, num_views)
    draws = _draws("schedule", key, seed, cycle)
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


def _draws(purpose: str, key: str, seed: int, index: int) -> Iterator[int]:
    """Yield 64-bit words of BLAKE2b-512(purpose, seed, index, block, key), block by block."""
    if not (0 <= seed < _TWO_64 and 0 <= index < _TWO_64):
        raise ValueError(f"seed and index must lie in [0, 2**64), got {seed} and {index}")
    head = (
        f"mealv2/{purpose}/1\0".encode() + seed.to_bytes(8, "little") + index.to_bytes(8, "little")
    )
    tail = key.encode("utf-8")
    block = 0
    while True:
        digest = blake2b(head + block.to_bytes(8, "little") + tail).digest()
        for start in range(0, 64, 8):
            yield int.from_bytes(digest[start : start + 8], "little")
        block += 1


def _uniform(word: int) -> float:
    """Map a 64-bit word to a double in [0, 1): its upper 53 bits over 2**53."""
    return (word >> 11) * 2.0**-53


def _box_size(draws: Iterator[int], width: int, height: int) -> tuple[int, int]:
    """Draw up to ten (height, width) of a box; (0, 0) if none fits (torchvision: get_params)."""
    area = float(width * height)
    for _ in range(TRIES):
        box_area = area * (SCALE[0] + (SCALE[1] - SCALE[0]) * _uniform(next(draws)))
        ratio = _exp((2.0 * _uniform(next(draws)) - 1.0) * _LOG_RATIO)
        box_width = round(math.sqrt(box_area * ratio))
        box_height = round(math.sqrt(box_area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            return box_height, box_width
    return 0, 0


def _fallback_size(width: int, height: int) -> tuple[int, int]:
    """Return the (height, width) of the largest box with an allowed ratio (torchvision)."""
    image_ratio = width / height
    if image_ratio < RATIO[0]:
        return max(1, min(height, round(width / RATIO[0]))), width
    if image_ratio > RATIO[1]:
        return height, max(1, min(width, round(height * RATIO[1])))
    return height, width


def _exp(x: float) -> float:
    """Return e**x for |x| <= 0.3 by a Taylor series.

    The last bit of the C library's exp differs between machines; that of products does not.
    """
    value = 1.0
    for n in range(16, 0, -1):
        value = 1.0 + x * value / n
    return value


@lru_cache(maxsize=64)
def _coprimes(n: int) -> tuple[int, ...]:
    """Return the strides that visit all n views: those of 1..n-1 that are coprime to n."""
    return tuple(a for a in range(1, max(n, 2)) if math.gcd(a, n) == 1)
