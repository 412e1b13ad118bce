"""Who answers for a batch of views: the label set, or the data set's own class labels."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from mealv2.label_set import LabelSet
from mealv2.soft_labels import SoftLabels
from mealv2.views import scheduled_view


class Targets(Protocol):
    """Says which view of an image an epoch uses, and what the answer to a batch of views is."""

    def view(self, key: str, epoch: int) -> int:
        """Return the index of the view of ``key`` that ``epoch`` uses."""

    def answer(self, positions: Sequence[int], views: Sequence[int]) -> SoftLabels | Tensor:
        """Return the targets of views of the images at ``positions`` of the source."""


class StoredLabels:
    """Answers from a label set: one stored view of each image an epoch, all before any repeats."""

    def __init__(self, label_set: LabelSet, keys: Sequence[str], *, seed: int) -> None:
        self.label_set = label_set
        self._keys = keys
        self._seed = seed

    def view(self, key: str, epoch: int) -> int:
        """Return the stored view of ``key`` for ``epoch`` (views.scheduled_view)."""
        return scheduled_view(key, epoch, seed=self._seed, num_views=self.label_set.num_views)

    def answer(self, positions: Sequence[int], views: Sequence[int]) -> SoftLabels:
        """Return the stored labels of these views; raises LabelSetError for a row not there."""
        found = self.label_set.lookup([self._keys[p] for p in positions], views)
        return SoftLabels(
            torch.from_numpy(found.indices_NK),
            torch.from_numpy(found.probs_NK),
            self.label_set.num_classes,
        )


class HardLabels:
    """Answers with the data set's class ids; epoch e uses view e, so that none repeats."""

    def __init__(self, labels: Sequence[int]) -> None:
        self._labels = labels

    def view(self, key: str, epoch: int) -> int:
        """Return ``epoch``: a fresh view each time."""
        return epoch

    def answer(self, positions: Sequence[int], views: Sequence[int]) -> Tensor:
        """Return class ids, int64 B."""
        return torch.tensor([self._labels[p] for p in positions], dtype=torch.int64)
