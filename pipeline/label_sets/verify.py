"""`mealv2 labels verify`: check a label set's files, labels, boxes, images and teachers."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mealv2 import label_set
from mealv2.data.source import ImageSource
from mealv2.errors import LabelSetError
from mealv2.label_set import (
    MANIFEST_NAME,
    PLAN_NAME,
    Encoding,
    LabelSet,
    ShardFile,
    boxes_of,
    check_same_data,
    content_of,
    creating_command,
    labelled_hashes,
    remaking_command,
)
from mealv2.label_set.shard import APPENDED_PREFIX
from mealv2.labelling.compare import Compared, compare_images, require_same
from mealv2.storage.atomic import file_sha256
from mealv2.storage.json_format import canonical_json
from mealv2.storage.regular_files import read_regular
from mealv2.storage.urls import shown
from mealv2.views import DrawnViews
from pipeline import console
from pipeline.config import LabelsVerifyConfig
from pipeline.label_sets.relabel import relabel
from pipeline.label_sets.shard_checks import Checked, check_files, in_threads
from pipeline.labelling.store import local_folder
from pipeline.loading.sources import open_labelled
from pipeline.runtime.device import create_runtime


@dataclass
class Found:
    """The result of a check: problems by file, and counts of what was checked."""

    problems: dict[str, str] = field(default_factory=dict)
    files: int = 0
    images: int = 0
    labels: int = 0
    unchecked_boxes: int = 0


def run(config: LabelsVerifyConfig) -> dict[str, Any]:
    """Verify a set; return the report. Raises LabelSetError naming the damaged files."""
    folder = local_folder(config, config.labels, require_complete=False, whole_files=True)
    manifest = label_set.read_manifest(folder)
    found = Found()
    if why := _plan_problem(folder / PLAN_NAME, manifest["plan"]):
        found.problems[PLAN_NAME] = why
    listed = label_set.listed_shards(manifest["roles"])
    found.files += 1 + len(listed)
    checked = _check_listed(config, folder, manifest["plan"], listed)
    found.problems |= {name: file.difference for name, file in checked.items() if file.difference}
    if not found.problems:
        for split in manifest["roles"]:
            _check_split(config, LabelSet.open(folder, split=split), checked, found)
    for name, problem in found.problems.items():
        console.info(f"{name}: {problem}")
    if found.problems:
        raise LabelSetError(
            f"{shown(config.labels)}: {len(found.problems)} of "
            f"{console.count(found.files, 'file')} damaged or missing "
            f"({console.first_names(found.problems)}); {_advice(manifest['plan'], found.problems)}"
        )
    report: dict[str, Any] = {
        "labels": shown(config.labels),
        "files": found.files,
        "images": found.images,
        "views": found.labels,
        "sha256": "right",
        "crc32": "right",
        "boxes": "right" if not found.unchecked_boxes else "not checked",
    }
    if config.data_dir is not None:
        report |= _check_data(config, folder, manifest)
    if config.relabel:
        report["relabelled"] = relabel(config, folder, create_runtime(config))
    console.info(
        f"{console.count(found.files, 'file')}, {console.count(found.images, 'image')}, "
        f"{console.count(found.labels, 'label')}: every byte is right"
    )
    return report


def _advice(plan: dict[str, Any], problems: Iterable[str]) -> str:
    """Return the commands that repair damaged files."""
    first, commands = creating_command(plan), {remaking_command(plan, name) for name in problems}
    ordered = sorted(commands, key=lambda command: command != first)  # first views first
    steps = [f"run the same {command} again" for command in ordered]
    if any(APPENDED_PREFIX in name for name in problems):
        steps.insert(0, f"remove the files of appended rows ({APPENDED_PREFIX}…)")
    return f"{', then '.join(steps)}: only these files are made again"


def _plan_problem(path: Path, plan: dict[str, Any]) -> str | None:
    try:
        is_same = read_regular(path) == canonical_json(plan).encode()
        return None if is_same else "differs from the plan in the manifest"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _check_listed(
    config: LabelsVerifyConfig, folder: Path, plan: dict[str, Any], listed: list[dict[str, Any]]
) -> dict[str, Checked]:
    """Read and check the files that the manifest lists; return what was found by name."""
    try:
        encoding = Encoding.of_plan(plan)
    except LabelSetError:  # raised again where the set is opened
        encoding = None
    files = check_files(folder, listed, encoding, workers=config.workers)
    files = console.progress(files, total=len(listed), what="bytes and labels", unit="shards")
    return {shard["name"]: file for shard, file in zip(listed, files, strict=True)}


def _check_split(
    config: LabelsVerifyConfig, labels: LabelSet, checked: dict[str, Checked], found: Found
) -> None:
    """Check what needs the set, whose files are right: appended files, boxes, content hashes."""
    more = labels.appended_files
    found.files += len(more)
    appended = []
    for file in more:
        digest = file_sha256(file.path)
        appended.append({"name": file.path.name, "bytes": file.size, "sha256": digest})
        if digest[:16] != file.path.stem.rpartition("-")[2]:
            found.problems[file.path.name] = "has another SHA-256 than its name"
    more_checked = check_files(labels.folder, appended, labels.encoding, workers=config.workers)
    checked = checked | {f.path.name: c for f, c in zip(more, more_checked, strict=True)}
    files = [*(file for _, files in labels.blocks for file in files), *more]
    drifts = in_threads(partial(_drift, labels), files, workers=config.workers)
    what = f"boxes of {labels.split}"
    drifts = console.progress(drifts, total=len(files), what=what, unit="shards")
    for file, (is_checked, drift) in zip(files, drifts, strict=True):
        if problem := checked[file.path.name].problem or drift:
            found.problems.setdefault(file.path.name, problem)
        found.labels += file.num_images * file.num_views
        found.unchecked_boxes += not is_checked
    if not found.problems:
        found.problems |= _content_problems(labels)
    # added views and appended rows belong to images that are in other files too
    hashes = np.sort(np.concatenate([checked[file.path.name].hashes_N for file in files]))
    found.images += len(hashes) and 1 + int((hashes[1:] != hashes[:-1]).sum())


def _content_problems(labels: LabelSet) -> dict[str, str]:
    """Return the problems of content hashes: files that differ in them, or from the manifest."""
    _, first = labels.blocks[0]
    hashes = {key: value for file in first for key, value in file.content_hashes().items()}
    problems = {}
    listed = labels.manifest["roles"][labels.split].get("content")
    if listed != content_of(hashes):
        problems[MANIFEST_NAME] = (
            f"has another hash of the images of {labels.split} than the shards"
        )
    others = [file for _, files in labels.blocks[1:] for file in files]
    for file in (*others, *labels.appended_files):
        found = file.content_hashes().items()
        other = {key for key, value in found if hashes.setdefault(key, value) != value}
        if other:
            images, names = console.count(len(other), "image"), console.first_names(sorted(other))
            problems[file.path.name] = f"has labels of another picture for {images}: {names}"
    return problems


def _drift(labels: LabelSet, file: ShardFile) -> tuple[bool, str | None]:
    """Compare the hash of the boxes when the shard was made with the boxes of the recipe now.

    Return whether it could be compared, or need not be, and the difference.
    """
    if labels.split != "train" or file.has_column("views"):
        return True, None
    views = labels.views()
    if file.header["boxes_sha256"] is None or not file.has_column("classes"):
        return False, None
    try:
        boxes_hash = boxes_of(file.shard(with_blocks=False), views)
    except (ValueError, LabelSetError) as error:  # an image of size 0
        return True, str(error)
    finally:
        file.unmap()
    if boxes_hash == file.header["boxes_sha256"]:
        return True, None
    kind = "drawn" if isinstance(views, DrawnViews) else "stored"
    return True, f"the {kind} boxes differ from the boxes that were labelled"


def _check_data(
    config: LabelsVerifyConfig, folder: Path, manifest: dict[str, Any]
) -> dict[str, Any]:
    """Compare the images with the data set; return the report. Raises LabelSetError.

    Names and sizes first, then the content of every image of which the set has the hash, unless
    --quick is given. A part of a split set is compared with its own images only.
    """
    assert config.data_dir is not None
    num_images = num_bytes = num_left = 0
    is_part = creating_command(manifest["plan"]) == "`mealv2 labels split`"
    for split in manifest["roles"]:
        labels = LabelSet.open(folder, split=split)
        source = open_labelled(config, config.data_dir, manifest["plan"], split)
        lenient = is_part and split == "train"
        check_same_data(labels, source, allow_missing=lenient)
        num_labelled = len(labels) + len(labels.skipped)
        of = "all" if num_labelled == len(source) else f"{num_labelled} of {len(source)}"
        found = None if config.quick else _compare_content(config, labels, source)
        num_here = 0 if found is None else found.images
        how = "names and sizes only" if found is None else f"the content of {found.summary()}"
        if 0 < num_here < num_labelled:
            how += f"; only names and sizes of {num_labelled - num_here} without a content hash"
        console.info(
            f"{split}: labels {of} images of {source.name}; they are unchanged (compared {how})"
        )
        num_left += num_labelled - num_here
        if found is not None:
            num_images += found.images
            num_bytes += found.bytes
    compared = (
        "names and sizes" if not num_images else "content, of some" if num_left else "content"
    )
    return {
        "data": "a part of it" if is_part else "the same",
        "data_compared": compared,
        "images_compared": num_images,
        "image_bytes_compared": num_bytes,
        "images_not_compared": num_left,
    }


def _compare_content(
    config: LabelsVerifyConfig, labels: LabelSet, source: ImageSource
) -> Compared | None:
    """Compare all images by content; None if the set has no content hashes, which is logged.

    Raises LabelSetError, naming images.
    """
    labelled = labelled_hashes(labels, source.keys)
    if not labelled.num_known:
        console.info(f"{labels.split}: the label set has no content hashes of its images")
        return None
    is_labelled_N = labels.has_labels(source.keys)
    found = compare_images(
        source,
        labelled,
        [p for p, key in enumerate(source.keys) if is_labelled_N[p] or key in labels.skipped],
        workers=config.workers,
        what=f"images of {labels.split}",
    )
    advice = "give the data that was labelled, or precompute labels for this data"
    require_same(found, source, shown(config.labels), advice=advice)
    return found
