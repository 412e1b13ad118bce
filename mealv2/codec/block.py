"""The bytes of a block whose views share a model of components, and their decoder in NumPy.

docs/reference/label-codec.md describes every byte. V views, M listed classes of C, K entries: the
listed classes in ascending order and, if M is below C, one entry of all others.

=========  ========================================================================================
bytes      1: R, the number of components; 2: M; 1: bytes of a length, 1 or 2
           2 for each component: low (signed) and step, which give a weight of nibble n as
           8 low + step n, in 1/256
           V lengths of residuals, in bits
nibbles    R for each view: weights; R rows of K: codes of components in nats, the first 0 to 15,
           others -8 to 7; M gaps between ids, in pieces; 15 pads the last byte
bits       the residuals of the views, each without padding; zeros pad the last byte
=========  ========================================================================================
"""

from typing import Any, NamedTuple

import numpy as np

from mealv2.codec.residuals import (
    LEVELS_PER_NAT,
    LONGEST_RUN,
    MAX_CODE,
    OTHERS,
    RUNS,
    STEPS,
    VALUE_OF,
    VALUES,
    Codes,
    contexts,
)
from mealv2.errors import LabelSetError

MAX_COMPONENTS = 8
MAX_LISTED = 512
LOW_UNIT = 32  # lows of weights in a nat
NIBBLE = 15
HEAD_SIZE = 4
_WEIGHT_OF_LOW = LEVELS_PER_NAT // LOW_UNIT
_SIGN = 8  # of the codes of all components but the first
_LOWEST = 64 * LEVELS_PER_NAT  # below the likeliest: above 0 in float32 with 10^6 classes
_POSITIONS = 1 << 20  # above all positions of entries, in a sort key

_Array = np.ndarray[Any, Any]


class Residuals(NamedTuple):
    """Prefix codes in order: ``words_F`` of ``sizes_F`` bits; ``lengths_N``, the bits of a row."""

    words_F: _Array
    sizes_F: _Array
    lengths_N: _Array


class Model(NamedTuple):
    """The shared part of a block: listed classes, components, and weights of the views."""

    ids_M: _Array
    codes_RK: _Array
    lows_R: _Array
    steps_R: _Array
    nibbles_VR: _Array


class SharedRows(NamedTuple):
    """Decoded rows: listed classes, padded; ``counts_N`` of them; the probability of all others.

    ``ids_NM`` int64 and ``probs_NM`` float32 are 0 beyond the count; ``tail_N`` float32 is the
    probability of each class not listed, 0 where all are.
    """

    ids_NM: _Array
    probs_NM: _Array
    counts_N: _Array
    tail_N: _Array


# --- writing --------------------------------------------------------------------------------------


def symbols(
    residuals_NK: _Array, contexts_NK: _Array, sizes_NK: _Array
) -> tuple[_Array, _Array, _Array, _Array]:
    """Return for each symbol of residuals whether it is a value, context, symbol and row.

    For each residual: runs of LONGEST_RUN entries without one, a shorter run, the value.
    """
    order_NK = _order(contexts_NK, sizes_NK)
    residuals_NK = np.take_along_axis(residuals_NK, order_NK, 1)
    contexts_NK = np.take_along_axis(contexts_NK, order_NK, 1)
    row_E, at_E = np.nonzero(residuals_NK)
    is_first_E = np.diff(row_E, prepend=-1) != 0
    start_E = np.where(is_first_E, 0, np.roll(at_E, 1) + 1)
    long_E, short_E = np.divmod(at_E - start_E, LONGEST_RUN)
    item_F = np.repeat(np.arange(len(at_E)), long_E + 2)
    step_F = np.arange(len(item_F)) - np.repeat(np.cumsum(long_E + 2) - long_E - 2, long_E + 2)
    is_value_F = step_F > long_E[item_F]
    place_F = np.where(is_value_F, at_E[item_F], start_E[item_F] + LONGEST_RUN * step_F)
    values_E = residuals_NK[row_E, at_E]
    value_F = (2 * np.abs(values_E) - 2 + (values_E < 0))[item_F]
    run_F = np.where(step_F < long_E[item_F], LONGEST_RUN, short_E[item_F])
    row_F = row_E[item_F]
    return is_value_F, contexts_NK[row_F, place_F], np.where(is_value_F, value_F, run_F), row_F


