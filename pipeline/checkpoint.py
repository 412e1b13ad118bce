"""Checkpoints: the whole state of a run, published whole, the newest few kept."""

import io
from pathlib import Path
from typing import Any

import torch

from mealv2.errors import ConfigError, MealError
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


def load_newest(run: Path) -> dict[str, Any]:
    """Return the newest checkpoint of a run folder; raises ConfigError where there is none."""
    if not (run / "config.json").exists():
        raise ConfigError(f"no run at {run}: it has no config.json")
    paths = _all(run)
    if not paths:
        raise ConfigError(f"{run} has no checkpoint yet; start the run again")
    try:
        state = torch.load(paths[-1], map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and runtime errors, as the damage has it
        reason = str(error).strip().split("\n")[0]
        raise MealError(
            f"checkpoint {paths[-1]} is damaged: {reason}; remove it to use the one before"
        ) from error
    return dict(state)


def _all(run: Path) -> list[Path]:
    return sorted((run / _FOLDER).glob("step-*.pt"))
