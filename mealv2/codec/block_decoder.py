"""Decode views of blocks whose views share a model, in NumPy, many rows at once.

mealv2.codec.block describes the bytes. Rows are decoded in groups of about equally many entries,
padded to the longest; results do not depend on the group. All levels are whole numbers below 2^24,
which float32 holds exactly, and sums of products of them too.
"""

from typing import Any, NamedTuple

import numpy as np

from mealv2.codec.block import (
    HEAD_SIZE,
    LOW_UNIT,
    MAX_COMPONENTS,
    MAX_LISTED,
    NIBBLE,
    SharedRows,
    low_nibbles,
)
from mealv2.codec.residual_reader import END, read_residuals
from mealv2.codec.residuals import CONTEXTS, EXP, LEVELS_PER_NAT, LOG, LONGEST_RUN, MAX_CODE
from mealv2.errors import LabelSetError

_Array = np.ndarray[Any, Any]

_ROWS, _GROUP = 4096, 128  # rows whose residuals are read together; padded together: fit in a cache
_LANES = 64  # rows are padded to a multiple of this, and summed in so many parts
_PADDING = np.float32(1 << 30)  # the level of no entry: its probability is 0


class _Places(NamedTuple):
    """Where the parts of N rows lie: nibbles, bytes and, for residuals, bits of the data."""

    counts_N: _Array
    entries_N: _Array
    weights_NR: _Array
    components_N: _Array
    codes_at_N: _Array
    gaps_at_N: _Array
    streams_at_N: _Array
    begin_N: _Array
    lengths_N: _Array

    def rows(self, order: _Array | slice) -> "_Places":
        return _Places(*(column[order] for column in self))


class _Model(NamedTuple):
    """Entries of a group of rows by their components alone, padded.

    ``levels_NK`` float32; ``order_NK``, indices of entries by context, counted from the first row
    on; ``keys_NK`` uint16, the keys of contexts in that order, where their tables begin.
    """

    levels_NK: _Array
    order_NK: _Array
    keys_NK: _Array


def decode_shared(
    data_P: _Array,
    at_N: _Array,
    ends_N: _Array,
    num_views_N: _Array,
    views_N: _Array,
    num_classes: int,
    *,
    strict: bool = False,
) -> SharedRows:
    """Decode one view of each of N blocks, which lie at these offsets.

    Raises LabelSetError for bytes that no writer leaves; for the residuals only if ``strict``,
    else every label is some distribution.
    """
    # most reads end at most a block's size beyond the data
    longest = int((ends_N - at_N).max(initial=0))
    data_P = np.concatenate([data_P, np.zeros(longest + 16, np.uint8)])
    places = _places(data_P, at_N, ends_N, num_views_N, views_N, num_classes)
    shape = len(at_N), int(places.counts_N.max(initial=1))
    ids_NM, probs_NM = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    tail_N = np.zeros(len(at_N), np.float32)
    order_N = np.argsort(places.entries_N, kind="stable")
    for rows in (order_N[n : n + _ROWS] for n in range(0, len(order_N), _ROWS)):
        chosen = places.rows(rows)
        groups = [slice(n, n + _GROUP) for n in range(0, len(rows), _GROUP)]
        models = []
        for group in groups:
            of_group = chosen.rows(group)
            nibbles_X, shift_G = _nibbles(data_P, of_group, num_classes)
            models.append(_model(nibbles_X, shift_G, of_group, num_classes))
            _put_ids(ids_NM, rows[group], nibbles_X, shift_G, of_group, num_classes)
        _subtract_residuals(data_P, chosen, models, strict=strict)
        for group, model in zip(groups, models, strict=True):
            probs_GM, tail_N[rows[group]] = _probabilities(
                model.levels_NK, chosen.counts_N[group], num_classes
            )
            probs_NM[rows[group], : probs_GM.shape[1]] = probs_GM
    return SharedRows(ids_NM, probs_NM, places.counts_N, tail_N)


# --- where everything lies ------------------------------------------------------------------------


