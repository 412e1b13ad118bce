"""Checks of the paths that a config names, before torch is imported.

What is checked here is checked again, and further, where the path is used.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mealv2.data.folder import class_folders
from mealv2.data.tar_splits import find_split
from mealv2.errors import ConfigError, LabelSetError
from mealv2.storage.atomic import list_folder
from mealv2.weight_files import find_checkpoint
from pipeline import config as configs
from pipeline.config import NO_SPLIT, Settings, spelling

PLAN_NAME, MANIFEST_NAME = "plan.json", "manifest.json"  # as in mealv2.label_set.manifest
MOST_NAMES = 8  # in a message

Check = Callable[[Settings, str, Path], None]


def check_paths(config: Settings, *, skip: Iterable[str] = ()) -> None:
    """Raise ConfigError or LabelSetError for a path that the command cannot use.

    URLs are not checked, nor the fields in ``skip``.
    """
    fields = [f for f in dataclasses.fields(config) if f.metadata.get("path")]
    fields.sort(key=lambda f: f.metadata["path"] != "new file")  # nothing is read for these
    for field in fields:
        kind = field.metadata["path"]
        if field.name in skip:
            continue
        value = getattr(config, field.name)
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, Path) or kind == "teachers":
                _CHECKS[kind](config, spelling(field), item)


def _check_data_set(config: Settings, name: str, data_dir: Path) -> None:
    """Check that the splits that the config reads are there."""
    splits = [*_splits_of(config)]
    for split in splits:
        if find_split(data_dir, split) is None:
            class_folders(data_dir / split)
    if not splits and not data_dir.exists() and find_split(data_dir, "") is None:
        raise ConfigError(f"no folder {data_dir}; give the data set as {name}{_there(data_dir)}")


def _splits_of(config: Settings) -> Iterable[str]:
    """Yield the names of the splits that a config reads of --data-dir."""
    settings: dict[str, Any] = vars(config)
    if isinstance(config, configs.PackConfig):
        yield from config.split
        return
    if isinstance(labels := settings.get("labels"), Path):
        yield from _split_of_labels(labels, settings.get("split", "train"))
    elif "train_split" in settings:
        yield settings["train_split"] or "train"
    if settings.get("val_split", NO_SPLIT) != NO_SPLIT:
        yield settings["val_split"]


def _split_of_labels(labels: Path, part: str) -> Iterable[str]:
    """Yield the split that a label set's plan names; nothing where the plan cannot be read."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        split = json.loads((labels / PLAN_NAME).read_bytes())["roles"][part]["split"]
        if isinstance(split, str):
            yield split


def _check_label_set(config: Settings, name: str, labels: Path) -> None:
    if not any((labels / file).is_file() for file in (PLAN_NAME, MANIFEST_NAME)):
        raise LabelSetError(
            f"{name}: no label set there: {labels} has no {MANIFEST_NAME}; give the --output of "
            f"`mealv2 precompute`{_label_sets_near(labels)}"
        )


def _label_sets_near(path: Path) -> str:
    """Return what to add to a message: the label sets in a folder, or else next to it."""
    for folder in (path, path.absolute().parent):
        with suppress(OSError):
            found = sorted(str(plan.parent) for plan in folder.glob(f"*/{PLAN_NAME}"))
            if found:
                return f" (label sets in {folder}: {_listed(found)})"
    return ""


def _check_new_folder(config: Settings, name: str, folder: Path) -> None:
    """Check that no file is in the way; a file that the command writes needs the same folders."""
    above = next((p for p in (folder, *folder.absolute().parents) if p.exists()), folder)
    is_file = isinstance(config, configs.ExportConfig) and above == folder
    if above.is_file() and not is_file:  # an existing file to export to has its own message
        what = "is a file" if above == folder else f"cannot be created: {above} is a file"
        raise ConfigError(f"{name} {folder} {what}; give another folder")


def _check_new_label_set(config: Settings, name: str, folder: Path) -> None:
    _check_new_folder(config, name, folder)
    names = list_folder(folder) if folder.is_dir() else []
    files = {PLAN_NAME, MANIFEST_NAME}
    if names and not files & set(names) and not any(n.endswith(".h5") for n in names):
        raise ConfigError(
            f"{name}: {folder} is no label set and not empty ({names[0]}, …); give a new folder"
        )


def _check_new_file(config: Settings, name: str, path: Path) -> None:
    if path.is_dir():
        raise ConfigError(f"{name} {path} is a folder; give the name of a file")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{name} {path}: there is no folder {path.parent}; create it first")


def _check_weights(config: Settings, name: str, path: Path) -> None:
    try:
        find_checkpoint(path)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}{_there(path)}") from None


def _check_teacher(config: Settings, name: str, spec: Any) -> None:
    teacher, _, path = spec.partition("=")
    if path:
        _check_weights(config, f"{name} {teacher}", Path(path))


def _check_exists(config: Settings, name: str, path: Path) -> None:
    if not path.exists():
        what = "picture or folder" if name == "IMAGE" else "file or folder"
        raise ConfigError(f"{name}: no {what} at {path}{_there(path)}")


def _there(path: Path) -> str:
    """Return what to add to a message: the names in the nearest folder above that exists."""
    folder = next((p for p in path.absolute().parents if p.is_dir()), None)
    names: list[str] = []
    with suppress(OSError):
        names = sorted(p.name for p in folder.iterdir() if p.name[0] != ".") if folder else []
    return f" (in {folder}: {_listed(names) or 'nothing'})"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:MOST_NAMES]) + (", …" if len(names) > MOST_NAMES else "")


_CHECKS: dict[configs.PathKind, Check] = {
    "data set": _check_data_set,
    "label set": _check_label_set,
    "new label set": _check_new_label_set,
    "weights": _check_weights,
    "teachers": _check_teacher,
    "images": _check_exists,
    "folder": _check_exists,
    "new folder": _check_new_folder,
    "file": _check_exists,
    "new file": _check_new_file,
}
