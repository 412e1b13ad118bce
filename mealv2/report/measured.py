"""Measure teachers and ensemble by the labels that a label set has of the validation images."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mealv2.data.source import UNLABELLED
from mealv2.label_set import LabelSet, class_of
from mealv2.label_set.manifest import MANIFEST_NAME, read_manifest
from mealv2.metrics import Evaluation
from mealv2.report.averaged import open_labels, teacher_sets
from mealv2.report.run import Row
from mealv2.report.teachers import ENSEMBLE, LabelSource, Teacher
from mealv2.soft_labels import SoftLabels
from mealv2.teacher_sets import sets_of

_SPLIT = "val"
_BATCH_VALUES = 4_000_000  # images x classes that are read at once
_LEAST = 1e-12  # a label that is stored as float16 can be 0
_ACCURACY = ("top1", "top5")


def with_measured(source: LabelSource | None, folder: Path | None) -> LabelSource | None:
    """Return what is known of the teachers with what the validation labels of a set tell.

    ``ece`` of the ensemble, and its accuracy where nobody measured it; of teachers whose labels are
    stored apart also ``ece``, ``agreement`` and ``kl`` to the ensemble. Unchanged for a set that
    has no labels of validation images, or no hard labels. Raises LabelSetError for damaged labels.
    """
    if source is None or folder is None or not _has_labels(folder):
        return source
    labels = open_labels(folder, split=_SPLIT)
    ensemble, apart = measure_teachers(labels)
    if ensemble is None:
        return source
    of_teachers: list[Row] = [{} for _ in source.teachers]
    if len(apart) == len(source.teachers):
        of_teachers = apart
    elif len(source.teachers) == 1:
        of_teachers = [{"ece": ensemble["ece"]}]
    known = source.ensemble or Teacher(ENSEMBLE)
    return replace(
        source,
        teachers=tuple(map(_added, source.teachers, of_teachers)),
        ensemble=_added(known, {name: ensemble[name] for name in (*_ACCURACY, "ece")}),
    )


def measure_teachers(labels: LabelSet) -> tuple[Row | None, list[Row]]:
    """Return the metrics of the ensemble, and those of each teacher whose labels are stored apart.

    Those of ``Evaluation.summary``, of the images with a hard label; none without such images.
    """
    sets = teacher_sets(labels)
    ensemble = Evaluation(labels.num_classes)
    teachers = [Evaluation(labels.num_classes) for _ in sets] if len(sets) > 1 else []
    for keys, hard_B in _labelled_images(labels):
        found_TBC = torch.stack([s.soft_labels(keys, [0] * len(keys)).to_dense() for s in sets])
        mean_BC = found_TBC.mean(dim=0)
        ensemble.add(_logits(mean_BC), hard_B)
        for teacher, probs_BC in zip(teachers, found_TBC, strict=False):
            teacher.add(_logits(probs_BC), hard_B, SoftLabels.from_dense(mean_BC))
    if not ensemble.num_images:
        return None, []
    return dict(ensemble.summary()), [dict(teacher.summary()) for teacher in teachers]


def _has_labels(folder: Path) -> bool:
    """Return whether all sets are finished and label validation images."""
    folders = sets_of(folder)
    if not all((path / MANIFEST_NAME).exists() for path in folders):
        return False
    return all(_SPLIT in read_manifest(path)["roles"] for path in folders)


def _labelled_images(labels: LabelSet) -> Iterator[tuple[list[str], Tensor]]:
    """Yield keys and class ids of the images that have a hard label, a batch at a time."""
    size = max(1, _BATCH_VALUES // labels.num_classes)
    for file in labels.blocks[0][1]:
        if file.images is None:
            continue
        classes = map(class_of, file.images.classes_N.tolist())
        known = [(key, c) for key, c in zip(file.keys(), classes, strict=True) if c != UNLABELLED]
        for start in range(0, len(known), size):
            keys, hard = zip(*known[start : start + size], strict=True)
            yield list(keys), torch.tensor(hard)
        file.unmap()


def _logits(probs_BC: Tensor) -> Tensor:
    return probs_BC.double().clamp_min(_LEAST).log()


def _added(teacher: Teacher, found: Row) -> Teacher:
    """Return a teacher with figures that it has not got."""
    new = {n: v for n, v in found.items() if n in (*_ACCURACY, "ece", "agreement", "kl")}
    return replace(teacher, metrics={**new, **teacher.metrics})
