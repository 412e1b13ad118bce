"""What is known of the teachers: from the manifest of a label set, or from a run's own log."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mealv2.errors import LabelSetError
from mealv2.label_set.manifest import MANIFEST_NAME, read_manifest, read_plan
from mealv2.report.run import Row, Run
from mealv2.teacher_sets import sets_of

ENSEMBLE = "ensemble"


@dataclass(frozen=True)
class Teacher:
    """A teacher, or the ensemble: its accuracies in percent, and the size of its images."""

    name: str
    metrics: Row = field(default_factory=dict)
    img_size: int | None = None


@dataclass(frozen=True)
class LabelSource:
    """Who labelled: ``teachers``, then the ensemble where it is known.

    ``plan`` and ``manifest`` are those of the label set, empty for labels of the run itself.
    """

    teachers: tuple[Teacher, ...]
    ensemble: Teacher | None
    num_classes: int | None
    plan: dict[str, Any]
    manifest: dict[str, Any]


def find_labels(runs: Sequence[Run]) -> Path | None:
    """Return the folder of the first label set that a run names and that is there."""
    for run in runs:
        for path in (run.config.get("labels"), (run.labels or {}).get("path")):
            if isinstance(path, str) and "://" not in path and Path(path).is_dir():
                return Path(path)
    return None


def label_source(folder: Path | None, runs: Sequence[Run] = ()) -> LabelSource | None:
    """Return what a label set says of its teachers, else what the runs logged of theirs.

    Raises LabelSetError for a label set that is damaged.
    """
    if folder is not None:
        sets = sets_of(folder)
        return _of_set(folder) if sets == [folder] else _of_sets(sets)
    for run in runs:
        if run.teachers:
            rows = dict(run.teachers)
            ensemble = rows.pop(ENSEMBLE, None)
            teachers = tuple(Teacher(_plain(name), row) for name, row in rows.items())
            known = None if ensemble is None else Teacher(ENSEMBLE, ensemble)
            return LabelSource(teachers, known, _num_classes(run), {}, {})
    return None


def _of_set(folder: Path) -> LabelSource:
    """Read a label set, finished or not."""
    manifest: dict[str, Any] = {}
    if (folder / MANIFEST_NAME).exists():
        manifest = read_manifest(folder)
    plan = manifest["plan"] if manifest else read_plan(folder)
    known: dict[str, Any] = next(
        (split["accuracy"] for split in manifest.get("roles", {}).values() if "accuracy" in split),
        {},
    )
    named, rows = plan.get("teachers", []), known.get("teachers", [])
    if len(rows) != len(named):
        rows = [{} for _ in named]
    teachers = tuple(
        Teacher(teacher["model"], _figures(row), teacher.get("img_size", plan["img_size"]))
        for teacher, row in zip(named, rows, strict=True)
    )
    ensemble = Teacher(ENSEMBLE, _figures(known["ensemble"])) if known else None
    return LabelSource(teachers, ensemble, len(plan["classes"]), plan, manifest)


def _of_sets(folders: Sequence[Path]) -> LabelSource:
    """Read the label sets of teachers that are stored apart: nobody measured their ensemble."""
    found = []
    for folder in folders:
        with suppress(LabelSetError):  # one of them may not be finished
            found.append(_of_set(folder))
    teachers = tuple(teacher for source in found for teacher in source.teachers)
    first = found[0] if found else None
    return LabelSource(
        teachers,
        None,
        first.num_classes if first else None,
        first.plan if first else {},
        first.manifest if first else {},
    )


def _figures(row: dict[str, Any]) -> Row:
    return {name: float(row[name]) for name in ("top1", "top5") if name in row}


def _plain(name: str) -> str:
    return name.removeprefix("teacher ")


def _num_classes(run: Run) -> int | None:
    found = (run.student or {}).get("num_classes")
    return found if isinstance(found, int) else None
