"""Encoded labels: views of blocks, as a label set stores them; selected, decoded, and as bytes.

mealv2.codec.record and mealv2.codec.block describe the bytes.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mealv2.codec.block import SharedRows, decode_shared
from mealv2.codec.record import check_rows, decode_rows, num_bytes
from mealv2.errors import LabelSetError

_HEADER = struct.Struct("<8sIBxxxQQ")  # magic, classes, bytes of a count, blocks, rows
_MAGIC = b"MEALBLK2"
_NO_CLASS = 1 << 40  # above all ids
_BY_ITSELF = 0  # first byte of a block of several views: a record for each

_Array = np.ndarray[Any, Any]


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
    """Decoded labels: the classes with a value of their own, padded to the longest row; the tail.

    ``indices_NK`` int64 and ``probs_NK`` float32 are 0 where ``is_kept_NK`` is false; ``tail_N``
    float32 is the probability of each class not kept.
    """

    indices_NK: Tensor
    probs_NK: Tensor
    is_kept_NK: Tensor
    tail_N: Tensor

    def to(self, device: torch.device) -> "Kept":
        """Return the same labels on a device."""
        return Kept(*(to_device(each, device) for each in self))

    def by_probability(self) -> "Kept":
        """Return the classes of each row from the likeliest on, equal ones in their order."""
        keys_NK = torch.where(self.is_kept_NK, self.probs_NK, -1.0)
        order_NK = keys_NK.sort(dim=1, descending=True, stable=True).indices
        return Kept(*(each.gather(1, order_NK) for each in self[:3]), self.tail_N)

    def likeliest(self) -> Tensor:
        """Return the likeliest class of each row, int64 N: the first of several equal ones.

        Views of a shared model may have more on each class not listed than on any listed one.
        """
        best_N1 = self.probs_NK.argmax(dim=1, keepdim=True)
        of_kept_N = self.indices_NK.gather(1, best_N1)[:, 0]
        # the first class not kept: where the sorted ids and their positions part
        slots_K = torch.arange(self.indices_NK.shape[1], device=self.indices_NK.device)
        sorted_NK = self.indices_NK.masked_fill(~self.is_kept_NK, _NO_CLASS).sort(dim=1).values
        first_N = (sorted_NK == slots_K).sum(dim=1)
        is_tail_N = self.tail_N > self.probs_NK.gather(1, best_N1)[:, 0]
        return torch.where(is_tail_N, first_N, of_kept_N)

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


class Records(NamedTuple):
    """Where the record of each row lies: ``counts_N`` classes kept, its offset and bytes."""

    counts_N: _Array
    at_N: _Array
    sizes_N: _Array


@dataclass(frozen=True, eq=False)
class EncodedLabels:
    """Soft labels: N views of blocks. A block has all views of an image, as a shard stores them.

    Block b lies at ``at_B[b]`` to ``ends_B[b]`` of ``data_P`` (uint8) and has ``views_B[b]`` views;
    row n is view ``view_N[n]`` of block ``block_N[n]``. ``count_size`` is the bytes of the number
    of classes of a record. The bytes stay on the CPU: ``device`` is where ``kept`` and ``to_dense``
    return their tensors.
    """

    data_P: _Array
    at_B: _Array
    ends_B: _Array
    views_B: _Array
    block_N: _Array
    view_N: _Array
    num_classes: int
    count_size: int = 1
    device: torch.device = field(default=torch.device("cpu"))

    @classmethod
    def of_blocks(
        cls,
        blocks: Sequence[bytes],
        num_views: int,
        num_classes: int,
        *,
        count_size: int = 1,
        device: torch.device | None = None,
    ) -> "EncodedLabels":
        """Return all views of blocks with the same number of views."""
        ends_B = np.cumsum([len(block) for block in blocks], dtype=np.int64)
        return cls(
            np.frombuffer(b"".join(blocks), np.uint8),
            np.concatenate([[0], ends_B])[: len(ends_B)].astype(np.int64),
            ends_B,
            np.full(len(blocks), num_views, np.int64),
            np.repeat(np.arange(len(blocks)), num_views),
            np.tile(np.arange(num_views), len(blocks)),
            num_classes,
            count_size,
            device or torch.device("cpu"),
        )

    def __len__(self) -> int:
        return len(self.block_N)

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> "EncodedLabels":
        """Return rows by index, slice, or indices in any order; an int gives one row."""
        order: Any
        if isinstance(rows, int | np.integer):
            order = np.arange(len(self))[int(rows)][None]
        elif isinstance(rows, slice):
            order = rows
        else:
            order = np.asarray(rows.cpu() if isinstance(rows, Tensor) else rows)
            order = order if len(order) else order.astype(np.int64)
        return replace(self, block_N=self.block_N[order], view_N=self.view_N[order])

    def rows(self, order_N: Tensor) -> "EncodedLabels":
        """Return rows by index, in that order."""
        return self[order_N]

    @property
    def nbytes(self) -> int:
        """The bytes on disk of the blocks that the rows are views of."""
        used_U = np.unique(self.block_N)
        return int((self.ends_B - self.at_B)[used_U].sum())

    def blocks(self, num_views: int) -> list[bytes]:
        """Return the blocks of images; raises ValueError unless the rows are all their views.

        Views of an image that lie in several blocks cannot be joined without encoding them again.
        """
        if len(self) % num_views:
            raise ValueError(f"{len(self)} labels are not images of {num_views} views")
        block_IV = self.block_N.reshape(-1, num_views)
        is_whole = (block_IV == block_IV[:, :1]).all()
        is_whole &= (self.view_N.reshape(-1, num_views) == np.arange(num_views)).all()
        if not is_whole or (self.views_B[block_IV[:, 0]] != num_views).any():
            raise ValueError(f"these labels are not blocks of {num_views} views")
        view = np.ascontiguousarray(self.data_P).data
        at_I, ends_I = self.at_B[block_IV[:, 0]].tolist(), self.ends_B[block_IV[:, 0]].tolist()
        return [bytes(view[at:end]) for at, end in zip(at_I, ends_I, strict=True)]

    def _all_blocks(self) -> list[bytes]:
        view = np.ascontiguousarray(self.data_P).data
        spans_B = zip(self.at_B.tolist(), self.ends_B.tolist(), strict=True)
        return [bytes(view[at:end]) for at, end in spans_B]

    def to(self, device: torch.device) -> "EncodedLabels":
        """Return the same labels with their decoded form on a device."""
        moved = replace(self, device=device)
        if "_on_cpu" in self.__dict__:  # decoded once
            moved.__dict__["_on_cpu"] = self._on_cpu
        return moved

    @staticmethod
    def concat(parts: "Sequence[EncodedLabels]") -> "EncodedLabels":
        """Return the rows of several labels of the same classes, in order."""
        if len({(part.num_classes, part.count_size) for part in parts}) != 1:
            raise ValueError("cannot concatenate labels of different classes or count sizes")
        shifts = np.cumsum([0, *(len(part.data_P) for part in parts)])[:-1]
        firsts = np.cumsum([0, *(len(part.at_B) for part in parts)])[:-1]
        return replace(
            parts[0],
            data_P=np.concatenate([part.data_P for part in parts]),
            at_B=np.concatenate([p.at_B + s for p, s in zip(parts, shifts, strict=True)]),
            ends_B=np.concatenate([p.ends_B + s for p, s in zip(parts, shifts, strict=True)]),
            views_B=np.concatenate([part.views_B for part in parts]),
            block_N=np.concatenate([p.block_N + f for p, f in zip(parts, firsts, strict=True)]),
            view_N=np.concatenate([part.view_N for part in parts]),
        )

    def argmax(self) -> Tensor:
        """Return the likeliest class of each row, int64 N; the first of several equal ones."""
        return self.kept().likeliest()

    def kept(self) -> Kept:
        """Decode, once: the classes kept and their probabilities, on the labels' device."""
        return self._on_device

    @cached_property
    def _on_device(self) -> Kept:
        return self._on_cpu.to(self.device)

    @cached_property
    def _on_cpu(self) -> Kept:
        return self._decode(strict=False)

    def to_dense(self) -> Tensor:
        """Return the recovered distributions, float32 N x C, each > 0 and summing to 1."""
        kept = self.kept()
        return kept.spread(kept.probs_NK, kept.tail_N, self.num_classes)

    def check(self) -> None:
        """Raise LabelSetError for rows that no encoder writes."""
        self._decode(strict=True)

    def counts_of_blocks(self, num_views: int) -> tuple[_Array, _Array]:
        """Return the classes that each view keeps, blocks x views, and the ends of the records.

        For blocks of equally many views that have a record for each. Their ends may be beyond the
        records. Raises LabelSetError for blocks that are shorter, or share a model.
        """
        blocks = np.arange(len(self.at_B))
        views = np.tile(np.arange(num_views), len(blocks))
        every = replace(self, block_N=np.repeat(blocks, num_views), view_N=views)
        if every._is_shared().any():
            raise LabelSetError("a block shares a model, and has no records")
        found = _records(every, np.arange(len(every)), fills_block=False)
        ends_N = (found.at_N + found.sizes_N).reshape(-1, num_views)[:, -1]
        return found.counts_N.reshape(-1, num_views), ends_N

    def records(self) -> Records:
        """Locate the records of rows whose blocks have one for each view; raises LabelSetError."""
        return _records(self, np.arange(len(self)))

    def _decode(self, *, strict: bool) -> Kept:
        is_shared_N = self._is_shared()
        (own_R,), (shared_R,) = (~is_shared_N).nonzero(), is_shared_N.nonzero()
        parts = []
        if len(own_R) or not len(self):
            parts.append(_decode_records(self, own_R, strict=strict))
        if len(shared_R):
            block_R = self.block_N[shared_R]
            of_blocks = (self.at_B[block_R], self.ends_B[block_R], self.views_B[block_R])
            rows = (self.data_P, *of_blocks, self.view_N[shared_R], self.num_classes)
            parts.append(decode_shared(*rows, strict=strict))
        return _kept(parts, np.concatenate([own_R, shared_R]))

    def _is_shared(self) -> _Array:
        """Return whether the block of each row has a model that its views share."""
        if (self.ends_B <= self.at_B).any():
            raise LabelSetError("a block is empty")
        is_shared_B = (self.views_B > 1) & (self.data_P[self.at_B] != _BY_ITSELF)
        is_shared_N: _Array = is_shared_B[self.block_N]
        return is_shared_N

    def to_bytes(self) -> bytes:
        """Return a header of 32 bytes, ends and numbers of views of blocks, rows, the blocks."""
        blocks = self._all_blocks()
        header = _HEADER.pack(_MAGIC, self.num_classes, self.count_size, len(blocks), len(self))
        ends_B = np.cumsum([len(block) for block in blocks], dtype=np.int64)
        parts = (ends_B, self.views_B, self.block_N, self.view_N)
        return b"".join([header, *(part.astype("<u8").tobytes() for part in parts), *blocks])

    @staticmethod
    def from_bytes(data: bytes) -> "EncodedLabels":
        """Return the labels that ``to_bytes`` wrote; raises LabelSetError for anything else."""
        if len(data) < _HEADER.size:
            raise LabelSetError(f"encoded labels are truncated: {len(data)} bytes")
        magic, num_classes, count_size, num_blocks, num_rows = _HEADER.unpack_from(data)
        if magic != _MAGIC or any(data[13:16]):
            raise LabelSetError("these are not encoded labels of this version")
        if count_size not in (1, 2):
            raise LabelSetError(f"a count has 1 or 2 bytes, not {count_size}")
        begin = _HEADER.size + 16 * (num_blocks + num_rows)
        if begin > len(data):
            raise LabelSetError(f"encoded labels are truncated: {num_rows} rows, {len(data)} bytes")
        numbers = np.frombuffer(data[_HEADER.size : begin], "<u8").astype(np.int64)
        ends_B, views_B, block_N, view_N = np.split(
            numbers, np.cumsum([num_blocks, num_blocks, num_rows])
        )
        at_B = np.concatenate([[0], ends_B])[:num_blocks].astype(np.int64)
        last = int(ends_B[-1]) if num_blocks else 0
        is_valid = (ends_B > at_B).all() and last == len(data) - begin and (views_B > 0).all()
        is_valid = is_valid and (views_B <= ends_B - at_B).all()  # a view takes at least a byte
        is_valid = is_valid and (block_N >= 0).all() and (block_N < num_blocks).all()
        if not is_valid or (view_N < 0).any() or (view_N >= views_B[block_N]).any():
            raise LabelSetError("encoded labels have rows or blocks that do not fit their bytes")
        payload_P = np.frombuffer(data, np.uint8, offset=begin)
        labels = EncodedLabels(
            payload_P, at_B, ends_B, views_B, block_N, view_N, num_classes, count_size
        )
        labels.check()
        return labels


