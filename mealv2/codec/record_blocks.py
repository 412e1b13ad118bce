"""Blocks with a record for each view: where the records lie, their bytes and their decoder.

A block of one view is the number of classes that it keeps, and its record. A block of several
views begins with a byte 0; the numbers of classes of all views follow, then the records. A number
has 1 or 2 bytes.
"""

from typing import Any, NamedTuple

import numpy as np

from mealv2.codec.block import DecodedRows
from mealv2.codec.record import check_rows, decode_rows, num_bytes
from mealv2.errors import LabelSetError

_Array = np.ndarray[Any, Any]


class Records(NamedTuple):
    """Where the record of each row lies: ``counts_R`` classes kept, its offset and bytes."""

    counts_R: _Array
    at_R: _Array
    sizes_R: _Array


class RecordTable(NamedTuple):
    """Where all records of blocks lie, blocks x views; what exceeds a block's views means nothing.

    Classes kept, ends and bytes of the records.
    """

    counts_BV: _Array
    ends_BV: _Array
    sizes_BV: _Array

    def rows(self, block_R: _Array, view_R: _Array) -> Records:
        """Return the records of views of blocks."""
        counts_R, ends_R, sizes_R = (column[block_R, view_R] for column in self)
        return Records(counts_R, ends_R - sizes_R, sizes_R)


def locate(
    data_P: _Array,
    at_B: _Array,
    ends_B: _Array,
    views_B: _Array,
    num_classes: int,
    count_size: int,
    *,
    fills_block: bool = True,
) -> RecordTable:
    """Locate the records of blocks, which lie at these offsets and have so many views.

    Raises LabelSetError for counts out of range or that do not fit (fill) their block.
    """
    counts_at_B = at_B + (views_B > 1)
    records_at_B = counts_at_B + count_size * views_B
    if (records_at_B > ends_B).any():
        raise LabelSetError("a block is shorter than its counts")
    slots_V = np.arange(int(views_B.max(initial=1)))
    is_view_BV = slots_V < views_B[:, None]
    counts_at_BV = np.where(is_view_BV, counts_at_B[:, None] + count_size * slots_V, 0)
    counts_BV = data_P[counts_at_BV].astype(np.int64)
    if count_size == 2:
        counts_BV += data_P[counts_at_BV + is_view_BV].astype(np.int64) << 8
    is_valid_BV = (counts_BV >= 1) & (counts_BV <= num_classes)
    if not (is_valid_BV | ~is_view_BV).all():
        raise LabelSetError(f"a view must keep 1 to {num_classes} classes")
    sizes_BV = num_bytes(counts_BV, num_classes) * is_view_BV
    ends_BV = records_at_B[:, None] + sizes_BV.cumsum(axis=1)
    left_B = ends_B - ends_BV[:, -1]
    if (left_B < 0).any() or (fills_block and (left_B > 0).any()):
        raise LabelSetError("a block does not match its counts")
    return RecordTable(counts_BV, ends_BV, sizes_BV)


def decode(data_P: _Array, records: Records, num_classes: int, *, strict: bool) -> DecodedRows:
    """Decode rows; raises LabelSetError, if ``strict``, as ``check_rows``."""
    counts_R, at_R, sizes_R = records
    payload_P = data_P[spans(at_R, sizes_R)]
    if strict:
        check_rows(counts_R, payload_P, num_classes)
    found = decode_rows(counts_R, payload_P, num_classes)
    if found.indices_E.max(initial=0) >= num_classes:
        raise LabelSetError(f"a record names a class above {num_classes - 1}")
    is_kept_RK = np.arange(int(counts_R.max(initial=1))) < counts_R[:, None]
    ids_RK = np.zeros(is_kept_RK.shape, np.int64)
    probs_RK = np.zeros(is_kept_RK.shape, np.float32)
    ids_RK[is_kept_RK], probs_RK[is_kept_RK] = found.indices_E, found.probs_E
    return DecodedRows(ids_RK, probs_RK, counts_R, found.tail_N)


def blocks_of_records(
    counts_N: _Array, payload_P: _Array, num_views: int, num_classes: int, count_size: int
) -> tuple[_Array, _Array]:
    """Return the bytes of blocks and where each ends; the views of a block follow each other."""
    sizes_N = num_bytes(counts_N, num_classes)
    sizes_BV = sizes_N.reshape(-1, num_views)
    head = (num_views > 1) + count_size * num_views
    ends_B = (sizes_BV.sum(axis=1) + head).cumsum()
    at_B = starts(ends_B)
    counts_at_N = (at_B[:, None] + (num_views > 1) + count_size * np.arange(num_views)).reshape(-1)
    records_at_BV = (at_B + head)[:, None] + sizes_BV.cumsum(axis=1) - sizes_BV
    data_P = np.zeros(int(ends_B[-1]) if len(ends_B) else 0, np.uint8)
    for i in range(count_size):
        data_P[counts_at_N + i] = counts_N >> 8 * i & 255
    data_P[spans(records_at_BV.reshape(-1), sizes_N)] = payload_P
    return data_P, ends_B


def starts(ends_B: _Array) -> _Array:
    """Return where blocks begin that lie one after the other."""
    return np.concatenate([[0], ends_B])[: len(ends_B)].astype(np.int64)


def spans(at_N: _Array, sizes_N: _Array) -> _Array:
    """Return the indices of spans that begin at these offsets, concatenated."""
    source: _Array = np.repeat(at_N - (np.cumsum(sizes_N) - sizes_N), sizes_N)
    source += np.arange(len(source))
    return source
