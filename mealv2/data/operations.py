"""Apply the operations of a view to its pixels: timm's functions on Pillow's images."""

import math
from collections.abc import Iterable
from functools import cache
from hashlib import shake_128
from typing import Any

import numpy as np
from PIL import Image
from timm.data.auto_augment import NAME_TO_OP

from mealv2.view_operations import ERASE, Operation
from mealv2.view_recipe import FILL, NOISE_MEAN, NOISE_STD

_ERASE_NAMES = frozenset(ERASE.values())
_TWO_16 = 1 << 16


def apply_operations(pixels_SSC: np.ndarray, operations: Iterable[Operation]) -> np.ndarray:
    """Return pixels, uint8 S x S x 3, after some operations; the same array if there are none."""
    for operation in operations:
        is_erased = operation.name in _ERASE_NAMES
        pixels_SSC = (_erased if is_erased else _changed)(pixels_SSC, operation)
    return pixels_SSC


def _changed(pixels_SSC: np.ndarray, operation: Operation) -> np.ndarray:
    if operation.name == "Posterize" and operation.numbers[0] < 1:
        return np.zeros_like(pixels_SSC)  # newer versions of Pillow refuse 0 bits
    resampling = Image.Resampling
    resample = resampling.BICUBIC if operation.is_bicubic else resampling.BILINEAR
    change: Any = NAME_TO_OP[operation.name]
    image = Image.fromarray(np.require(pixels_SSC, requirements=["C"]))
    changed = change(image, *operation.numbers, fillcolor=FILL, resample=resample)
    return np.array(changed)


def _erased(pixels_SSC: np.ndarray, operation: Operation) -> np.ndarray:
    """Return a copy with the mean colour, a random one or noise in a box (timm: RandomErasing)."""
    side = len(pixels_SSC)
    # a part of a side, so that a view has the same box at every size
    height, width = (min(round(part * side), side - 1) for part in operation.numbers[:2])
    rooms = side - height + 1, side - width + 1
    top, left = (int(part * n) for part, n in zip(operation.numbers[2:4], rooms, strict=True))
    fill_HWC = np.array(FILL, dtype=np.uint8)
    if operation.name != ERASE["const"]:
        shape = (height, width) if operation.name == ERASE["pixel"] else (1, 1)
        fill_HWC = _noise(int(operation.numbers[4]), shape)
    erased_SSC = pixels_SSC.copy()
    erased_SSC[top : top + height, left : left + width] = fill_HWC
    return erased_SSC


def _noise(seed: int, shape: tuple[int, int]) -> np.ndarray:
    """Return normal noise of ImageNet's mean and deviation, rounded and clipped, uint8 H x W x 3.

    Value v stands for the 16-bit numbers u with F(v - 0.5) <= u / 65536 < F(v + 0.5).
    """
    size = 3 * shape[0] * shape[1]
    digest = shake_128(b"mealv2/erase/1\0" + seed.to_bytes(8, "little")).digest(2 * size)
    draws_HWC = np.frombuffer(digest, "<u2").reshape(*shape, 3)
    tables = [_quantiles(mean, std) for mean, std in zip(NOISE_MEAN, NOISE_STD, strict=True)]
    return np.stack([table[draws_HWC[..., c]] for c, table in enumerate(tables)], axis=-1)


@cache
def _quantiles(mean: float, std: float) -> np.ndarray:
    """Return the value of each 16-bit number; 0 and 255 get the tails."""
    scaled = [(v + 0.5 - 255 * mean) / (255 * std * math.sqrt(2)) for v in range(255)]
    bounds = [round(_TWO_16 * 0.5 * (1 + math.erf(z))) for z in scaled]
    return np.searchsorted(bounds, np.arange(_TWO_16), side="right").astype(np.uint8)
