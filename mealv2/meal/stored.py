"""MEAL from stored labels: a label set of each teacher, and its rows in place of logits."""

from collections.abc import Sequence

from torch import Tensor

from mealv2.label_set import Rows
from mealv2.losses import compress_logits, similarity_loss
from mealv2.meal.losses import BlockLoss, block_loss
from mealv2.meal.teachers import TeacherSelection, drawn_teachers
from mealv2.models.ensemble import ONE_SIZE, BySize
from mealv2.soft_labels import SoftLabels
from mealv2.targets import STORED, BatchTargets, StoredLabels, Targets, class_ids


class StoredTeachers(Targets):
    """Labels of one teacher a step, each from a label set of its own; views as StoredLabels.

    The teacher of a step is that of ``SelectedTeachers`` with the same ``seed`` and ``selection``.
    ``sets`` label the same views in the same order of epochs. A view that one of them lacks counts
    as missing, whichever teacher is drawn.
    """

    def __init__(
        self,
        sets: Sequence[StoredLabels],
        classes: Sequence[int] = (),
        *,
        seed: int,
        selection: TeacherSelection = "random",
    ) -> None:
        self._sets = sets
        self._classes = classes
        self._seed = seed
        self._selection = selection

    def view(self, key: str, epoch: int) -> int | None:
        views = {of_teacher.view(key, epoch) for of_teacher in self._sets}
        if None in views:
            return None
        (view,) = views
        return view

    def batch(
        self,
        positions: Sequence[int],
        views: Sequence[int],
        images_BCHW: Tensor,
        by_size: BySize = ONE_SIZE,
        *,
        step: int = 1,
    ) -> BatchTargets:
        """Return the targets; raises LabelSetError for a missing label."""
        chosen = drawn_teachers(len(self._sets), self._selection, seed=self._seed, step=step)
        stored = []
        for number in chosen:
            found = self._sets[number].batch(positions, views, images_BCHW)
            assert found.soft_labels is not None, "a label set has soft labels"
            stored.append(Rows(found.soft_labels, found.kept_logits))
        return BatchTargets(
            classes_B=class_ids(self._classes, positions),
            stored=tuple(stored),
            label_counts={STORED: len(positions)},
        )


def stored_loss(student_BC: Tensor, stored: Rows, loss: BlockLoss = "ce") -> Tensor:
    """Return ``block_loss`` of the student's logits and a teacher's stored row, a float32 scalar.

    ``ce``, ``l1_soft`` and ``l2_soft`` need its label alone; ``l1`` and ``l2`` its logits.
    """
    if loss in ("l1", "l2"):
        return block_loss(*stored_logits(student_BC, stored), loss)
    labels = stored.labels
    if loss == "ce":
        is_dense = isinstance(labels, SoftLabels)  # records are not expanded to B x C
        return similarity_loss(student_BC, labels.to_dense() if is_dense else labels)
    # softmax(log q) = q
    return block_loss(student_BC, labels.to_dense().log(), loss)


def stored_logits(student_BC: Tensor, stored: Rows) -> tuple[Tensor, Tensor]:
    """Return the student's logits and a teacher's stored ones, float32 B x C each.

    Both have the logits of the classes that the label keeps, and for all others their mean: nothing
    but the teacher, and the errors of a line, tells them apart (docs/adr/0004, 0045).
    """
    assert stored.logits is not None, "the label set stores no logits"
    kept = stored.labels.kept()
    teacher_BC = stored.logits.to_dense(kept, stored.labels.num_classes)
    return compress_logits(student_BC, kept), teacher_BC
