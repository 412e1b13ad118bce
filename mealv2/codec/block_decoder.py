"""Decode views of blocks whose views share a model, in NumPy, many rows at once.

mealv2.codec.block describes the bytes. Rows are decoded in groups of about equally many entries,
padded to the longest; results do not depend on the group. All levels are whole numbers below 2^24,
which float32 holds exactly, and sums of products of them too.
"""

from typing import Any, NamedTuple

import numpy as np

from mealv2.codec.block import HEAD_SIZE, LOW_UNIT, MAX_COMPONENTS, MAX_LISTED, NIBBLE, low_nibbles
from mealv2.codec.residuals import (
    CONTEXTS,
    EXP,
    LEVELS_PER_NAT,
    LOG,
    LONGEST_RUN,
    MAX_CODE,
    OTHERS,
    RUNS,
    STEPS,
    VALUE_OF,
    VALUES,
    Codes,
)
from mealv2.errors import LabelSetError

_Array = np.ndarray[Any, Any]

_ROWS, _GROUP = 4096, 128  # rows whose residuals are read together; padded together: fit in a cache
_LANES = 64  # rows are padded to a multiple of this, and summed in so many parts
_PADDING = np.float32(1 << 30)  # the level of no entry: its probability is 0
_COMPACT = 8  # symbols after which rows without any left are dropped
_WINDOW = (1 << MAX_CODE) - 1
_KEYS = np.array([OTHERS, *range(CONTEXTS)])  # contexts in the order of entries
_SHIFT = np.uint16(MAX_CODE)  # of a key, to the row of a table
_SIZE = 8  # bits below the size of a code in an entry of a table


def _table(codes: Codes) -> _Array:
    """Return the symbols and sizes of the next MAX_CODE bits, for keys one after another."""
    table: _Array = (codes.symbols_XW | codes.sizes_XW << _SIZE)[_KEYS].reshape(-1)
    return table


_RUNS, _VALUES, _STEPS = _table(RUNS), _table(VALUES), STEPS[_KEYS]


class SharedRows(NamedTuple):
    """Decoded rows: listed classes, padded; ``counts_N`` of them; the probability of all others.

    ``ids_NM`` int64 and ``probs_NM`` float32 are 0 beyond the count; ``tail_N`` float32 is the
    probability of each class not listed, 0 where all are.
    """

    ids_NM: _Array
    probs_NM: _Array
    counts_N: _Array
    tail_N: _Array


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


class _Entries(NamedTuple):
    """Entries of N rows, one row after another: row n has those from ``base_N[n]`` on.

    ``levels_E`` float32; ``order_E``, entries by context, counted from the row's first;
    ``keys_E`` uint16, the contexts in that order, as rows of a table.
    """

    base_N: _Array
    levels_E: _Array
    order_E: _Array
    keys_E: _Array


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
    # all reads end at most a block's size beyond the data
    data_P = np.concatenate([data_P, np.zeros(int((ends_N - at_N).max(initial=0)) + 16, np.uint8)])
    places = _places(data_P, at_N, ends_N, num_views_N, views_N, num_classes)
    shape = len(at_N), int(places.counts_N.max(initial=1))
    ids_NM, probs_NM = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    tail_N = np.zeros(len(at_N), np.float32)
    order_N = np.argsort(places.entries_N, kind="stable")
    for rows in (order_N[n : n + _ROWS] for n in range(0, len(order_N), _ROWS)):
        chosen = places.rows(rows)
        groups = [slice(n, n + _GROUP) for n in range(0, len(rows), _GROUP)]
        parts = []
        for group in groups:
            part, ids_GM = _model(data_P, chosen.rows(group), num_classes)
            ids_NM[rows[group], : ids_GM.shape[1]] = ids_GM
            parts.append(part)
        entries = _joined(parts)
        _subtract_residuals(data_P, chosen, entries, strict=strict)
        ends = np.cumsum([len(part.levels_E) for part in parts])
        for group, levels_E in zip(groups, np.split(entries.levels_E, ends), strict=False):
            counts_G = chosen.counts_N[group]
            levels_GK = levels_E.reshape(len(counts_G), -1)
            probs_GM, tail_N[rows[group]] = _probabilities(levels_GK, counts_G, num_classes)
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
) -> tuple[_Array, _Array, _Array]:
    """Return where the residuals of the views begin, how many bits they have, and all views'."""
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
    return found_3N[0], found_3N[1], found_3N[2]


def _windows(flat_P: _Array, at: _Array, size: int) -> _Array:
    """Return ``size`` entries from each offset, ... x size: one copy of memory each."""
    shape = (len(flat_P) - size + 1,)
    runs = np.ndarray(shape, f"V{size * flat_P.itemsize}", flat_P, strides=flat_P.strides)
    copied: _Array = runs[at][..., None].view(flat_P.dtype)
    return copied


# --- listed classes and the model -----------------------------------------------------------------