def _places(
    data_P: _Array,
    at_N: _Array,
    ends_N: _Array,
    num_views_N: _Array,
    views_N: _Array,
    num_classes: int,
) -> _Places:
    if (ends_N - at_N < HEAD_SIZE).any():
        raise LabelSetError("a block is shorter than its head")
    components_N = data_P[at_N].astype(np.int64)
    counts_N = data_P[at_N + 1] | data_P[at_N + 2].astype(np.int64) << 8
    length_sizes_N = data_P[at_N + 3].astype(np.int64)
    if len(at_N) and not (
        components_N.min() >= 1
        and components_N.max() <= MAX_COMPONENTS
        and counts_N.min() >= 1
        and counts_N.max() <= min(num_classes, MAX_LISTED)
        and length_sizes_N.min() >= 1
        and length_sizes_N.max() <= 2
    ):
        raise LabelSetError("a block has a head that is not valid")
    entries_N = counts_N + (counts_N < num_classes)
    lengths_at_N = at_N + HEAD_SIZE + 2 * components_N
    nibbles_at_N = 2 * (lengths_at_N + length_sizes_N * num_views_N)
    codes_at_N = nibbles_at_N + components_N * num_views_N
    gaps_at_N = codes_at_N + components_N * entries_N
    if ((gaps_at_N + 1) // 2 > ends_N).any():
        raise LabelSetError("a block is shorter than its parts")
    starts_N, lengths_N, bits_N = _lengths(
        data_P, lengths_at_N, length_sizes_N, num_views_N, views_N
    )
    streams_at_N = ends_N - (bits_N + 7) // 8
    if (streams_at_N * 2 < gaps_at_N).any():
        raise LabelSetError("a block is shorter than its residuals")
    # low and step of a component, and the nibble of the view
    r_R = np.arange(int(components_N.max(initial=0)))
    has_NR = r_R < components_N[:, None]
    low_at_NR = (at_N + HEAD_SIZE)[:, None] + 2 * r_R * has_NR
    nibble_at_NR = (nibbles_at_N + views_N * components_N)[:, None] + r_R * has_NR
    nibble_NR = data_P[nibble_at_NR >> 1] >> (4 * (nibble_at_NR & 1)).astype(np.uint8) & NIBBLE
    weights_NR = data_P[low_at_NR].view(np.int8) * np.float32(LEVELS_PER_NAT // LOW_UNIT)
    weights_NR += data_P[low_at_NR + 1] * nibble_NR.astype(np.float32)
    return _Places(
        counts_N,
        entries_N,
        weights_NR * has_NR,
        components_N,
        codes_at_N,
        gaps_at_N,
        streams_at_N,
        8 * streams_at_N + starts_N,
        lengths_N,
    )


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
        bytes_RS = _windows(data_P, at_N[rows_R], size * int(num_views_R.max()))
        ends_RV = bytes_RS.view(f"<u{size}").cumsum(axis=1, dtype=np.int64)
        row_R = np.arange(len(rows_R))
        begin_R = np.where(views_R > 0, ends_RV[row_R, views_R - 1], 0)
        lengths_R = ends_RV[row_R, views_R] - begin_R
        found_3N[:, rows_R] = begin_R, lengths_R, ends_RV[row_R, num_views_R - 1]
    return found_3N


def _windows(flat_P: _Array, at: _Array, size: int) -> _Array:
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


# --- listed classes and the model -----------------------------------------------------------------


def _nibbles(data_P: _Array, places: _Places, num_classes: int) -> tuple[_Array, _Array]:
    """Return codes and lists of rows as nibbles, and what is added to their offsets in the data."""
    first_N = places.codes_at_N >> 1
    has_list_N = places.counts_N < num_classes
    last_N = np.where(has_list_N, places.streams_at_N, (places.gaps_at_N + 1) >> 1)
    bytes_NS = _windows(data_P, first_N, int((last_N - first_N).max()))
    pairs_NS = bytes_NS.astype("<u2")
    pairs_NS |= pairs_NS << np.uint16(4)
    pairs_NS &= np.uint16(NIBBLE << 8 | NIBBLE)
    # zeros follow the last row: others are read up to the longest
    zeros = np.zeros(2 * bytes_NS.shape[1] + 2 * _LANES, np.uint8)
    nibbles_X = np.concatenate([pairs_NS.reshape(-1).view(np.uint8), zeros])
    return nibbles_X, 2 * (np.arange(len(first_N)) * bytes_NS.shape[1] - first_N)


def _model(nibbles_X: _Array, shift_N: _Array, places: _Places, num_classes: int) -> _Model:
    entries_N = places.entries_N
    # no run from an entry leads beyond the padding
    width = -(-(int(entries_N.max()) + LONGEST_RUN) // _LANES) * _LANES
    r_R = np.arange(int(places.components_N.max()))
    codes_at_NR = np.where(r_R < places.components_N[:, None], r_R * entries_N[:, None], 0)
    codes_at_NR += (shift_N + places.codes_at_N)[:, None]
    codes_NRK = _windows(nibbles_X, codes_at_NR, width).astype(np.float32)
    # signed codes are stored with 8 added: that adds a constant to all levels of a row
    weights_N1R = places.weights_NR[:, None, : len(r_R)]
    levels_NK = np.matmul(weights_N1R, codes_NRK)[:, 0]
    # only the last columns have padding
    shortest = int(entries_N.min())
    is_padding_NK = np.arange(shortest, width) >= entries_N[:, None]
    np.copyto(levels_NK[:, shortest:], _PADDING, where=is_padding_NK)
    keys_NK = _keys(levels_NK, places.counts_N, num_classes)
    np.copyto(keys_NK[:, shortest:], END, where=is_padding_NK)
    order_NK = keys_NK.argsort(axis=1, kind="stable")
    order_NK += width * np.arange(len(entries_N))[:, None]
    keys_NK = keys_NK.reshape(-1).take(order_NK).astype(np.uint16) << np.uint16(MAX_CODE)
    return _Model(levels_NK, order_NK, keys_NK)


def _keys(levels_NK: _Array, counts_N: _Array, num_classes: int) -> _Array:
    """Return the keys of the entries' contexts, uint8.

    mealv2.codec.residuals.contexts has the arithmetic.
    """
    beyond = len(EXP) - 1  # in 1/16 nat: all from here on are in the last context
    fine_NK = levels_NK - levels_NK.min(axis=1, keepdims=True)
    coarse_NK = np.minimum(fine_NK, np.float32(16 * beyond), out=fine_NK).astype(np.int16)
    coarse_NK >>= 4
    (some,) = np.nonzero(counts_N < num_classes)
    others_at = some, counts_N[some]
    total_N = EXP.take(coarse_NK.astype(np.intp)).sum(axis=1)
    total_N[some] += EXP[coarse_NK[others_at]] * (num_classes - counts_N[some] - 1)
    coarse_NK += (np.searchsorted(LOG, total_N, side="right") - 1).astype(np.int16)[:, None]
    coarse_NK >>= 3
    keys_NK: _Array = np.minimum(coarse_NK, CONTEXTS - 1, out=coarse_NK).astype(np.uint8)
    keys_NK += np.uint8(1)
    keys_NK[others_at] = 0
    return keys_NK


def _put_ids(
    ids_NM: _Array,
    rows_G: _Array,
    nibbles_X: _Array,
    shift_G: _Array,
    places: _Places,
    num_classes: int,
) -> None:
    """Put the listed classes of a group into the rows of all."""
    has_list_G = places.counts_N < num_classes
    if not has_list_G.all():
        ids_NM[rows_G[~has_list_G], :num_classes] = np.arange(num_classes)
    num_low_G = low_nibbles(places.counts_N, num_classes)
    for num_low in range(int(num_low_G.max()) + 1):  # rows are sorted: mostly one
        (some,) = np.nonzero(has_list_G & (num_low_G == num_low))
        if len(some):
            found_RM = _ids(nibbles_X, shift_G[some], places.rows(some), num_low, num_classes)
            ids_NM[rows_G[some], : found_RM.shape[1]] = found_RM


def _ids(
    nibbles_X: _Array, shift_N: _Array, places: _Places, num_low: int, num_classes: int
) -> _Array:
    """Return the listed classes of rows with so many low nibbles, N x M, 0 beyond their number."""
    counts_N, at_N = places.counts_N, shift_N + places.gaps_at_N
    spans_N = 2 * places.streams_at_N - places.gaps_at_N - num_low * counts_N
    if (spans_N < counts_N).any():
        raise LabelSetError("a block is shorter than its list of classes")
    if (spans_N > counts_N + num_classes // NIBBLE + 2).any():
        raise LabelSetError("a block has a longer list of classes than it says")
    pieces_NG = _windows(nibbles_X, at_N + num_low * counts_N, int(spans_N.max()))
    shortest = int(spans_N.min())
    is_beyond_NG = np.arange(shortest, pieces_NG.shape[1]) >= spans_N[:, None]
    np.copyto(pieces_NG[:, shortest:], NIBBLE, where=is_beyond_NG)
    (end_E,) = np.nonzero(pieces_NG.reshape(-1) != NIBBLE)
    starts_N1 = np.searchsorted(end_E, pieces_NG.shape[1] * np.arange(len(at_N) + 1))
    if (np.diff(starts_N1) != counts_N).any():
        raise LabelSetError("a block does not list as many classes as it says")
    dtype = np.int64 if num_low else np.int32
    sums_E = pieces_NG.cumsum(axis=1, dtype=dtype).reshape(-1).take(end_E)
    slots_M = np.arange(int(counts_N.max()), dtype=dtype)
    ids_NM: _Array = _windows(sums_E, starts_N1[:-1], len(slots_M))
    ids_NM <<= 4 * num_low
    if num_low:
        low_NML = _windows(nibbles_X, at_N, num_low * len(slots_M))
        low_NML = low_NML.reshape(len(at_N), -1, num_low)
        ids_NM += (low_NML.astype(np.int64) << 4 * np.arange(num_low)).sum(axis=2).cumsum(axis=1)
    ids_NM += slots_M
    if (ids_NM[np.arange(len(at_N)), counts_N - 1] >= num_classes).any():
        raise LabelSetError(f"a block names a class above {num_classes - 1}")
    fewest = int(counts_N.min())
    ids_NM[:, fewest:] *= slots_M[fewest:] < counts_N[:, None]
    return ids_NM


# --- residuals ------------------------------------------------------------------------------------


def _subtract_residuals(
    data_P: _Array, places: _Places, models: list[_Model], *, strict: bool
) -> None:
    """Subtract the residuals of rows from the levels of their entries."""
    (rows_A,) = np.nonzero(places.lengths_N)
    if not len(rows_A):
        return
    keys_E = np.concatenate([model.keys_NK.reshape(-1) for model in models])
    sizes = [model.keys_NK.size for model in models]
    firsts = np.cumsum([0, *sizes])[:-1]
    bases = [
        first + np.arange(0, size, model.keys_NK.shape[1])
        for first, size, model in zip(firsts, sizes, models, strict=True)
    ]
    base_N = np.concatenate(bases)
    begin_A, lengths_A = places.begin_N[rows_A], places.lengths_N[rows_A]
    num_bytes = (int(lengths_A.max()) + 7 + 2 * MAX_CODE) // 8 + 4
    bytes_AS = _windows(data_P, begin_A >> 3, num_bytes)
    at_F, value_F = read_residuals(
        bytes_AS, begin_A & 7, lengths_A, keys_E, base_N[rows_A], strict=strict
    )
    for first, size, model in zip(firsts, sizes, models, strict=True):
        (here,) = np.nonzero((at_F >= first) & (at_F < first + size))
        places_F = model.order_NK.reshape(-1)[at_F[here] - first]
        model.levels_NK.reshape(-1)[places_F] -= value_F[here].astype(np.float32)


def _probabilities(levels_NK: _Array, counts_N: _Array, num_classes: int) -> tuple[_Array, _Array]:
    """Return the probabilities of listed classes, N x M, and of each other class."""
    weights_NK = levels_NK - levels_NK.min(axis=1, keepdims=True)
    weights_NK *= np.float32(-1.0 / LEVELS_PER_NAT)
    np.exp(weights_NK, out=weights_NK)
    (some,) = np.nonzero(counts_N < num_classes)
    others_at = some, counts_N[some]
    others_N = np.zeros(len(counts_N), np.float32)
    others_N[some] = weights_NK[others_at]
    weights_NK[others_at] = 0.0
    # in parts: more padding changes no sum
    total_N = weights_NK.reshape(len(counts_N), -1, _LANES).sum(axis=1).sum(axis=1)
    total_N += others_N * (num_classes - counts_N).astype(np.float32)
    weights_NK /= total_N[:, None]
    return weights_NK[:, : int(counts_N.max())], others_N / total_N
