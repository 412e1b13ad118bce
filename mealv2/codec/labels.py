"""Encoded labels: rows of records on a device, selected, decoded, and as bytes.

mealv2.codec.record describes the fields of a record.
"""

import struct
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from mealv2.codec.record import (
    ANCHORS,
    CURVE_BITS,
    CURVE_STEPS,
    FIRST_BITS,
    FIRST_STEPS,
    LEVELS_PER_NAT,
    LOWEST,
    STEPS,
    TAIL_BITS,
    check_rows,
    id_bits,
)
from mealv2.errors import LabelSetError

_HEADER = struct.Struct("<8sIBxxxQ")  # magic, classes, bytes of a count, rows
_MAGIC = b"MEALREC1"


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; a copy to the CPU is complete on return.

    A copy to a GPU uses page-locked memory: any other copy waits for the device's pending work.
    """
    if device.type == "cpu":  # an asynchronous copy to the CPU is read too early
        return tensor.to(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # torch keeps the memory until the copy is done
    return tensor.to(device, non_blocking=True)


class Kept(NamedTuple):
    """Decoded labels: the classes kept, padded to the longest row, and the tail.

    ``indices_NK`` int64 and ``probs_NK`` float32 are 0 where ``is_kept_NK`` is false; ``tail_N``
    float32 is the probability of each class not kept.
    """

    indices_NK: Tensor
    probs_NK: Tensor
    is_kept_NK: Tensor
    tail_N: Tensor

    def spread(self, values_NK: Tensor, others_N: Tensor, num_classes: int) -> Tensor:
        """Return N x C: ``values_NK`` at the kept classes, ``others_N`` at all other classes."""
        # the padding goes to an extra last column: a boolean mask would wait for the device
        spread_NC = others_N[:, None].repeat(1, num_classes + 1)
        indices_NK = torch.where(self.is_kept_NK, self.indices_NK, num_classes)
        return spread_NC.scatter_(1, indices_NK, values_NK)[:, :num_classes]

    def mask(self, num_classes: int) -> Tensor:
        """Return whether each class is kept, bool N x C."""
        zeros_N = torch.zeros_like(self.tail_N)
        return self.spread(self.is_kept_NK.to(zeros_N.dtype), zeros_N, num_classes) > 0


@dataclass(frozen=True, eq=False)
class EncodedLabels:
    """Soft labels of N views in records of varying length, as a shard stores them.

    ``counts_N`` int32 is the number of classes that each view keeps; ``payload_P`` uint8 has the
    records in order; ``count_size`` is the bytes of a count on disk. ``longest`` is the largest
    count if it is known: then decoding on a GPU does not wait for the device.
    """

    counts_N: Tensor
    payload_P: Tensor
    num_classes: int
    count_size: int = 1
    longest: int | None = None

    def __len__(self) -> int:
        return len(self.counts_N)

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> "EncodedLabels":
        """Return rows by index, slice, or indices in any order; an int gives one row."""
        order_R = torch.arange(len(self), device=self.counts_N.device)
        if isinstance(rows, int | np.integer):
            order_R = order_R[int(rows)][None]
        elif isinstance(rows, slice):
            order_R = order_R[rows]
        else:
            selected = torch.as_tensor(rows, device=order_R.device)
            order_R = order_R[selected if len(selected) else selected.long()]  # torch: [] is float
        ends_N = self.ends()
        sizes_R = self.sizes()[order_R]
        # byte b of a row in the result is byte b + shift of the payload
        shift_R = ends_N[order_R] - sizes_R.cumsum(0)
        source_P = torch.repeat_interleave(shift_R, sizes_R)
        source_P += torch.arange(len(source_P), device=source_P.device)
        return EncodedLabels(
            self.counts_N[order_R], self.payload_P[source_P], self.num_classes, self.count_size
        )

    def rows(self, order_N: Tensor) -> "EncodedLabels":
        """Return rows by index, in that order."""
        return self[order_N]

    @property
    def nbytes(self) -> int:
        """The bytes of the rows on disk: records and counts."""
        return len(self.payload_P) + self.count_size * len(self)

    def sizes(self) -> Tensor:
        """Return the bytes of each record, int64 N."""
        return (num_bits(self.counts_N, self.num_classes) + 7) >> 3

    def ends(self) -> Tensor:
        """Return the end of each record in the payload, int64 N."""
        return self.sizes().cumsum(0)

    def to(self, device: torch.device) -> "EncodedLabels":
        """Return the same labels on a device; a copy to the CPU is complete on return."""
        longest = self.longest
        if longest is None and self.counts_N.device.type == "cpu":
            longest = int(self.counts_N.numpy().max(initial=1))
        counts_N, payload_P = to_device(self.counts_N, device), to_device(self.payload_P, device)
        return EncodedLabels(counts_N, payload_P, self.num_classes, self.count_size, longest)

    @staticmethod
    def concat(parts: "Sequence[EncodedLabels]") -> "EncodedLabels":
        """Return the rows of several labels of the same classes, in order."""
        if len({(part.num_classes, part.count_size) for part in parts}) != 1:
            raise ValueError("cannot concatenate labels of different classes or count sizes")
        return EncodedLabels(
            torch.cat([part.counts_N for part in parts]),
            torch.cat([part.payload_P for part in parts]),
            parts[0].num_classes,
            parts[0].count_size,
        )

    def argmax(self) -> Tensor:
        """Return the likeliest class of each row, int64 N; the first of several equal ones."""
        return self.kept().indices_NK[:, 0]

    def kept(self) -> Kept:
        """Decode, once: the classes kept and their probabilities, on the labels' device."""
        return self._kept

    @cached_property
    def _kept(self) -> Kept:
        return decode(self.counts_N, self.payload_P, self.num_classes, longest=self.longest)

    def to_dense(self) -> Tensor:
        """Return the recovered distributions, float32 N x C, each > 0 and summing to 1."""
        kept = self.kept()
        return kept.spread(kept.probs_NK, kept.tail_N, self.num_classes)

    def to_bytes(self) -> bytes:
        """Return a header of 24 bytes, the counts, and the records."""
        header = _HEADER.pack(_MAGIC, self.num_classes, self.count_size, len(self))
        counts = self.counts_N.cpu().numpy().astype(f"<u{self.count_size}")
        return header + counts.tobytes() + self.payload_P.cpu().numpy().tobytes()

    @staticmethod
    def from_bytes(data: bytes) -> "EncodedLabels":
        """Return the labels that ``to_bytes`` wrote; raises LabelSetError for anything else."""
        if len(data) < _HEADER.size:
            raise LabelSetError(f"encoded labels are truncated: {len(data)} bytes")
        magic, num_classes, count_size, num_rows = _HEADER.unpack_from(data)
        if magic != _MAGIC or any(data[13:16]):
            raise LabelSetError("these are not encoded labels of this version")
        if count_size not in (1, 2):
            raise LabelSetError(f"a count has 1 or 2 bytes, not {count_size}")
        begin = _HEADER.size + num_rows * count_size
        if begin > len(data):
            raise LabelSetError(f"encoded labels are truncated: {num_rows} rows, {len(data)} bytes")
        counts_N = np.frombuffer(data, f"<u{count_size}", num_rows, _HEADER.size).astype(np.int32)
        payload_P = np.frombuffer(data, np.uint8, offset=begin).copy()
        check_rows(counts_N, payload_P, num_classes)
        tensors = torch.from_numpy(counts_N), torch.from_numpy(payload_P)
        return EncodedLabels(*tensors, num_classes, count_size)


