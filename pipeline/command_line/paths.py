"""Checks of the paths in a config, before torch is imported. Commands check their files again."""

import dataclasses
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mealv2.data.coco_name import find_coco
from mealv2.data.folder import class_folders, is_flat, split_folder
from mealv2.data.hf_name import hf_name
from mealv2.data.image_table import check_splits, is_table
from mealv2.data.layout_name import layout_name
from mealv2.data.own_source import own_source
from mealv2.data.tar_splits import find_split, require_no_split
from mealv2.data.torch_name import torch_name
from mealv2.errors import ConfigError, LabelSetError
from mealv2.storage.atomic import list_folder
from mealv2.storage.json_format import read_json
from mealv2.storage.report_folder import require_replaceable
from mealv2.storage.run_files import CONFIG_NAME, METRICS_NAME
from mealv2.storage.weight_files import find_checkpoint, weights_format
from mealv2.teacher_sets import INDEX_NAME, is_folder_of_sets, sets_of
from pipeline.config import (
    LOCAL_DIR,
    NO_SPLIT,
    ComparisonConfig,
    DistillConfig,
    EvaluateConfig,
    ExportConfig,
    LabelsAddViewsConfig,
    LabelsExportConfig,
    LabelsVerifyConfig,
    PackConfig,
    PrecomputeConfig,
    Settings,
    TrainConfig,
    require,
    spelling,
)
from pipeline.training.run_folder import has_checkpoint
from pipeline.training.run_lock import require_unlocked
from pipeline.training.trackers import require_packages

PLAN_NAME, MANIFEST_NAME = "plan.json", "manifest.json"  # as in mealv2.label_set.manifest
MAX_NAMES = 8  # in a message
# commands that read pictures without classes, or say themselves what they need classes for
_READ_UNLABELLED = (
    PrecomputeConfig,
    DistillConfig,
    LabelsVerifyConfig,
    LabelsAddViewsConfig,
    LabelsExportConfig,
)


def check_paths(config: Settings, *, skip: Iterable[str] = ()) -> None:
    """Raise ConfigError or LabelSetError for a path that the command cannot use.

    URLs and the fields in ``skip`` are not checked.
    """
    if isinstance(config, TrainConfig):
        require_packages(config)
    skip = {*skip, *_of_start(config)}
    fields = [f for f in dataclasses.fields(config) if f.metadata["path"] and f.name not in skip]
    fields.sort(key=lambda f: f.metadata["path"] != "new file")  # their check reads nothing
    for field in fields:
        kind, value = field.metadata["path"], getattr(config, field.name)
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, Path) or (item and kind in ("teachers", "starts")):
                _CHECKS[kind](config, spelling(field), item)
    if isinstance(config, TrainConfig) and not getattr(config, "dry_run", False):
        for run in filter(None, (config.resume, config.output)):
            require_unlocked(run)


def _of_start(config: Settings) -> tuple[str, ...]:
    """Return the settings that a resumed transfer has no need of: its checkpoint has the model."""
    is_resumed = (
        isinstance(config, ComparisonConfig) and config.resume and has_checkpoint(config.resume)
    )
    return ("model", "initial_checkpoint") if is_resumed else ()


def _check_data_set(config: Settings, name: str, data_dir: Path) -> None:
    """Check that the splits that the config reads exist, and that which --val-fraction makes not.

    For --val-split none, or a config without --val-split, there is none to make.
    """
    splits, settings = [*_splits_of(config)], vars(config)
    made = settings["val_split"] if settings.get("val_fraction") is not None else None
    if made == settings.get("train_split"):
        made = None
    if named := torch_name(data_dir):
        named.check(splits, made=made)
        if not settings.get("download"):
            named.require_folder()
        return
    if on_hub := hf_name(data_dir):
        on_hub.check()
        return
    if layout := layout_name(data_dir):
        layout.check(splits, made=made)
        return
    if own_source(data_dir):
        return
    if is_table(data_dir):
        require(data_dir.is_file(), f"{name}: no file {data_dir}{_near(data_dir)}")
        check_splits(data_dir, splits, made=made)
        return
    if is_flat(data_dir) and isinstance(config, _READ_UNLABELLED):
        message = (
            f"{name} {data_dir} has pictures and no class folders: the teachers label them, but "
            "nothing can be validated; add --val-split none"
        )
        require(settings.get("val_split", NO_SPLIT) == NO_SPLIT, message)
        return
    if made is not None:
        require_no_split(data_dir, made)
    for split in splits:
        if find_split(data_dir, split) is None:
            class_folders(split_folder(data_dir, split))
    is_pattern = any(character in "*?[{" for character in str(data_dir))
    if not splits and not is_pattern and not data_dir.exists():
        raise ConfigError(f"no folder {data_dir}; give the data set as {name}{_near(data_dir)}")


