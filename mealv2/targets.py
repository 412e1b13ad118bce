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
        return self.label_set.soft_labels([self._keys[p] for p in positions], views)


class HardLabels:
    """Answers with the data set's class ids, for any view.

    Epoch e uses view e, so that none repeats; with ``num_views`` the views, in the order, that a
    label set of so many views would give under ``seed``.
    """

    def __init__(
        self, labels: Sequence[int], *, num_views: int | None = None, seed: int = 0
    ) -> None:
        self._labels = labels
        self._num_views = num_views
        self._seed = seed

    def view(self, key: str, epoch: int) -> int:
        """Return the view of ``key`` for ``epoch``."""
        if self._num_views is None:
            return epoch
        return scheduled_view(key, epoch, seed=self._seed, num_views=self._num_views)

    def answer(self, positions: Sequence[int], views: Sequence[int]) -> Tensor:
        """Return class ids, int64 B."""
        return torch.tensor([self._labels[p] for p in positions], dtype=torch.int64)
