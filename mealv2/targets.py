"""Targets of a batch of views: stored labels, labels of online teachers, both, or class ids."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from mealv2.codec import to_device
from mealv2.errors import DataError
from mealv2.label_set import Appender, LabelSet, Logits, Rows, concat_logits, web_set_at
from mealv2.models.ensemble import ONE_SIZE, BySize, TeacherEnsemble
from mealv2.objects import ImageObjects
from mealv2.soft_labels import Labels, SoftLabels, concat
from mealv2.views import scheduled_view

Missing = Literal["fail", "skip", "teach"]

# Keys of the log: the source of the labels.
STORED, ONLINE, SKIPPED = "labels_stored", "labels_online", "labels_skipped"


@dataclass(frozen=True)
class BatchTargets:
    """The targets of B views: soft labels, class ids (int64 B), the ensemble's mean logits.

    ``multi_labels_BC`` are 1, 0 (ignored) or -1 for each class, where images have several.
    ``mean_logits_BC`` is set if the teachers labelled all rows online, ``kept_logits`` if the
    labels come from a set that stores them. ``blocks`` has the compared blocks of each teacher that
    was chosen for the batch, B x D each (MEAL); ``stored`` the rows of each from its own label set.
    ``objects`` are those of each image (detection).
    ``label_counts`` counts the rows by source.
    """

    soft_labels: Labels | None = None
    classes_B: Tensor | None = None
    mean_logits_BC: Tensor | None = None
    kept_logits: Logits | None = None
    multi_labels_BC: Tensor | None = None
    blocks: tuple[tuple[Tensor, ...], ...] = ()
    stored: tuple[Rows, ...] = ()
    objects: tuple[ImageObjects, ...] = ()
    label_counts: dict[str, int] = field(default_factory=dict)

    def to(self, device: torch.device) -> "BatchTargets":
        """Return the targets on a device."""
        moved = self._map(lambda labels: labels.to(device), lambda rows: to_device(rows, device))
        return replace(moved, objects=tuple(found.to(device) for found in self.objects))

    def rows(self, order_B: Tensor) -> "BatchTargets":
        """Return rows by index, in that order."""
        return self._map(
            lambda labels: labels.rows(order_B),
            lambda rows: rows[to_device(order_B, rows.device)],
        )

    @staticmethod
    def concat(parts: "Sequence[BatchTargets]") -> "BatchTargets":
        """Concatenate targets of stored labels: all have class ids, or none; logits likewise."""
        classes, soft_labels, logits = [], [], []
        label_counts: Counter[str] = Counter()
        for part in parts:
            classes += [] if part.classes_B is None else [part.classes_B]
            soft_labels += [] if part.soft_labels is None else [part.soft_labels]
            logits += [] if part.kept_logits is None else [part.kept_logits]
            label_counts.update(part.label_counts)
        return BatchTargets(
            concat(soft_labels) if soft_labels else None,
            torch.cat(classes) if classes else None,
            kept_logits=concat_logits(logits) if logits else None,
            label_counts=dict(label_counts),
        )

    def _map(
        self, labels: Callable[[Any], Any], tensor: Callable[[Tensor], Tensor]
    ) -> "BatchTargets":
        return BatchTargets(
            None if self.soft_labels is None else labels(self.soft_labels),
            None if self.classes_B is None else tensor(self.classes_B),
            None if self.mean_logits_BC is None else tensor(self.mean_logits_BC),
            None if self.kept_logits is None else labels(self.kept_logits),
            None if self.multi_labels_BC is None else tensor(self.multi_labels_BC),
            tuple(tuple(map(tensor, blocks)) for blocks in self.blocks),
            tuple(map(labels, self.stored)),
            label_counts=self.label_counts,
        )


class Targets(Protocol):
    """Selects the view of an image for each epoch, and returns the targets of a batch of views.

    ``other_sizes`` are the sizes at which its teachers see a view, beside that of the student.
    """

    other_sizes: tuple[int, ...] = ()

    def view(self, key: str, epoch: int) -> int | None:
        """Return the index of the view of ``key`` in ``epoch``; None skips the image."""

    def batch(
        self,
        positions: Sequence[int],
        views: Sequence[int],
        images_BCHW: Tensor,
        by_size: BySize = ONE_SIZE,
        *,
        step: int = 1,
    ) -> BatchTargets:
        """Return the targets of views of the images at ``positions`` of the source.

        ``images_BCHW`` has their pixels, uint8, on the device of the models; ``by_size`` has them
        in each of ``other_sizes``. ``step`` is the number of the training step, counted from 1: the
        same for all rows of its batch, on all ranks.
        """

    def read_ahead(self, positions: Sequence[int], views: Sequence[int]) -> None:
        """Read what ``batch`` will need; called in the thread that starts to read a batch."""
        return

    def flush(self) -> None:
        """Write new labels, if any; called before every checkpoint."""
        return

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the targets, tensors and plain values."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from the state in a checkpoint."""
        return


