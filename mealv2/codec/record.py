"""The record of one encoded label: its bytes, how long it is, and its reader in NumPy.

A label keeps its ``k`` likeliest classes in falling order, a curve for their probabilities, and one
number for all others. k stands in a column of its own: one byte, or two (little-endian) where k may
exceed 255. The record is a row of unsigned fields, each lowest bit first, filling every byte from
its lowest bit; zeros fill up the last byte:

=================  ==========================  ================================================
field              bits                        meaning
=================  ==========================  ================================================
tail               6; absent when k = C        index into TAIL_STEPS: last anchor -> tail
curve              5, then 4 for each other    indices into FIRST_STEPS, then CURVE_STEPS: from
                   anchor; absent when k = 1   rank 1 to the first anchor, then from each to the
                                               next
ids                k times ceil(log2 C)        the kept classes, distinct, likeliest first
=================  ==========================  ================================================

Anchors stand at the ranks 2, 3, 4, 6, 8, 12, 16, 24, … (2^i and 3 * 2^i) below k, and at k. A level
is 16 ln(p_1 / p): 0 at rank 1; at an anchor the level of the one before plus the step; linear in
ln(rank) between two. Every class not kept has the tail's level: the last anchor's plus the tail's
step. Levels of anchors and tail that exceed 1024 are 1024. p = exp(-level / 16), over the sum of
that over all C classes: so every p > 0, and the row sums to 1. docs/label-codec.md has an example.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from mealv2.errors import LabelSetError

MIN_CLASSES, MAX_CLASSES = 2, 1_000_000
MAX_KEPT = 65_535

LEVELS_PER_NAT = 16
LOWEST = 1024  # e^-64 of the likeliest: above 0 in float32 with 10^6 classes
TAIL_BITS, FIRST_BITS, CURVE_BITS = 6, 5, 4
TAIL_STEPS = np.arange(64) * 6
# fmt: off
FIRST_STEPS = np.array([
    0, 2, 4, 6, 8, 10, 13, 15, 18, 21, 25, 28, 32, 36, 41, 45,
    51, 56, 62, 68, 75, 82, 90, 99, 108, 117, 128, 139, 151, 163, 177, 192,
])
# fmt: on
CURVE_STEPS = np.array([0, 1, 3, 5, 8, 11, 14, 18, 23, 29, 36, 44, 54, 66, 84, 112])
# 2, 3, 4, 6, 8, 12, …, 65536
ANCHORS = np.array([2] + [rank for i in range(15) for rank in (3 << i, 4 << i)])

_Array = np.ndarray[Any, Any]
_CHUNK_BYTES = 1 << 18  # of records checked in one go


class KeptRows(NamedTuple):
    """Decoded rows, one after another: the classes kept and what every other class has.

    ``indices_E`` and ``probs_E`` (float32) hold the kept classes of all rows; row n's begin at
    ``starts_N[n]``. ``tail_N`` (float32) is the probability of each single class not kept.
    """

    indices_E: _Array
    probs_E: _Array
    starts_N: _Array
    tail_N: _Array


def id_bits(num_classes: int) -> int:
    """Return the bits of a class id, ceil(log2 C)."""
    return (num_classes - 1).bit_length()


def num_bits(counts_N: _Array, num_classes: int) -> _Array:
    """Return the bits of records that keep so many classes, before filling up the last byte."""
    num_anchors_N = anchors_of(counts_N)
    tail_N = TAIL_BITS * (counts_N < num_classes)
    curve_N = CURVE_BITS * num_anchors_N + (FIRST_BITS - CURVE_BITS) * (num_anchors_N > 0)
    bits_N: _Array = tail_N + curve_N + counts_N.astype(np.int64) * id_bits(num_classes)
    return bits_N


def num_bytes(counts_N: _Array, num_classes: int) -> _Array:
    """Return the bytes of records that keep so many classes."""
    return (num_bits(counts_N, num_classes) + 7) >> 3


def anchors_of(counts_N: _Array) -> _Array:
    """Return how many anchors a curve over so many ranks has: those below k, and k (not 1)."""
    return np.searchsorted(ANCHORS, counts_N) + (counts_N > 1)


def decode_rows(counts_N: _Array, payload_P: _Array, num_classes: int) -> KeptRows:
    """Decode records that lie one after another; sizes must be right (see ``check_rows``)."""
    counts_N = counts_N.astype(np.int64)
    ends_N = np.cumsum(counts_N)
    starts_N = ends_N - counts_N
    row_E = np.repeat(np.arange(len(counts_N)), counts_N)
    rank_E = np.arange(len(row_E)) - starts_N[row_E] + 1

    bits_N = num_bits(counts_N, num_classes)
    bytes_N = (bits_N + 7) >> 3
    begin_N = 8 * (np.cumsum(bytes_N) - bytes_N)
    data = np.concatenate([payload_P, np.zeros(4, np.uint8)])
    width = id_bits(num_classes)
    ids_at_N = begin_N + bits_N - width * counts_N
    indices_E = _fields(data, ids_at_N[row_E] + width * (rank_E - 1), width)

    levels_NA, tail_level_N = _levels(data, begin_N, counts_N, num_classes)
    # level = low + (high - low) ln(rank / from) / ln(to / from), between the anchors around a rank
    slot_E = np.searchsorted(ANCHORS, rank_E)
    ranks = np.concatenate([[1], ANCHORS]).astype(np.float32)
    to_E = np.minimum(ranks[slot_E + 1], counts_N[row_E]).astype(np.float32)
    log_from_E = np.log(ranks[slot_E])
    span_E = np.where(rank_E > 1, np.log(to_E) - log_from_E, np.float32(1.0))
    part_E = np.where(rank_E > 1, np.log(rank_E.astype(np.float32)) - log_from_E, 0.0) / span_E
    high_E = levels_NA[row_E, np.minimum(slot_E + 1, levels_NA.shape[1] - 1)]
    low_E = levels_NA[row_E, slot_E]
    weight_E = _weight(low_E + (high_E - low_E) * part_E)
    weight_N = _weight(tail_level_N)

    others_N = num_classes - counts_N
    total_N = np.add.reduceat(weight_E, starts_N, dtype=np.float64) if len(counts_N) else weight_N
    total_N = total_N + others_N * weight_N.astype(np.float64)
    probs_E = (weight_E / total_N[row_E]).astype(np.float32)
    tail_N = np.where(others_N > 0, weight_N / total_N, 0.0).astype(np.float32)
    return KeptRows(indices_E, probs_E, starts_N, tail_N)


def dense_rows(counts_N: _Array, payload_P: _Array, num_classes: int) -> _Array:
    """Return the recovered distributions, float32 N x C, each > 0 and summing to 1."""
    kept = decode_rows(counts_N, payload_P, num_classes)
    row_E = np.repeat(np.arange(len(counts_N)), counts_N)
    dense_NC: _Array = np.repeat(kept.tail_N[:, None], num_classes, axis=1)
    dense_NC[row_E, kept.indices_E] = kept.probs_E
    return dense_NC


def check_rows(counts_N: _Array, payload_P: _Array, num_classes: int) -> None:
    """Raise LabelSetError unless every record is whole and one that an encoder could write."""
    if not MIN_CLASSES <= num_classes <= MAX_CLASSES:
        raise LabelSetError(
            f"encoded labels of {num_classes} classes: {MIN_CLASSES} to 10^6 may be"
        )
    most = min(num_classes, MAX_KEPT)
    if len(counts_N) and not 1 <= counts_N.min() <= counts_N.max() <= most:
        raise LabelSetError(f"an encoded label must keep 1 to {most} classes")
    ends_N = np.cumsum(num_bytes(counts_N, num_classes))
    expected = int(ends_N[-1]) if len(ends_N) else 0
    if expected != len(payload_P):
        raise LabelSetError(f"encoded labels need {expected} bytes and have {len(payload_P)}")
    for first, last in _chunks(ends_N):
        begin = int(ends_N[first - 1]) if first else 0
        _check_fields(counts_N[first:last], payload_P[begin : ends_N[last - 1]], num_classes)


def _check_fields(counts_N: _Array, payload_P: _Array, num_classes: int) -> None:
    bits_N = num_bits(counts_N, num_classes)
    last_N = np.cumsum((bits_N + 7) >> 3) - 1
    used_N = (bits_N - 1) % 8 + 1  # bits of the last byte
    if (payload_P[last_N] >> used_N).any():
        raise LabelSetError("an encoded label has bits behind its end")
    indices_E = decode_rows(counts_N, payload_P, num_classes).indices_E
    if (indices_E >= num_classes).any():
        raise LabelSetError(f"an encoded label names a class above {num_classes - 1}")
    row_E = np.repeat(np.arange(len(counts_N)), counts_N)
    names_E = np.sort(row_E * num_classes + indices_E)
    if (names_E[1:] == names_E[:-1]).any():
        raise LabelSetError("an encoded label names a class twice")


def _chunks(ends_N: _Array) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows of at most ``_CHUNK_BYTES`` each, or one."""
    first = 0
    while first < len(ends_N):
        begin = int(ends_N[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends_N, begin + _CHUNK_BYTES, side="right")))
        yield first, last
        first = last