# --- decoding -------------------------------------------------------------------------------------


def decode(
    counts_N: Tensor, payload_P: Tensor, num_classes: int, *, longest: int | None = None
) -> Kept:
    """Decode contiguous records on their device; waits for it once if ``longest`` is None."""
    counts_N = counts_N.int()
    if longest is None:
        longest = int(counts_N.max()) if len(counts_N) else 1
    rank_K = torch.arange(1, longest + 1, dtype=torch.int32, device=counts_N.device)
    is_kept_NK = rank_K <= counts_N[:, None]
    bits_N = num_bits(counts_N, num_classes)
    sizes_N = (bits_N + 7) >> 3
    begin_N = sizes_N.cumsum(0) - sizes_N
    width = id_bits(num_classes)
    # every row is read to the length of the longest, the last one beyond the payload
    words_P = _words(payload_P, padding=16 + (width * longest >> 3))

    ids_at_N = (bits_N - width * counts_N).int()
    ids_at_NK = ids_at_N[:, None] + width * (rank_K - 1)
    indices_NK = _fields(words_P, begin_N, ids_at_NK, (1 << width) - 1) * is_kept_NK

    has_tail_N = counts_N < num_classes
    levels_NA, tail_N = _levels(words_P, begin_N, counts_N, has_tail_N, longest)
    weights_NK = weights(levels_NA, counts_N, is_kept_NK)
    tail_N = (tail_N / -LEVELS_PER_NAT).exp() * has_tail_N
    total_N = weights_NK.sum(dim=1) + (num_classes - counts_N) * tail_N
    weights_NK /= total_N[:, None]
    return Kept(indices_NK.long(), weights_NK, is_kept_NK, tail_N / total_N)


