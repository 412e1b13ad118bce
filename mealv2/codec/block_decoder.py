"""Decode views of blocks whose views share a model, in NumPy, many rows at once.

mealv2.codec.block describes the bytes. Rows are decoded in groups of about equally many entries,
padded to the longest; results do not depend on the group. All levels are whole numbers below 2^24,
which float32 holds exactly, and sums of products of them too.
"""

from typing import Any, NamedTuple

import numpy as np

from mealv2.codec.block import LOWEST, NIBBLE, DecodedRows, low_nibbles
from mealv2.codec.block_layout import BlockSpans, Layout, find_layout, windows
from mealv2.codec.residual_reader import END, read_residuals
from mealv2.codec.residuals import CONTEXTS, EXP, LEVELS_PER_NAT, LOG, LONGEST_RUN, MAX_CODE
from mealv2.errors import LabelSetError

_Array = np.ndarray[Any, Any]

_ROWS, _GROUP = 4096, 128  # rows whose residuals are read together; padded together: fit in a cache
_LANES = 64  # rows are padded to a multiple of this, and summed in so many parts
_INDEX_BITS = 10  # of the index of an entry, or of padding, in a row
_INDEX = (1 << _INDEX_BITS) - 1
_PADDING = np.float32(1 << 30)  # the level of no entry: its probability is 0


class _Model(NamedTuple):
    """Entries of a group of rows by their components alone, padded.

    ``levels_NK`` float32; ``order_NK`` int32, entries by context, whose low bits are their indices
    in the row; ``keys_NK`` uint16, the keys of contexts in that order, where their tables begin.
    """

    levels_NK: _Array
    order_NK: _Array
    keys_NK: _Array


def decode_shared(
    data_P: _Array,
    blocks: BlockSpans,
    with_models: BlockSpans,
    views_N: _Array,
    num_classes: int,
    *,
    strict: bool = False,
) -> DecodedRows:
    """Decode one view of each of N blocks; ``with_models`` are those whose models they use.

    Raises LabelSetError for bytes that no writer leaves; for the residuals only if ``strict``,
    else every label is some distribution.
    """
    # most reads end at most a block's size beyond the data
    longest = max(int((of.ends_N - of.at_N).max(initial=0)) for of in (blocks, with_models))
    data_P = np.concatenate([data_P, np.zeros(longest + 16, np.uint8)])
    layout = find_layout(data_P, blocks, with_models, views_N, num_classes)
    shape = len(views_N), int(layout.counts_N.max(initial=1))
    ids_NM, probs_NM = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    tail_N = np.zeros(len(views_N), np.float32)
    order_N = np.argsort(layout.entries_N, kind="stable")
    for rows in (order_N[n : n + _ROWS] for n in range(0, len(order_N), _ROWS)):
        chosen = layout.rows(rows)
        groups = [slice(n, n + _GROUP) for n in range(0, len(rows), _GROUP)]
        models = []
        for group in groups:
            of_group = chosen.rows(group)
            nibbles_X, shift_G = _nibbles(data_P, of_group, num_classes)
            models.append(_model(nibbles_X, shift_G, of_group, num_classes))
            left_G = _put_ids(ids_NM, rows[group], nibbles_X, shift_G, of_group, num_classes)
            if strict:
                _check_padding(data_P, of_group, left_G)
        _subtract_residuals(data_P, chosen, models, strict=strict)
        for group, model in zip(groups, models, strict=True):
            of_group = chosen.rows(group)
            probs_GM, tail_N[rows[group]] = _probabilities(model.levels_NK, of_group, num_classes)
            probs_NM[rows[group], : probs_GM.shape[1]] = probs_GM
    return DecodedRows(ids_NM, probs_NM, layout.counts_N, tail_N)


# --- listed classes and the model -----------------------------------------------------------------


