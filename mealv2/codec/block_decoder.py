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
_STEPS_AT_ONCE, _FEW = 6, 24  # values after which finished rows are dropped; then one by one
_WINDOW = (1 << MAX_CODE) - 1
_KEYS = np.array([OTHERS, *range(CONTEXTS)])  # contexts in the order of entries
_END = len(_KEYS)  # the key of what follows the entries: nothing is read there
# entries of tables: 4 bits for the size of a code, then 8 for its symbol, then whether it is a
# run that no value follows, as an index beyond the table of values
_SIZE, _SYMBOL, _NO_VALUE = 15, 4, 1 << 16


def _table(codes: Codes) -> _Array:
    """Return the entries for the next MAX_CODE bits, for keys one after another."""
    assert (codes.sizes_XW > 0).all(), "a code is not complete: reading would not end"
    entries_KW = (codes.sizes_XW | codes.symbols_XW << _SYMBOL)[_KEYS]
    table: _Array = np.concatenate([entries_KW.reshape(-1), np.zeros(_WINDOW + 1, np.int64)])
    return table


_RUNS, _VALUES, _STEPS = _table(RUNS), _table(VALUES), STEPS[_KEYS]
_RUNS[_RUNS >> _SYMBOL == LONGEST_RUN] |= _NO_VALUE


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
    codes_NRK = _windows_within(nibbles_X, codes_at_NR, width).astype(np.float32)
    # signed codes are stored with 8 added: that adds a constant to all levels of a row
    weights_N1R = places.weights_NR[:, None, : len(r_R)]
    levels_NK = np.matmul(weights_N1R, codes_NRK)[:, 0]
    # only the last columns have padding
    shortest = int(entries_N.min())
    is_padding_NK = np.arange(shortest, width) >= entries_N[:, None]
    np.copyto(levels_NK[:, shortest:], _PADDING, where=is_padding_NK)
    keys_NK = _keys(levels_NK, places.counts_N, num_classes)
    np.copyto(keys_NK[:, shortest:], _END, where=is_padding_NK)
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
    keys_NK = np.minimum(coarse_NK, CONTEXTS - 1, out=coarse_NK).astype(np.uint8)
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
    pieces_NG = _windows_within(nibbles_X, at_N + num_low * counts_N, int(spans_N.max()))
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
    ids_NM = _windows_within(sums_E, starts_N1[:-1], len(slots_M))
    ids_NM <<= 4 * num_low
    if num_low:
        low_NML = _windows_within(nibbles_X, at_N, num_low * len(slots_M))
        low_NML = low_NML.reshape(len(at_N), -1, num_low)
        ids_NM += (low_NML.astype(np.int64) << 4 * np.arange(num_low)).sum(axis=2).cumsum(axis=1)
    ids_NM += slots_M
    if (ids_NM[np.arange(len(at_N)), counts_N - 1] >= num_classes).any():
        raise LabelSetError(f"a block names a class above {num_classes - 1}")
    fewest = int(counts_N.min())
    ids_NM[:, fewest:] *= slots_M[fewest:] < counts_N[:, None]
    return ids_NM


def _windows_within(flat_X: _Array, at_N: _Array, size: int) -> _Array:
    """Return ``_windows``; zeros beyond the end."""
    missing = int(at_N.max()) + size - len(flat_X)
    if missing > 0:
        flat_X = np.concatenate([flat_X, np.zeros(missing, flat_X.dtype)])
    return _windows(flat_X, at_N, size)


# --- residuals ------------------------------------------------------------------------------------


