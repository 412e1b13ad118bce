"""Soft labels: the top-k of an ensemble distribution, its tail, and dense recovery."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mealv2.codec import EncodedLabels as EncodedLabels  # the public names, used from here
from mealv2.codec import encode as encode

# What a manifest says about the mass that top-k does not keep.
TAIL_RULE = "uniform over the classes not kept"


@dataclass(frozen=True)
class SoftLabels:
    """What an ensemble said about N views: the K likeliest classes, their mass, and the rest.

    ``indices_NK`` int64 class ids, distinct in a row; ``probs_NK`` float32, the ensemble's own
    probabilities (not renormalised); ``rest_N`` float32, the mass of the other classes, spread
    evenly over them (FKD: marginal smoothing). K = ``num_classes`` means a dense label. The rest is
    kept, not derived: 1 - sum of rounded values is noise where the ensemble was sure.
    """

    indices_NK: Tensor
    probs_NK: Tensor
    rest_N: Tensor
    num_classes: int

    def __len__(self) -> int:
        return len(self.indices_NK)

    def to(self, device: torch.device) -> "SoftLabels":
        """Return the same labels on a device; on the CPU they are there when this returns."""
        wait_not = device.type != "cpu"  # a copy to the CPU that nobody waits for is read too early
        return SoftLabels(
            self.indices_NK.to(device, non_blocking=wait_not),
            self.probs_NK.to(device, non_blocking=wait_not),
            self.rest_N.to(device, non_blocking=wait_not),
            self.num_classes,
        )

    def rows(self, order_N: Tensor) -> "SoftLabels":
        """Return rows by index, in that order."""
        return SoftLabels(
            self.indices_NK[order_N], self.probs_NK[order_N], self.rest_N[order_N], self.num_classes
        )

    def rounded(self, dtype: torch.dtype) -> "SoftLabels":
        """Return what is left of the values after storing them in a type such as float16."""
        probs_NK, rest_N = self.probs_NK.to(dtype).float(), self.rest_N.to(dtype).float()
        return SoftLabels(self.indices_NK, probs_NK, rest_N, self.num_classes)

    @staticmethod
    def joined(parts: "Sequence[SoftLabels]") -> "SoftLabels":
        """Return the rows of several labels of the same K and classes, one after another."""
        return SoftLabels(
            torch.cat([part.indices_NK for part in parts]),
            torch.cat([part.probs_NK for part in parts]),
            torch.cat([part.rest_N for part in parts]),
            parts[0].num_classes,
        )

    def dense(self) -> Tensor:
        """Return the recovered distribution, float32 N x C, each row summing to 1."""
        num_others = self.num_classes - self.indices_NK.shape[1]
        dense_NC = (self.rest_N / max(1, num_others))[:, None].repeat(1, self.num_classes)
        dense_NC.scatter_(1, self.indices_NK, self.probs_NK)
        return dense_NC / dense_NC.sum(dim=1, keepdim=True)


def top_k(probs_NC: Tensor, k: int) -> SoftLabels:
    """Keep the ``k`` largest probabilities of each row, largest first, and the sum of the others.

    With ``k`` equal to the class count nothing is sorted: the indices are 0..C-1. Raises ValueError
    when ``k`` is not in 1..C.
    """
    num_classes = probs_NC.shape[1]
    if not 1 <= k <= num_classes:
        raise ValueError(f"k must lie in 1..{num_classes}, got {k}")
    if k == num_classes:
        indices_NK = torch.arange(num_classes, device=probs_NC.device).expand_as(probs_NC)
        return SoftLabels(indices_NK, probs_NC, torch.zeros_like(probs_NC[:, 0]), num_classes)
    probs_NK, indices_NK = probs_NC.topk(k, dim=1, sorted=True)
    rest_N = probs_NC.scatter(1, indices_NK, 0.0).sum(dim=1)
    return SoftLabels(indices_NK, probs_NK, rest_N, num_classes)


def through_top_k(logits_NC: Tensor, indices_NK: Tensor) -> Tensor:
    """Return log-probabilities N x C of a model after the loss that stored labels went through.

    The model's probabilities at the kept classes stay; every other class gets the mean of the rest,
    as SoftLabels.dense does to the teachers. In log space, float32:
    log tail = logsumexp(logits not kept) - log(C - K) - logsumexp(all logits).
    """
    logits_NC = logits_NC.float()
    num_classes, k = logits_NC.shape[1], indices_NK.shape[1]
    log_probs_NC = torch.log_softmax(logits_NC, dim=1)
    if k == num_classes:
        return log_probs_NC
    kept_NC = torch.zeros_like(log_probs_NC, dtype=torch.bool).scatter_(1, indices_NK, True)
    rest_NC = log_probs_NC.masked_fill(kept_NC, -torch.inf)
    tail_N1 = rest_NC.logsumexp(dim=1, keepdim=True) - math.log(num_classes - k)
    return torch.where(kept_NC, log_probs_NC, tail_N1)


def tempered(probs_NC: Tensor, temperature: float) -> Tensor:
    """Return q^(1/T) renormalised, row by row: softer above 1, sharper below; 1 changes nothing."""
    if temperature == 1.0:
        return probs_NC
    return torch.softmax(probs_NC.log() / temperature, dim=1)  # in log space: q^100 underflows
