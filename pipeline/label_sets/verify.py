"""`mealv2 labels verify`: a label set against its hashes, its images and its teachers."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mealv2.errors import LabelSetError
from mealv2.label_set import (
    PLAN_NAME,
    LabelSet,
    ShardFile,
    boxes_of,
    creating_command,
    read_manifest,
)
from mealv2.label_set.blocks import key_hash
from mealv2.label_set.shard import APPENDED_PREFIX
from mealv2.storage.atomic import file_sha256
from mealv2.storage.json_format import canonical_json
from mealv2.storage.urls import shown
from mealv2.views import DrawnViews
from pipeline import console
from pipeline.config import LabelsVerifyConfig
from pipeline.label_sets.relabel import relabel
from pipeline.labelling.compatibility import check_same_data
from pipeline.labelling.store import local_folder
from pipeline.loading.sources import open_images
from pipeline.runtime.device import create_runtime


@dataclass
class Found:
    """What a check came to: problems by file, and how much was looked at."""

    problems: dict[str, str] = field(default_factory=dict)
    shards: int = 0
    images: int = 0
    labels: int = 0
    unchecked_boxes: int = 0


def run(config: LabelsVerifyConfig) -> dict[str, Any]:
    """Verify a set; return the report. Raises LabelSetError saying what is damaged."""
    folder = local_folder(config, config.labels, require_complete=False)
    manifest = read_manifest(folder)
    found = Found()
    _check_plan(folder, manifest, found)
    for split, entry in manifest["roles"].items():
        listed = [s for b in entry["blocks"] for s in b["shards"]]
        for shard in console.progress(
            listed, total=len(listed), what=f"bytes of {split}", unit="shards"
        ):
            _hash_shard(folder / shard["name"], shard, found)
    if not found.problems:
        for split in manifest["roles"]:
            _check_split(LabelSet.open(folder, split=split), found)
    for name, problem in found.problems.items():
        console.info(f"{name}: {problem}")
    if found.problems:
        raise LabelSetError(
            f"{shown(config.labels)}: {len(found.problems)} of "
            f"{console.count(found.shards, 'file')} "
            f"are damaged or missing ({console.first_names(found.problems)}); "
            f"{_advice(manifest['plan'], found.problems)}"
        )
    report = {
        "labels": shown(config.labels),
        "shards": found.shards,
        "images": found.images,
        "views": found.labels,
        "sha256": "right",
        "crc32": "right",
        "boxes": "right" if not found.unchecked_boxes else "not known",
    }
    if config.data_dir is not None:
        report["data"] = _check_data(config, folder, manifest)
    if config.relabel:
        report["relabelled"] = relabel(config, folder, create_runtime(config))
    console.info(
        f"{console.count(found.shards, 'file')}, {console.count(found.images, 'image')}, "
        f"{console.count(found.labels, 'label')}: every byte is right"
    )
    return report


def _advice(plan: dict[str, Any], problems: Iterable[str]) -> str:
    """Return what makes damaged files again."""
    steps = [f"the same {creating_command(plan)}"]
    if any("-views-" in name for name in problems):
        steps.append("then the same `mealv2 labels add-views`")
    if any(APPENDED_PREFIX in name for name in problems):
        steps.insert(0, f"remove those of appended rows ({APPENDED_PREFIX}…)")
    return f"{', '.join(steps)} makes these again, and only these"


def _check_plan(folder: Path, manifest: dict[str, Any], found: Found) -> None:
    """Compare plan.json with the manifest, which repeats it."""
    found.shards += 1
    try:
        if (folder / PLAN_NAME).read_bytes() != canonical_json(manifest["plan"]).encode():
            found.problems[PLAN_NAME] = "it is not the plan in the manifest"
    except OSError as error:
        found.problems[PLAN_NAME] = f"cannot be read: {error.strerror}"


def _hash_shard(path: Path, entry: dict[str, Any], found: Found) -> None:
    """Compare a file with the manifest."""
    found.shards += 1
    try:
        if path.stat().st_size != entry["bytes"]:
            found.problems[path.name] = f"it has {path.stat().st_size} bytes of {entry['bytes']}"
        elif file_sha256(path) != entry["sha256"]:
            found.problems[path.name] = "its contents fail their SHA-256" + _where(path)
    except OSError as error:
        found.problems[path.name] = f"cannot be read: {error.strerror}"


def _where(path: Path) -> str:
    """Return what of a damaged shard is wrong, where it can be told."""
    try:
        damaged = [key.decode() for key, _, is_intact in ShardFile(path).blocks() if not is_intact]
    except LabelSetError as error:
        return f" ({str(error).partition(' is damaged: ')[2] or error})"
    if not damaged:
        return " (not in the labels nor in how they are found)"
    return (
        f" (the labels of {console.count(len(damaged), 'image')}: {console.first_names(damaged)})"
    )


def _check_split(labels: LabelSet, found: Found) -> None:
    """Check the contents of shards that are the ones in the manifest, and appended files."""
    more = labels.appended_files
    found.shards += len(more)
    for file in more:
        if file_sha256(file.path)[:16] != file.path.stem.rpartition("-")[2]:
            found.problems[file.path.name] = "its name is not that of its bytes"
    files = [*(file for _, files in labels.blocks for file in files), *more]
    for file in console.progress(
        files, total=len(files), what=f"labels and boxes of {labels.split}", unit="shards"
    ):
        for problem in _problems(labels, file, found):
            found.problems.setdefault(file.path.name, problem)
        found.labels += file.num_images * file.num_views
    # Added views and appended rows are of images that other files have too.
    found.images += len(np.unique(np.concatenate([f.column("key_hashes") for f in files])))


def _problems(labels: LabelSet, file: ShardFile, found: Found) -> Iterator[str]:
    bad = [key.decode() for key, _, is_intact in file.blocks() if not is_intact]
    if bad:
        yield f"the labels of {len(bad)} images fail their CRC-32: {console.first_names(bad)}"
        return
    keys = file.keys()
    hashes = np.frombuffer(b"".join(key_hash(key.encode()) for key in keys), "<u8")
    if not np.array_equal(hashes, file.column("key_hashes")):
        yield "its key hashes are not those of its keys"
    if not file.has_column("views") and len(set(keys)) < len(keys):
        yield "it has an image twice"
    try:
        rows = labels.encoding.all_rows_of(
            file.column("labels"), file.column("label_ends"), file.num_views
        )
        labels.encoding.check(rows)
    except LabelSetError as error:
        yield str(error)
    if labels.split == "train" and not file.has_column("views"):
        yield from _drift(labels, file, found)


def _drift(labels: LabelSet, file: ShardFile, found: Found) -> Iterator[str]:
    """Compare the boxes that were cut with those that the recipe gives today."""
    views = labels.views()
    if file.header["boxes_sha256"] is None or file.images is None:
        found.unchecked_boxes += 1
        return
    try:
        boxes_hash = boxes_of(file.shard(), views)
    except (ValueError, LabelSetError) as error:  # an image without pixels
        yield str(error)
        return
    if boxes_hash != file.header["boxes_sha256"]:
        kind = "drawn" if isinstance(views, DrawnViews) else "stored"
        yield f"its {kind} boxes are not those that were cut when it was made"


def _check_data(config: LabelsVerifyConfig, folder: Path, manifest: dict[str, Any]) -> str:
    """Compare keys and files with the data set; raises LabelSetError where they differ.

    A part of a set is to label a part of the data: then only its own images are compared.
    """
    assert config.data_dir is not None
    is_part = creating_command(manifest["plan"]) == "`mealv2 labels split`"
    for split in manifest["roles"]:
        labels = LabelSet.open(folder, split=split)
        source = open_images(config, config.data_dir, manifest["plan"]["roles"][split]["split"])
        lenient = is_part and split == "train"
        check_same_data(labels, source, allow_missing=lenient)
        num_images = len(labels) + len(labels.skipped)
        of = "the" if num_images == len(source) else f"{num_images} of {len(source)}"
        console.info(f"{split}: it labels {of} images of {source.name}, and they are the same")
    return "a part of it" if is_part else "the same"