def _model(data_P: _Array, places: _Places, num_classes: int) -> tuple[_Entries, _Array]:
    """Return the entries of a group of rows by their components alone, and the listed classes."""
    num_rows, width = len(places.counts_N), _padded(int(places.entries_N.max()))
    first_N = places.codes_at_N >> 1
    has_list_N = places.counts_N < num_classes
    last_N = np.where(has_list_N, places.streams_at_N, (places.gaps_at_N + 1) >> 1)
    bytes_NS = _windows(data_P, first_N, int((last_N - first_N).max()))
    nibbles_X = np.zeros(2 * bytes_NS.size + width, np.uint8)
    np.bitwise_and(bytes_NS.reshape(-1), NIBBLE, out=nibbles_X[: 2 * bytes_NS.size : 2])
    np.right_shift(bytes_NS.reshape(-1), 4, out=nibbles_X[1 : 2 * bytes_NS.size : 2])
    # where byte 0 of the data would be
    shift_N = 2 * (np.arange(num_rows) * bytes_NS.shape[1] - first_N)
    r_R = np.arange(int(places.components_N.max()))
    codes_at_NR = np.where(r_R < places.components_N[:, None], r_R * places.entries_N[:, None], 0)
    codes_at_NR += (shift_N + places.codes_at_N)[:, None]
    codes_NRK = _windows(nibbles_X, codes_at_NR, width).astype(np.float32)
    # signed codes are stored with 8 added: that adds a constant to all levels of a row
    weights_N1R = places.weights_NR[:, None, : len(r_R)]
    levels_NK = np.matmul(weights_N1R, codes_NRK)[:, 0]
    slots_K = np.arange(width)
    np.copyto(levels_NK, _PADDING, where=slots_K >= places.entries_N[:, None])
    order_NK, keys_NK = _by_context(levels_NK, places.counts_N, num_classes)
    base_N = width * np.arange(num_rows)
    entries = _Entries(base_N, levels_NK.reshape(-1), order_NK.reshape(-1), keys_NK.reshape(-1))
    return entries, _ids(nibbles_X, shift_N, places, num_classes)


