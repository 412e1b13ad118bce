"""Encoded labels as bytes: a header, where blocks end, their views and models, rows, the blocks."""

import struct
from typing import Any, NamedTuple

import numpy as np

from mealv2.codec.record import MAX_CLASSES, MIN_CLASSES
from mealv2.errors import LabelSetError

_HEADER = struct.Struct("<8sIBxxxQQ")  # magic, classes, bytes of a count, blocks, rows
_MAGIC = b"MEALBLK3"

_Array = np.ndarray[Any, Any]


class LabelParts(NamedTuple):
    """What EncodedLabels consist of; their blocks lie one after the other."""

    data_P: _Array
    ends_B: _Array
    views_B: _Array
    model_B: _Array
    block_N: _Array
    view_N: _Array
    num_classes: int
    count_size: int


def joined(parts: LabelParts) -> bytes:
    """Return a header of 32 bytes, then all numbers as uint64, then the blocks."""
    num_blocks, num_rows = len(parts.ends_B), len(parts.block_N)
    header = _HEADER.pack(_MAGIC, parts.num_classes, parts.count_size, num_blocks, num_rows)
    return b"".join([header, *(n.astype("<u8").tobytes() for n in parts[1:6]), parts.data_P.data])


def split(data: bytes) -> LabelParts:
    """Return what ``joined`` wrote; raises LabelSetError where the numbers do not fit the bytes."""
    if len(data) < _HEADER.size:
        raise LabelSetError(f"encoded labels are truncated: {len(data)} bytes")
    magic, num_classes, count_size, num_blocks, num_rows = _HEADER.unpack_from(data)
    if magic != _MAGIC or any(data[13:16]):
        raise LabelSetError("these are not encoded labels of this version")
    if not MIN_CLASSES <= num_classes <= MAX_CLASSES:
        raise LabelSetError(f"classes must be {MIN_CLASSES} to {MAX_CLASSES}, not {num_classes}")
    if count_size not in (1, 2):
        raise LabelSetError(f"a count has 1 or 2 bytes, not {count_size}")
    begin = _HEADER.size + 24 * num_blocks + 16 * num_rows
    if begin > len(data):
        raise LabelSetError(f"encoded labels are truncated: {num_rows} rows, {len(data)} bytes")
    numbers = np.frombuffer(data[_HEADER.size : begin], "<u8").astype(np.int64)
    ends_B, views_B, model_B, block_N, view_N = np.split(
        numbers, np.cumsum([num_blocks, num_blocks, num_blocks, num_rows])
    )
    sizes_B = np.diff(ends_B, prepend=0)
    last = int(ends_B[-1]) if num_blocks else 0
    is_valid = (sizes_B > 0).all() and last == len(data) - begin and (views_B > 0).all()
    is_valid = is_valid and (views_B <= sizes_B).all()  # a view takes at least a byte
    for of_B in (model_B, block_N):
        is_valid = is_valid and (of_B >= 0).all() and (of_B < num_blocks).all()
    if not is_valid or (view_N < 0).any() or (view_N >= views_B[block_N]).any():
        raise LabelSetError("encoded labels have rows or blocks that do not fit their bytes")
    payload_P = np.frombuffer(data, np.uint8, offset=begin)
    return LabelParts(payload_P, ends_B, views_B, model_B, block_N, view_N, num_classes, count_size)