def _levels(
    data: _Array, begin_N: _Array, counts_N: _Array, num_classes: int
) -> tuple[_Array, _Array]:
    """Return (levels of rank 1 and every anchor N x (1 + A), level of the tail N)."""
    num_anchors_N = anchors_of(counts_N)
    has_tail_N = counts_N < num_classes
    tail_N = np.where(has_tail_N, TAIL_STEPS[_fields(data, begin_N, TAIL_BITS)], 0)
    at_N = begin_N + TAIL_BITS * has_tail_N
    steps_NA = np.zeros((len(counts_N), 1 + max(1, int(num_anchors_N.max(initial=0)))), np.int64)
    for slot in range(1, steps_NA.shape[1]):
        table = FIRST_STEPS if slot == 1 else CURVE_STEPS
        width = FIRST_BITS if slot == 1 else CURVE_BITS
        has_N = num_anchors_N >= slot
        codes_N = _fields(data, np.where(has_N, at_N, 0), width)
        steps_NA[:, slot] = np.where(has_N, table[codes_N], 0)
        at_N = at_N + width
    levels_NA = np.minimum(np.cumsum(steps_NA, axis=1), LOWEST)
    return levels_NA, np.minimum(levels_NA[:, -1] + tail_N, LOWEST)


def _weight(levels: _Array) -> _Array:
    weights: _Array = np.exp(levels.astype(np.float32) / np.float32(-LEVELS_PER_NAT))
    return weights


def _fields(data: _Array, at_F: _Array, width: int) -> _Array:
    """Return fields of up to 20 bits that begin at these bits of padded bytes."""
    byte_F = at_F >> 3
    word_F = data[byte_F].astype(np.int64)
    for i in range(1, (width + 14) // 8):
        word_F |= data[byte_F + i].astype(np.int64) << (8 * i)
    fields_F: _Array = (word_F >> (at_F & 7)) & ((1 << width) - 1)
    return fields_F
