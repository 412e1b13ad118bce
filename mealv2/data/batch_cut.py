"""Crop, resize and flip many small images at once: the pixels of ``cut`` and ``centre_crop``.

torch resizes uint8 images with weights of 16 bits: round(weight * 2**p), sums of products, halves
rounded up, columns before rows. Such sums are exact in floating point in any order if no partial
sum needs more bits than a number has, so a matrix product for each image gives the same pixels.
``is_exact`` compares them on this machine.
"""

from functools import cache

import numpy as np
import torch

from mealv2.data.pixels import Resize, centre_crop, centre_side, cut
from mealv2.views import View

MAX_SIDE = 40  # of images and views; larger ones are resized as fast one by one
_MAX_BITS = 22  # torch: the most bits of a weight
_FLOAT32_BITS = 24  # of a sum that float32 holds exactly
_UINT8_MAX = 255
_KINDS = {"torch": (1.0, False), "torch-bicubic": (2.0, True)}  # support, is bicubic


def can_cut(resize: Resize, height: int, width: int, img_size: int) -> bool:
    """Return whether images of this size are cut faster together, with the same pixels."""
    return resize in _KINDS and max(height, width, img_size) <= MAX_SIDE and is_exact(resize)


def cut_batch(
    images_NHWC: np.ndarray, boxes_N5: np.ndarray, img_size: int, *, resize: Resize = "torch"
) -> np.ndarray:
    """Return a view of each image, uint8 N x S x S x 3.

    ``boxes_N5`` are top, left, height, width and flips, as in ``View.box``, negative where a box
    leaves the image: it is black there.
    """
    images_NHWC, boxes_N5 = _padded(images_NHWC, boxes_N5)
    _, height, width, _ = images_NHWC.shape
    if (boxes_N5[:, 2:4] == img_size).all():
        return _cropped(images_NHWC, boxes_N5, img_size)
    lengths = np.unique(boxes_N5[:, 2:4])
    tables = {length: _table(length, img_size, resize) for length in lengths.tolist()}
    dtype = np.result_type(*(table.dtype for table in tables.values()))
    vertical_NSH = np.zeros((len(images_NHWC), img_size, height), dtype=dtype)
    horizontal_NSW = np.zeros((len(images_NHWC), img_size, width), dtype=dtype)
    for n, (top, left, rows, columns, flips) in enumerate(boxes_N5.tolist()):
        table = tables[rows]
        vertical_NSH[n, :, top : top + rows] = table[::-1] if flips & 2 else table
        table = tables[columns]
        horizontal_NSW[n, :, left : left + columns] = table[::-1] if flips & 1 else table
    return _resized(images_NHWC, vertical_NSH, horizontal_NSW)


def centre_crop_batch(
    images_NHWC: np.ndarray, img_size: int, *, resize: Resize = "torch"
) -> np.ndarray:
    """Return the evaluation view of each image, uint8 N x S x S x 3; see ``centre_crop``."""
    num, height, width, _ = images_NHWC.shape
    tables = []
    for side, other in ((height, width), (width, height)):
        length, start = centre_side(side, other, img_size)
        tables.append(_table(side, length, resize)[start : start + img_size])
    dtype = np.result_type(*tables)
    vertical_NSH, horizontal_NSW = (
        np.broadcast_to(table.astype(dtype), (num, *table.shape)) for table in tables
    )
    return _resized(images_NHWC, vertical_NSH, horizontal_NSW)