def coded(residuals_NK: _Array, contexts_NK: _Array, sizes_NK: _Array) -> Residuals:
    """Return the codes of residuals, row by row."""
    is_value_F, context_F, symbol_F, row_F = symbols(residuals_NK, contexts_NK, sizes_NK)
    words_F, sizes_F = np.empty((2, len(row_F)), np.int64)
    for codes, is_of_F in ((VALUES, is_value_F), (RUNS, ~is_value_F)):
        of = context_F[is_of_F], symbol_F[is_of_F]
        words_F[is_of_F], sizes_F[is_of_F] = codes.words_XS[of], codes.lengths_XS[of]
    lengths_N = np.bincount(row_F, sizes_F, minlength=len(residuals_NK)).astype(np.int64)
    return Residuals(words_F, sizes_F, lengths_N)


def packed(residuals: Residuals, num_views: int) -> list[bytes]:
    """Return the residuals of each image, whose views have no padding between them."""
    lengths_IV = residuals.lengths_N.reshape(-1, num_views)
    sizes_I = (lengths_IV.sum(axis=1) + 7) // 8
    ends_I = np.cumsum(sizes_I)
    begin_IV = 8 * (ends_I - sizes_I)[:, None] + lengths_IV.cumsum(axis=1) - lengths_IV
    # codes follow each other within a row
    ends_F = np.cumsum(residuals.sizes_F)
    row_ends_N = np.cumsum(residuals.lengths_N)
    row_F = np.searchsorted(row_ends_N, ends_F - residuals.sizes_F, side="right")
    within_F = ends_F - residuals.sizes_F - (row_ends_N - residuals.lengths_N)[row_F]
    at_F = begin_IV.reshape(-1)[row_F] + within_F
    words_F = residuals.words_F << (at_F & 7)
    stream_P = np.zeros(int(ends_I[-1]) + 2 if len(ends_I) else 2, np.uint8)
    for i in range(3):  # codes do not overlap: a sum is an or
        shifted_F = (words_F >> 8 * i & 255).astype(np.uint8)
        np.bitwise_or.at(stream_P, (at_F >> 3) + i, shifted_F)
    data = stream_P.tobytes()
    return [data[end - size : end] for end, size in zip(ends_I, sizes_I, strict=True)]


def block_bytes(model: Model, lengths_V: _Array, stream: bytes, num_classes: int) -> bytes:
    """Return a block; ``stream`` is its residuals."""
    num_components, num_listed = len(model.codes_RK), len(model.ids_M)
    length_size = 1 if lengths_V.max(initial=0) < 256 else 2
    head = np.array([num_components, num_listed & 255, num_listed >> 8, length_size], np.uint8)
    of_weights = np.stack([model.lows_R.astype(np.int8).view(np.uint8), model.steps_R], 1)
    codes_RK = model.codes_RK.copy()
    codes_RK[1:] += _SIGN
    nibbles = [model.nibbles_VR.reshape(-1), codes_RK.reshape(-1)]
    if num_listed < num_classes:
        nibbles.append(_gap_nibbles(model.ids_M, num_classes))
    flat = np.concatenate(nibbles)
    flat = np.pad(flat, (0, len(flat) % 2), constant_values=NIBBLE).astype(np.uint8)
    return b"".join(
        (
            head.tobytes(),
            of_weights.astype(np.uint8).tobytes(),
            lengths_V.astype(f"<u{length_size}").tobytes(),
            (flat[::2] | flat[1::2] << 4).astype(np.uint8).tobytes(),
            stream,
        )
    )


