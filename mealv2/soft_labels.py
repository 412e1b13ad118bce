"""Soft labels: the classes that are kept of an ensemble's distribution, its tail, dense recovery.

Two forms with one face (``rows``, ``to``, ``kept``, ``to_dense``): SoftLabels has exact values of
as many classes in each row, EncodedLabels the codec's records of as many as each row needs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mealv2.codec import EncodedLabels as EncodedLabels  # the public names, used from here
from mealv2.codec import Kept
from mealv2.codec import encode as encode
from mealv2.devices import to_device


@dataclass(frozen=True)
class SoftLabels:
    """What an ensemble said about N views: the K likeliest classes, their mass, and the rest.

    ``indices_NK`` int64 class ids, distinct in a row; ``probs_NK`` the ensemble's own probabilities
    (not renormalised); ``rest_N`` the mass of the other classes, spread evenly over them (FKD:
    marginal smoothing); float32, or float16 as stored. K = ``num_classes`` means a dense label, in
    class order. The rest is kept, not derived: 1 - sum of rounded values is noise where the
    ensemble was sure.
    """

    indices_NK: Tensor
    probs_NK: Tensor
    rest_N: Tensor
    num_classes: int

    @staticmethod
    def from_dense(probs_NC: Tensor) -> "SoftLabels":
        """Return dense labels, in class order."""
        indices_NC = torch.arange(probs_NC.shape[1], device=probs_NC.device).expand(probs_NC.shape)
        rest_N = probs_NC.new_zeros(len(probs_NC))
        return SoftLabels(indices_NC, probs_NC, rest_N, probs_NC.shape[1])

    def __len__(self) -> int:
        return len(self.indices_NK)

    @property
    def is_dense(self) -> bool:
        """Whether every class has a value of its own."""
        return self.indices_NK.shape[1] == self.num_classes

    def to(self, device: torch.device) -> "SoftLabels":
        """Return the same labels on a device; on the CPU they are there when this returns."""
        probs_NK = to_device(self.probs_NK, device)
        if self.is_dense:
            return SoftLabels.from_dense(probs_NK)
        return SoftLabels(
            to_device(self.indices_NK, device),
            probs_NK,
            to_device(self.rest_N, device),
            self.num_classes,
        )

    def rows(self, order_N: Tensor) -> "SoftLabels":
        """Return rows by index, in that order."""
        order_N = to_device(order_N, self.probs_NK.device)
        if self.is_dense:
            return SoftLabels.from_dense(self.probs_NK[order_N])
        return SoftLabels(
            self.indices_NK[order_N], self.probs_NK[order_N], self.rest_N[order_N], self.num_classes
        )

    def rounded(self, dtype: torch.dtype) -> "SoftLabels":
        """Return the labels with their values in a type such as float16."""
        return SoftLabels(
            self.indices_NK, self.probs_NK.to(dtype), self.rest_N.to(dtype), self.num_classes
        )

    @staticmethod
    def concat(parts: "Sequence[SoftLabels]") -> "SoftLabels":
        """Return the rows of several labels of the same K and classes, one after another."""
        probs_NK = torch.cat([part.probs_NK for part in parts])
        if parts[0].is_dense:
            return SoftLabels.from_dense(probs_NK)
        return SoftLabels(
            torch.cat([part.indices_NK for part in parts]),
            probs_NK,
            torch.cat([part.rest_N for part in parts]),
            parts[0].num_classes,
        )

    def kept(self) -> Kept:
        """Return the classes kept, float32, and what every other class has; rows sum to 1."""
        num_others = self.num_classes - self.indices_NK.shape[1]
        probs_NK, rest_N = self.probs_NK.float(), self.rest_N.float()
        total_N = probs_NK.sum(dim=1) + (rest_N if num_others else 0.0)
        return Kept(
            self.indices_NK,
            probs_NK / total_N[:, None],
            torch.ones_like(self.indices_NK, dtype=torch.bool),
            rest_N / max(1, num_others) / total_N,
        )

    def argmax(self) -> Tensor:
        """Return the likeliest class of each row, int64 N."""
        return self.probs_NK.argmax(dim=1) if self.is_dense else self.indices_NK[:, 0]

    def to_dense(self) -> Tensor:
        """Return the recovered distribution, float32 N x C, each row summing to 1."""
        if self.is_dense:
            dense_NC = self.probs_NK.float()
        else:
            num_others = self.num_classes - self.indices_NK.shape[1]
            dense_NC = (self.rest_N.float() / num_others)[:, None].repeat(1, self.num_classes)
            dense_NC.scatter_(1, self.indices_NK, self.probs_NK.float())
        return dense_NC / dense_NC.sum(dim=1, keepdim=True)


Labels = SoftLabels | EncodedLabels


def concat(parts: Sequence[Labels]) -> Labels:
    """Return the rows of several labels of one form, one after another."""
    exact = [part for part in parts if isinstance(part, SoftLabels)]
    encoded = [part for part in parts if isinstance(part, EncodedLabels)]
    if exact and encoded:
        raise ValueError("labels of two forms cannot be joined")
    return SoftLabels.concat(exact) if exact else EncodedLabels.concat(encoded)


@dataclass(frozen=True)
class KeptLogits:
    """An ensemble's mean logits of the classes that N labels keep, and the mean of all others.

    ``values_NK`` is in the order of the label's classes, 0 where it keeps none; ``rest_N`` is 0
    where it keeps all. Float.
    """

    values_NK: Tensor
    rest_N: Tensor

    def to(self, device: torch.device) -> "KeptLogits":
        """Return the same on a device; on the CPU it is there when this returns."""
        return KeptLogits(to_device(self.values_NK, device), to_device(self.rest_N, device))

    def rows(self, order_N: Tensor) -> "KeptLogits":
        """Return rows by index, in that order."""
        order_N = to_device(order_N, self.rest_N.device)
        return KeptLogits(self.values_NK[order_N], self.rest_N[order_N])

    def rounded(self, dtype: torch.dtype) -> "KeptLogits":
        """Return the logits in a type such as float16."""
        return KeptLogits(self.values_NK.to(dtype), self.rest_N.to(dtype))

    @staticmethod
    def concat(parts: "Sequence[KeptLogits]") -> "KeptLogits":
        """Return the rows of several, one after another."""
        longest = max(part.values_NK.shape[1] for part in parts)
        padded = [F.pad(p.values_NK, (0, longest - p.values_NK.shape[1])) for p in parts]
        return KeptLogits(torch.cat(padded), torch.cat([part.rest_N for part in parts]))

    def to_dense(self, kept: Kept, num_classes: int) -> Tensor:
        """Return logits of all classes, float32 N x C, for the labels they were kept with."""
        width = kept.indices_NK.shape[1]
        values_NK = F.pad(self.values_NK.float(), (0, width - self.values_NK.shape[1]))
        return _spread(kept, values_NK, self.rest_N.float(), num_classes)


def keep_logits(logits_NC: Tensor, kept: Kept) -> KeptLogits:
    """Return the logits of the classes kept, and the mean of the others, float32."""
    logits_NC = logits_NC.float()
    values_NK = logits_NC.gather(1, kept.indices_NK).masked_fill(~kept.is_kept_NK, 0.0)
    num_others_N = logits_NC.shape[1] - kept.is_kept_NK.sum(dim=1)
    rest_NC = logits_NC.masked_fill(_is_kept(kept, logits_NC.shape[1]), 0.0)
    return KeptLogits(values_NK, rest_NC.sum(dim=1) / num_others_N.clamp_min(1))


def compress_logits(logits_NC: Tensor, kept: Kept) -> Tensor:
    """Return a model's logits, float32 N x C, after the loss that stored mean logits went through.

    Those of the kept classes stay; every other class gets the mean of the others.
    """
    return keep_logits(logits_NC, kept).to_dense(kept, logits_NC.shape[1])


def _is_kept(kept: Kept, num_classes: int) -> Tensor:
    """Return which classes are kept, bool N x C."""
    zeros_N = kept.tail_N.new_zeros(len(kept.tail_N))
    return _spread(kept, kept.is_kept_NK.to(zeros_N.dtype), zeros_N, num_classes) > 0


def _spread(kept: Kept, values_NK: Tensor, others_N: Tensor, num_classes: int) -> Tensor:
    """Return N x C with values at the classes kept, and one value at all others of a row."""
    # what is not kept goes to a column behind the last: no mask to wait for
    spread_NC = others_N[:, None].repeat(1, num_classes + 1)
    places_NK = torch.where(kept.is_kept_NK, kept.indices_NK, num_classes)
    return spread_NC.scatter(1, places_NK, values_NK)[:, :num_classes]


def top_k(probs_NC: Tensor, k: int) -> SoftLabels:
    """Keep the ``k`` largest probabilities of each row, largest first, and the sum of the others.

    With ``k`` equal to the class count nothing is sorted: the indices are 0..C-1. Raises ValueError
    when ``k`` is not in 1..C.
    """
    num_classes = probs_NC.shape[1]
    if not 1 <= k <= num_classes:
        raise ValueError(f"k must lie in 1..{num_classes}, got {k}")
    if k == num_classes:
        return SoftLabels.from_dense(probs_NC)
    probs_NK, indices_NK = probs_NC.topk(k, dim=1, sorted=True)
    rest_N = probs_NC.scatter(1, indices_NK, 0.0).sum(dim=1)
    return SoftLabels(indices_NK, probs_NK, rest_N, num_classes)


def compress_log_probs(logits_NC: Tensor, kept: Kept) -> Tensor:
    """Return log-probabilities N x C of a model after the loss that stored labels went through.

    The model's probabilities at the kept classes stay; every other class gets the mean of the rest,
    as ``to_dense`` does to the teachers. In log space, float32:
    log tail = logsumexp(logits not kept) - log(C - K) - logsumexp(all logits).
    """
    log_probs_NC = torch.log_softmax(logits_NC.float(), dim=1)
    num_classes = logits_NC.shape[1]
    is_kept_NC = _is_kept(kept, num_classes)
    # a row that keeps all has no rest; a number keeps its gradient from being none
    rest_NC = log_probs_NC.masked_fill(is_kept_NC, torch.finfo(torch.float32).min)
    num_others_N1 = (num_classes - kept.is_kept_NK.sum(dim=1, keepdim=True)).clamp_min(1)
    tail_N1 = rest_NC.logsumexp(dim=1, keepdim=True) - num_others_N1.log()
    return torch.where(is_kept_NC, log_probs_NC, tail_N1)


def tempered(probs_NC: Tensor, temperature: float) -> Tensor:
    """Return q^(1/T) renormalised, row by row: softer above 1, sharper below; 1 changes nothing."""
    if temperature == 1.0:
        return probs_NC
    return torch.softmax(probs_NC.log() / temperature, dim=1)  # in log space: q^100 underflows
