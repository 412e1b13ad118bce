"""The bytes of a block: all labels of one image, as a shard stores them.

A block holds the labels, in the codec's form or as plain values, and the mean logits of each view,
only if the set stores them.
docs/reference/label-set-format.md describes every byte.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from typing import Literal, NamedTuple
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from mealv2.codec import EncodedLabels
from mealv2.codec.record import id_bits
from mealv2.codec.record_blocks import spans
from mealv2.errors import LabelSetError
from mealv2.label_set.logits import (
    LINE_SIZE,
    FittedLogits,
    Logits,
    concat_logits,
    no_values,
    of_values,
    value_bytes,
)
from mealv2.soft_labels import KeptLogits, Labels, SoftLabels, concat

Form = Literal["curve", "float16", "float32"]

# returns a row of the first block of the images of some blocks, by index
FirstLabels = Callable[[np.ndarray], EncodedLabels]

_RATE_MAX_KEPT = 255  # a count of one byte
_STEP = 7919  # from the view of a block that is checked to that of the next: a prime


def key_hashes(keys: Sequence[bytes]) -> np.ndarray:
    """Return what indexes images: BLAKE2b-64 of their keys in UTF-8, uint64 N."""
    return np.frombuffer(b"".join([blake2b(key, digest_size=8).digest() for key in keys]), "<u8")


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
    logits: Logits | None = None

    def rows(self, order_N: Tensor) -> "Rows":
        """Return rows by index, in that order."""
        logits = None if self.logits is None else self.logits.rows(order_N)
        return Rows(self.labels.rows(order_N), logits)

    def to(self, device: torch.device) -> "Rows":
        """Return the same rows on a device; a copy to the CPU is complete on return."""
        return Rows(self.labels.to(device), None if self.logits is None else self.logits.to(device))

    def with_models(self, firsts: FirstLabels | None) -> "Rows":
        """Return the same rows, with the models of first blocks where their blocks use these."""
        if firsts is None or not isinstance(self.labels, EncodedLabels):
            return self
        users = self.labels.uses_others().nonzero()[0]
        return self._replace(labels=self.labels.using(firsts(users))) if len(users) else self

    @staticmethod
    def concat(parts: "Sequence[Rows]") -> "Rows":
        """Return the rows of several parts of one encoding, in order."""
        logits = [part.logits for part in parts if part.logits is not None]
        return Rows(
            concat([part.labels for part in parts]), concat_logits(logits) if logits else None
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

    @property
    def has_fitted_logits(self) -> bool:
        """Whether logits are a line in the log-probabilities (``FittedLogits``)."""
        return self.logits and self.form == "curve" and self.topk is None

    @cached_property
    def count_size(self) -> int:
        """The bytes of a view's number of classes; 0 where all views keep equally many."""
        if self.form != "curve":
            return 0
        return 1 if self.topk is None or self.topk <= _RATE_MAX_KEPT else 2

    @property
    def shares_models(self) -> bool:
        """Whether the views of a block may share a model, and added ones that of earlier views."""
        return self.form == "curve" and self.topk is None and not self.logits

    def blocks(self, rows: Rows, num_views: int) -> list[bytes]:
        """Return the block of each image; ``rows``, on the CPU, has its views in order.

        Raises ValueError for rows of a curve that are not all views of their blocks.
        """
        if isinstance(rows.labels, EncodedLabels):
            blocks = rows.labels.blocks(num_views)
        else:
            size = num_views * self._value_record_size
            blocks = _split(self._value_records(rows.labels), len(rows.labels) // num_views, size)
        if rows.logits is None:
            return blocks
        if isinstance(rows.logits, FittedLogits):
            lines = _split(rows.logits.to_bytes(), len(blocks), LINE_SIZE * num_views)
            return [block + line for block, line in zip(blocks, lines, strict=True)]
        counts_N = self._counts(rows.labels)
        logits = value_bytes(rows.logits, *self._masks(counts_N))
        ends = np.cumsum(self._logit_sizes(counts_N))[num_views - 1 :: num_views].tolist()
        spans_I = zip([0, *ends], ends, blocks, strict=False)
        return [block + logits[begin:end] for begin, end, block in spans_I]

    def rows_of(
        self,
        data: np.ndarray,
        ends_N: np.ndarray,
        num_views: int,
        views_N: np.ndarray,
        firsts: FirstLabels | None = None,
    ) -> Rows:
        """Return one view of each of N blocks; ``data`` uint8 has the blocks in order.

        ``firsts`` as ``Rows.with_models``. Raises LabelSetError for a block that this encoding
        cannot have written.
        """
        self._check_sizes(ends_N, num_views)
        rows = self._rows(data, ends_N, num_views, np.arange(len(ends_N)), views_N)
        rows = rows.with_models(firsts)
        rows.labels.kept()  # decodes them now: an error belongs to the set that is read
        return rows

    def all_rows_of(self, data: np.ndarray, ends_N: np.ndarray, num_views: int) -> Rows:
        """Return all views of N blocks, image by image; a curve is checked when it is decoded."""
        self._check_sizes(ends_N, num_views)
        images, views = np.arange(len(ends_N)), np.arange(num_views if len(ends_N) else 0)
        return self._rows(
            data, ends_N, num_views, np.repeat(images, len(views)), np.tile(views, len(images))
        )

    def rows_to_check(
        self, data: np.ndarray, ends_N: np.ndarray, num_views: int, *, most: int
    ) -> Rows:
        """Return rows for a check that decodes at most ``most`` views that share a model.

        All views of blocks with a record for each; of every other block as few as give ``most``.
        """
        if self.form != "curve" or self.logits or not len(ends_N):
            return self.all_rows_of(data, ends_N, num_views)
        self._check_sizes(ends_N, num_views)
        images = np.arange(len(ends_N))
        labels = self._rows(data, ends_N, num_views, images, np.zeros_like(images)).labels
        assert isinstance(labels, EncodedLabels)
        is_shared_N = labels.shared_blocks()
        own, shared = images[~is_shared_N], images[is_shared_N]
        num_each = min(num_views, -(-most // max(1, len(shared))))
        view_SV = (shared[:, None] * _STEP + np.arange(num_each)) % num_views
        block_R = np.concatenate([np.repeat(own, num_views), np.repeat(shared, num_each)])
        view_R = np.concatenate([np.tile(np.arange(num_views), len(own)), view_SV.reshape(-1)])
        return Rows(replace(labels, block_N=block_R, view_N=view_R))

    def _rows(
        self,
        data: np.ndarray,
        ends_N: np.ndarray,
        num_views: int,
        image_R: np.ndarray,
        view_R: np.ndarray,
    ) -> Rows:
        """Return views of blocks: row r is view ``view_R[r]`` of block ``image_R[r]``."""
        ends_N = ends_N.astype(np.int64)
        starts_N = np.concatenate([[0], ends_N[:-1]]) if len(ends_N) else ends_N
        if self.form != "curve":
            return self._value_rows(data, starts_N, ends_N, num_views, image_R, view_R)
        views_N = np.full(len(ends_N), num_views, np.int64)
        labels_end_N = ends_N - LINE_SIZE * num_views * self.has_fitted_logits
        of_blocks = data, starts_N, labels_end_N, views_N, image_R, view_R
        labels = EncodedLabels(*of_blocks, self.num_classes, self.count_size)
        if self.has_fitted_logits:
            at_R = labels_end_N[image_R] + LINE_SIZE * view_R
            lines = data[spans(at_R, np.full(len(at_R), LINE_SIZE))]
            return Rows(labels, FittedLogits.from_bytes(lines))
        if not self.logits or not len(ends_N):
            return Rows(labels, None if not self.logits else no_values())
        counts_NV, label_ends_N = labels.counts_of_blocks()
        logits = self._logits_of(data, label_ends_N, ends_N, counts_NV, image_R, view_R)
        return Rows(replace(labels, ends_B=label_ends_N), logits)

    def _value_rows(
        self,
        data: np.ndarray,
        starts_N: np.ndarray,
        ends_N: np.ndarray,
        num_views: int,
        image_R: np.ndarray,
        view_R: np.ndarray,
    ) -> Rows:
        assert self.topk is not None
        size = self._value_record_size
        label_ends_N = starts_N + size * num_views if len(starts_N) else starts_N
        if (label_ends_N > ends_N).any() or (not self.logits and (label_ends_N < ends_N).any()):
            raise LabelSetError("a block does not match its counts")
        sizes_R = np.full(len(image_R), size, np.int64)
        labels = self._values(len(image_R), data[spans(starts_N[image_R] + size * view_R, sizes_R)])
        if not self.logits:
            return Rows(labels)
        counts_NV = np.full((len(starts_N), num_views if len(starts_N) else 1), self.topk)
        return Rows(labels, self._logits_of(data, label_ends_N, ends_N, counts_NV, image_R, view_R))

    def _logits_of(
        self,
        data: np.ndarray,
        at_N: np.ndarray,
        ends_N: np.ndarray,
        counts_NV: np.ndarray,
        image_R: np.ndarray,
        view_R: np.ndarray,
    ) -> KeptLogits:
        """Return the logits of rows; those of a block fill it from ``at_N`` to ``ends_N``."""
        sizes_NV = self._logit_sizes(counts_NV)
        logit_ends_NV = at_N[:, None] + np.cumsum(sizes_NV, axis=1)
        if (logit_ends_NV[:, -1] != ends_N).any():
            raise LabelSetError("a block does not match its counts")
        sizes_R = sizes_NV[image_R, view_R]
        values = data[spans(logit_ends_NV[image_R, view_R] - sizes_R, sizes_R)].view("<f2")
        return of_values(values, *self._masks(counts_NV[image_R, view_R]))

    def _check_sizes(self, ends_N: np.ndarray, num_views: int) -> None:
        """Raise LabelSetError where not every view can have a byte: a header may say any number."""
        least = num_views * (1 + LINE_SIZE * self.has_fitted_logits)
        if len(ends_N) and int(np.diff(ends_N.astype(np.int64), prepend=0).min()) < least:
            raise LabelSetError("a block is shorter than its number of views")

    @cached_property
    def _id_size(self) -> int:
        """The bytes of the class ids in a record of plain values."""
        assert self.topk is not None
        return 0 if self.is_dense else (self.topk * id_bits(self.num_classes) + 7) // 8

    @cached_property
    def _value_record_size(self) -> int:
        """The bytes of a record of plain values."""
        assert self.topk is not None
        return self._id_size + (self.topk + (not self.is_dense)) * np.dtype(self.form).itemsize

    def _logit_sizes(self, counts: np.ndarray) -> np.ndarray:
        """Return the bytes of the logits of views that keep these numbers of classes, int64."""
        sizes: np.ndarray = 2 * (counts + (counts < self.num_classes)).astype(np.int64)
        return sizes

    def _counts(self, labels: Labels) -> np.ndarray:
        """Return the number of classes that each row keeps, int64 N."""
        if isinstance(labels, EncodedLabels):
            return labels.records().counts_R
        return np.full(len(labels), self.topk, dtype=np.int64)

    def _value_records(self, labels: SoftLabels) -> bytes:
        """Return all records of plain values in order."""
        value = np.dtype(self.form).newbyteorder("<")
        probs_NK = labels.probs_NK.numpy().astype(value, order="C")
        if self.is_dense:
            return probs_NK.tobytes()
        ids = _packed_ids(labels.indices_NK.numpy(), id_bits(self.num_classes))
        rest_N1 = labels.rest_N.numpy().astype(value)[:, None]
        parts = [ids, probs_NK.view(np.uint8), rest_N1.view(np.uint8)]
        return np.concatenate(parts, axis=1).tobytes()

    def _values(self, num_rows: int, records: np.ndarray) -> SoftLabels:
        """Return the labels of contiguous records of plain values."""
        assert self.topk is not None
        value = np.dtype(self.form).newbyteorder("<")
        by_row = records.reshape(num_rows, self._value_record_size)  # -1 fails for no rows
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


def _split(data: bytes, number: int, size: int) -> list[bytes]:
    """Return pieces of equal size."""
    return [data[size * n : size * (n + 1)] for n in range(number)]


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
