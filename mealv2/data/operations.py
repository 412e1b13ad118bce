"""Apply the operations of a view to its pixels: timm's functions on Pillow's images."""

from collections.abc import Iterable
from hashlib import shake_128
from typing import Any

import numpy as np
from PIL import Image
from timm.data.auto_augment import NAME_TO_OP

from mealv2.view_operations import ERASE, Operation
from mealv2.view_recipe import FILL


def apply_operations(pixels_SSC: np.ndarray, operations: Iterable[Operation]) -> np.ndarray:
    """Return pixels, uint8 S x S x 3, after some operations; the same array if there are none."""
    for operation in operations:
        if operation.name == ERASE:
            pixels_SSC = _erased(pixels_SSC, operation.numbers)
        else:
            pixels_SSC = _changed(pixels_SSC, operation)
    return pixels_SSC


def _changed(pixels_SSC: np.ndarray, operation: Operation) -> np.ndarray:
    resampling = Image.Resampling
    resample = resampling.BICUBIC if operation.is_bicubic else resampling.BILINEAR
    change: Any = NAME_TO_OP[operation.name]
    image = Image.fromarray(np.require(pixels_SSC, requirements=["C"]))
    changed = change(image, *operation.numbers, fillcolor=FILL, resample=resample)
    return np.array(changed)


def _erased(pixels_SSC: np.ndarray, numbers: tuple[float, ...]) -> np.ndarray:
    """Return a copy with the mean colour, or uniform noise, in a box (timm: RandomErasing)."""
    side = len(pixels_SSC)
    height, width = (min(round(number * side), side - 1) for number in numbers[:2])
    top, left = int(numbers[2] * (side - height + 1)), int(numbers[3] * (side - width + 1))
    fill = np.array(FILL, dtype=np.uint8)
    if len(numbers) > 4:
        seed = int(numbers[4]).to_bytes(8, "little")
        noise = shake_128(b"mealv2/erase/1\0" + seed).digest(height * width * 3)
        fill = np.frombuffer(noise, np.uint8).reshape(height, width, 3)
    erased_SSC = pixels_SSC.copy()
    erased_SSC[top : top + height, left : left + width] = fill
    return erased_SSC