def _nibbles(data_P: _Array, layout: Layout, num_classes: int) -> tuple[_Array, _Array]:
    """Return codes and lists of rows as nibbles, and what is added to their offsets in the data."""
    first_N = layout.codes_at_N >> 1
    has_list_N = layout.counts_N < num_classes
    last_N = np.where(has_list_N, layout.lists_end_N, (layout.gaps_at_N + 1) >> 1)
    bytes_NS = windows(data_P, first_N, int((last_N - first_N).max()))
    pairs_NS = bytes_NS.astype("<u2")
    pairs_NS |= pairs_NS << np.uint16(4)
    pairs_NS &= np.uint16(NIBBLE << 8 | NIBBLE)
    # zeros follow the last row: others are read up to the longest
    zeros = np.zeros(2 * bytes_NS.shape[1] + 2 * _LANES, np.uint8)
    nibbles_X = np.concatenate([pairs_NS.reshape(-1).view(np.uint8), zeros])
    return nibbles_X, 2 * (np.arange(len(first_N)) * bytes_NS.shape[1] - first_N)


def _model(nibbles_X: _Array, shift_N: _Array, layout: Layout, num_classes: int) -> _Model:
    entries_N = layout.entries_N
    # no run from an entry leads beyond the padding
    width = -(-(int(entries_N.max()) + LONGEST_RUN) // _LANES) * _LANES
    r_R = np.arange(int(layout.components_N.max()))
    codes_at_NR = np.where(r_R < layout.components_N[:, None], r_R * entries_N[:, None], 0)
    codes_at_NR += (shift_N + layout.codes_at_N)[:, None]
    codes_NRK = windows(nibbles_X, codes_at_NR, width).astype(np.float32)
    # signed codes are stored with 8 added: that adds a constant to all levels of a row
    weights_N1R = layout.weights_NR[:, None, : len(r_R)]
    levels_NK = np.matmul(weights_N1R, codes_NRK)[:, 0]
    # only the last columns have padding
    shortest = int(entries_N.min())
    is_padding_NK = np.arange(shortest, width) >= entries_N[:, None]
    np.copyto(levels_NK[:, shortest:], _PADDING, where=is_padding_NK)
    keys_NK = _keys(levels_NK, layout.counts_N, num_classes)
    np.copyto(keys_NK[:, shortest:], END, where=is_padding_NK)
    order_NK = keys_NK.astype(np.int32) << _INDEX_BITS
    order_NK += np.arange(width, dtype=np.int32)
    order_NK.sort(axis=1)
    keys_NK = (order_NK >> _INDEX_BITS).astype(np.uint16) << np.uint16(MAX_CODE)
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
    total_N = EXP.take(coarse_NK, mode="clip").sum(axis=1)
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
    layout: Layout,
    num_classes: int,
) -> _Array:
    """Put the listed classes of a group into the rows of all; return how many nibbles are left."""
    has_list_G = layout.counts_N < num_classes
    left_G = 2 * layout.lists_end_N - layout.gaps_at_N
    if not has_list_G.all():
        ids_NM[rows_G[~has_list_G], :num_classes] = np.arange(num_classes)
    num_low_G = low_nibbles(layout.counts_N, num_classes)
    for num_low in range(int(num_low_G.max()) + 1):  # rows are sorted: mostly one
        (some,) = np.nonzero(has_list_G & (num_low_G == num_low))
        if len(some):
            of_some = layout.rows(some)
            found_RM, left_G[some] = _ids(nibbles_X, shift_G[some], of_some, num_low, num_classes)
            ids_NM[rows_G[some], : found_RM.shape[1]] = found_RM
    return left_G


