"""The bytes of a block whose views share a model of components, and how they are written.

docs/reference/label-codec.md describes every byte. V views, M listed classes of C, K entries: the
listed classes in ascending order and, if M is below C, one entry of all others.

=========  ========================================================================================
bytes      1: R, the number of components; 2: M; 1: bytes of a length, 1 or 2
           2 for each component: low (signed) and step, which give a weight of nibble n as
           8 low + step n, in 1/256
           V lengths of residuals, in bits
nibbles    R for each view: weights; R rows of K: codes of components in nats, up to a constant
           of each component; M gaps between ids, in pieces; 15 pads the last byte
bits       the residuals of the views, each without padding; zeros pad the last byte
=========  ========================================================================================
"""

from typing import Any, NamedTuple

import numpy as np

from mealv2.codec.residuals import (
    LEVELS_PER_NAT,
    LONGEST_RUN,
    OTHERS,
    RUNS,
    VALUES,
)

MAX_COMPONENTS = 8
MAX_LISTED = 512
LOW_UNIT = 32  # lows of weights in a nat
NIBBLE = 15
HEAD_SIZE = 4
LOWEST = 64 * LEVELS_PER_NAT  # below the likeliest: above 0 in float32 with 10^6 classes
_POSITIONS = np.int32(1 << 20)  # above all positions of entries, in a sort key

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


class DecodedRows(NamedTuple):
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
    order_NK, has_NK = _order(residuals_NK, contexts_NK, sizes_NK)
    row_E, at_E = np.nonzero(has_NK)
    is_first_E = np.diff(row_E, prepend=-1) != 0
    start_E = np.where(is_first_E, 0, np.roll(at_E, 1) + 1)
    long_E, short_E = np.divmod(at_E - start_E, LONGEST_RUN)
    item_F = np.repeat(np.arange(len(at_E)), long_E + 2)
    step_F = np.arange(len(item_F)) - np.repeat(np.cumsum(long_E + 2) - long_E - 2, long_E + 2)
    is_value_F = step_F > long_E[item_F]
    place_F = np.where(is_value_F, at_E[item_F], start_E[item_F] + LONGEST_RUN * step_F)
    values_E = residuals_NK[row_E, order_NK[row_E, at_E]]
    value_F = (2 * np.abs(values_E) - 2 + (values_E < 0))[item_F]
    run_F = np.where(step_F < long_E[item_F], LONGEST_RUN, short_E[item_F])
    row_F = row_E[item_F]
    contexts_F = contexts_NK[row_F, order_NK[row_F, place_F]]
    return is_value_F, contexts_F, np.where(is_value_F, value_F, run_F), row_F


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
    nibbles = [model.nibbles_VR.reshape(-1), model.codes_RK.reshape(-1)]
    if num_listed < num_classes:
        nibbles.append(_gap_nibbles(model.ids_M, num_classes))
    return b"".join(
        (
            head.tobytes(),
            of_weights.astype(np.uint8).tobytes(),
            lengths_V.astype(f"<u{length_size}").tobytes(),
            _bytes_of_nibbles(np.concatenate(nibbles)),
            stream,
        )
    )


def block_with_model_of_another(nibbles_VR: _Array, lengths_V: _Array, stream: bytes) -> bytes:
    """Return a block that uses the model of the image's first block; ``stream`` is its residuals.

    The first byte says so: 0 for one view, whose count it would be, else one more than the most
    components for lengths of one byte, and two more for lengths of two.
    """
    size = 2 if len(lengths_V) == 1 or lengths_V.max() > 255 else 1
    first = 0 if len(lengths_V) == 1 else MAX_COMPONENTS + size
    lengths = lengths_V.astype(f"<u{size}").tobytes()
    return b"".join((bytes([first]), lengths, _bytes_of_nibbles(nibbles_VR.reshape(-1)), stream))


def _bytes_of_nibbles(nibbles_X: _Array) -> bytes:
    padded_X = np.pad(nibbles_X, (0, len(nibbles_X) % 2), constant_values=NIBBLE).astype(np.uint8)
    return (padded_X[::2] | padded_X[1::2] << 4).astype(np.uint8).tobytes()


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


def _order(residuals_NK: _Array, contexts_NK: _Array, sizes_NK: _Array) -> tuple[_Array, _Array]:
    """Return entries by context, and whether each has a residual.

    Equal contexts are in ascending order; all others come first, padding last.
    """
    keys_NK = np.where(contexts_NK == OTHERS, 0, contexts_NK + 1)
    keys_NK = np.where(sizes_NK > 0, keys_NK, OTHERS + 2).astype(np.int32) * (2 * _POSITIONS)
    keys_NK += np.arange(contexts_NK.shape[1], dtype=np.int32) << 1
    keys_NK += residuals_NK != 0
    keys_NK.sort(axis=1)
    return keys_NK >> 1 & (_POSITIONS - 1), keys_NK & 1
