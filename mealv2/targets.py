"""Targets of a batch of views: stored labels, labels of online teachers, both, or class ids."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from mealv2.devices import to_device
from mealv2.errors import DataError
from mealv2.label_set import Appender, LabelSet, Rows
from mealv2.models.ensemble import TeacherEnsemble
from mealv2.soft_labels import KeptLogits, Labels, SoftLabels
from mealv2.views import scheduled_view

Missing = Literal["fail", "skip", "teach"]

# Where labels come from, in the log.
STORED, ONLINE, SKIPPED = "labels_stored", "labels_online", "labels_skipped"


@dataclass(frozen=True)
class BatchTargets:
    """What supervises B views: soft labels, class ids (int64 B), the ensemble's mean logits.

    ``mean_logits_BC`` is there only when the teachers computed every row just now, ``kept_logits``
    when the labels come from a set that keeps them. ``label_counts`` counts the rows by where their
    labels come from.
    """

    soft_labels: Labels | None = None
    classes_B: Tensor | None = None
    mean_logits_BC: Tensor | None = None
    kept_logits: KeptLogits | None = None
    label_counts: dict[str, int] = field(default_factory=dict)

    def to(self, device: torch.device) -> "BatchTargets":
        """Return the same targets on a device."""
        return BatchTargets(
            None if self.soft_labels is None else self.soft_labels.to(device),
            None if self.classes_B is None else to_device(self.classes_B, device),
            None if self.mean_logits_BC is None else to_device(self.mean_logits_BC, device),
            None if self.kept_logits is None else self.kept_logits.to(device),
            self.label_counts,
        )

    def rows(self, order_B: Tensor) -> "BatchTargets":
        """Return the rows in another order, on the same device."""
        return BatchTargets(
            None if self.soft_labels is None else self.soft_labels.rows(order_B),
            _select_rows(self.classes_B, order_B),
            _select_rows(self.mean_logits_BC, order_B),
            None if self.kept_logits is None else self.kept_logits.rows(order_B),
            self.label_counts,
        )


class Targets(Protocol):
    """Chooses the view of an image for each epoch, and gives the targets of a batch of views."""

    def view(self, key: str, epoch: int) -> int | None:
        """Return the index of the view of ``key`` that ``epoch`` uses; None skips it."""

    def batch(
        self, positions: Sequence[int], views: Sequence[int], images_BCHW: Tensor
    ) -> BatchTargets:
        """Return the targets of views of the images at ``positions`` of the source.

        ``images_BCHW`` are their pixels, uint8, on the device of the models.
        """

    def flush(self) -> None:
        """Write what is to be kept, by default nothing; called before every checkpoint."""
        return


class HardLabels(Targets):
    """The data set's class ids, for any view.

    Epoch e uses view e, so that none repeats; with ``num_views`` the same views in the same order
    as a label set of so many views under ``seed``.
    """

    def __init__(
        self, classes: Sequence[int], *, num_views: int | None = None, seed: int = 0
    ) -> None:
        self._classes = classes
        self._num_views = num_views
        self._seed = seed

    def view(self, key: str, epoch: int) -> int:
        if self._num_views is None:
            return epoch
        return scheduled_view(key, epoch, seed=self._seed, num_views=self._num_views)

    def batch(
        self, positions: Sequence[int], views: Sequence[int], images_BCHW: Tensor
    ) -> BatchTargets:
        return BatchTargets(classes_B=_class_ids(self._classes, positions))


class OnlineTeachers(Targets):
    """Labels of the ensemble, computed from the batch's pixels; epoch e uses view e: none repeats.

    This is the paper's training: fully random crops, dense labels, mean logits for the
    discriminator (official train.py).
    """

    def __init__(self, ensemble: TeacherEnsemble, classes: Sequence[int]) -> None:
        self.ensemble = ensemble
        self._classes = classes

    def view(self, key: str, epoch: int) -> int:
        return epoch

    def batch(
        self, positions: Sequence[int], views: Sequence[int], images_BCHW: Tensor
    ) -> BatchTargets:
        probs_BC, mean_logits_BC = self.ensemble(images_BCHW)
        return BatchTargets(
            SoftLabels.from_dense(probs_BC),
            _class_ids(self._classes, positions),
            mean_logits_BC,
            label_counts={ONLINE: len(positions)},
        )


class StoredLabels(Targets):
    """Labels from a label set; those it lacks raise, are skipped, or come from its teachers.

    With ``reuse`` an epoch uses one of the stored views of each image, all before any repeats;
    without, the stored views once and then view e in epoch e, which the set lacks unless another
    job appended it. ``ensemble`` labels the views that the set lacks (only those rows go through
    it), in the set's own encoding, so that a row is the same whether it is stored or online;
    ``appender`` keeps these labels for the next job.
    """

    def __init__(
        self,
        label_set: LabelSet,
        keys: Sequence[str],
        classes: Sequence[int] = (),
        *,
        seed: int,
        reuse: bool = True,
        missing: Missing = "fail",
        ensemble: TeacherEnsemble | None = None,
        appender: Appender | None = None,
    ) -> None:
        if (missing == "teach") != (ensemble is not None):
            raise ValueError("missing='teach' needs an ensemble, and nothing else uses one")
        self.label_set = label_set
        self._keys = keys
        self._classes = classes
        self._seed = seed
        self._reuse = reuse
        self._missing = missing
        self._ensemble = ensemble
        self._appender = appender

    def view(self, key: str, epoch: int) -> int | None:
        num_views = self.label_set.num_views
        if self._reuse or epoch < num_views:
            view = scheduled_view(key, epoch, seed=self._seed, num_views=num_views)
        else:
            view = epoch
        if self._missing == "skip" and not self.label_set.holds(key, view):
            return None
        return view

    def batch(
        self, positions: Sequence[int], views: Sequence[int], images_BCHW: Tensor
    ) -> BatchTargets:
        """Return the targets; raises LabelSetError for a missing row with ``missing='fail'``."""
        keys = [self._keys[p] for p in positions]
        online = []
        if self._ensemble is not None:
            is_stored = map(self.label_set.holds, keys, views)
            online = [row for row, stored_rows in enumerate(is_stored) if not stored_rows]
        stored_rows = sorted(set(range(len(keys))).difference(online))
        rows = self.label_set.rows([keys[r] for r in stored_rows], [views[r] for r in stored_rows])
        if online:
            new = self._label_online(images_BCHW[torch.tensor(online, device=images_BCHW.device)])
            if self._appender is not None:
                self._appender.add([keys[r] for r in online], [views[r] for r in online], new)
            rows = Rows.concat([rows, new]).rows(torch.tensor(stored_rows + online).argsort())
        label_counts = {STORED: len(stored_rows)}
        if self._ensemble is not None:
            label_counts[ONLINE] = len(online)
        return BatchTargets(
            rows.labels,
            _class_ids(self._classes, positions),
            kept_logits=rows.logits,
            label_counts=label_counts,
        )

    def flush(self) -> None:
        """Append the teachers' new labels to the label set, if they are to be kept."""
        if self._appender is not None:
            self._appender.flush()

    def _label_online(self, images_BCHW: Tensor) -> Rows:
        """Return the ensemble's labels as the set stores them, on the CPU.

        In the precision of the set, whatever the student's precision. Raises DataError for
        probabilities that are not finite: no later check would find them in a label set.
        """
        assert self._ensemble is not None
        plan = self.label_set.manifest["plan"]
        precision: torch.dtype = getattr(torch, plan["precision"])
        lower = None if precision is torch.float32 else precision
        with torch.autocast(images_BCHW.device.type, dtype=lower, enabled=lower is not None):
            probs_BC, mean_logits_BC = self._ensemble(images_BCHW)
        if not bool(torch.isfinite(probs_BC).all()):
            raise DataError(
                "the teachers' outputs are not finite; check their weights, or the label set's "
                f"precision ({plan['precision']})"
            )
        rows = self.label_set.encoding.encode(probs_BC, mean_logits_BC)
        return rows.to(torch.device("cpu"))


def _select_rows(values: Tensor | None, order_B: Tensor) -> Tensor | None:
    return None if values is None else values[to_device(order_B, values.device)]


def _class_ids(classes: Sequence[int], positions: Sequence[int]) -> Tensor | None:
    return torch.tensor([classes[p] for p in positions], dtype=torch.int64) if classes else None
