"""How a label set keeps what an ensemble said of a view, and the bytes of an image's views.

A block has all labels of an image: how many classes each view keeps (only where that differs), the
record of each view, and the mean logits of each (only where the set has them).
docs/reference/label-set-format.md has every byte.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mealv2.codec import EncodedLabels, encode
from mealv2.codec.record import (
    MAX_CLASSES,
    MAX_KEPT,
    MIN_CLASSES,
    check_rows,
    id_bits,
    num_bytes,
)
from mealv2.errors import LabelSetError
from mealv2.soft_labels import KeptLogits, Labels, SoftLabels, concat, keep_logits, top_k

Form = Literal["curve", "float16", "float32"]

_TAIL_RULE = "even over the classes not kept"
_RATE_MAX_KEPT = 255  # a count of one byte


class Rows(NamedTuple):
    """What a set holds of N views: their labels, and the ensemble's mean logits if it keeps any."""

    labels: Labels
    logits: KeptLogits | None = None

    def rows(self, order_N: Tensor) -> "Rows":
        """Return rows by index, in that order."""
        logits = None if self.logits is None else self.logits.rows(order_N)
        return Rows(self.labels.rows(order_N), logits)

    def to(self, device: torch.device) -> "Rows":
        """Return the same rows on a device; on the CPU they are there when this returns."""
        return Rows(self.labels.to(device), None if self.logits is None else self.logits.to(device))

    @staticmethod
    def concat(parts: "Sequence[Rows]") -> "Rows":
        """Return the rows of several, of one encoding, one after another."""
        logits = [part.logits for part in parts if part.logits is not None]
        return Rows(
            concat([part.labels for part in parts]), KeptLogits.concat(logits) if logits else None
        )


