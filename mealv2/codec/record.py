"""The record of one encoded label: its bytes, its size, and its decoder in NumPy.

A label keeps its ``k`` likeliest classes in descending order, a curve of their probabilities, and
one number for all others. k is stored separately: one byte, or two (little-endian) if k can exceed
255. The record is a sequence of unsigned fields, lowest bit first; zeros pad the last byte:

=================  ==========================  ================================================
field              bits                        meaning
=================  ==========================  ================================================
tail               6; absent when k = C        index into TAIL_STEPS: last anchor -> tail
curve              5, then 4 for each other    index into FIRST_STEPS: rank 1 to first anchor;
                   anchor; absent when k = 1   then into CURVE_STEPS: each anchor to the next
ids                k times ceil(log2 C)        the kept classes, distinct, likeliest first
=================  ==========================  ================================================

Anchors are the ranks 2, 3, 4, 6, 8, 12, 16, 24, … (2^i and 3 * 2^i) below k, and k. A level is
16 ln(p_1 / p): 0 at rank 1; at an anchor, the previous anchor's level plus the step; between
anchors, linear in ln(rank). Every class not kept has the level of the last anchor plus the tail's
step. Levels of anchors and tail are at most 1024. p = exp(-level / 16), normalised over all C
classes, so every p > 0. docs/reference/label-codec.md has an example.
"""

from collections.abc import Iterator
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np

from mealv2.errors import LabelSetError

MIN_CLASSES, MAX_CLASSES = 2, 1_000_000
MAX_KEPT = 65_535

LEVELS_PER_NAT = 16
LOWEST = 1024  # e^-64: above 0 in float32 with 10^6 classes
TAIL_BITS, FIRST_BITS, CURVE_BITS = 6, 5, 4
TAIL_STEPS = np.arange(64) * 6
# fmt: off
FIRST_STEPS = np.array([
    0, 2, 4, 6, 8, 10, 13, 15, 18, 21, 25, 28, 32, 36, 41, 45,
    51, 56, 62, 68, 75, 82, 90, 99, 108, 117, 128, 139, 151, 163, 177, 192,
])
# fmt: on
CURVE_STEPS = np.array([0, 1, 3, 5, 8, 11, 14, 18, 23, 29, 36, 44, 54, 66, 84, 112])
# the tables concatenated, as floats
STEPS = np.concatenate([FIRST_STEPS, CURVE_STEPS, TAIL_STEPS]).astype(np.float32)
# 2, 3, 4, 6, 8, 12, …, 65536
ANCHORS = np.array([2] + [rank for i in range(15) for rank in (3 << i, 4 << i)])

_Array = np.ndarray[Any, Any]
_CHUNK_BYTES = 1 << 22  # records per chunk: many rows of each k, and all fit in a cache


class KeptRows(NamedTuple):
    """Decoded rows, concatenated.

    ``indices_E`` (int32) and ``probs_E`` (float32) have the kept classes; row n starts at
    ``starts_N[n]``. ``tail_N`` (float32) is the probability of each class not kept.
    """

    indices_E: _Array
    probs_E: _Array
    starts_N: _Array
    tail_N: _Array


@cache
def id_bits(num_classes: int) -> int:
    """Return the bits of a class id, ceil(log2 C)."""
    return (num_classes - 1).bit_length()


def num_bits(counts_N: _Array, num_classes: int) -> _Array:
    """Return the bits of records by the number of classes kept, without padding."""
    num_anchors_N = anchors_of(counts_N)
    tail_N = TAIL_BITS * (counts_N < num_classes)
    curve_N = CURVE_BITS * num_anchors_N + (FIRST_BITS - CURVE_BITS) * (num_anchors_N > 0)
    bits_N: _Array = tail_N + curve_N + counts_N.astype(np.int64) * id_bits(num_classes)
    return bits_N


def num_bytes(counts_N: _Array, num_classes: int) -> _Array:
    """Return the bytes of records by the number of classes kept."""
    return (num_bits(counts_N, num_classes) + 7) >> 3


def anchors_of(counts_N: _Array) -> _Array:
    """Return the number of anchors of curves: those below k, and k unless it is 1."""
    return np.searchsorted(ANCHORS, counts_N) + (counts_N > 1)


