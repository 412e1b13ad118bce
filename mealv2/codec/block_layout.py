"""Where the parts of blocks whose views share a model lie, for many rows at once."""

from typing import Any, NamedTuple

import numpy as np

from mealv2.codec.block import HEAD_SIZE, LOW_UNIT, MAX_COMPONENTS, MAX_LISTED, NIBBLE
from mealv2.codec.residuals import LEVELS_PER_NAT
from mealv2.errors import LabelSetError

_Array = np.ndarray[Any, Any]


class BlockSpans(NamedTuple):
    """Where blocks lie, and how many views each has."""

    at_N: _Array
    ends_N: _Array
    num_views_N: _Array

    def rows(self, order: _Array | slice) -> "BlockSpans":
        return BlockSpans(*(column[order] for column in self))


class Layout(NamedTuple):
    """Where the parts of N rows lie: nibbles, bytes and, for residuals, bits of the data.

    ``bits_N``: of the residuals of all views of a block. ``lists_end_N``: the byte where the
    model ends, in its block; ``nibbles_end_N``: the last nibble before the residuals, but for gaps.
    """

    counts_N: _Array
    entries_N: _Array
    weights_NR: _Array
    components_N: _Array
    codes_at_N: _Array
    gaps_at_N: _Array
    lists_end_N: _Array
    nibbles_end_N: _Array
    streams_at_N: _Array
    ends_N: _Array
    begin_N: _Array
    lengths_N: _Array
    bits_N: _Array

    def rows(self, order: _Array | slice) -> "Layout":
        return Layout(*(column[order] for column in self))


