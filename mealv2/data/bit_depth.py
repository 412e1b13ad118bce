"""From an opened image to 8 bits: pixels of 16 bits and of floats by torchvision's rule.

Pillow's ``convert("RGB")`` saturates them: every value above 255 becomes white.
"""

import numpy as np
from PIL import Image, TiffImagePlugin

from mealv2.errors import DataError

_SUBFILE, _BITS, _WHITE_IS_ZERO, _SAMPLE_FORMAT = 254, 258, 262, 339  # tags of TIFF
_IS_REDUCED = 1
_SIGNED = 2
_ADVICE = "scale them to 0 to 65535, or save 8 bits"


def rgb_pixels(image: Image.Image) -> np.ndarray:
    """Return the pixels of an opened image as RGB, uint8 H x W x 3.

    Modes of 8 bits and fewer as torchvision's loader: ``convert("RGB")``. Gray of 16 bits, and of
    floats between 0 and 1, as torchvision's ``to_dtype(scale=True)``. Raises DataError for values
    of unknown range and for a TIFF file that begins with a thumbnail, and what Pillow raises.
    """
    if _tag(image, _SUBFILE, 0) & _IS_REDUCED:
        raise DataError("its first image is a thumbnail of another one; save that one alone")
    mode, bits = image.mode, _bits_of(image)
    if mode not in ("I", "F") and not mode.startswith("I;16"):
        rgb_HWC = np.array(image.convert("RGB"))
        if bits == 16 and (high := int(rgb_HWC.max())) < 16:  # Pillow keeps the upper 8 bits
            raise DataError(
                f"16-bit pixels of at most {256 * high + 255} would be almost black; {_ADVICE}"
            )
        return rgb_HWC
    values_HW = np.asarray(image)
    if mode == "F":
        gray_HW = floats_to_8_bits(values_HW)
    elif mode != "I" or image.format in ("PNG", "PPM"):
        gray_HW = integers_to_8_bits(values_HW, bits=bits)
    else:
        raise DataError(f"integer pixels of unknown range ({bits} bits, or signed); save 8 bits")
    if _tag(image, _WHITE_IS_ZERO, 1) == 0:  # Pillow inverts 8 bits only
        gray_HW = 255 - gray_HW
    return np.repeat(gray_HW[:, :, None], 3, axis=2)


def integers_to_8_bits(values: np.ndarray, *, bits: int = 16) -> np.ndarray:
    """Return the upper 8 of ``bits`` bits as uint8: v >> (bits - 8), as torchvision.

    Raises DataError for 16-bit values that need at most 12 bits: the result would be almost black.
    """
    values = values.astype(np.int32)
    high = int(values.max())
    if bits == 16 and 0 < high < 1 << 12:
        raise DataError(f"16-bit pixels of at most {high} would be almost black; {_ADVICE}")
    return (values >> (bits - 8)).astype(np.uint8)


def floats_to_8_bits(values: np.ndarray) -> np.ndarray:
    """Return floats between 0 and 1 as uint8: the integer part of 255.999 v, as torchvision.

    Raises DataError for other floats.
    """
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):  # nan fails both
        raise DataError(
            f"float pixels from {low:.4g} to {high:.4g}: only 0 to 1 has a known scale; save 8 bits"
        )
    return (values.astype(np.float32) * np.float32(255.999)).astype(np.uint8)


def _bits_of(image: Image.Image) -> int:
    """Return the bits of a sample in the file; raises DataError for signed bytes."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = int(_tag(image, _BITS, 1))
        if bits == 8 and _tag(image, _SAMPLE_FORMAT, 1) == _SIGNED:
            raise DataError("pixels are signed bytes, which Pillow reads as unsigned; save 8 bits")
        return bits
    if image.mode.startswith("I"):
        return 16 if image.format in ("PNG", "PPM") else 32
    raw_modes = [str(tile[3]) for tile in getattr(image, "tile", ())]
    return 16 if image.format == "PNG" and any(";16" in raw for raw in raw_modes) else 8


def _tag(image: Image.Image, number: int, default: int) -> int:
    """Return a number in a TIFF file's head, ``default`` for other files."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return default
    value = image.tag_v2.get(number, default)
    return int(value[0] if isinstance(value, tuple) else value)