def _splits_of(config: Settings) -> Iterable[str]:
    """Yield the names of the splits that a config reads from --data-dir."""
    settings: dict[str, Any] = vars(config)
    held_out = settings.get("val_fraction") is not None
    if isinstance(config, PackConfig):
        yield from config.split
        return
    if isinstance(labels := settings.get("labels"), Path):
        with suppress(OSError, ValueError, KeyError, TypeError):  # the plan cannot be read
            first = sets_of(labels)[0]
            entry = read_json(first / PLAN_NAME)["roles"][settings.get("split", "train")]
            held_out = held_out or "held_out" in entry
            yield str(entry["held_out"]["of"] if "held_out" in entry else entry["split"])
    elif held_out or (
        "train_split" in settings and labels is None and not isinstance(config, EvaluateConfig)
    ):  # a remote label set names its own split
        yield settings["train_split"] or "train"
    if settings.get("val_split", NO_SPLIT) != NO_SPLIT and not held_out:
        yield settings["val_split"]


def _check_coco(config: Settings, name: str, data_dir: Path) -> None:
    require(
        find_spec("pycocotools") is not None,
        "average precision needs pycocotools: pip install pycocotools",
    )
    for split in _splits_of(config):
        find_coco(data_dir, split)


def _check_label_set(config: Settings, name: str, labels: Path) -> None:
    if isinstance(config, DistillConfig) and config.method == "meal":
        _check_sets(config, name, labels)
        return
    if is_folder_of_sets(labels):
        raise ConfigError(
            f"{name}: {labels} has a label set of each of {len(sets_of(labels))} teachers; make "
            f"their mean with `mealv2 labels merge {labels} --output LABELS`, or give one of them, "
            f"{labels / 'teacher-0'}; only `mealv2 distill --method meal` uses them as they are"
        )
    _check_is_set(name, labels)


def _check_sets(config: Settings, name: str, labels: Path) -> None:
    """Check a label set, or those in a folder that has one for each teacher."""
    for folder in sets_of(labels):
        _check_is_set(name, folder)


def _check_weights_or_set(config: Settings, name: str, path: Path) -> None:
    if is_folder_of_sets(path):
        message = f"{name}: {path} has a label set of each teacher; give one, {path / 'teacher-0'}"
        raise ConfigError(message)
    if not _has_set(path):
        _check_weights(config, name, path)
    elif _has_weights(path):
        raise ConfigError(f"{name}: {path} has a model and a label set; give a folder of one")


def _has_weights(path: Path) -> bool:
    try:
        find_checkpoint(path)
    except ConfigError:
        return False
    return True


def _has_set(folder: Path) -> bool:
    return any((folder / file).is_file() for file in (PLAN_NAME, MANIFEST_NAME))


def _check_is_set(name: str, labels: Path) -> None:
    if not _has_set(labels):
        raise LabelSetError(
            f"{name}: no label set in {labels}: it has no {MANIFEST_NAME}; give the --output of "
            f"`mealv2 precompute`{_label_sets_near(labels)}"
        )


def _label_sets_near(path: Path) -> str:
    """Return the end of a message: the label sets in a folder, or else beside it."""
    for folder in (path, path.absolute().parent):
        with suppress(OSError):
            found = sorted(str(plan.parent) for plan in folder.glob(f"*/{PLAN_NAME}"))
            if found:
                return f" (label sets in {folder}: {_listed(found)})"
    return ""


def _check_new_folder(config: Settings, name: str, folder: Path) -> None:
    """Check that no file prevents a new folder, or the folder of a new file."""
    above = next((p for p in (folder, *folder.absolute().parents) if p.exists()), folder)
    is_export = isinstance(config, ExportConfig) and above == folder  # export checks its file
    what = "is a file" if above == folder else f"cannot be created: {above} is a file"
    require(is_export or not above.is_file(), f"{name} {folder} {what}; give another folder")


