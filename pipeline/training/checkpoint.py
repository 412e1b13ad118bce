"""Checkpoints: the whole state of a run, written atomically, the newest few kept."""

import io
import os
import warnings
import zipfile
from pathlib import Path
from typing import Any, Literal

import torch

from mealv2.errors import MealError
from mealv2.storage.atomic import write_atomic
from mealv2.storage.json_format import canonical_json
from mealv2.storage.regular_files import open_regular
from pipeline.training.run_folder import SETTINGS_NAME, checkpoint_path, checkpoint_paths


def save(
    run: Path,
    state: dict[str, Any],
    *,
    step: int,
    keep: int | Literal["all"],
    best: int | None = None,
) -> Path:
    """Write checkpoints/step-NNNNNNNN.pt and remove all but the newest ``keep`` up to it.

    The one after step ``best`` stays too.

    The settings of the run, ``args``, are also a JSON file in its zip, which is read without torch.
    Raises OSError.
    """
    data = io.BytesIO()
    torch.save(state, data)
    with zipfile.ZipFile(data, "a") as archive:
        archive.writestr(zipfile.ZipInfo(SETTINGS_NAME), canonical_json(state.get("args")))
    path = checkpoint_path(run, step)
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, data.getvalue())
    if keep != "all":
        remove_old(run, keep=keep, last=path, best=best)
    return path


def remove_old(run: Path, *, keep: int, last: Path, best: int | None = None) -> None:
    """Remove all but the newest ``keep`` checkpoints up to ``last``; later ones stay, and ``best``,
    the one after this step.
    """
    until_now = [other for other in checkpoint_paths(run) if other.name <= last.name]
    for old in until_now[:-keep]:
        if best is None or old != checkpoint_path(run, best):
            old.unlink()


def load_newest(run: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """Return the newest whole checkpoint of a run folder: its path, its state, and what was wrong
    with newer ones. These are set aside under another name, so that they count no more.

    Raises MealError where none is whole; then nothing is renamed.
    """
    damaged: dict[Path, str] = {}
    for path in reversed(checkpoint_paths(run)):
        try:
            state = load(path)
        except Exception as error:  # zip, pickle and runtime errors, as the damage has it
            reason = str(error).strip().split("\n")[0]
            damaged[path] = f"checkpoint {path} is damaged: {reason}"
            continue
        for other in damaged:
            other.rename(other.with_name(f"{other.name}.damaged"))
        return path, state, list(damaged.values())
    raise MealError(f"{next(iter(damaged.values()))}; no other is whole: start a new run")


def load(path: Path) -> dict[str, Any]:
    """Return the state in a checkpoint; raises what zip, pickle and torch raise for a damaged one.

    Raises OSError where there is none.
    """
    with os.fdopen(open_regular(path), "rb") as file, zipfile.ZipFile(file) as archive:
        if archive.testzip() is not None:  # torch.load does not look at the checksums
            raise ValueError("its contents fail their CRC")
    with warnings.catch_warnings():  # a damaged file has tensors of any kind; torch warns of some
        warnings.simplefilter("ignore")
        state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise ValueError("it is not a checkpoint of a run")
    return state
