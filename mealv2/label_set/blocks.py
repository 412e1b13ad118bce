"""The bytes of a block: all labels of one image, as a shard stores them.

A block holds the number of classes that each view keeps (only where it varies), the record of each
view, and the mean logits of each view (only if the set stores them).
docs/reference/label-set-format.md describes every byte.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any, Literal, NamedTuple
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from mealv2.codec import EncodedLabels
from mealv2.codec.record import id_bits, num_bytes
from mealv2.errors import LabelSetError
from mealv2.soft_labels import KeptLogits, Labels, SoftLabels, concat

Form = Literal["curve", "float16", "float32"]

_RATE_MAX_KEPT = 255  # a count of one byte


def key_hash(key: bytes) -> bytes:
    """Return the 8 bytes that index an image: BLAKE2b-64 of its key in UTF-8."""
    return blake2b(key, digest_size=8).digest()


def block_crc(key: bytes, block: bytes | memoryview) -> int:
    """Return the CRC-32 (zlib's) of a key in UTF-8 followed by the image's block."""
    return crc32(block, crc32(key))


def member_bytes(key: str, block: bytes) -> bytes:
    """Return a block followed by its CRC-32: the member of a tar shard."""
    return block + block_crc(key.encode(), block).to_bytes(4, "little")


def block_of_member(key: str, data: bytes) -> bytes:
    """Return the block in what ``member_bytes`` wrote; raises LabelSetError if it is damaged."""
    block = data[:-4]
    if len(data) < 4 or block_crc(key.encode(), block) != int.from_bytes(data[-4:], "little"):
        raise LabelSetError(f"the labels of {key!r} are damaged (CRC-32)")
    return block


class Rows(NamedTuple):
    """Labels of N views, and the ensemble's mean logits if the set stores them."""

    labels: Labels
    logits: KeptLogits | None = None

    def rows(self, order_N: Tensor) -> "Rows":
        """Return rows by index, in that order."""
        logits = None if self.logits is None else self.logits.rows(order_N)
        return Rows(self.labels.rows(order_N), logits)

    def to(self, device: torch.device) -> "Rows":
        """Return the same rows on a device; a copy to the CPU is complete on return."""
        return Rows(self.labels.to(device), None if self.logits is None else self.logits.to(device))

    @staticmethod
    def concat(parts: "Sequence[Rows]") -> "Rows":
        """Return the rows of several parts of one encoding, in order."""
        logits = [part.logits for part in parts if part.logits is not None]
        return Rows(
            concat([part.labels for part in parts]), KeptLogits.concat(logits) if logits else None
        )


@dataclass(frozen=True)
class BlockFormat:
    """How blocks store labels. ``Encoding`` describes and checks the fields."""

    num_classes: int
    form: Form = "curve"
    topk: int | None = None
    logits: bool = False

    @property
    def is_dense(self) -> bool:
        """Whether every class has its own value."""
        return self.form != "curve" and self.topk == self.num_classes

    @cached_property
    def count_size(self) -> int:
        """The bytes of a view's number of classes; 0 where all views keep equally many."""
        if self.form != "curve":
            return 0
        return 1 if self.topk is None or self.topk <= _RATE_MAX_KEPT else 2

    def blocks(self, rows: Rows, num_views: int) -> list[bytes]:
        """Return the block of each image; ``rows``, on the CPU, has its views in order."""
        counts_N, records = self._records(rows.labels)
        counts = counts_N.astype(f"<u{self.count_size}").tobytes() if self.count_size else b""
        logits = b"" if rows.logits is None else _logit_bytes(rows.logits, *self._masks(counts_N))
        ends_N = np.arange(1, len(counts_N) + 1) * self.count_size
        pieces = [
            _split(counts, ends_N[num_views - 1 :: num_views]),
            _split(records, np.cumsum(self._sizes(counts_N))[num_views - 1 :: num_views]),
            _split(logits, np.cumsum(self._logit_sizes(counts_N))[num_views - 1 :: num_views]),
        ]
        return [b"".join(block) for block in zip(*pieces, strict=True)]

    def rows_of(
        self, data: np.ndarray, ends_N: np.ndarray, num_views: int, views_N: np.ndarray
    ) -> Rows:
        """Return one view of each of N blocks; ``data`` uint8 has the blocks in order.

        Raises LabelSetError for a block that this encoding cannot have written.
        """
        layout = self._layout(data, ends_N, num_views)
        return self._gather(data, layout, (np.arange(len(ends_N)), views_N))

    def all_rows_of(self, data: np.ndarray, ends_N: np.ndarray, num_views: int) -> Rows:
        """Return all views of N blocks, image by image; raises as ``rows_of``."""
        layout = self._layout(data, ends_N, num_views)
        if self.logits:
            return self._gather(data, layout, (slice(None), slice(None)))
        # the records of a block are contiguous: copy one piece per block
        begins, ends = layout.record_at_NV[:, 0].tolist(), layout.logit_at_NV[:, 0].tolist()
        flat = np.ascontiguousarray(data).data
        records = bytearray().join([flat[a:b] for a, b in zip(begins, ends, strict=True)])
        return Rows(self._labels(layout.counts_NV.reshape(-1), np.frombuffer(records, np.uint8)))

    def _layout(self, data: np.ndarray, ends_N: np.ndarray, num_views: int) -> "_Layout":
        """Locate every record and logit; checks that they fill the blocks exactly."""
        ends_N = ends_N.astype(np.int64)
        starts_N = np.concatenate([[0], ends_N[:-1]]) if len(ends_N) else ends_N
        num_views = num_views if len(ends_N) else 1  # without images, a huge number is harmless
        head = num_views * self.count_size
        if (ends_N - starts_N < head).any():
            raise LabelSetError("a block is shorter than its counts")
        if self.count_size:
            counts_NV = _heads(data, starts_N, head).view(f"<u{self.count_size}").astype(np.int64)
            if len(ends_N) and not 1 <= counts_NV.min() <= counts_NV.max() <= self.num_classes:
                raise LabelSetError(f"a view must keep 1 to {self.num_classes} classes")
        else:
            counts_NV = np.full((len(ends_N), num_views), self.topk, dtype=np.int64)
        sizes_NV, logit_sizes_NV = self._sizes(counts_NV), self._logit_sizes(counts_NV)
        record_ends_NV = starts_N[:, None] + head + np.cumsum(sizes_NV, axis=1)
        logit_ends_NV = record_ends_NV[:, -1:] + np.cumsum(logit_sizes_NV, axis=1)
        if (logit_ends_NV[:, -1] != ends_N).any():
            raise LabelSetError("a block does not match its counts")
        return _Layout(
            counts_NV,
            record_ends_NV - sizes_NV,
            sizes_NV,
            logit_ends_NV - logit_sizes_NV,
            logit_sizes_NV,
        )

    def _gather(self, data: np.ndarray, layout: "_Layout", which: Any) -> Rows:
        """Return the rows at these positions of a layout."""
        counts_N, record_at_N, sizes_N, logit_at_N, logit_sizes_N = (
            part[which].reshape(-1) for part in layout
        )
        labels = self._labels(counts_N, _pick(data, record_at_N, sizes_N))
        if not self.logits:
            return Rows(labels)
        values = _pick(data, logit_at_N, logit_sizes_N).view("<f2")
        return Rows(labels, _logits(values, *self._masks(counts_N)))

    @cached_property
    def _record_sizes(self) -> np.ndarray:
        """The bytes of a record by the number of classes that it keeps, int64."""
        num_counts = min(1 << (8 * self.count_size), self.num_classes + 1)
        return num_bytes(np.maximum(1, np.arange(num_counts)), self.num_classes)

    @cached_property
    def _id_size(self) -> int:
        """The bytes of the class ids in a record of plain values."""
        assert self.topk is not None
        return 0 if self.is_dense else (self.topk * id_bits(self.num_classes) + 7) // 8

    def _sizes(self, counts: np.ndarray) -> np.ndarray:
        """Return the bytes of records that keep these numbers of classes, int64."""
        if self.form == "curve":
            curve_sizes: np.ndarray = self._record_sizes[counts]
            return curve_sizes
        return np.full(counts.shape, self._value_record_size, dtype=np.int64)

    @cached_property
    def _value_record_size(self) -> int:
        """The bytes of a record of plain values."""
        assert self.topk is not None
        return self._id_size + (self.topk + (not self.is_dense)) * np.dtype(self.form).itemsize

    def _logit_sizes(self, counts: np.ndarray) -> np.ndarray:
        """Return the bytes of the logits of views that keep these numbers of classes, int64."""
        if not self.logits:
            return np.zeros(counts.shape, dtype=np.int64)
        sizes: np.ndarray = 2 * (counts + (counts < self.num_classes)).astype(np.int64)
        return sizes

    def _records(self, labels: Labels) -> tuple[np.ndarray, bytes]:
        """Return the number of classes that each view keeps, int64 N, and all records in order."""
        if isinstance(labels, EncodedLabels):
            return labels.counts_N.numpy().astype(np.int64), labels.payload_P.numpy().tobytes()
        assert self.topk is not None
        counts_N = np.full(len(labels), self.topk, dtype=np.int64)
        value = np.dtype(self.form).newbyteorder("<")
        probs_NK = labels.probs_NK.numpy().astype(value, order="C")
        if self.is_dense:
            return counts_N, probs_NK.tobytes()
        ids = _packed_ids(labels.indices_NK.numpy(), id_bits(self.num_classes))
        rest_N1 = labels.rest_N.numpy().astype(value)[:, None]
        parts = [ids, probs_NK.view(np.uint8), rest_N1.view(np.uint8)]
        return counts_N, np.concatenate(parts, axis=1).tobytes()

    def _labels(self, counts_N: np.ndarray, records: np.ndarray) -> Labels:
        """Return the labels of contiguous records."""
        if self.form == "curve":
            return EncodedLabels(
                torch.from_numpy(counts_N.astype(np.int32)),
                torch.from_numpy(records),
                self.num_classes,
                self.count_size,
            )
        assert self.topk is not None
        value = np.dtype(self.form).newbyteorder("<")
        by_row = records.reshape(len(counts_N), self._value_record_size)  # -1 fails for no rows
        if self.is_dense:
            return SoftLabels.from_dense(torch.from_numpy(by_row.view(value)))
        indices_NK = _unpacked_ids(by_row[:, : self._id_size], self.topk, id_bits(self.num_classes))
        values = by_row[:, self._id_size :].copy().view(value)  # torch needs aligned strides
        return SoftLabels(
            torch.from_numpy(indices_NK),
            torch.from_numpy(values[:, :-1].copy()),  # a slice of one row keeps odd strides
            torch.from_numpy(values[:, -1].copy()),
            self.num_classes,
        )

    def _masks(self, counts_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return where padded rows have logits, N x (K + 1), and where the rest's logit is."""
        has_rest_N = counts_N < self.num_classes
        slot_K1 = np.arange(int(counts_N.max(initial=0)) + 1)
        is_rest_NK1 = (slot_K1 == counts_N[:, None]) & has_rest_N[:, None]
        return slot_K1 < (counts_N + has_rest_N)[:, None], is_rest_NK1


class _Layout(NamedTuple):
    """For N blocks x V views: classes kept; offset and bytes of the record and of the logits."""

    counts_NV: np.ndarray
    record_at_NV: np.ndarray
    sizes_NV: np.ndarray
    logit_at_NV: np.ndarray
    logit_sizes_NV: np.ndarray


def _logit_bytes(logits: KeptLogits, is_stored_NK1: np.ndarray, is_rest_NK1: np.ndarray) -> bytes:
    padded_NK1: np.ndarray = np.zeros(is_stored_NK1.shape, "<f2")
    padded_NK1[:, :-1] = logits.values_NK.numpy()[:, : padded_NK1.shape[1] - 1]
    padded_NK1[is_rest_NK1] = logits.rest_N.numpy()[is_rest_NK1.any(axis=1)]
    stored: bytes = padded_NK1[is_stored_NK1].tobytes()
    return stored


def _logits(values: np.ndarray, is_stored_NK1: np.ndarray, is_rest_NK1: np.ndarray) -> KeptLogits:
    padded_NK1 = np.zeros(is_stored_NK1.shape, "<f2")
    padded_NK1[is_stored_NK1] = values
    rest_N = np.zeros(len(padded_NK1), "<f2")
    rest_N[is_rest_NK1.any(axis=1)] = padded_NK1[is_rest_NK1]
    padded_NK1[is_rest_NK1] = 0
    values_NK = torch.from_numpy(np.ascontiguousarray(padded_NK1[:, :-1]))
    return KeptLogits(values_NK, torch.from_numpy(rest_N))


def _split(data: bytes, ends: np.ndarray) -> list[bytes]:
    """Return the pieces of some bytes that end at these offsets."""
    return [data[a:b] for a, b in zip([0, *ends.tolist()], ends.tolist(), strict=False)]


def _heads(data: np.ndarray, at_N: np.ndarray, size: int) -> np.ndarray:
    """Return ``size`` bytes from each offset, N x size."""
    view = np.ascontiguousarray(data).data
    heads = b"".join([view[at : at + size] for at in at_N.tolist()])
    return np.frombuffer(heads, np.uint8).reshape(len(at_N), size)


def _pick(data: np.ndarray, at_N: np.ndarray, sizes_N: np.ndarray) -> np.ndarray:
    """Return the pieces at these offsets, concatenated."""
    shift_N = at_N - (np.cumsum(sizes_N) - sizes_N)
    source = np.repeat(shift_N, sizes_N)
    source += np.arange(len(source))
    picked: np.ndarray = data[source]
    return picked


def _packed_ids(indices_NK: np.ndarray, width: int) -> np.ndarray:
    """Return rows of ids of ``width`` bits each, lowest bit first, padded to full bytes."""
    num_rows, k = indices_NK.shape
    id_bytes = indices_NK.astype("<u4", order="C")[..., None].view(np.uint8)
    bits = np.unpackbits(id_bytes, axis=-1, bitorder="little")
    packed: np.ndarray = np.packbits(
        bits[..., :width].reshape(num_rows, k * width), axis=1, bitorder="little"
    )
    return packed


def _unpacked_ids(packed: np.ndarray, k: int, width: int) -> np.ndarray:
    """Return the ids of packed rows, int64."""
    bits = np.unpackbits(packed, axis=1, count=k * width, bitorder="little")
    weights = np.left_shift(1, np.arange(width, dtype=np.int64))
    ids_NK: np.ndarray = bits.reshape(len(packed), k, width) @ weights
    return ids_NK
