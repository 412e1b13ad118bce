"""Encoded labels: views of blocks, as a label set stores them; selected, decoded, and as bytes.

mealv2.codec.record and mealv2.codec.block describe the bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mealv2.codec import label_bytes, record_blocks
from mealv2.codec.block import MAX_COMPONENTS
from mealv2.codec.block_decoder import decode_shared
from mealv2.codec.block_layout import BlockSpans, find_layout
from mealv2.codec.kept import Kept, joined
from mealv2.codec.label_bytes import LabelParts
from mealv2.codec.record_blocks import Records
from mealv2.errors import LabelSetError

_CHECKED_AT_ONCE = 4096

_Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class EncodedLabels:
    """Soft labels: N views of blocks. A block has all views of an image, as a shard stores them.

    Block b lies at ``at_B[b]`` to ``ends_B[b]`` of ``data_P`` (uint8) and has ``views_B[b]`` views;
    row n is view ``view_N[n]`` of block ``block_N[n]``. ``count_size`` is the bytes of the number
    of classes of a record. The bytes stay on the CPU: ``device`` is where ``kept`` and ``to_dense``
    return their tensors. Block b uses the model of block ``model_B[b]``, None for its own.
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
    model_B: _Array | None = None

    @classmethod
    def of_blocks(
        cls, blocks: Sequence[bytes], num_views: int, num_classes: int, *, count_size: int = 1
    ) -> "EncodedLabels":
        """Return all views of blocks with the same number of views."""
        ends_B = np.cumsum([len(block) for block in blocks], dtype=np.int64)
        data_P = np.frombuffer(b"".join(blocks), np.uint8)
        return cls.of_data(data_P, ends_B, num_views, num_classes, count_size=count_size)

    @classmethod
    def of_data(
        cls,
        data_P: _Array,
        ends_B: _Array,
        num_views: int,
        num_classes: int,
        *,
        count_size: int = 1,
    ) -> "EncodedLabels":
        """Return all views of blocks that lie one after the other."""
        ends_B = ends_B.astype(np.int64)
        blocks = np.arange(len(ends_B))
        return cls(
            data_P,
            record_blocks.starts(ends_B),
            ends_B,
            np.full(len(blocks), num_views, np.int64),
            np.repeat(blocks, num_views),
            np.tile(np.arange(num_views if len(blocks) else 0), len(blocks)),
            num_classes,
            count_size,
        )

    def __len__(self) -> int:
        return len(self.block_N)

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor | _Array) -> "EncodedLabels":
        """Return rows by index, slice, or indices in any order; an int gives one row.

        Blocks are dropped of which no row is left, and that no other one uses.
        """
        order: Any
        if isinstance(rows, int | np.integer):
            order = np.arange(len(self))[int(rows)][None]
        elif isinstance(rows, slice):
            order = rows
        else:
            order = np.asarray(rows.cpu() if isinstance(rows, Tensor) else rows)
            order = order if len(order) else order.astype(np.int64)
        block_R, view_R = self.block_N[order], self.view_N[order]
        used_U = _distinct(block_R, len(self.at_B))
        if self.model_B is not None:
            used_U = _distinct(np.concatenate([used_U, self.model_B[used_U]]), len(self.at_B))
        if len(used_U) == len(self.at_B):
            return replace(self, block_N=block_R, view_N=view_R)
        number_B = np.zeros(len(self.at_B), np.int64)
        number_B[used_U] = np.arange(len(used_U))
        sizes_U = (self.ends_B - self.at_B)[used_U]
        return EncodedLabels(
            self.data_P[record_blocks.spans(self.at_B[used_U], sizes_U)],
            np.cumsum(sizes_U) - sizes_U,
            np.cumsum(sizes_U),
            self.views_B[used_U],
            number_B[block_R],
            view_R,
            self.num_classes,
            self.count_size,
            self.device,
            None if self.model_B is None else number_B[self.model_B[used_U]],
        )

    def rows(self, order_N: Tensor) -> "EncodedLabels":
        """Return rows by index, in that order."""
        return self[order_N]

    @property
    def nbytes(self) -> int:
        """The bytes on disk of the blocks that the rows are views of, without others' models."""
        of_rows = _distinct(self.block_N, len(self.at_B))
        return int((self.ends_B - self.at_B)[of_rows].sum())

    def using(self, models: "EncodedLabels") -> "EncodedLabels":
        """Return the labels with the models of other blocks.

        The rows of ``models`` are of the blocks whose models those of ``uses_others`` use, in
        order. Raises LabelSetError for another number of them.
        """
        (users,) = self.uses_others().nonzero()
        if len(users) != len(models):
            raise LabelSetError(f"{len(users)} blocks use the models of {len(models)}")
        if not len(users):
            return self
        both = EncodedLabels.concat([self, models])
        model_B = both._models()
        model_B[users] = len(self.at_B) + models.block_N
        return replace(both, block_N=self.block_N, view_N=self.view_N, model_B=model_B)

    def uses_others(self) -> _Array:
        """Return whether each block says that it uses the model of another one, bool B."""
        first_B, has_no_count_B = self._first_bytes()
        of_several_B = (first_B > MAX_COMPONENTS) & (first_B <= MAX_COMPONENTS + 2)
        uses_B: _Array = np.where(self.views_B == 1, has_no_count_B, of_several_B)
        return uses_B

    def blocks(self, num_views: int) -> list[bytes]:
        """Return the blocks of images, whose views are the rows in order.

        Raises ValueError for rows that are not all views of their blocks, where these share a
        model: other blocks would need encoding again.
        """
        if len(self) % num_views:
            raise ValueError(f"{len(self)} labels are not images of {num_views} views")
        block_IV = self.block_N.reshape(-1, num_views)
        is_whole = (block_IV == block_IV[:, :1]).all()
        is_whole &= (self.view_N.reshape(-1, num_views) == np.arange(num_views)).all()
        if is_whole and (self.views_B[block_IV[:, 0]] == num_views).all():
            return _cut(self.data_P, self.at_B[block_IV[:, 0]], self.ends_B[block_IV[:, 0]])
        if self._is_shared().any():
            raise ValueError(f"these labels are not blocks of {num_views} views")
        counts_N, at_N, sizes_N = self.records()
        payload_P = self.data_P[record_blocks.spans(at_N, sizes_N)]
        data_P, ends_B = record_blocks.blocks_of_records(
            counts_N, payload_P, num_views, self.num_classes, self.count_size
        )
        return _cut(data_P, record_blocks.starts(ends_B), ends_B)

    @property
    def shares_models(self) -> bool:
        """Whether the views of a block share a model."""
        return bool(self._is_shared().any())

    def to(self, device: torch.device) -> "EncodedLabels":
        """Return the same labels with their decoded form on a device."""
        moved = replace(self, device=device)
        if "_on_cpu" in self.__dict__:  # decoded once
            moved.__dict__["_on_cpu"] = self._on_cpu
        return moved

    @staticmethod
    def concat(parts: "Sequence[EncodedLabels]") -> "EncodedLabels":
        """Return the rows of several labels of the same classes, in order."""
        if not parts:
            raise ValueError("there are no labels to concatenate")
        if len({(part.num_classes, part.count_size) for part in parts}) != 1:
            raise ValueError("cannot concatenate labels of different classes or count sizes")
        shifts = np.cumsum([0, *(len(part.data_P) for part in parts)])[:-1]
        firsts = np.cumsum([0, *(len(part.at_B) for part in parts)])[:-1]
        models = [part._models() + first for part, first in zip(parts, firsts, strict=True)]
        has_models = any(part.model_B is not None for part in parts)
        return replace(
            parts[0],
            data_P=np.concatenate([part.data_P for part in parts]),
            at_B=np.concatenate([p.at_B + s for p, s in zip(parts, shifts, strict=True)]),
            ends_B=np.concatenate([p.ends_B + s for p, s in zip(parts, shifts, strict=True)]),
            views_B=np.concatenate([part.views_B for part in parts]),
            block_N=np.concatenate([p.block_N + f for p, f in zip(parts, firsts, strict=True)]),
            view_N=np.concatenate([part.view_N for part in parts]),
            model_B=np.concatenate(models) if has_models else None,
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

    def check(self, *, most: int | None = None) -> None:
        """Raise LabelSetError for rows that no encoder writes.

        ``most``: of views that share a model decode at most so many, evenly spread; of all others
        only the layout of their blocks is checked.
        """
        is_shared_N = self._is_shared()
        (shared_R,) = is_shared_N.nonzero()
        order_N = np.arange(len(self))
        if most is not None and len(shared_R) > most:
            blocks = _distinct(self.block_N[shared_R], len(self.at_B))
            spans, models = self._spans(blocks)
            last_B = spans.num_views_N - 1
            find_layout(self.data_P, spans, models, last_B, self.num_classes)
            chosen = shared_R[np.linspace(0, len(shared_R) - 1, most).astype(np.int64)]
            order_N = np.concatenate([order_N[~is_shared_N], chosen])
        for n in range(0, len(order_N), _CHECKED_AT_ONCE):
            rows = torch.from_numpy(order_N[n : n + _CHECKED_AT_ONCE])
            self[rows]._decode(strict=True)

    def counts_of_blocks(self) -> tuple[_Array, _Array]:
        """Return the classes that each view keeps, blocks x views, and the ends of the records.

        For blocks of equally many views that have a record for each. Their ends may be beyond the
        records. Raises LabelSetError for blocks that are shorter, or share a model.
        """
        if self.shared_blocks().any():
            raise LabelSetError("a block shares a model, and has no records")
        sizes = self.num_classes, self.count_size
        found = record_blocks.locate(
            self.data_P, self.at_B, self.ends_B, self.views_B, *sizes, fills_block=False
        )
        return found.counts_BV, found.ends_BV[:, -1]

    def records(self) -> Records:
        """Locate the records of rows whose blocks have one for each view; raises LabelSetError."""
        return self._records(np.arange(len(self)))

    def _records(self, rows_R: _Array) -> Records:
        blocks = _distinct(self.block_N[rows_R], len(self.at_B))
        of_blocks = self.at_B[blocks], self.ends_B[blocks], self.views_B[blocks]
        table = record_blocks.locate(self.data_P, *of_blocks, self.num_classes, self.count_size)
        number_B = np.zeros(len(self.at_B), np.int64)
        number_B[blocks] = np.arange(len(blocks))
        return table.rows(number_B[self.block_N[rows_R]], self.view_N[rows_R])

    def _decode(self, *, strict: bool) -> Kept:
        is_shared_N = self._is_shared()
        (own_R,), (shared_R,) = (~is_shared_N).nonzero(), is_shared_N.nonzero()
        parts = []
        if len(own_R) or not len(self):
            records, classes = self._records(own_R), self.num_classes
            parts.append(record_blocks.decode(self.data_P, records, classes, strict=strict))
        if len(shared_R):
            blocks, models = self._spans(self.block_N[shared_R])
            rows = (blocks, models, self.view_N[shared_R], self.num_classes)
            parts.append(decode_shared(self.data_P, *rows, strict=strict))
        return joined(parts, np.concatenate([own_R, shared_R]))

    def _is_shared(self) -> _Array:
        """Return whether the block of each row has a model that its views share."""
        is_shared_N: _Array = self.shared_blocks()[self.block_N]
        return is_shared_N

    def shared_blocks(self) -> _Array:
        """Return whether the views of each block share a model; raises LabelSetError."""
        first_B, has_no_count_B = self._first_bytes()
        is_shared_B: _Array = np.where(self.views_B == 1, has_no_count_B, first_B > 0)
        return is_shared_B

    def _first_bytes(self) -> tuple[_Array, _Array]:
        """Return the first byte of blocks, and whether it is no count of a block of one view."""
        if (self.ends_B <= self.at_B).any():
            raise LabelSetError("a block is empty")
        first_B = self.data_P[self.at_B]
        return first_B, (first_B == 0) & (self.count_size == 1)

    def _models(self) -> _Array:
        """Return the block whose model each uses."""
        return np.arange(len(self.at_B)) if self.model_B is None else self.model_B.copy()

    def _spans(self, blocks: _Array) -> tuple[BlockSpans, BlockSpans]:
        """Return where blocks lie, and those whose models they use."""
        of_all = BlockSpans(self.at_B, self.ends_B, self.views_B)
        spans = of_all.rows(blocks)
        return spans, spans if self.model_B is None else of_all.rows(self.model_B[blocks])

    def to_bytes(self) -> bytes:
        """Return a header of 32 bytes, ends, views and models of blocks, rows, the blocks."""
        sizes_B = self.ends_B - self.at_B
        data_P = self.data_P[record_blocks.spans(self.at_B, sizes_B)]
        of_rows = self.block_N, self.view_N, self.num_classes, self.count_size
        parts = LabelParts(data_P, sizes_B.cumsum(), self.views_B, self._models(), *of_rows)
        return label_bytes.joined(parts)

    @staticmethod
    def from_bytes(data: bytes) -> "EncodedLabels":
        """Return the labels that ``to_bytes`` wrote; raises LabelSetError for anything else."""
        found = label_bytes.split(data)
        spans = found.data_P, record_blocks.starts(found.ends_B), found.ends_B, found.views_B
        labels = EncodedLabels(*spans, *found[4:], model_B=found.model_B)
        is_others_B = found.model_B != np.arange(len(found.ends_B))
        if (is_others_B != labels.uses_others()).any():
            raise LabelSetError("encoded labels have models that do not fit their blocks")
        labels.check()
        return labels


def _cut(data_P: _Array, at_B: _Array, ends_B: _Array) -> list[bytes]:
    """Return the bytes from each offset to each end."""
    view = np.ascontiguousarray(data_P).data
    return [bytes(view[at:end]) for at, end in zip(at_B.tolist(), ends_B.tolist(), strict=True)]


def _distinct(numbers_N: _Array, num_numbers: int) -> _Array:
    """Return the numbers that occur, ascending; np.unique is slow where most occur often."""
    occurs_X = np.zeros(num_numbers, bool)
    occurs_X[numbers_N] = True
    return occurs_X.nonzero()[0]
