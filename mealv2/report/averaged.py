"""The label sets of several teachers as one: the mean of their soft labels, view by view."""

from collections.abc import Sequence
from pathlib import Path

import torch

from mealv2.errors import LabelSetError
from mealv2.label_set import LabelSet
from mealv2.soft_labels import Labels, SoftLabels
from mealv2.teacher_sets import sets_of


class AveragedLabels(LabelSet):
    """Sets of single teachers, on the same views, read as the labels of the ensemble."""

    def __init__(self, sets: Sequence[LabelSet]) -> None:
        first = sets[0]
        super().__init__(first.folder, first.manifest, first.split, first.appended)
        self.sets = list(sets)

    def soft_labels(self, keys: Sequence[str], views: Sequence[int]) -> Labels:
        """Return the mean of the teachers' labels, dense; raises as ``LabelSet.soft_labels``."""
        found = [labels.soft_labels(keys, views).to_dense() for labels in self.sets]
        return SoftLabels.from_dense(torch.stack(found).mean(dim=0))


def open_labels(folder: Path, *, split: str = "train") -> LabelSet:
    """Open a label set, or a folder of `mealv2 precompute --store per-teacher` as the mean of its
    sets; raises LabelSetError as ``LabelSet.open``, and for sets of different images or views.
    """
    sets = [LabelSet.open(path, split=split) for path in sets_of(folder)]
    for other in sets[1:]:
        if other.classes != sets[0].classes or other.num_views != sets[0].num_views:
            raise LabelSetError(f"{other.folder} labels other classes or views than its neighbours")
        if not other.has_labels(list(sets[0].keys())).all():
            raise LabelSetError(f"{other.folder} labels other images than {sets[0].folder}")
    return sets[0] if len(sets) == 1 else AveragedLabels(sets)


def teacher_sets(labels: LabelSet) -> list[LabelSet]:
    """Return the sets that labels are the mean of; a set of its own otherwise."""
    return labels.sets if isinstance(labels, AveragedLabels) else [labels]