def _padded(size: int) -> int:
    return -(-size // _LANES) * _LANES


def _by_context(levels_NK: _Array, counts_N: _Array, num_classes: int) -> tuple[_Array, _Array]:
    """Return entries by context, all others first, and these contexts as rows of a table.

    mealv2.codec.residuals.contexts has the arithmetic.
    """
    beyond = len(EXP) - 1  # in 1/16 nat: all from here on are in the last context
    fine_NK = levels_NK - levels_NK.min(axis=1, keepdims=True)
    coarse_NK = np.minimum(fine_NK, np.float32(16 * beyond), out=fine_NK).astype(np.int16) >> 4
    (some,) = np.nonzero(counts_N < num_classes)
    others_at = some, counts_N[some]
    total_N = EXP.take(coarse_NK).sum(axis=1)
    total_N[some] += EXP[coarse_NK[others_at]] * (num_classes - counts_N[some] - 1)
    coarse_NK += (np.searchsorted(LOG, total_N, side="right") - 1).astype(np.int16)[:, None]
    coarse_NK >>= 3
    keys_NK = np.minimum(coarse_NK, CONTEXTS - 1).astype(np.uint8)
    keys_NK += np.uint8(1)
    keys_NK[others_at] = 0
    # stable: padding, in the last context, stays after the entries
    order_NK = keys_NK.argsort(axis=1, kind="stable")
    keys_NK.sort(axis=1, kind="stable")
    return order_NK, keys_NK.astype(np.uint16) << _SHIFT


def _ids(nibbles_X: _Array, shift_N: _Array, places: _Places, num_classes: int) -> _Array:
    """Return the listed classes, N x M, 0 beyond their number."""
    slots_M = np.arange(int(places.counts_N.max()))
    is_listed_NM = slots_M < places.counts_N[:, None]
    ids_NM = np.where(is_listed_NM, slots_M, 0)
    num_low_N = np.where(
        places.counts_N < num_classes, low_nibbles(places.counts_N, num_classes), -1
    )
    for num_low in np.unique(num_low_N[num_low_N >= 0]).tolist():
        (rows,) = np.nonzero(num_low_N == num_low)
        at_R, counts_R = places.gaps_at_N[rows], places.counts_N[rows]
        high_at_R = at_R + num_low * counts_R
        spans_R = 2 * places.streams_at_N[rows] - high_at_R
        if (spans_R < counts_R).any():
            raise LabelSetError("a block is shorter than its list of classes")
        if (spans_R > counts_R + num_classes // NIBBLE + 2).any():
            raise LabelSetError("a block has a longer list of classes than it says")
        is_listed_RM = is_listed_NM[rows]
        pieces_RG = _windows_within(nibbles_X, shift_N[rows] + high_at_R, int(spans_R.max()))
        np.copyto(pieces_RG, NIBBLE, where=np.arange(pieces_RG.shape[1]) >= spans_R[:, None])
        is_end_RG = pieces_RG != NIBBLE
        if (is_end_RG.sum(axis=1) != counts_R).any():
            raise LabelSetError("a block does not list as many classes as it says")
        found_RM = np.zeros(is_listed_RM.shape, np.int64)
        found_RM[is_listed_RM] = pieces_RG.cumsum(axis=1, dtype=np.int64)[is_end_RG]
        found_RM <<= 4 * num_low
        if num_low:
            size = num_low * len(slots_M)
            low_RML = _windows_within(nibbles_X, shift_N[rows] + at_R, size)
            low_RML = low_RML.reshape(len(rows), -1, num_low)
            low_RM = (low_RML.astype(np.int64) << 4 * np.arange(num_low)).sum(axis=2)
            found_RM += low_RM.cumsum(axis=1)
        found_RM += slots_M
        found_RM *= is_listed_RM
        if (found_RM.max(axis=1) >= num_classes).any():
            raise LabelSetError(f"a block names a class above {num_classes - 1}")
        ids_NM[rows] = found_RM
    return ids_NM


def _windows_within(flat_X: _Array, at_N: _Array, size: int) -> _Array:
    """Return ``_windows``; zeros beyond the end."""
    missing = int(at_N.max()) + size - len(flat_X)
    if missing > 0:
        flat_X = np.concatenate([flat_X, np.zeros(missing, flat_X.dtype)])
    return _windows(flat_X, at_N, size)


# --- residuals ------------------------------------------------------------------------------------


def _joined(parts: list[_Entries]) -> _Entries:
    if len(parts) == 1:
        return parts[0]
    shifts = np.cumsum([0, *(len(part.levels_E) for part in parts)])
    base_N = np.concatenate([p.base_N + s for p, s in zip(parts, shifts, strict=False)])
    levels_E, order_E, keys_E = (np.concatenate([p[i] for p in parts]) for i in (1, 2, 3))
    return _Entries(base_N, levels_E, order_E, keys_E)


def _subtract_residuals(
    data_P: _Array, places: _Places, entries: _Entries, *, strict: bool
) -> None:
    """Subtract the residuals of rows from the levels of their entries."""
    (rows_A,) = np.nonzero(places.lengths_N)
    if not len(rows_A):
        return
    begin_A = places.begin_N[rows_A]
    num_bytes = (int(places.lengths_N.max()) + 7 + 2 * MAX_CODE) // 8 + 1
    bytes_AS = _windows_within(data_P, begin_A >> 3, num_bytes + 3)
    # the 32 bits from each byte on: two codes, from any of its bits
    strides = bytes_AS.strides
    words_AS = np.ndarray((len(rows_A), num_bytes), "<u4", bytes_AS, strides=strides)
    words_Y = words_AS.astype(np.int64).reshape(-1)
    bit_A = 8 * num_bytes * np.arange(len(rows_A)) + (begin_A & 7)
    end_A = bit_A + places.lengths_N[rows_A]
    base_A = entries.base_N[rows_A]
    at_A, last_A = base_A.copy(), base_A + places.entries_N[rows_A]
    is_active_A = np.ones(len(rows_A), bool)
    found: list[tuple[_Array, _Array, _Array]] = []
    for step in range(1, len(words_Y) * 8):
        # a run of entries without a residual, then a value; reads beyond the end are not used
        words_A = words_Y.take(bit_A >> 3, mode="clip") >> (bit_A & 7)
        run_A = _RUNS.take(entries.keys_E.take(at_A, mode="clip") | (words_A & _WINDOW))
        size_A, run_A = run_A >> _SIZE, run_A & 255
        at_A = at_A + run_A
        is_within_A = at_A < last_A
        np.minimum(at_A, last_A - 1, out=at_A)
        has_value_A = is_within_A & (run_A < LONGEST_RUN)
        words_A = words_A >> size_A & _WINDOW
        value_A = _VALUES.take(entries.keys_E.take(at_A) | words_A) * has_value_A
        bit_A = bit_A + size_A + (value_A >> _SIZE)
        (value_V,) = np.nonzero(has_value_A & is_active_A)
        found.append((base_A[value_V], at_A[value_V], value_A[value_V]))
        at_A = at_A + has_value_A
        is_left_A, has_entries_A = bit_A < end_A, at_A < last_A
        if strict:
            if (~is_within_A & is_active_A).any():
                raise LabelSetError("residuals of a label go beyond its entries")
            is_wrong_A = (bit_A > end_A) | (is_left_A & ~has_entries_A)
            if (is_wrong_A & is_active_A).any():
                raise LabelSetError("residuals of a label do not end where its length says")
        is_active_A &= is_left_A & has_entries_A
        if step % _COMPACT == 0:
            (keep,) = np.nonzero(is_active_A)
            if not len(keep):
                break
            bit_A, end_A, base_A, at_A, last_A, is_active_A = (
                column[keep] for column in (bit_A, end_A, base_A, at_A, last_A, is_active_A)
            )
    base_F, at_F, value_F = (np.concatenate(column) for column in zip(*found, strict=True))
    value_F = VALUE_OF[value_F & 255] * _STEPS[entries.keys_E[at_F] >> _SHIFT]
    entries.levels_E[base_F + entries.order_E[at_F]] -= value_F.astype(np.float32)


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