def _padded(images_NHWC: np.ndarray, boxes_N5: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return images with a black border that contains all boxes, and the boxes in them."""
    _, height, width, _ = images_NHWC.shape
    top, left = (max(0, -int(boxes_N5[:, side].min())) for side in (0, 1))
    ends = boxes_N5[:, :2] + boxes_N5[:, 2:4]
    bottom, right = (max(0, int(end)) for end in ends.max(axis=0) - (height, width))
    if not (top or left or bottom or right):
        return images_NHWC, boxes_N5
    num = len(images_NHWC)
    padded_NHWC = np.zeros((num, top + height + bottom, left + width + right, 3), dtype=np.uint8)
    padded_NHWC[:, top : top + height, left : left + width] = images_NHWC
    return padded_NHWC, boxes_N5 + np.array([top, left, 0, 0, 0])


def _cropped(images_NHWC: np.ndarray, boxes_N5: np.ndarray, side: int) -> np.ndarray:
    """Return views that need no resize."""
    pixels_NSSC = np.empty((len(images_NHWC), side, side, 3), dtype=np.uint8)
    for n, (top, left, *_) in enumerate(boxes_N5.tolist()):
        pixels_NSSC[n] = images_NHWC[n, top : top + side, left : left + side]
    for bit, axis in ((1, 2), (2, 1)):
        flipped = np.flatnonzero(boxes_N5[:, 4] & bit)
        if len(flipped):  # torch reverses rows of three-byte pixels in a third of NumPy's time
            pixels_NSSC[flipped] = torch.from_numpy(pixels_NSSC[flipped]).flip(axis).numpy()
    return pixels_NSSC


def _resized(
    images_NHWC: np.ndarray, vertical_NSH: np.ndarray, horizontal_NTW: np.ndarray
) -> np.ndarray:
    """Return rounded products: columns first, then rows, uint8 N x S x T x 3.

    NumPy multiplies: torch's products depend on autocast and set_float32_matmul_precision.
    """
    num, height, width, _ = images_NHWC.shape
    rows, columns = vertical_NSH.shape[1], horizontal_NTW.shape[1]
    images_NWHC = _transposed(images_NHWC).astype(vertical_NSH.dtype)
    wide = _rounded(np.matmul(horizontal_NTW, images_NWHC.reshape(num, width, height * 3)))
    wide = _transposed(wide.reshape(num, columns, height, 3))
    small = _rounded(np.matmul(vertical_NSH, wide.reshape(num, height, columns * 3)))
    return small.astype(np.uint8).reshape(num, rows, columns, 3)


def _transposed(pixels_NHWC: np.ndarray) -> np.ndarray:
    """Return N x W x H x C in memory order; whole pixels are moved, a third of NumPy's time."""
    num, height, width, channels = pixels_NHWC.shape
    pixels = np.dtype((np.void, channels * pixels_NHWC.itemsize))
    moved_NWH = pixels_NHWC.view(pixels)[..., 0].transpose(0, 2, 1).copy()
    return moved_NWH.view(pixels_NHWC.dtype).reshape(num, width, height, channels)


def _rounded(sums: np.ndarray) -> np.ndarray:
    sums += 0.5
    np.floor(sums, out=sums)
    return np.clip(sums, 0.0, _UINT8_MAX, out=sums)


@cache
def _table(length: int, new_length: int, resize: Resize) -> np.ndarray:
    """Return torch's weights of a resize, new_length x length, multiples of 2**-p.

    torch: aten/src/ATen/native/cpu/UpSampleKernel.cpp, antialias, uint8.
    """
    support, is_bicubic = _KINDS[resize]
    scale = length / new_length
    support *= max(scale, 1.0)
    inverse = 1.0 / scale if scale >= 1.0 else 1.0
    weights = np.zeros((new_length, length))
    for row in range(new_length):
        centre = scale * (row + 0.5)
        first = max(int(centre - support + 0.5), 0)
        last = min(int(centre + support + 0.5), length)
        values = [_filter((j - centre + 0.5) * inverse, is_bicubic) for j in range(first, last)]
        total = 0.0
        for value in values:  # as torch adds; sum() is more exact from Python 3.12 on
            total += value
        weights[row, first:last] = [value / total for value in values]
    bits = next(
        (b for b in range(_MAX_BITS) if int(0.5 + weights.max() * 2.0 ** (b + 1)) >= 1 << 15),
        _MAX_BITS,
    )
    integers = np.trunc(weights * 2.0**bits + np.copysign(0.5, weights))
    # the largest partial sum is that of the positive products, and then a half is added
    largest = _UINT8_MAX * np.maximum(integers, 0.0).sum(axis=1).max() + 2.0 ** (bits - 1)
    is_exact_in_float32 = largest < 2.0**_FLOAT32_BITS
    return (integers * 2.0**-bits).astype(np.float32 if is_exact_in_float32 else np.float64)


def _filter(x: float, is_bicubic: bool) -> float:
    x = abs(x)
    if not is_bicubic:
        return max(0.0, 1.0 - x)
    a = -0.5  # torch: with antialias, as Pillow's
    if x < 1.0:
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    if x < 2.0:
        return (((x - 5.0) * x + 8.0) * x - 4.0) * a
    return 0.0


_PROBE_BOXES = np.array(  # in images of 40 x 36: larger, equal, smaller, flipped, outside
    [[0, 0, 36, 40, 0], [3, 7, 11, 9, 1], [1, 20, 34, 17, 3], [30, 2, 5, 33, 2], [-4, 8, 36, 36, 1]]
)


@cache
def is_exact(resize: Resize) -> bool:
    """Return whether this machine's torch resizes to the same pixels one by one."""
    noise = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (5, 36, 40, 3), np.uint8)
    for img_size in (32, 36, 15):
        views = [
            View(top, left, height, width, bool(flips & 1), bool(flips & 2))
            for top, left, height, width, flips in _PROBE_BOXES.tolist()
        ]
        each = [
            cut(image, view, img_size, resize=resize)
            for image, view in zip(noise, views, strict=True)
        ]
        if not np.array_equal(cut_batch(noise, _PROBE_BOXES, img_size, resize=resize), each):
            return False
        each = [centre_crop(image, img_size, resize=resize) for image in noise]
        if not np.array_equal(centre_crop_batch(noise, img_size, resize=resize), each):
            return False
    return True