# --- decoding -------------------------------------------------------------------------------------


def _records(labels: EncodedLabels, rows_R: _Array, *, fills_block: bool = True) -> Records:
    """Locate the records of some rows, by the counts of all views of their blocks."""
    block_R, view_R, size = labels.block_N[rows_R], labels.view_N[rows_R], labels.count_size
    num_views_R = labels.views_B[block_R]
    counts_at_R = labels.at_B[block_R] + (num_views_R > 1)
    records_at_R = counts_at_R + size * num_views_R
    if (records_at_R > labels.ends_B[block_R]).any():
        raise LabelSetError("a block is shorter than its counts")
    slots_V = np.arange(int(num_views_R.max(initial=1)))
    is_view_RV = slots_V < num_views_R[:, None]
    place_RV = np.where(is_view_RV, counts_at_R[:, None] + size * slots_V, 0)
    counts_RV = labels.data_P[place_RV].astype(np.int64)
    if size == 2:
        counts_RV += labels.data_P[place_RV + is_view_RV].astype(np.int64) << 8
    is_valid_RV = (counts_RV >= 1) & (counts_RV <= labels.num_classes)
    if not (is_valid_RV | ~is_view_RV).all():
        raise LabelSetError(f"a view must keep 1 to {labels.num_classes} classes")
    sizes_RV = num_bytes(counts_RV, labels.num_classes) * is_view_RV
    ends_RV = records_at_R[:, None] + sizes_RV.cumsum(axis=1)
    left_R = labels.ends_B[block_R] - ends_RV[:, -1]
    if (left_R < 0).any() or (fills_block and (left_R > 0).any()):
        raise LabelSetError("a block does not match its counts")
    row_R = np.arange(len(rows_R))
    sizes_R = sizes_RV[row_R, view_R]
    return Records(counts_RV[row_R, view_R], ends_RV[row_R, view_R] - sizes_R, sizes_R)


