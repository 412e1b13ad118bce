"""Checkpoints: the whole state of a run, published whole, the newest few kept."""

import io
import zipfile
from pathlib import Path
from typing import Any

import torch

from mealv2.errors import MealError
from mealv2.files import write_whole

_FOLDER = "checkpoints"


def save(run: Path, state: dict[str, Any], *, step: int, keep: int) -> Path:
    """Write checkpoints/step-NNNNNNNN.pt and remove all but the newest ``keep``. Raises OSError."""
    folder = run / _FOLDER
    folder.mkdir(exist_ok=True)
    data = io.BytesIO()
    torch.save(state, data)
    path = folder / f"step-{step:08d}.pt"
    write_whole(path, data.getvalue())
    for old in _all(run)[:-keep]:
        old.unlink()
    return path


def exists(run: Path) -> bool:
    """Return whether a run folder has a checkpoint."""
    return bool(_all(run))


def newest(run: Path) -> Path:
    """Return the path of the newest checkpoint of a run folder that has one."""
    return _all(run)[-1]


def load_newest(run: Path) -> dict[str, Any]:
    """Return the newest checkpoint of a run folder; raises MealError where it is damaged."""
    path = newest(run)
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:  # torch.load does not look at the checksums
                raise ValueError("its contents fail their CRC")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError("it is no checkpoint of a run")
    except Exception as error:  # zip, pickle and runtime errors, as the damage has it
        reason = str(error).strip().split("\n")[0]
        raise MealError(
            f"checkpoint {path} is damaged: {reason}; remove it to use the one before"
        ) from error
    return state


def _all(run: Path) -> list[Path]:
    return sorted((run / _FOLDER).glob("step-*.pt"))