class _Symbols(NamedTuple):
    """Runs and values in order: rows, indices of the keys after the run, entries of the tables."""

    row_F: _Array
    at_F: _Array
    run_F: _Array
    value_F: _Array


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
    base_N = np.concatenate(
        [
            first + model.keys_NK.shape[1] * np.arange(len(model.keys_NK))
            for first, model in zip(firsts, models, strict=True)
        ]
    )
    begin_A, lengths_A = places.begin_N[rows_A], places.lengths_N[rows_A]
    num_bytes = (int(lengths_A.max()) + 7 + 2 * MAX_CODE) // 8 + 1
    bytes_AS = _windows_within(data_P, begin_A >> 3, num_bytes + 3)
    # the 32 bits from each byte on: two codes, from any of its bits
    shape, strides = (len(rows_A), num_bytes), bytes_AS.strides
    words_Y = np.ndarray(shape, "<u4", bytes_AS, strides=strides).astype(np.int64).reshape(-1)
    bit_A = 8 * num_bytes * np.arange(len(rows_A)) + (begin_A & 7)
    symbols = _read(words_Y, keys_E, bit_A, bit_A + lengths_A, base_N[rows_A])
    if strict:
        _check_symbols(symbols, keys_E, lengths_A)
    (real,) = np.nonzero(symbols.value_F)
    at_F = symbols.at_F[real]
    value_F = VALUE_OF[symbols.value_F[real] >> _SYMBOL & 255] * _STEPS[keys_E[at_F] >> MAX_CODE]
    for first, size, model in zip(firsts, sizes, models, strict=True):
        (here,) = np.nonzero((at_F >= first) & (at_F < first + size))
        places_F = model.order_NK.reshape(-1)[at_F[here] - first]
        model.levels_NK.reshape(-1)[places_F] -= value_F[here].astype(np.float32)


def _read(words_Y: _Array, keys_E: _Array, bit_A: _Array, end_A: _Array, at_A: _Array) -> _Symbols:
    """Return the symbols of rows: bits from ``bit_A`` to ``end_A``, keys from ``at_A`` on."""
    row_A = np.arange(len(bit_A))
    found = []
    while len(row_A) > _FEW:
        for _ in range(_STEPS_AT_ONCE):
            # a run of entries without a residual, then a value
            is_active_A = bit_A < end_A  # what follows is not used
            words_A = words_Y.take(bit_A >> 3, mode="clip") >> (bit_A & 7)
            run_A = _RUNS.take(keys_E.take(at_A) | (words_A & _WINDOW))
            size_A = run_A & _SIZE
            at_A = at_A + (run_A >> _SYMBOL & 255)
            index_A = keys_E.take(at_A) | (words_A >> size_A & _WINDOW) | (run_A & _NO_VALUE)
            value_A = _VALUES.take(index_A, mode="clip")
            found.append((is_active_A, row_A, at_A, run_A, value_A))
            bit_A = bit_A + size_A + (value_A & _SIZE)
            at_A = at_A + (value_A > 0)
        (left,) = np.nonzero((bit_A < end_A) & (keys_E.take(at_A) < _END << MAX_CODE))
        row_A, bit_A, end_A, at_A = row_A[left], bit_A[left], end_A[left], at_A[left]
    columns = [np.concatenate(column) for column in zip(*found, strict=True)]
    read = _Symbols(*(column[columns[0]] for column in columns[1:])) if found else None
    rest = _read_one_by_one(words_Y, keys_E, row_A, bit_A, end_A, at_A)
    if read is None:
        return rest
    return _Symbols(*(np.concatenate(pair) for pair in zip(read, rest, strict=True)))


def _read_one_by_one(
    words_Y: _Array, keys_E: _Array, row_A: _Array, bit_A: _Array, end_A: _Array, at_A: _Array
) -> _Symbols:
    """Return the symbols of a few rows: Python is faster than calls for so few."""
    words, keys, runs, values = words_Y.data, keys_E.data, _RUNS.data, _VALUES.data
    found = []
    columns = (column.tolist() for column in (row_A, bit_A, end_A, at_A))
    for row, bit, end, at in zip(*columns, strict=True):
        while bit < end and keys[at] < _END << MAX_CODE:
            word = words[bit >> 3] >> (bit & 7)
            run = runs[keys[at] | word & _WINDOW]
            size = run & _SIZE
            at += run >> _SYMBOL & 255
            value = 0
            if not run & _NO_VALUE:
                value = values[keys[at] | word >> size & _WINDOW]
            found.append((row, at, run, value))
            bit += size + (value & _SIZE)
            at += value > 0
    return _Symbols(*np.array(found, np.int64).reshape(-1, 4).T)


def _check_symbols(symbols: _Symbols, keys_E: _Array, lengths_A: _Array) -> None:
    """Raise LabelSetError unless the symbols have so many bits and stay within the entries."""
    if (keys_E[symbols.at_F] >= _END << MAX_CODE).any():
        raise LabelSetError("residuals of a label go beyond its entries")
    bits_F = (symbols.run_F & _SIZE) + (symbols.value_F & _SIZE)
    if (np.bincount(symbols.row_F, bits_F, len(lengths_A)) != lengths_A).any():
        raise LabelSetError("residuals of a label do not end where its length says")


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