def decode_rows(counts_N: _Array, payload_P: _Array, num_classes: int) -> KeptRows:
    """Decode contiguous records, which must pass ``check_rows``."""
    counts_N = counts_N.astype(np.int64)
    starts_N = np.cumsum(counts_N) - counts_N
    indices_E = np.empty(int(counts_N.sum()), np.uint32)
    probs_E = np.empty(len(indices_E), np.float32)
    tail_N = np.zeros(len(counts_N), np.float32)
    for k, rows_G, layout, words_GS in _groups(counts_N, payload_P, num_classes):
        weights_GK = _weights(words_GS, layout)
        total_G = weights_GK[:, :k].sum(axis=1)
        total_G += np.float32(num_classes - k) * weights_GK[:, k]
        _put(indices_E, starts_N[rows_G], _ids(words_GS, layout))
        _put(probs_E, starts_N[rows_G], weights_GK[:, :k] / total_G[:, None])
        if k < num_classes:
            tail_N[rows_G] = weights_GK[:, k] / total_G
    return KeptRows(indices_E.view(np.int32), probs_E, starts_N, tail_N)


def dense_rows(counts_N: _Array, payload_P: _Array, num_classes: int) -> _Array:
    """Return the recovered distributions, float32 N x C, each > 0 and summing to 1."""
    kept = decode_rows(counts_N, payload_P, num_classes)
    row_E = np.repeat(np.arange(len(counts_N)), counts_N)
    dense_NC: _Array = np.repeat(kept.tail_N[:, None], num_classes, axis=1)
    dense_NC[row_E, kept.indices_E] = kept.probs_E
    return dense_NC


def check_rows(counts_N: _Array, payload_P: _Array, num_classes: int) -> None:
    """Raise LabelSetError for a record that no encoder writes."""
    if not MIN_CLASSES <= num_classes <= MAX_CLASSES:
        raise LabelSetError(
            f"encoded labels must have {MIN_CLASSES} to 10^6 classes, not {num_classes}"
        )
    max_kept = min(num_classes, MAX_KEPT)
    if len(counts_N) and not 1 <= counts_N.min() <= counts_N.max() <= max_kept:
        raise LabelSetError(f"an encoded label must keep 1 to {max_kept} classes")
    ends_N = np.cumsum(num_bytes(counts_N, num_classes))
    expected = int(ends_N[-1]) if len(ends_N) else 0
    if expected != len(payload_P):
        raise LabelSetError(f"encoded labels need {expected} bytes and have {len(payload_P)}")
    for k, _, layout, words_GS in _groups(counts_N, payload_P, num_classes):
        if ((words_GS[:, -1] & 255) >> layout.last_bits).any():
            raise LabelSetError("an encoded label has bits after its end")
        ids_GK = _ids(words_GS, layout)
        if ids_GK.max() >= num_classes:
            raise LabelSetError(f"an encoded label names a class above {num_classes - 1}")
        ids_GK.sort(axis=1)
        if k > 1 and (ids_GK[:, 1:] == ids_GK[:, :-1]).any():
            raise LabelSetError("an encoded label names a class twice")


# --- records of equal k, whose fields have the same offsets ---------------------------------------


class _Layout(NamedTuple):
    """The layout of all records that keep k of C classes; fields F are the curve and the tail.

    A field is ``words >> shift & mask`` of the 32 bits that start at its first byte.
    """

    size: int  # bytes
    last_bits: int  # used bits of the last byte
    step_bytes_F: _Array
    step_shifts_F: _Array
    step_masks_F: _Array
    step_tables_F: _Array  # offset of each field's table in STEPS
    exponents_FK: _Array  # steps @ exponents = log weights of the ranks and the tail
    id_bytes_K: _Array
    id_shifts_K: _Array
    id_mask: np.uint32