def find_layout(
    data_P: _Array, blocks: BlockSpans, models: BlockSpans, views_N: _Array, num_classes: int
) -> Layout:
    """Locate one view of each of N blocks; raises LabelSetError for parts that do not fit.

    ``models`` are the blocks whose models they use: the same ones, or the first of their images.
    """
    components_N, counts_N, model_sizes_N = _heads(data_P, models, num_classes)
    entries_N = counts_N + (counts_N < num_classes)
    is_own_N = blocks.at_N == models.at_N
    scales_at_N = models.at_N + HEAD_SIZE
    model_lengths_at_N = scales_at_N + 2 * components_N
    sizes_N = np.where(is_own_N, model_sizes_N, _length_sizes(data_P, blocks, is_own_N))
    lengths_at_N = np.where(is_own_N, model_lengths_at_N, blocks.at_N + 1)
    weights_at_N = 2 * (lengths_at_N + sizes_N * blocks.num_views_N)
    weights_end_N = weights_at_N + components_N * blocks.num_views_N
    of_model_N = 2 * (model_lengths_at_N + model_sizes_N * models.num_views_N)
    codes_at_N = of_model_N + components_N * models.num_views_N
    gaps_at_N = codes_at_N + components_N * entries_N
    nibbles_end_N = np.where(is_own_N, gaps_at_N, weights_end_N)
    if (np.maximum(gaps_at_N - 2 * models.ends_N, nibbles_end_N - 2 * blocks.ends_N) > 0).any():
        raise LabelSetError("a block is shorter than its parts")
    starts_N, lengths_N, bits_N = _lengths(
        data_P, lengths_at_N, sizes_N, blocks.num_views_N, views_N
    )
    streams_at_N = blocks.ends_N - (bits_N + 7) // 8
    lists_end_N = streams_at_N.copy()
    (others,) = np.nonzero(~is_own_N)
    if len(others):
        num_views_R = models.num_views_N[others]
        of_others = model_lengths_at_N[others], model_sizes_N[others], num_views_R
        model_bits_R = _lengths(data_P, *of_others, num_views_R - 1)[2]
        lists_end_N[others] = models.ends_N[others] - (model_bits_R + 7) // 8
    if (np.minimum(2 * lists_end_N - gaps_at_N, 2 * streams_at_N - nibbles_end_N) < 0).any():
        raise LabelSetError("a block is shorter than its residuals")
    # low and step of a component, and the nibble of the view
    r_R = np.arange(int(components_N.max(initial=0)))
    has_NR = r_R < components_N[:, None]
    low_at_NR = scales_at_N[:, None] + 2 * r_R * has_NR
    nibble_at_NR = (weights_at_N + views_N * components_N)[:, None] + r_R * has_NR
    nibble_NR = data_P[nibble_at_NR >> 1] >> (4 * (nibble_at_NR & 1)).astype(np.uint8) & NIBBLE
    weights_NR = data_P[low_at_NR].view(np.int8) * np.float32(LEVELS_PER_NAT // LOW_UNIT)
    weights_NR += data_P[low_at_NR + 1] * nibble_NR.astype(np.float32)
    return Layout(
        counts_N,
        entries_N,
        weights_NR * has_NR,
        components_N,
        codes_at_N,
        gaps_at_N,
        lists_end_N,
        nibbles_end_N,
        streams_at_N,
        blocks.ends_N,
        8 * streams_at_N + starts_N,
        lengths_N,
        bits_N,
    )


def _heads(data_P: _Array, models: BlockSpans, num_classes: int) -> tuple[_Array, _Array, _Array]:
    """Return the numbers of components and of listed classes, and the bytes of a length."""
    if (models.ends_N - models.at_N < HEAD_SIZE).any():
        raise LabelSetError("a block is shorter than its head")
    components_N = data_P[models.at_N].astype(np.int64)
    counts_N = data_P[models.at_N + 1] | data_P[models.at_N + 2].astype(np.int64) << 8
    sizes_N = data_P[models.at_N + 3].astype(np.int64)
    if len(components_N) and not (
        components_N.min() >= 1
        and components_N.max() <= MAX_COMPONENTS
        and counts_N.min() >= 1
        and counts_N.max() <= min(num_classes, MAX_LISTED)
        and sizes_N.min() >= 1
        and sizes_N.max() <= 2
        and models.num_views_N.min() >= 2
    ):
        raise LabelSetError("a block has a head that is not valid")
    return components_N, counts_N, sizes_N


def _length_sizes(data_P: _Array, blocks: BlockSpans, is_own_N: _Array) -> _Array:
    """Return the bytes of a length of blocks with another block's model: their first byte says."""
    first_N = data_P[blocks.at_N].astype(np.int64)
    is_one_N = blocks.num_views_N == 1
    sizes_N: _Array = np.where(is_one_N, 2, first_N - MAX_COMPONENTS)
    is_valid_N = np.where(is_one_N, first_N == 0, (sizes_N >= 1) & (sizes_N <= 2))
    if not (is_own_N | is_valid_N).all():
        raise LabelSetError("a block has a head that is not valid")
    return sizes_N


def _lengths(
    data_P: _Array, at_N: _Array, sizes_N: _Array, num_views_N: _Array, views_N: _Array
) -> _Array:
    """Return where the residuals of the views begin, their bits, and all views' bits, 3 x N."""
    found_3N = np.zeros((3, len(at_N)), np.int64)
    for size in (1, 2):
        (rows_R,) = np.nonzero(sizes_N == size)
        if not len(rows_R):
            continue
        num_views_R, views_R = num_views_N[rows_R], views_N[rows_R]
        bytes_RS = windows(data_P, at_N[rows_R], size * int(num_views_R.max()))
        ends_RV = bytes_RS.view(f"<u{size}").cumsum(axis=1, dtype=np.int64)
        row_R = np.arange(len(rows_R))
        begin_R = np.where(views_R > 0, ends_RV[row_R, views_R - 1], 0)
        lengths_R = ends_RV[row_R, views_R] - begin_R
        found_3N[:, rows_R] = begin_R, lengths_R, ends_RV[row_R, num_views_R - 1]
    return found_3N


def windows(flat_P: _Array, at: _Array, size: int) -> _Array:
    """Return ``size`` entries from each offset, ... x size: one copy of memory each.

    Zeros beyond the end.
    """
    missing = int(at.max()) + size - len(flat_P)
    if missing > 0:
        flat_P = np.concatenate([flat_P, np.zeros(missing, flat_P.dtype)])
    shape = (len(flat_P) - size + 1,)
    runs = np.ndarray(shape, f"V{size * flat_P.itemsize}", flat_P, strides=flat_P.strides)
    copied: _Array = runs[at][..., None].view(flat_P.dtype)
    return copied
