"""Who answers for a batch of views: the label set, the teachers now, both, or the class labels."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from mealv2.devices import moved
from mealv2.ensemble import TeacherEnsemble
from mealv2.errors import DataError
from mealv2.label_set import Appender, LabelSet, Rows
from mealv2.soft_labels import KeptLogits, Labels, SoftLabels
from mealv2.views import scheduled_view

Missing = Literal["fail", "skip", "teach"]

# Where answers came from, in the log.
STORED, TAUGHT, SKIPPED = "labels_stored", "labels_taught", "labels_skipped"


@dataclass(frozen=True)
class Answer:
    """What is known of B views: soft labels, class ids (int64 B), the ensemble's mean logits.

    ``mean_logits_BC`` is there only when the teachers answered every row just now, ``kept_logits``
    when the labels come from a set that keeps them. ``sources`` counts the rows by who answered.
    """

    soft: Labels | None = None
    classes_B: Tensor | None = None
    mean_logits_BC: Tensor | None = None
    kept_logits: KeptLogits | None = None
    sources: dict[str, int] = field(default_factory=dict)

    def to(self, device: torch.device) -> "Answer":
        """Return the same answer on a device."""
        return Answer(
            None if self.soft is None else self.soft.to(device),
            None if self.classes_B is None else moved(self.classes_B, device),
            None if self.mean_logits_BC is None else moved(self.mean_logits_BC, device),
            None if self.kept_logits is None else self.kept_logits.to(device),
            self.sources,
        )

    def rows(self, order_B: Tensor) -> "Answer":
        """Return the rows in another order, where they are."""
        return Answer(
            None if self.soft is None else self.soft.rows(order_B),
            _picked(self.classes_B, order_B),
            _picked(self.mean_logits_BC, order_B),
            None if self.kept_logits is None else self.kept_logits.rows(order_B),
            self.sources,
        )


class Targets(Protocol):
    """Says which view of an image an epoch uses, and what the answer to a batch of views is."""

    def view(self, key: str, epoch: int) -> int | None:
        """Return the index of the view of ``key`` that ``epoch`` uses; None leaves it out."""

    def answer(self, positions: Sequence[int], views: Sequence[int], images_BCHW: Tensor) -> Answer:
        """Return the targets of views of the images at ``positions`` of the source.

        ``images_BCHW`` are their pixels, uint8, where the networks compute.
        """

    def flush(self) -> None:
        """Put on disk what is to be kept, by default nothing; called before every checkpoint."""
        return


class HardLabels(Targets):
    """Answers with the data set's class ids, for any view.

    Epoch e uses view e, so that none repeats; with ``num_views`` the views, in the order, that a
    label set of so many views would give under ``seed``.
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

    def answer(self, positions: Sequence[int], views: Sequence[int], images_BCHW: Tensor) -> Answer:
        return Answer(classes_B=_classes_of(self._classes, positions))


class OnlineTeachers(Targets):
    """Answers by asking the ensemble about the very pixels; epoch e uses view e: none repeats.

    This is the paper's training: fully random crops, dense labels, mean logits for the
    discriminator (official train.py).
    """

    def __init__(self, ensemble: TeacherEnsemble, classes: Sequence[int]) -> None:
        self.ensemble = ensemble
        self._classes = classes

    def view(self, key: str, epoch: int) -> int:
        return epoch

    def answer(self, positions: Sequence[int], views: Sequence[int], images_BCHW: Tensor) -> Answer:
        probs_BC, mean_logits_BC = self.ensemble(images_BCHW)
        return Answer(
            SoftLabels.of_all(probs_BC),
            _classes_of(self._classes, positions),
            mean_logits_BC,
            sources={TAUGHT: len(positions)},
        )


class StoredLabels(Targets):
    """Answers from a label set; rows it lacks are refused, left out, or asked of its teachers.

    With ``reuse`` an epoch uses one of the stored views of each image, all before any repeats;
    without, the stored views once and then view e in epoch e, which the set lacks unless another
    job appended it. ``ensemble`` answers what the set lacks (only those rows go through it), in
    the set's own encoding, so that a row is the same whoever answers; ``appender`` keeps these
    answers for the next job.
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
            raise ValueError("an ensemble is for missing='teach', and that needs one")
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

    def answer(self, positions: Sequence[int], views: Sequence[int], images_BCHW: Tensor) -> Answer:
        """Return the answers; raises LabelSetError for a row not there with ``missing='fail'``."""
        keys = [self._keys[p] for p in positions]
        lacking = []
        if self._ensemble is not None:
            there = map(self.label_set.holds, keys, views)
            lacking = [row for row, holds in enumerate(there) if not holds]
        stored = sorted(set(range(len(keys))).difference(lacking))
        rows = self.label_set.rows([keys[r] for r in stored], [views[r] for r in stored])
        if lacking:
            taught = self._teach(images_BCHW[torch.tensor(lacking, device=images_BCHW.device)])
            if self._appender is not None:
                self._appender.add([keys[r] for r in lacking], [views[r] for r in lacking], taught)
            rows = Rows.joined([rows, taught]).rows(torch.tensor(stored + lacking).argsort())
        sources = {STORED: len(stored)}
        if self._ensemble is not None:
            sources[TAUGHT] = len(lacking)
        return Answer(
            rows.labels,
            _classes_of(self._classes, positions),
            kept_logits=rows.logits,
            sources=sources,
        )

    def flush(self) -> None:
        """Append the teachers' new answers to the label set, if they are to be kept."""
        if self._appender is not None:
            self._appender.flush()

    def _teach(self, images_BCHW: Tensor) -> Rows:
        """Ask the ensemble; return its answer as the set would have stored it, on the CPU.

        In the precision that the set was made in, whatever the student computes in. Raises
        DataError for an answer that is not finite: it would never be noticed in a label set.
        """
        assert self._ensemble is not None
        plan = self.label_set.manifest["plan"]
        precision: torch.dtype = getattr(torch, plan["precision"])
        lower = None if precision is torch.float32 else precision
        with torch.autocast(images_BCHW.device.type, dtype=lower, enabled=lower is not None):
            probs_BC, mean_logits_BC = self._ensemble(images_BCHW)
        if not bool(torch.isfinite(probs_BC).all()):
            raise DataError(
                "the teachers' answers are not finite; check their weights, or the label set's "
                f"precision ({plan['precision']})"
            )
        rows = self.label_set.encoding.encode(probs_BC, mean_logits_BC)
        return rows.to(torch.device("cpu"))


def _picked(values: Tensor | None, order_B: Tensor) -> Tensor | None:
    return None if values is None else values[moved(order_B, values.device)]


def _classes_of(classes: Sequence[int], positions: Sequence[int]) -> Tensor | None:
    return torch.tensor([classes[p] for p in positions], dtype=torch.int64) if classes else None
