"""Blocks with a record for each view: where the records lie, their bytes and their decoder.

A block of one view is the number of classes that it keeps, and its record. A block of several
views begins with a byte 0; the numbers of classes of all views follow, then the records. A number
has 1 or 2 bytes.
"""

from typing import Any, NamedTuple

import numpy as np

from mealv2.codec.block import SharedRows
from mealv2.codec.record import check_rows, decode_rows, num_bytes
from mealv2.errors import LabelSetError

_Array = np.ndarray[Any, Any]


class BlockViews(NamedTuple):
    """Views of blocks: row r is view ``view_R[r]`` of a block.

    The block lies at ``at_R[r]`` to ``ends_R[r]`` and has ``views_R[r]`` views.
    """

    at_R: _Array
    ends_R: _Array
    views_R: _Array
    view_R: _Array


class Records(NamedTuple):
    """Where the record of each row lies: ``counts_R`` classes kept, its offset and bytes."""

    counts_R: _Array
    at_R: _Array
    sizes_R: _Array


def locate(
    data_P: _Array,
    views: BlockViews,
    num_classes: int,
    count_size: int,
    *,
    fills_block: bool = True,
) -> Records:
    """Locate the records of rows, by the counts of all views of their blocks.

    Raises LabelSetError for counts out of range or that do not fit (fill) their block.
    """
    at_R, block_ends_R, views_R, view_R = views
    counts_at_R = at_R + (views_R > 1)
    records_at_R = counts_at_R + count_size * views_R
    if (records_at_R > block_ends_R).any():
        raise LabelSetError("a block is shorter than its counts")
    slots_V = np.arange(int(views_R.max(initial=1)))
    is_view_RV = slots_V < views_R[:, None]
    place_RV = np.where(is_view_RV, counts_at_R[:, None] + count_size * slots_V, 0)
    counts_RV = data_P[place_RV].astype(np.int64)
    if count_size == 2:
        counts_RV += data_P[place_RV + is_view_RV].astype(np.int64) << 8
    is_valid_RV = (counts_RV >= 1) & (counts_RV <= num_classes)
    if not (is_valid_RV | ~is_view_RV).all():
        raise LabelSetError(f"a view must keep 1 to {num_classes} classes")
    sizes_RV = num_bytes(counts_RV, num_classes) * is_view_RV
    ends_RV = records_at_R[:, None] + sizes_RV.cumsum(axis=1)
    left_R = block_ends_R - ends_RV[:, -1]
    if (left_R < 0).any() or (fills_block and (left_R > 0).any()):
        raise LabelSetError("a block does not match its counts")
    row_R = np.arange(len(view_R))
    sizes_R = sizes_RV[row_R, view_R]
    return Records(counts_RV[row_R, view_R], ends_RV[row_R, view_R] - sizes_R, sizes_R)


def decode(
    data_P: _Array, views: BlockViews, num_classes: int, count_size: int, *, strict: bool
) -> SharedRows:
    """Decode rows; raises LabelSetError as ``locate`` and, if ``strict``, as ``check_rows``."""
    counts_R, at_R, sizes_R = locate(data_P, views, num_classes, count_size)
    payload_P = data_P[spans(at_R, sizes_R)]
    if strict:
        check_rows(counts_R, payload_P, num_classes)
    found = decode_rows(counts_R, payload_P, num_classes)
    is_kept_RK = np.arange(int(counts_R.max(initial=1))) < counts_R[:, None]
    ids_RK = np.zeros(is_kept_RK.shape, np.int64)
    probs_RK = np.zeros(is_kept_RK.shape, np.float32)
    ids_RK[is_kept_RK], probs_RK[is_kept_RK] = found.indices_E, found.probs_E
    return SharedRows(ids_RK, probs_RK, counts_R, found.tail_N)


def blocks_of_records(
    counts_N: _Array, payload_P: _Array, num_views: int, num_classes: int, count_size: int
) -> tuple[_Array, _Array]:
    """Return the bytes of blocks and where each ends; the views of a block follow each other."""
    sizes_N = num_bytes(counts_N, num_classes)
    sizes_BV = sizes_N.reshape(-1, num_views)
    head = (num_views > 1) + count_size * num_views
    ends_B = (sizes_BV.sum(axis=1) + head).cumsum()
    at_B = np.concatenate([[0], ends_B])[: len(ends_B)].astype(np.int64)
    counts_at_N = (at_B[:, None] + (num_views > 1) + count_size * np.arange(num_views)).reshape(-1)
    records_at_BV = (at_B + head)[:, None] + sizes_BV.cumsum(axis=1) - sizes_BV
    data_P = np.zeros(int(ends_B[-1]) if len(ends_B) else 0, np.uint8)
    for i in range(count_size):
        data_P[counts_at_N + i] = counts_N >> 8 * i & 255
    data_P[spans(records_at_BV.reshape(-1), sizes_N)] = payload_P
    return data_P, ends_B


def spans(at_N: _Array, sizes_N: _Array) -> _Array:
    """Return the indices of spans that begin at these offsets, concatenated."""
    source: _Array = np.repeat(at_N - (np.cumsum(sizes_N) - sizes_N), sizes_N)
    source += np.arange(len(source))
    return source