def _decode_records(labels: EncodedLabels, rows_R: _Array, *, strict: bool) -> SharedRows:
    """Decode rows whose blocks have a record for each view."""
    counts_R, at_R, sizes_R = _records(labels, rows_R)
    payload_P = labels.data_P[spans(at_R, sizes_R)]
    if strict:
        check_rows(counts_R, payload_P, labels.num_classes)
    found = decode_rows(counts_R, payload_P, labels.num_classes)
    is_kept_RK = np.arange(int(counts_R.max(initial=1))) < counts_R[:, None]
    ids_RK = np.zeros(is_kept_RK.shape, np.int64)
    probs_RK = np.zeros(is_kept_RK.shape, np.float32)
    ids_RK[is_kept_RK], probs_RK[is_kept_RK] = found.indices_E, found.probs_E
    return SharedRows(ids_RK, probs_RK, counts_R, found.tail_N)


def spans(at_N: _Array, sizes_N: _Array) -> _Array:
    """Return the indices of spans that begin at these offsets, concatenated."""
    source: _Array = np.repeat(at_N - (np.cumsum(sizes_N) - sizes_N), sizes_N)
    source += np.arange(len(source))
    return source


def _kept(parts: Sequence[SharedRows], rows_N: _Array) -> Kept:
    """Join decoded rows, which go to these places."""
    width = max(part.ids_NM.shape[1] for part in parts)
    padded = [((0, 0), (0, width - part.ids_NM.shape[1])) for part in parts]
    ids_NK = np.concatenate([np.pad(p.ids_NM, w) for p, w in zip(parts, padded, strict=True)])
    probs_NK = np.concatenate([np.pad(p.probs_NM, w) for p, w in zip(parts, padded, strict=True)])
    counts_N = np.concatenate([part.counts_N for part in parts])
    is_kept_NK = np.arange(width) < counts_N[:, None]
    columns = (ids_NK, probs_NK, is_kept_NK, np.concatenate([part.tail_N for part in parts]))
    if len(parts) > 1:
        order_N = np.argsort(rows_N)
        columns = tuple(column[order_N] for column in columns)
    return Kept(*map(torch.from_numpy, columns))