def _ids(
    nibbles_X: _Array, shift_N: _Array, layout: Layout, num_low: int, num_classes: int
) -> tuple[_Array, _Array]:
    """Return the listed classes of rows with so many low nibbles, N x M, 0 beyond their number.

    And how many nibbles are left after them.
    """
    counts_N, at_N = layout.counts_N, shift_N + layout.gaps_at_N
    spans_N = 2 * layout.lists_end_N - layout.gaps_at_N - num_low * counts_N
    if (spans_N < counts_N).any():
        raise LabelSetError("a block is shorter than its list of classes")
    if (spans_N > counts_N + num_classes // NIBBLE + 2).any():
        raise LabelSetError("a block has a longer list of classes than it says")
    pieces_NG = windows(nibbles_X, at_N + num_low * counts_N, int(spans_N.max()))
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
    ids_NM: _Array = windows(sums_E, starts_N1[:-1], len(slots_M))
    ids_NM <<= 4 * num_low
    if num_low:
        low_NML = windows(nibbles_X, at_N, num_low * len(slots_M))
        low_NML = low_NML.reshape(len(at_N), -1, num_low)
        ids_NM += (low_NML.astype(np.int64) << 4 * np.arange(num_low)).sum(axis=2).cumsum(axis=1)
    ids_NM += slots_M
    if (ids_NM[np.arange(len(at_N)), counts_N - 1] >= num_classes).any():
        raise LabelSetError(f"a block names a class above {num_classes - 1}")
    fewest = int(counts_N.min())
    ids_NM[:, fewest:] *= slots_M[fewest:] < counts_N[:, None]
    used_N = end_E[starts_N1[1:] - 1] % pieces_NG.shape[1] + 1
    return ids_NM, spans_N - used_N


def _check_padding(data_P: _Array, layout: Layout, left_N: _Array) -> None:
    """Raise LabelSetError unless at most one nibble of 15, and zeros, pad the parts of blocks."""
    unused_N = data_P[layout.ends_N - 1] >> ((layout.bits_N - 1) % 8 + 1).astype(np.uint8)
    is_wrong_N = (unused_N > 0) & (layout.bits_N > 0)
    # the weights of a block that uses the model of another have padding of their own
    is_own_N = layout.lists_end_N == layout.streams_at_N
    left_of_weights_N = np.where(is_own_N, 0, 2 * layout.streams_at_N - layout.nibbles_end_N)
    of_weights = layout.streams_at_N, left_of_weights_N
    for ends_N, nibbles_N in ((layout.lists_end_N, left_N), of_weights):
        is_wrong_N |= (nibbles_N > 1) | (nibbles_N > 0) & (data_P[ends_N - 1] >> 4 != NIBBLE)
    if is_wrong_N.any():
        raise LabelSetError("a block has bits after the end of a part")


# --- residuals ------------------------------------------------------------------------------------


def _subtract_residuals(
    data_P: _Array, layout: Layout, models: list[_Model], *, strict: bool
) -> None:
    """Subtract the residuals of rows from the levels of their entries."""
    (rows_A,) = np.nonzero(layout.lengths_N)
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
    begin_A, lengths_A = layout.begin_N[rows_A], layout.lengths_N[rows_A]
    num_bytes = (int(lengths_A.max()) + 7 + 2 * MAX_CODE) // 8 + 4
    bytes_AS = windows(data_P, begin_A >> 3, num_bytes)
    at_F, value_F = read_residuals(
        bytes_AS, begin_A & 7, lengths_A, keys_E, base_N[rows_A], strict=strict
    )
    for first, size, model in zip(firsts, sizes, models, strict=True):
        (own,) = np.nonzero((at_F >= first) & (at_F < first + size))
        sorted_F = at_F[own] - first
        row_F = sorted_F // model.order_NK.shape[1]
        entry_F = model.order_NK.reshape(-1)[sorted_F] & _INDEX
        model.levels_NK[row_F, entry_F] -= value_F[own].astype(np.float32)


def _probabilities(levels_NK: _Array, layout: Layout, num_classes: int) -> tuple[_Array, _Array]:
    """Return the probabilities of listed classes, N x M, and of each other class."""
    counts_N = layout.counts_N
    weights_NK = levels_NK - levels_NK.min(axis=1, keepdims=True)
    np.minimum(weights_NK, np.float32(LOWEST), out=weights_NK)
    weights_NK *= np.float32(-1.0 / LEVELS_PER_NAT)
    np.exp(weights_NK, out=weights_NK)
    (some,) = np.nonzero(counts_N < num_classes)
    others_at = some, counts_N[some]
    others_N = np.zeros(len(counts_N), np.float32)
    others_N[some] = weights_NK[others_at]
    fewest = int(counts_N.min())
    weights_NK[:, fewest:] *= np.arange(fewest, weights_NK.shape[1]) < counts_N[:, None]
    # in parts: more padding changes no sum
    total_N = weights_NK.reshape(len(counts_N), -1, _LANES).sum(axis=1).sum(axis=1)
    total_N += others_N * (num_classes - counts_N).astype(np.float32)
    weights_NK /= total_N[:, None]
    return weights_NK[:, : int(counts_N.max())], others_N / total_N