def low_nibbles(num_listed: _Array | int, num_classes: int) -> _Array:
    """Return how many low nibbles of each gap are stored as such: few where classes are dense."""
    exponent: _Array = np.frexp(num_classes // np.asarray(num_listed))[1]  # its bits
    return (exponent.astype(np.int64) - 1) // 4


def _gap_nibbles(ids_M: _Array, num_classes: int) -> _Array:
    """Return low nibbles of all gaps, then the rest of each: so many times 15, and what is left."""
    gaps_M = np.diff(ids_M, prepend=-1) - 1
    num_low = int(low_nibbles(len(ids_M), num_classes))
    low = [gaps_M >> 4 * n & 15 for n in range(num_low)]
    long_M, short_M = np.divmod(gaps_M >> 4 * num_low, NIBBLE)
    high = np.full(int(long_M.sum()) + len(gaps_M), NIBBLE)
    high[np.cumsum(long_M + 1) - 1] = short_M
    return np.concatenate([np.stack(low, 1).reshape(-1), high]) if low else high


def _order(contexts_NK: _Array, sizes_NK: _Array) -> _Array:
    """Return entries by context, equal ones in ascending order; all others first, padding last."""
    keys_NK = np.where(contexts_NK == OTHERS, 0, contexts_NK + 1)
    keys_NK = np.where(sizes_NK > 0, keys_NK, OTHERS + 2) * _POSITIONS
    keys_NK += np.arange(contexts_NK.shape[1])
    keys_NK.sort(axis=1)
    order_NK: _Array = keys_NK % _POSITIONS
    return order_NK


# --- reading --------------------------------------------------------------------------------------


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
    data_P = np.concatenate([data_P, np.zeros(8, np.uint8)])
    if (ends_N - at_N < HEAD_SIZE).any():
        raise LabelSetError("a block is shorter than its head")
    num_components_N = data_P[at_N].astype(np.int64)
    counts_N = data_P[at_N + 1] | data_P[at_N + 2].astype(np.int64) << 8
    length_sizes_N = data_P[at_N + 3].astype(np.int64)
    if len(at_N) and not (
        num_components_N.min() >= 1
        and num_components_N.max() <= MAX_COMPONENTS
        and counts_N.min() >= 1
        and counts_N.max() <= min(num_classes, MAX_LISTED)
        and length_sizes_N.min() >= 1
        and length_sizes_N.max() <= 2
    ):
        raise LabelSetError("a block has a head that is not valid")
    entries_N = counts_N + (counts_N < num_classes)
    lengths_at_N = at_N + HEAD_SIZE + 2 * num_components_N
    nibbles_at_N = 2 * (lengths_at_N + length_sizes_N * num_views_N)
    codes_at_N = nibbles_at_N + num_components_N * num_views_N
    gaps_at_N = codes_at_N + num_components_N * entries_N
    if ((gaps_at_N + 1) // 2 > ends_N).any():
        raise LabelSetError("a block is shorter than its parts")
    starts_N, lengths_N, bits_N = _lengths(
        data_P, lengths_at_N, length_sizes_N, num_views_N, views_N
    )
    streams_at_N = ends_N - (bits_N + 7) // 8
    if (streams_at_N * 2 < gaps_at_N).any():
        raise LabelSetError("a block is shorter than its residuals")
    ids_NM, left_N = _ids(data_P, gaps_at_N, 2 * streams_at_N, counts_N, num_classes)
    if strict:
        _check_padding(data_P, 2 * streams_at_N, left_N, ends_N, bits_N)

    slots_K = np.arange(int(entries_N.max(initial=1)))
    levels_NK = np.zeros((len(at_N), len(slots_K)), np.int64)
    for r in range(int(num_components_N.max(initial=0))):
        has_N = r < num_components_N
        low_at_N = at_N + HEAD_SIZE + 2 * np.where(has_N, r, 0)
        low_N, step_N = data_P[low_at_N].view(np.int8).astype(np.int64), data_P[low_at_N + 1]
        nibble_N = _nibbles(data_P, nibbles_at_N + views_N * num_components_N + r * has_N)
        weight_N = (_WEIGHT_OF_LOW * low_N + step_N * nibble_N) * has_N
        codes_NK = _nibbles(
            data_P, np.where(has_N, codes_at_N + r * entries_N, 0)[:, None] + slots_K
        )
        levels_NK += weight_N[:, None] * (codes_NK - _SIGN * (r > 0))
    is_entry_NK = slots_K < entries_N[:, None]
    is_others_NK = (slots_K == counts_N[:, None]) & is_entry_NK
    sizes_NK = np.where(is_others_NK, (num_classes - counts_N)[:, None], is_entry_NK)
    levels_NK += _residuals(
        data_P, 8 * streams_at_N + starts_N, lengths_N, levels_NK, sizes_NK, is_others_NK, strict
    )
    weights_NK = np.where(is_entry_NK, levels_NK, 1 << 40)
    weights_NK = np.minimum(weights_NK - weights_NK.min(axis=1, keepdims=True), _LOWEST)
    weights_NK = np.exp(weights_NK.astype(np.float32) / np.float32(-LEVELS_PER_NAT)) * is_entry_NK
    weights_NK /= (weights_NK * sizes_NK).sum(axis=1, keepdims=True, dtype=np.float32)
    tail_N = (weights_NK * is_others_NK).sum(axis=1)
    probs_NM = (weights_NK * ~is_others_NK)[:, : ids_NM.shape[1]]
    return SharedRows(ids_NM, np.ascontiguousarray(probs_NM), counts_N, tail_N)


def _nibbles(data_P: _Array, at: _Array) -> _Array:
    """Return the nibbles at these offsets, int64; 0 beyond the end."""
    at = np.minimum(at, 2 * len(data_P) - 2)
    found: _Array = (data_P[at >> 1] >> (4 * (at & 1)).astype(np.uint8)) & np.uint8(NIBBLE)
    return found.astype(np.int64)


def _lengths(
    data_P: _Array, at_N: _Array, sizes_N: _Array, num_views_N: _Array, views_N: _Array
) -> tuple[_Array, _Array, _Array]:
    """Return where the residuals of the views begin, how many bits they have, and all views'."""
    slots_V = np.arange(int(num_views_N.max(initial=1)))
    place_NV = np.minimum(at_N[:, None] + sizes_N[:, None] * slots_V, len(data_P) - 2)
    lengths_NV = data_P[place_NV].astype(np.int64)
    lengths_NV += (data_P[place_NV + 1].astype(np.int64) << 8) * (sizes_N == 2)[:, None]
    lengths_NV *= slots_V < num_views_N[:, None]
    ends_NV = lengths_NV.cumsum(axis=1)
    row_N = np.arange(len(at_N))
    lengths_N = lengths_NV[row_N, views_N]
    return ends_NV[row_N, views_N] - lengths_N, lengths_N, ends_NV[:, -1]


def _ids(
    data_P: _Array, at_N: _Array, ends_N: _Array, counts_N: _Array, num_classes: int
) -> tuple[_Array, _Array]:
    """Return the listed classes, N x M, 0 beyond their number, and how many nibbles are left."""
    slots_M = np.arange(int(counts_N.max(initial=1)))
    is_listed_NM = slots_M < counts_N[:, None]
    ids_NM = np.where(is_listed_NM, slots_M, 0)
    left_N = ends_N - at_N
    (some,) = np.nonzero(counts_N < num_classes)
    if not len(some):
        return ids_NM, left_N
    num_low_N = low_nibbles(counts_N[some], num_classes)
    listed_N = counts_N[some]
    high_at_N = at_N[some] + num_low_N * listed_N
    spans_N = ends_N[some] - high_at_N
    if (spans_N < listed_N).any():
        raise LabelSetError("a block is shorter than its list of classes")
    slots_G = np.arange(int(spans_N.max()))
    pieces_NG = _nibbles(data_P, high_at_N[:, None] + slots_G)
    pieces_NG *= slots_G < spans_N[:, None]
    is_end_NG = (pieces_NG != NIBBLE) & (slots_G < spans_N[:, None])
    if (is_end_NG.sum(axis=1) != listed_N).any():
        raise LabelSetError("a block does not list as many classes as it says")
    is_listed_SM = is_listed_NM[some]
    ends_SM = np.zeros(is_listed_SM.shape, np.int64)
    ends_SM[is_listed_SM] = pieces_NG.cumsum(axis=1)[is_end_NG]
    gaps_SM = np.diff(ends_SM, axis=1, prepend=0) * is_listed_SM
    gaps_SM <<= 4 * num_low_N[:, None]
    for n in range(int(num_low_N.max())):
        low_SM = _nibbles(data_P, (at_N[some] + n)[:, None] + num_low_N[:, None] * slots_M)
        gaps_SM += np.where((n < num_low_N)[:, None] & is_listed_SM, low_SM << 4 * n, 0)
    found_SM = ((gaps_SM + 1) * is_listed_SM).cumsum(axis=1) - 1
    if (found_SM.max(axis=1) >= num_classes).any():
        raise LabelSetError(f"a block names a class above {num_classes - 1}")
    ids_NM[some] = found_SM * is_listed_SM
    left_N[some] = is_end_NG[:, ::-1].argmax(axis=1) - (is_end_NG.shape[1] - spans_N)
    return ids_NM, left_N


def _check_padding(
    data_P: _Array, nibble_ends_N: _Array, left_N: _Array, ends_N: _Array, bits_N: _Array
) -> None:
    """Raise LabelSetError unless at most one nibble of 15, and zeros, pad the parts of blocks."""
    is_padded_N = left_N > 0
    last_N = _nibbles(data_P, nibble_ends_N - 1)
    unused_N = data_P[ends_N - 1] >> ((bits_N - 1) % 8 + 1)
    if (left_N > 1).any() or (last_N[is_padded_N] != NIBBLE).any() or (unused_N[bits_N > 0]).any():
        raise LabelSetError("a block has bits after the end of a part")


def _residuals(
    data_P: _Array,
    begin_N: _Array,
    lengths_N: _Array,
    levels_NK: _Array,
    sizes_NK: _Array,
    is_others_NK: _Array,
    strict: bool,
) -> _Array:
    """Return what residuals subtract from the levels, N x K, negated."""
    contexts_NK = contexts(levels_NK, sizes_NK, is_others_NK)
    order_NK = _order(contexts_NK, sizes_NK)
    sorted_NK = np.take_along_axis(contexts_NK, order_NK, 1)
    num_entries_N = (sizes_NK > 0).sum(axis=1)
    added_NK = np.zeros_like(levels_NK)
    ends_N = begin_N + lengths_N
    (rows_A,) = np.nonzero(lengths_N)
    bit_A, place_A = begin_N[rows_A], np.zeros(len(rows_A), np.int64)
    while len(rows_A):
        symbol_A, bit_A = _next(RUNS, data_P, bit_A, sorted_NK[rows_A, place_A])
        place_A = place_A + symbol_A
        is_beyond_A = place_A >= num_entries_N[rows_A]
        if strict and is_beyond_A.any():
            raise LabelSetError("residuals of a label go beyond its entries")
        place_A = np.minimum(place_A, num_entries_N[rows_A] - 1)
        (value_B,) = np.nonzero((symbol_A < LONGEST_RUN) & ~is_beyond_A)
        row_B, place_B = rows_A[value_B], place_A[value_B]
        context_B = sorted_NK[row_B, place_B]
        symbol_B, bit_A[value_B] = _next(VALUES, data_P, bit_A[value_B], context_B)
        added_NK[row_B, order_NK[row_B, place_B]] = -VALUE_OF[symbol_B] * STEPS[context_B]
        place_A[value_B] += 1
        is_left_A = bit_A < ends_N[rows_A]
        if (
            strict
            and ((bit_A > ends_N[rows_A]) | (is_left_A & (place_A >= num_entries_N[rows_A]))).any()
        ):
            raise LabelSetError("residuals of a label do not end where its length says")
        is_left_A &= place_A < num_entries_N[rows_A]
        rows_A, bit_A, place_A = rows_A[is_left_A], bit_A[is_left_A], place_A[is_left_A]
    return added_NK


def _next(codes: Codes, data_P: _Array, bit_A: _Array, context_A: _Array) -> tuple[_Array, _Array]:
    """Return the symbols at these bits, and the bits after them."""
    at_A = np.minimum(bit_A >> 3, len(data_P) - 4)
    words_A = data_P[at_A].astype(np.int64)
    words_A |= data_P[at_A + 1].astype(np.int64) << 8
    words_A |= data_P[at_A + 2].astype(np.int64) << 16
    words_A = (words_A >> (bit_A & 7)) & ((1 << MAX_CODE) - 1)
    return codes.symbols_XW[context_A, words_A], bit_A + codes.sizes_XW[context_A, words_A]
