"""Soft labels: the kept classes of an ensemble's distribution, its tail, and the dense form.

SoftLabels has exact values, the same number of classes in each row. EncodedLabels has the records
of the codec, as many classes as each row needs. Both have ``rows``, ``to``, ``kept``, ``argmax``
and ``to_dense``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from mealv2.codec import EncodedLabels as EncodedLabels  # public names of this module
from mealv2.codec import Kept, to_device
from mealv2.codec import encode as encode


@dataclass(frozen=True)
class SoftLabels:
    """The ensemble's output for N views: the K likeliest classes, their mass, and the rest.

    ``indices_NK`` are int64 class ids, distinct in a row; ``probs_NK`` are the ensemble's own
    probabilities, not renormalised; ``rest_N`` is the mass of the other classes, spread evenly over
    them (FKD: marginal smoothing). Floats are float32, or float16 as stored. K = ``num_classes``
    means a dense label, in class order. The rest is stored because 1 - sum of rounded values is
    noise where the ensemble is confident.
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
        """Whether every class has its own value."""
        return self.indices_NK.shape[1] == self.num_classes

    def _map(self, change: Callable[[Tensor], Tensor]) -> "SoftLabels":
        probs_NK = change(self.probs_NK)
        if self.is_dense:
            return SoftLabels.from_dense(probs_NK)
        return SoftLabels(change(self.indices_NK), probs_NK, change(self.rest_N), self.num_classes)

    def to(self, device: torch.device) -> "SoftLabels":
        """Return the labels on a device."""
        return self._map(lambda tensor: to_device(tensor, device))

    def rows(self, order_N: Tensor) -> "SoftLabels":
        """Return rows by index, in that order."""
        order_N = to_device(order_N, self.probs_NK.device)
        return self._map(lambda tensor: tensor[order_N])

    def rounded(self, dtype: torch.dtype) -> "SoftLabels":
        """Return the labels with values of another float type."""
        return replace(self, probs_NK=self.probs_NK.to(dtype), rest_N=self.rest_N.to(dtype))

    @staticmethod
    def concat(parts: "Sequence[SoftLabels]") -> "SoftLabels":
        """Concatenate labels with the same K and the same classes."""
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
        """Return the kept classes and the probability of each other class; rows sum to 1."""
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
    """Concatenate labels of one form."""
    exact = [part for part in parts if isinstance(part, SoftLabels)]
    encoded = [part for part in parts if isinstance(part, EncodedLabels)]
    if exact and encoded:
        raise ValueError("cannot join SoftLabels and EncodedLabels")
    return SoftLabels.concat(exact) if exact else EncodedLabels.concat(encoded)


@dataclass(frozen=True)
class KeptLogits:
    """The ensemble's mean logits of the classes that N labels keep, and the mean of all others.

    ``values_NK`` is in the order of the label's classes, 0 where the label keeps fewer than K;
    ``rest_N`` is 0 where it keeps all classes. Float.
    """

    values_NK: Tensor
    rest_N: Tensor

    def to(self, device: torch.device) -> "KeptLogits":
        """Return the logits on a device."""
        return KeptLogits(to_device(self.values_NK, device), to_device(self.rest_N, device))

    def rows(self, order_N: Tensor) -> "KeptLogits":
        """Return rows by index, in that order."""
        order_N = to_device(order_N, self.rest_N.device)
        return KeptLogits(self.values_NK[order_N], self.rest_N[order_N])

    def rounded(self, dtype: torch.dtype) -> "KeptLogits":
        """Return the logits in another float type."""
        return KeptLogits(self.values_NK.to(dtype), self.rest_N.to(dtype))

    @staticmethod
    def concat(parts: "Sequence[KeptLogits]") -> "KeptLogits":
        """Concatenate logits, padded to the largest K."""
        longest = max(part.values_NK.shape[1] for part in parts)
        padded = [F.pad(p.values_NK, (0, longest - p.values_NK.shape[1])) for p in parts]
        return KeptLogits(torch.cat(padded), torch.cat([part.rest_N for part in parts]))

    def to_dense(self, kept: Kept, num_classes: int) -> Tensor:
        """Return the logits of all classes, float32 N x C; ``kept`` is that of their labels."""
        width = kept.indices_NK.shape[1]
        values_NK = F.pad(self.values_NK.float(), (0, width - self.values_NK.shape[1]))
        return kept.spread(values_NK, self.rest_N.float(), num_classes)


def keep_logits(logits_NC: Tensor, kept: Kept) -> KeptLogits:
    """Return the logits of the kept classes and the mean of the others, float32."""
    logits_NC, num_classes = logits_NC.float(), logits_NC.shape[1]
    values_NK = logits_NC.gather(1, kept.indices_NK).masked_fill(~kept.is_kept_NK, 0.0)
    num_others_N = num_classes - kept.is_kept_NK.sum(dim=1)
    rest_NC = logits_NC.masked_fill(kept.mask(num_classes), 0.0)
    return KeptLogits(values_NK, rest_NC.sum(dim=1) / num_others_N.clamp_min(1))


def top_k(probs_NC: Tensor, k: int) -> SoftLabels:
    """Keep the ``k`` largest probabilities of each row, largest first, and the sum of the others.

    With ``k`` = C the label is dense and in class order. Raises ValueError unless 1 <= k <= C.
    """
    num_classes = probs_NC.shape[1]
    if not 1 <= k <= num_classes:
        raise ValueError(f"k must lie in 1..{num_classes}, got {k}")
    if k == num_classes:
        return SoftLabels.from_dense(probs_NC)
    probs_NK, indices_NK = probs_NC.topk(k, dim=1, sorted=True)
    rest_N = probs_NC.scatter(1, indices_NK, 0.0).sum(dim=1)
    return SoftLabels(indices_NK, probs_NK, rest_N, num_classes)


def tempered(probs_NC: Tensor, temperature: float) -> Tensor:
    """Return q^(1/T) renormalised, row by row: T > 1 softens, T < 1 sharpens."""
    if temperature == 1.0:
        return probs_NC
    return torch.softmax(probs_NC.log() / temperature, dim=1)  # in log space: q^100 underflows