def _check_new_label_set(config: Settings, name: str, folder: Path) -> None:
    _check_new_folder(config, name, folder)
    names = list_folder(folder) if folder.is_dir() else []
    known = (PLAN_NAME, MANIFEST_NAME, INDEX_NAME)
    is_label_set = any(n in known or n.endswith(".h5") for n in names)
    if names and not is_label_set:
        what = f"not a label set and not empty ({names[0]}, …)"
        raise ConfigError(f"{name}: {folder} is {what}; give a new folder")


def _check_new_file(config: Settings, name: str, path: Path) -> None:
    require(not path.is_dir(), f"{name} {path} is a folder; give the name of a file")
    folder = path.absolute().parent
    require(folder.is_dir(), f"{name} {path}: there is no folder {path.parent}; create it first")


def _check_run(config: Settings, name: str, run: Path) -> None:
    missing = [file for file in (CONFIG_NAME, METRICS_NAME) if not (run / file).is_file()]
    if missing:
        why = f"it has no {missing[0]}" if run.is_dir() else "there is no such folder"
        raise ConfigError(f"{name}: no run in {run}: {why}; give a run folder{_near(run)}")


def _check_new_report(config: Settings, name: str, folder: Path) -> None:
    _check_new_folder(config, name, folder)
    require_replaceable(folder, name)


def _check_weights(config: Settings, name: str, path: Path) -> None:
    try:
        checkpoint = find_checkpoint(path)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}{_near(path)}") from None
    try:
        weights_format(checkpoint)
    except OSError as error:
        raise ConfigError(f"{name}: cannot read checkpoint {checkpoint}: {error}") from None


def _check_teacher(config: Settings, name: str, spec: Any) -> None:
    teacher, _, path = spec.partition("=")
    is_onnx = spec.lower().endswith(".onnx")
    if is_onnx and not path:
        require(Path(spec).is_file(), f"{name} {spec}: no such file{_near(Path(spec))}")
        message = f"{name} {spec} needs onnxruntime: pip install onnxruntime"
        require(find_spec("onnxruntime") is not None, message)
    require(not (is_onnx and path), f"{name} {spec}: give an ONNX file alone: {name} {path}")
    if not path:
        return
    try:
        _check_weights(config, f"{name} {teacher}", Path(path))
    except ConfigError as error:
        if "," not in path:
            raise
        hint = "a comma separates teachers only after a path that exists"
        raise ConfigError(f"{error}; {hint}") from None


def _check_start(config: Settings, name: str, start: Any) -> None:
    """Check a backbone that is a path; whether a name is of a model, the command finds out."""
    if start.startswith(LOCAL_DIR):
        folder = Path(start.removeprefix(LOCAL_DIR))
        require(folder.is_dir(), f"{name} {start}: no folder {folder}{_near(folder)}")
        return
    model, equals, path = start.partition("=")
    is_found = os.sep in start and os.path.exists(start)  # noqa: PTH110  # a name may be too long
    if equals and not is_found:
        _check_weights(config, f"{name} {model}", Path(path))
    elif is_found or (os.sep in start and ":" not in start):
        require(is_found, f"{name}: no run or model {start}{_near(Path(start))}")
        _check_weights(config, name, Path(start))


def _check_exists(config: Settings, name: str, path: Path) -> None:
    if not path.exists():
        what = "picture or folder" if name == "IMAGE" else "file or folder"
        raise ConfigError(f"{name}: no {what} at {path}{_near(path)}")


def _near(path: Path) -> str:
    """Return the end of a message: the names in the nearest parent folder that exists."""
    folder = next((p for p in path.absolute().parents if p.is_dir()), None)
    names: list[str] = []
    with suppress(OSError):
        names = sorted(p.name for p in folder.iterdir() if p.name[0] != ".") if folder else []
    return f" (in {folder}: {_listed(names) or 'nothing'})"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:MAX_NAMES]) + (", …" if len(names) > MAX_NAMES else "")


# By the `path` of a setting.
_CHECKS: dict[str, Callable[[Settings, str, Any], None]] = {
    "data set": _check_data_set,
    "coco": _check_coco,
    "label set": _check_label_set,
    "label set or sets": _check_sets,
    "label sets": _check_sets,
    "new label set": _check_new_label_set,
    "weights": _check_weights,
    "weights or label set": _check_weights_or_set,
    "teachers": _check_teacher,
    "starts": _check_start,
    "images": _check_exists,
    "run": _check_run,
    "folder": _check_exists,
    "new folder": _check_new_folder,
    "new report": _check_new_report,
    "file": _check_exists,
    "new file": _check_new_file,
}
