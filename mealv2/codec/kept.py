"""Decoded labels as padded tensors: the classes with a value of their own, and the tail."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mealv2.codec.block import DecodedRows

_NO_CLASS = 1 << 40  # above all ids


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
        indices_NK, probs_NK, is_kept_NK = (each.gather(1, order_NK) for each in self[:3])
        return Kept(indices_NK, probs_NK, is_kept_NK, self.tail_N)

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


def joined(parts: Sequence[DecodedRows], rows_N: np.ndarray) -> Kept:
    """Join decoded rows, in this order of rows."""
    width = max(part.ids_NM.shape[1] for part in parts)
    columns: list[np.ndarray] = list(parts[0])
    if len(parts) > 1:
        order_N = np.argsort(rows_N)
        padded = [_padded(part, width) for part in parts]
        columns = [np.concatenate(column)[order_N] for column in zip(*padded, strict=True)]
    ids_NK, probs_NK, counts_N, tail_N = columns
    is_kept_NK = np.arange(width) < counts_N[:, None]
    return Kept(*map(torch.from_numpy, (ids_NK, probs_NK, is_kept_NK, tail_N)))


def _padded(rows: DecodedRows, width: int) -> DecodedRows:
    added = ((0, 0), (0, width - rows.ids_NM.shape[1]))
    return rows._replace(ids_NM=np.pad(rows.ids_NM, added), probs_NM=np.pad(rows.probs_NM, added))