def _levels(
    words_P: Tensor, begin_N: Tensor, counts_N: Tensor, has_tail_N: Tensor, longest: int
) -> tuple[Tensor, Tensor]:
    """Return integral levels, float32: N x (1 + A) of rank 1 and every anchor, N of the tail."""
    device = counts_N.device
    max_levels = bisect_left(ANCHORS, longest) + (longest > 1)
    slot_A = torch.arange(max_levels, dtype=torch.int32, device=device)
    at_NA = TAIL_BITS * has_tail_N.int()[:, None] + curve_offsets(max_levels, device).int()
    is_first_A = slot_A == 0
    masks_A = torch.where(is_first_A, (1 << FIRST_BITS) - 1, (1 << CURVE_BITS) - 1)
    tables_A = torch.where(is_first_A, 0, len(FIRST_STEPS))
    codes_NA = _fields(words_P, begin_N, at_NA, masks_A.int()) + tables_A
    table = _table("steps", device)
    steps_NA = table[codes_NA] * (slot_A < num_anchors(counts_N)[:, None])
    levels_NA = pad(steps_NA, (1, 0)).cumsum(1).clamp_max(LOWEST)
    tails_N = (words_P[begin_N] & (1 << TAIL_BITS) - 1) + (len(FIRST_STEPS) + len(CURVE_STEPS))
    return levels_NA, (levels_NA[:, -1] + table[tails_N]).clamp_max(LOWEST)


def weights(levels_NA: Tensor, counts_N: Tensor, is_kept_NK: Tensor) -> Tensor:
    """Return p / p_1 of the kept ranks, 0 elsewhere, in the dtype of the levels."""
    if levels_NA.shape[1] == 1:
        return is_kept_NK.to(levels_NA.dtype)
    # level = low + (high - low) ln(rank / from) / ln(to / from), between the anchors around a rank
    device, dtype = counts_N.device, levels_NA.dtype
    to_A = _table("anchors", device)[: levels_NA.shape[1] - 1]
    from_A = torch.cat([to_A.new_ones(1), to_A[:-1]])
    span_NA = (torch.minimum(to_A, counts_N[:, None]).to(dtype) / from_A).log()
    slope_NA = levels_NA.diff(dim=1) / torch.where(span_NA > 0, span_NA, 1.0)
    rank_K = torch.arange(1, is_kept_NK.shape[1] + 1, device=device)
    slot_K = torch.bucketize(rank_K, to_A)  # the anchor at or above each rank
    part_K = (rank_K.to(dtype) / from_A[slot_K]).log()
    levels_NK = (
        slope_NA.index_select(1, slot_K).mul_(part_K).add_(levels_NA.index_select(1, slot_K))
    )
    return levels_NK.mul_(-1.0 / LEVELS_PER_NAT).exp_().mul_(is_kept_NK)


def num_anchors(counts_N: Tensor) -> Tensor:
    """Return the number of anchors of curves over these numbers of ranks."""
    anchors = _table("anchors", counts_N.device)
    return torch.bucketize(counts_N.long(), anchors) + (counts_N > 1)


@lru_cache
def _table(name: Literal["anchors", "steps"], device: torch.device) -> Tensor:
    """Return a table of the codec on a device, copied once: each copy waits for the device."""
    with torch.inference_mode(False):  # the table is also used outside of inference mode
        return torch.from_numpy({"anchors": ANCHORS, "steps": STEPS}[name]).to(device)


def num_bits(counts_N: Tensor, num_classes: int) -> Tensor:
    """Return the bits of each record, without the padding of its last byte."""
    num_anchors_N = num_anchors(counts_N)
    curve_N = CURVE_BITS * num_anchors_N + (FIRST_BITS - CURVE_BITS) * (num_anchors_N > 0)
    return TAIL_BITS * (counts_N < num_classes) + curve_N + id_bits(num_classes) * counts_N.long()


def curve_offsets(num_anchors: int, device: torch.device) -> Tensor:
    """Return the offset of each code of a curve, in bits."""
    slot_A = torch.arange(num_anchors, device=device)
    return CURVE_BITS * slot_A + (FIRST_BITS - CURVE_BITS) * (slot_A > 0)


def _words(payload_P: Tensor, *, padding: int) -> Tensor:
    """Return the 32 bits that start at each byte, int32, with zeros after the end."""
    data = pad(payload_P, (0, padding + 3)).int()
    words_P = data[:-3] | data[1:-2] << 8
    words_P |= data[2:-1] << 16
    words_P |= data[3:] << 24
    return words_P


def _fields(words_P: Tensor, begin_N: Tensor, at_NF: Tensor, mask: Tensor | int) -> Tensor:
    """Return fields of up to 20 bits, int32, at these bit offsets in the records."""
    byte_NF = begin_N[:, None] + (at_NF >> 3)
    # on a CPU this is ten times as fast as words_P[byte_NF]
    words_NF = words_P.index_select(0, byte_NF.flatten()).view_as(byte_NF)
    return (words_NF >> (at_NF & 7)) & mask
