"""Encoded labels: rows of records on a device, picked, decoded, and as bytes."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mealv2.codec.record import check_rows
from mealv2.codec.tensors import Kept, decode, num_bits
from mealv2.errors import LabelSetError

_HEADER = struct.Struct("<8sIBxxxQ")  # magic, classes, bytes of a count, rows
_MAGIC = b"MEALREC1"


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; on the CPU it is there when this returns.

    To a GPU it goes through page-locked memory: from any other, the copy waits for what the device
    has still to do.
    """
    if device.type == "cpu":  # a copy to the CPU that nobody waits for is read too early
        return tensor.to(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # from a cache that keeps it until it is copied
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True, eq=False)
class EncodedLabels:
    """Soft labels of N views in records of varying length, as they lie in a shard.

    ``counts_N`` int32, the classes that each keeps; ``payload_P`` uint8, the records one after
    another; ``count_size`` the bytes that a count takes on disk. ``longest``, where it is known, is
    the greatest count: labels that are on a GPU are decoded without waiting for it then.
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
            picked = torch.as_tensor(rows, device=order_R.device)
            order_R = order_R[picked if len(picked) else picked.long()]  # [] is float to torch
        ends_N = self.ends()
        sizes_R = self.sizes()[order_R]
        # byte b of the result is byte b + shift of the payload, with one shift for each row
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
        """The bytes that the rows take on disk: records and counts."""
        return len(self.payload_P) + self.count_size * len(self)

    def sizes(self) -> Tensor:
        """Return the bytes of each record, int64 N."""
        return (num_bits(self.counts_N, self.num_classes) + 7) >> 3

    def ends(self) -> Tensor:
        """Return where each record ends in the payload, int64 N."""
        return self.sizes().cumsum(0)

    def to(self, device: torch.device) -> "EncodedLabels":
        """Return the same labels on a device; on the CPU they are there when this returns."""
        longest = self.longest
        if longest is None and self.counts_N.device.type == "cpu":
            longest = int(self.counts_N.numpy().max(initial=1))
        counts_N, payload_P = to_device(self.counts_N, device), to_device(self.payload_P, device)
        return EncodedLabels(counts_N, payload_P, self.num_classes, self.count_size, longest)

    @staticmethod
    def concat(parts: "Sequence[EncodedLabels]") -> "EncodedLabels":
        """Return the rows of several labels of the same classes, one after another."""
        if len({(part.num_classes, part.count_size) for part in parts}) != 1:
            raise ValueError("labels of different classes or count sizes cannot be joined")
        return EncodedLabels(
            torch.cat([part.counts_N for part in parts]),
            torch.cat([part.payload_P for part in parts]),
            parts[0].num_classes,
            parts[0].count_size,
        )

    def argmax(self) -> Tensor:
        """Return the likeliest class of each row, int64 N; its step may be 0 to the next."""
        return self.kept().indices_NK[:, 0]

    def kept(self) -> Kept:
        """Decode, once: the classes kept and their probabilities, where the labels are."""
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
            raise LabelSetError(f"encoded labels are cut off: {len(data)} bytes")
        magic, num_classes, count_size, num_rows = _HEADER.unpack_from(data)
        if magic != _MAGIC or any(data[13:16]):
            raise LabelSetError("these are not encoded labels, or of another version")
        if count_size not in (1, 2):
            raise LabelSetError(f"encoded labels have counts of 1 or 2 bytes, not {count_size}")
        begin = _HEADER.size + num_rows * count_size
        if begin > len(data):
            raise LabelSetError(f"encoded labels are cut off: {num_rows} rows, {len(data)} bytes")
        counts_N = np.frombuffer(data, f"<u{count_size}", num_rows, _HEADER.size).astype(np.int32)
        payload_P = np.frombuffer(data, np.uint8, offset=begin).copy()
        check_rows(counts_N, payload_P, num_classes)
        tensors = torch.from_numpy(counts_N), torch.from_numpy(payload_P)
        return EncodedLabels(*tensors, num_classes, count_size)
