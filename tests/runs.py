"""Looking into run folders, and leaving of them what a killed process leaves."""

import shutil
from pathlib import Path
from typing import Any

import torch

from conftest import same_state
from mealv2.storage.atomic import file_sha256


def states(run: Path) -> list[dict[str, Any]]:
    """Return the state of every checkpoint, the oldest first.

    Without the name of the folder and the count of views, in which a resumed run has the
    validation split twice.
    """
    paths = sorted((run / "checkpoints").glob("step-*.pt"))
    found = [torch.load(path, weights_only=True) for path in paths]
    return [{k: v for k, v in s.items() if k not in ("args", "teacher_forwards")} for s in found]


def as_killed_after(finished: Path, step: int, run: Path) -> None:
    """Leave of a finished run what a kill -9 leaves: events after ``step``, but no state."""
    shutil.copytree(finished, run)
    (run / "report.json").unlink()
    for path in (run / "checkpoints").iterdir():
        if int(path.stem.split("-")[1]) > step:
            path.unlink()


def assert_same_end(run: Path, other: Path) -> None:
    """Check that two runs have the same checkpoints, summary and student, bit for bit."""
    assert same_state(states(run), states(other))
    assert (run / "summary.csv").read_text() == (other / "summary.csv").read_text()
    weights = Path("student") / "model.safetensors"
    assert file_sha256(run / weights) == file_sha256(other / weights)