@dataclass(frozen=True)
class Encoding:
    """How the labels of a set are kept.

    ``form`` ``curve``: the codec's records (docs/reference/label-codec.md), of ``topk`` classes or
    of as many as ``rate`` gives each view; ``float16`` and ``float32``: ids and values of ``topk``
    classes and the mass of the others, or with ``topk`` equal to ``num_classes`` all values in
    class order.
    ``logits``: the mean logits of the kept classes, and of all others together, in float16.
    """

    num_classes: int
    form: Form = "curve"
    rate: float | None = None
    topk: int | None = None
    logits: bool = False

    def __post_init__(self) -> None:
        if self.form == "curve" and not MIN_CLASSES <= self.num_classes <= MAX_CLASSES:
            raise ValueError(f"classes must be {MIN_CLASSES} to {MAX_CLASSES}")
        has_rate, has_topk = self.rate is not None, self.topk is not None
        if has_rate == has_topk or (has_rate and self.form != "curve"):
            raise ValueError("labels have either a rate, in the form of a curve, or a topk")
        if self.rate is not None and not 0.0 < self.rate < math.inf:
            raise ValueError(f"rate must be above 0 and finite, not {self.rate}")
        max_kept = min(self.num_classes, MAX_KEPT) if self.form == "curve" else self.num_classes
        if self.topk is not None and not 1 <= self.topk <= max_kept:
            raise ValueError(f"topk must lie in 1..{max_kept}, not {self.topk}")

    @classmethod
    def of_plan(cls, plan: dict[str, Any]) -> "Encoding":
        """Return the encoding that a plan names; raises LabelSetError for one that is unknown."""
        try:
            kept = plan["labels"]
            if kept["form"] not in ("curve", "float16", "float32") or kept["tail"] != _TAIL_RULE:
                raise ValueError("a form or rule for the tail that this mealv2 does not know")
            if type(kept.get("topk", 1)) is not int or type(kept["logits"]) is not bool:
                raise ValueError("a topk that is no whole number, or logits not true or false")
            return cls(
                len(plan["classes"]),
                kept["form"],
                rate=kept.get("rate"),
                topk=kept.get("topk"),
                logits=kept["logits"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise LabelSetError(f"the labels of this set cannot be read: {error}") from None

    def plan(self) -> dict[str, Any]:
        """Return what a plan says of it."""
        named = dataclasses.asdict(self)
        del named["num_classes"]
        return {k: v for k, v in named.items() if v is not None} | {"tail": _TAIL_RULE}

    def __str__(self) -> str:
        if self.rate is not None:
            text = f"rate {self.rate:g}"
        elif self.is_dense:
            text = f"all classes, {self.form}"
        else:
            text = f"top-{self.topk}, {self.form}"
        return text + (", with logits" if self.logits else "")

    @property
    def is_dense(self) -> bool:
        """Whether every class has a value of its own."""
        return self.form != "curve" and self.topk == self.num_classes

    @property
    def count_size(self) -> int:
        """The bytes of a view's count of classes; 0 where all views keep as many."""
        if self.form != "curve":
            return 0
        return 1 if self.topk is None or self.topk <= _RATE_MAX_KEPT else 2

    def encode(self, probs_NC: Tensor, mean_logits_NC: Tensor | None = None) -> Rows:
        """Return the rows as the set keeps them, where the probabilities are."""
        labels: Labels
        if self.form == "curve":
            labels = encode(probs_NC, rate=self.rate, topk=self.topk)
        else:
            assert self.topk is not None
            labels = top_k(probs_NC, self.topk).rounded(getattr(torch, self.form))
        if not self.logits:
            return Rows(labels)
        if mean_logits_NC is None:
            raise ValueError("this set keeps logits, and none were given")
        # a masked class has a logit of minus infinity, which would make every mean with it so
        max_kept = torch.finfo(torch.float16).max
        logits = keep_logits(mean_logits_NC.float().clamp(-max_kept, max_kept), labels.kept())
        return Rows(labels, logits.rounded(torch.float16))

    # --- bytes ------------------------------------------------------------------------------------

    def blocks(self, rows: Rows, num_views: int) -> list[bytes]:
        """Return the block of each image; its views follow each other in ``rows``, on the CPU."""
        counts_N, records = self._records(rows.labels)
        counts = counts_N.astype(f"<u{self.count_size}").tobytes() if self.count_size else b""
        logits = b"" if rows.logits is None else self._logit_bytes(rows.logits, counts_N)
        record_ends = np.cumsum(self._sizes(counts_N))[num_views - 1 :: num_views].tolist()
        logit_ends = np.cumsum(self._logit_sizes(counts_N))[num_views - 1 :: num_views].tolist()
        step = num_views * self.count_size
        record_at = logit_at = 0
        blocks = []
        for image, (record_end, logit_end) in enumerate(zip(record_ends, logit_ends, strict=True)):
            blocks.append(
                counts[image * step : (image + 1) * step]
                + records[record_at:record_end]
                + logits[logit_at:logit_end]
            )
            record_at, logit_at = record_end, logit_end
        return blocks

    def rows_of(
        self, data: np.ndarray, ends_N: np.ndarray, num_views: int, views_N: np.ndarray
    ) -> Rows:
        """Return one view of each of N blocks, uint8, that lie one after another.

        Raises LabelSetError where a block is not one that this encoding writes.
        """
        layout = self._layout(data, ends_N, num_views)
        return self._gather(data, layout, (np.arange(len(ends_N)), views_N))

    def all_rows_of(self, data: np.ndarray, ends_N: np.ndarray, num_views: int) -> Rows:
        """Return all views of N blocks, image by image; raises as ``rows_of``."""
        layout = self._layout(data, ends_N, num_views)
        if self.logits:
            return self._gather(data, layout, (slice(None), slice(None)))
        # the records of a block lie one after another: one piece each
        begins, ends = layout.record_at_NV[:, 0].tolist(), layout.logit_at_NV[:, 0].tolist()
        flat = np.ascontiguousarray(data).data
        records = bytearray().join([flat[a:b] for a, b in zip(begins, ends, strict=True)])
        counts_N = layout.counts_NV.reshape(-1)
        return Rows(self._labels(counts_N, np.frombuffer(records, np.uint8)))

    def check(self, rows: Rows) -> None:
        """Raise LabelSetError for rows, as read, that ``encode`` cannot have written."""
        labels = rows.labels
        if rows.logits is not None:
            values_NK, rest_N = rows.logits.values_NK, rows.logits.rest_N
            if not bool(torch.isfinite(values_NK).all() & torch.isfinite(rest_N).all()):
                raise LabelSetError("a logit is not finite")
        if isinstance(labels, EncodedLabels):
            check_rows(labels.counts_N.numpy(), labels.payload_P.numpy(), labels.num_classes)
            if self.topk is not None and bool((labels.counts_N != self.topk).any()):
                raise LabelSetError(f"a label keeps another number of classes than {self.topk}")
            return
        values = torch.cat([labels.probs_NK.float(), labels.rest_N.float()[:, None]], dim=1)
        if not bool((values >= 0).all() & torch.isfinite(values).all()):
            raise LabelSetError("a label has a negative probability, or one that is no number")
        if bool((values.sum(dim=1) == 0).any()):
            raise LabelSetError("a label has no mass")
        if not self.is_dense:
            ids_NK = labels.indices_NK.sort(dim=1).values
            if bool((ids_NK >= self.num_classes).any() | (ids_NK.diff(dim=1) == 0).any()):
                raise LabelSetError("a label names a class twice, or one that is none")

    def _layout(self, data: np.ndarray, ends_N: np.ndarray, num_views: int) -> "_Layout":
        """Return where everything is in the blocks; checks that it fills them."""
        ends_N = ends_N.astype(np.int64)
        starts_N = np.concatenate([[0], ends_N[:-1]]) if len(ends_N) else ends_N
        num_views = num_views if len(ends_N) else 1  # of no image any number, however great
        shape = (len(ends_N), num_views)
        head = num_views * self.count_size
        if (ends_N - starts_N < head).any():
            raise LabelSetError("a block is shorter than its counts")
        if self.count_size:
            counts_NV = _heads(data, starts_N, head).view(f"<u{self.count_size}").astype(np.int64)
            if len(ends_N) and not 1 <= counts_NV.min() <= counts_NV.max() <= self.num_classes:
                raise LabelSetError(f"a view must keep 1 to {self.num_classes} classes")
        else:
            counts_NV = np.full(shape, self.topk, dtype=np.int64)
        sizes_NV, logit_sizes_NV = self._sizes(counts_NV), self._logit_sizes(counts_NV)
        record_ends_NV = starts_N[:, None] + head + np.cumsum(sizes_NV, axis=1)
        logit_ends_NV = record_ends_NV[:, -1:] + np.cumsum(logit_sizes_NV, axis=1)
        if (logit_ends_NV[:, -1] != ends_N).any():
            raise LabelSetError("a block is not as long as its counts say")
        return _Layout(
            counts_NV,
            record_ends_NV - sizes_NV,
            sizes_NV,
            logit_ends_NV - logit_sizes_NV,
            logit_sizes_NV,
        )

    def _gather(self, data: np.ndarray, layout: "_Layout", which: Any) -> Rows:
        """Return the rows at these places of a layout."""
        counts_N, record_at_N, sizes_N, logit_at_N, logit_sizes_N = (
            part[which].reshape(-1) for part in layout
        )
        records = _pick(data, record_at_N, sizes_N)
        labels = self._labels(counts_N, records)
        if not self.logits:
            return Rows(labels)
        values = _pick(data, logit_at_N, logit_sizes_N).view("<f2")
        return Rows(labels, self._logits(values, counts_N))

    def _sizes(self, counts: np.ndarray) -> np.ndarray:
        """Return the bytes of records that keep so many classes, int64."""
        if self.form == "curve":
            max_kept = 1 << (8 * self.count_size)
            table = _curve_sizes(self.num_classes, min(max_kept, self.num_classes + 1))
            curve_sizes: np.ndarray = table[counts]
            return curve_sizes
        return np.full(counts.shape, self._value_record_size(), dtype=np.int64)

    def _value_record_size(self) -> int:
        """Return the bytes of a record that has values as they are."""
        assert self.topk is not None
        ids = 0 if self.is_dense else (self.topk * id_bits(self.num_classes) + 7) // 8
        return ids + (self.topk + (not self.is_dense)) * np.dtype(self.form).itemsize

    def _logit_sizes(self, counts: np.ndarray) -> np.ndarray:
        """Return the bytes of the logits of views that keep so many classes, int64."""
        if not self.logits:
            return np.zeros(counts.shape, dtype=np.int64)
        sizes: np.ndarray = 2 * (counts + (counts < self.num_classes)).astype(np.int64)
        return sizes

    def _records(self, labels: Labels) -> tuple[np.ndarray, bytes]:
        """Return (how many classes each view keeps, int64 N; the records one after another)."""
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
        """Return the labels of records that lie one after another."""
        if self.form == "curve":
            return EncodedLabels(
                torch.from_numpy(counts_N.astype(np.int32)),
                torch.from_numpy(records),
                self.num_classes,
                self.count_size,
            )
        assert self.topk is not None
        value = np.dtype(self.form).newbyteorder("<")
        # with the width said: NumPy cannot tell it from no rows
        by_row = records.reshape(len(counts_N), self._value_record_size())
        if self.is_dense:
            return SoftLabels.from_dense(torch.from_numpy(by_row.view(value)))
        width = id_bits(self.num_classes)
        num_id_bytes = (self.topk * width + 7) // 8
        indices_NK = _unpacked_ids(by_row[:, :num_id_bytes], self.topk, width)
        values = by_row[:, num_id_bytes:].copy().view(value)  # a copy: no stride of odd bytes
        return SoftLabels(
            torch.from_numpy(indices_NK),
            torch.from_numpy(values[:, :-1].copy()),  # of one row NumPy lets any strides be
            torch.from_numpy(values[:, -1].copy()),
            self.num_classes,
        )

    def _logit_bytes(self, logits: KeptLogits, counts_N: np.ndarray) -> bytes:
        values_NK = logits.values_NK.numpy().astype("<f2")
        num_rows, width = values_NK.shape
        padded = np.concatenate([values_NK, np.zeros((num_rows, 1), "<f2")], axis=1)
        has_rest = counts_N < self.num_classes
        padded[np.flatnonzero(has_rest), counts_N[has_rest]] = logits.rest_N.numpy()[has_rest]
        is_there = np.arange(width + 1) < (counts_N + has_rest)[:, None]
        return padded[is_there].tobytes()

    def _logits(self, values: np.ndarray, counts_N: np.ndarray) -> KeptLogits:
        has_rest = counts_N < self.num_classes
        width = int(counts_N.max(initial=0)) + 1
        padded = np.zeros((len(counts_N), width), dtype="<f2")
        padded[np.arange(width) < (counts_N + has_rest)[:, None]] = values
        rest_N = np.zeros(len(counts_N), dtype="<f2")
        rest_N[has_rest] = padded[np.flatnonzero(has_rest), counts_N[has_rest]]
        padded[np.flatnonzero(has_rest), counts_N[has_rest]] = 0
        values_NK = torch.from_numpy(np.ascontiguousarray(padded[:, : width - 1]))
        return KeptLogits(values_NK, torch.from_numpy(rest_N))


class _Layout(NamedTuple):
    """Of N blocks x V views: classes kept; where record and logits begin, and their bytes."""

    counts_NV: np.ndarray
    record_at_NV: np.ndarray
    sizes_NV: np.ndarray
    logit_at_NV: np.ndarray
    logit_sizes_NV: np.ndarray


@lru_cache(maxsize=8)
def _curve_sizes(num_classes: int, num_counts: int) -> np.ndarray:
    return num_bytes(np.maximum(1, np.arange(num_counts)), num_classes)


def _heads(data: np.ndarray, at_N: np.ndarray, size: int) -> np.ndarray:
    """Return as many bytes from each of these places on, N x size."""
    view = np.ascontiguousarray(data).data
    heads = b"".join([view[at : at + size] for at in at_N.tolist()])
    return np.frombuffer(heads, np.uint8).reshape(len(at_N), size)


def _pick(data: np.ndarray, at_N: np.ndarray, sizes_N: np.ndarray) -> np.ndarray:
    """Return pieces of some bytes, one after another."""
    shift_N = at_N - (np.cumsum(sizes_N) - sizes_N)
    source = np.repeat(shift_N, sizes_N)
    source += np.arange(len(source))
    picked: np.ndarray = data[source]
    return picked


def _packed_ids(indices_NK: np.ndarray, width: int) -> np.ndarray:
    """Return rows of ids of ``width`` bits each, lowest bit first, filled up to whole bytes."""
    num_rows, k = indices_NK.shape
    id_bytes = indices_NK.astype("<u4", order="C")[..., None].view(np.uint8)
    bits = np.unpackbits(id_bytes, axis=-1, bitorder="little")
    packed: np.ndarray = np.packbits(
        bits[..., :width].reshape(num_rows, k * width), axis=1, bitorder="little"
    )
    return packed


def _unpacked_ids(packed: np.ndarray, k: int, width: int) -> np.ndarray:
    """Return the ids of rows, int64."""
    bits = np.unpackbits(packed, axis=1, count=k * width, bitorder="little")
    weights = np.left_shift(1, np.arange(width, dtype=np.int64))
    ids_NK: np.ndarray = bits.reshape(len(packed), k, width) @ weights
    return ids_NK