def _layout(k: int, num_classes: int) -> _Layout:
    num_anchors, has_tail = int(anchors_of(np.array(k))), int(k < num_classes)
    curve = [FIRST_BITS, *[CURVE_BITS] * num_anchors][:num_anchors]
    widths_F = np.array(curve + [TAIL_BITS] * has_tail)
    curve_at = TAIL_BITS * has_tail + np.cumsum(curve, dtype=np.int64) - curve
    at_F = np.concatenate([curve_at, [0] * has_tail]).astype(np.int64)
    tables = [0, *[len(FIRST_STEPS)] * num_anchors][:num_anchors]
    tables += [len(FIRST_STEPS) + len(CURVE_STEPS)] * has_tail
    bits, width = int(num_bits(np.array(k), num_classes)), id_bits(num_classes)
    ids_at_K = bits - width * np.arange(k, 0, -1)
    # level = low + step ln(rank / from) / ln(to / from) between the anchors around a rank: a step
    # adds nothing up to ``from``, and everything beyond ``to``
    ends = np.log(np.array([1, *ANCHORS[: max(0, num_anchors - 1)], k], np.float64))
    from_A, to_A = ends[:num_anchors, None], ends[1 : num_anchors + 1, None]
    part_FK = np.ones((len(at_F), k + 1))
    part_FK[num_anchors:, :k] = 0.0
    ranks_AK = (np.log(np.arange(1, k + 1)) - from_A) / (to_A - from_A)
    part_FK[:num_anchors, :k] = ranks_AK.clip(0.0, 1.0)
    return _Layout(
        size=(bits + 7) >> 3,
        last_bits=(bits - 1) % 8 + 1,
        step_bytes_F=at_F >> 3,
        step_shifts_F=(at_F & 7).astype(np.uint32),
        step_masks_F=((1 << widths_F) - 1).astype(np.uint32),
        step_tables_F=np.array(tables, np.uint32),
        exponents_FK=(part_FK / -LEVELS_PER_NAT).astype(np.float32),
        id_bytes_K=ids_at_K >> 3,
        id_shifts_K=(ids_at_K & 7).astype(np.uint32),
        id_mask=np.uint32((1 << width) - 1),
    )


_cached_layout = lru_cache(maxsize=1024)(_layout)


def _groups(
    counts_N: _Array, payload_P: _Array, num_classes: int
) -> Iterator[tuple[int, _Array, _Layout, _Array]]:
    """Yield (k, rows that keep k, their layout, the 32 bits that start at each of their bytes)."""
    sizes = num_bytes(np.arange(1 + int(counts_N.max(initial=0))), num_classes)
    ends_N = np.cumsum(sizes[counts_N])
    for first, last in _chunks(ends_N):
        begin_N = np.concatenate([[ends_N[first - 1] if first else 0], ends_N[first : last - 1]])
        data = np.concatenate([payload_P[begin_N[0] : ends_N[last - 1]], np.zeros(3, np.uint8)])
        begin_N -= begin_N[0]
        keys = counts_N[first:last].astype(np.uint16)  # NumPy sorts 16 bits in linear time
        order = np.argsort(keys, kind="stable")
        for rows_G in np.split(order, np.flatnonzero(np.diff(keys[order])) + 1):
            k = int(keys[rows_G[0]])
            layout = (_cached_layout if k <= 255 else _layout)(k, num_classes)
            bytes_GS = _runs(data, layout.size + 3)[begin_N[rows_G]]
            shape, strides = (len(rows_G), layout.size), (layout.size + 3, 1)
            words_GS = np.ndarray(shape, "<u4", bytes_GS, strides=strides).copy()
            yield k, first + rows_G, layout, words_GS


def _runs(flat: _Array, num: int) -> _Array:
    """Return a view of ``num`` entries from each offset as one item, for copies in one step."""
    shape = (len(flat) - num + 1,)
    return np.ndarray(shape, f"V{num * flat.itemsize}", flat, strides=flat.strides)


def _put(flat_E: _Array, starts_G: _Array, rows_GK: _Array) -> None:
    runs = _runs(flat_E, rows_GK.shape[1])
    runs[starts_G] = rows_GK.view(runs.dtype)[:, 0]


def _ids(words_GS: _Array, layout: _Layout) -> _Array:
    ids_GK = words_GS.take(layout.id_bytes_K, axis=1)
    ids_GK >>= layout.id_shifts_K
    ids_GK &= layout.id_mask
    return ids_GK


def _weights(words_GS: _Array, layout: _Layout) -> _Array:
    """Return p / p_1 of the kept ranks, then of each class not kept."""
    codes_GF = words_GS.take(layout.step_bytes_F, axis=1)
    codes_GF >>= layout.step_shifts_F
    codes_GF &= layout.step_masks_F
    codes_GF += layout.step_tables_F
    steps_GF = STEPS.take(codes_GF)
    if steps_GF.sum(axis=1).max() > LOWEST:
        levels_GF = np.minimum(steps_GF.cumsum(axis=1), np.float32(LOWEST))
        steps_GF = np.diff(levels_GF, axis=1, prepend=np.float32(0.0))
    weights_GK: _Array = steps_GF @ layout.exponents_FK
    return np.exp(weights_GK, out=weights_GK)


def _chunks(ends_N: _Array) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows of at most ``_CHUNK_BYTES``, at least one row each."""
    first = 0
    while first < len(ends_N):
        begin = int(ends_N[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends_N, begin + _CHUNK_BYTES, side="right")))
        yield first, last
        first = last