class HardLabels(Targets):
    """The class ids of the data set, for any view.

    Epoch e uses view e, so that no view repeats. With ``num_views`` it uses the views that a label
    set of that size uses, in the same order for the same ``seed``.
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
        self,
        positions: Sequence[int],
        views: Sequence[int],
        images_BCHW: Tensor,
        by_size: BySize = ONE_SIZE,
        *,
        step: int = 1,
    ) -> BatchTargets:
        return BatchTargets(classes_B=class_ids(self._classes, positions))


class OnlineTeachers(Targets):
    """Labels that the ensemble computes from the pixels of the batch; epoch e uses view e.

    The paper's training: new random crops, dense labels, mean logits for the discriminator
    (official train.py).
    """

    def __init__(self, ensemble: TeacherEnsemble, classes: Sequence[int]) -> None:
        self.ensemble = ensemble
        self.other_sizes = ensemble.other_sizes
        self._classes = classes

    def view(self, key: str, epoch: int) -> int:
        return epoch

    def batch(
        self,
        positions: Sequence[int],
        views: Sequence[int],
        images_BCHW: Tensor,
        by_size: BySize = ONE_SIZE,
        *,
        step: int = 1,
    ) -> BatchTargets:
        probs_BC, mean_logits_BC = self.ensemble(images_BCHW, by_size)
        return BatchTargets(
            SoftLabels.from_dense(probs_BC),
            class_ids(self._classes, positions),
            mean_logits_BC,
            label_counts={ONLINE: len(positions)},
        )


class StoredLabels(Targets):
    """Labels from a label set; a missing label raises, is skipped, or comes from the teachers.

    With ``reuse`` an epoch uses one stored view of each image, all views before any repeats.
    Without, it uses the stored views once and then view e in epoch e, which is missing unless
    another job appended it. ``ensemble`` computes the missing labels, in the encoding of the set,
    each view by itself. ``appender`` stores them for later jobs, which read equal labels.
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
            raise ValueError("missing='teach' needs an ensemble; the other modes take none")
        self.label_set = label_set
        self._keys = keys
        self._classes = classes
        self._seed = seed
        self._reuse = reuse
        self._missing = missing
        self._ensemble = ensemble
        self.other_sizes = () if ensemble is None else ensemble.other_sizes
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
        self,
        positions: Sequence[int],
        views: Sequence[int],
        images_BCHW: Tensor,
        by_size: BySize = ONE_SIZE,
        *,
        step: int = 1,
    ) -> BatchTargets:
        """Return the targets; raises LabelSetError for a missing label with ``missing='fail'``."""
        keys = [self._keys[p] for p in positions]
        stored, online = list(range(len(keys))), []
        if self._ensemble is not None:
            is_stored = list(map(self.label_set.holds, keys, views))
            online = [row for row in stored if not is_stored[row]]
            stored = [row for row in stored if is_stored[row]]
        rows = self.label_set.rows([keys[r] for r in stored], [views[r] for r in stored])
        if online:
            rows_B = torch.tensor(online, device=images_BCHW.device)
            of_size = {size: images[rows_B] for size, images in by_size.items()}
            new = self._label_online(images_BCHW[rows_B], of_size)
            if self._appender is not None:
                self._appender.add([keys[r] for r in online], [views[r] for r in online], new)
            rows = Rows.concat([rows, new]).rows(torch.tensor(stored + online).argsort())
        label_counts = {STORED: len(stored)}
        if self._ensemble is not None:
            label_counts[ONLINE] = len(online)
        return BatchTargets(
            rows.labels,
            class_ids(self._classes, positions),
            kept_logits=rows.logits,
            label_counts=label_counts,
        )

    def read_ahead(self, positions: Sequence[int], views: Sequence[int]) -> None:
        """Read the stored labels of a batch from a web server; raises as LabelSet.rows."""
        if web_set_at(self.label_set.folder) is None:
            return
        addresses = zip((self._keys[p] for p in positions), views, strict=True)
        stored = [address for address in addresses if self.label_set.holds(*address)]
        self.label_set.rows([key for key, _ in stored], [view for _, view in stored])

    def flush(self) -> None:
        """Append the new labels of the teachers to the label set, if there is an appender."""
        if self._appender is not None:
            self._appender.flush()

    def _label_online(self, images_BCHW: Tensor, by_size: BySize) -> Rows:
        """Return the ensemble's labels in the encoding and precision of the set, on the CPU.

        Raises DataError for probabilities that are not finite: no later check would find them.
        """
        assert self._ensemble is not None
        plan = self.label_set.manifest["plan"]
        precision: torch.dtype = getattr(torch, plan["precision"])
        is_lower = precision is not torch.float32
        dtype = precision if is_lower else None
        with torch.autocast(images_BCHW.device.type, dtype=dtype, enabled=is_lower):
            probs_BC, mean_logits_BC = self._ensemble(images_BCHW, by_size)
        if not bool(torch.isfinite(probs_BC).all()):
            raise DataError(
                "the teachers' outputs are not finite; check their weights and the precision of "
                f"the label set ({plan['precision']})"
            )
        rows = self.label_set.encoding.encode(probs_BC, mean_logits_BC)
        return rows.to(torch.device("cpu"))


def class_ids(classes: Sequence[int], positions: Sequence[int]) -> Tensor | None:
    """Return the class ids of images, int64; None for images without classes."""
    return torch.tensor([classes[p] for p in positions], dtype=torch.int64) if classes else None
