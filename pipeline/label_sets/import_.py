"""`mealv2 labels import`: a label set of the labels that FKD's and MEAL V2's code stored."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mealv2 import fkd, label_set
from mealv2.data.pixels import interpolation
from mealv2.data.source import ImageSource, fingerprint_of
from mealv2.errors import ConfigError, LabelSetError
from mealv2.fkd import FkdFile
from mealv2.label_set import UNKNOWN, Encoding, Images, Rows, Shard, StoredViews, boxes_of
from mealv2.soft_labels import SoftLabels
from mealv2.views import STORED_BOXES, packed_boxes
from pipeline import console
from pipeline.config import LabelsImportConfig
from pipeline.label_sets.writing import Writer
from pipeline.loading.sources import open_images


def run(config: LabelsImportConfig) -> dict[str, Any]:
    """Import; return the report. Raises MealError and OSError; whole shards stay.

    Values are kept exactly, boxes to a 65,535th of the image. Images without labels are left out.
    """
    if config.label_type is not None and not fkd.is_label_type(config.label_type):
        raise ConfigError(
            f"--label-type {config.label_type}: FKD has none such, but {', '.join(fkd.LABEL_TYPES)}"
        )
    source = open_images(config, config.data_dir, config.train_split)
    matched = fkd.match_files(source.keys, fkd.find_files(config.folder, split=config.train_split))
    if not matched.paths:
        matched.require_all()
    for number, what in (
        (len(matched.without_label), "images have no labels, and are not in the set"),
        (len(matched.without_image), "label files have no image, and are left out"),
    ):
        if number:
            console.info(f"{number} {what}")
    positions = [p for p, key in enumerate(source.keys) if key in matched.paths]
    first = fkd.read_file(matched.paths[source.keys[positions[0]]])
    num_classes = len(source.classes)
    kind = fkd.kind_of(first.labels, num_classes, config.label_type)
    labels = first.soft_labels(num_classes, kind)
    encoding = Encoding(
        num_classes,
        "float16" if first.labels.dtype == np.float16 and not _has_rest(kind) else "float32",
        topk=labels.indices_NK.shape[1],
    )
    num_views = len(first.boxes)
    writer = Writer(config.output, _plan(config, source, positions, encoding, kind, num_views))
    shards = [
        positions[part.start : part.stop]
        for part in label_set.shard_ranges(len(positions), config.shard_size)
    ]
    for part in console.progress(
        shards, total=len(positions), what="importing", unit="images", size=len
    ):
        paths = [matched.paths[source.keys[p]] for p in part]
        make = partial(_shard, source, part, paths, encoding, kind, num_views)
        writer.add("train", range(num_views), make)
    report = writer.finish({})
    console.info(f"{report['images']} images, {num_views} views each, {kind}, kept as {encoding}")
    return {**report, "label_type": kind, "num_views": num_views}


def _has_rest(kind: str) -> bool:
    """Return whether labels of a kind leave mass to the other classes: float16 would round it."""
    return kind.startswith(("smoothing", "marginal_smoothing"))


def _shard(
    source: ImageSource,
    positions: Sequence[int],
    paths: Sequence[Path],
    encoding: Encoding,
    kind: str,
    num_views: int,
) -> Shard:
    """Return the shard of some images from their label files."""
    files = [_read(path, num_views) for path in paths]
    labels = SoftLabels.concat([file.soft_labels(encoding.num_classes, kind) for file in files])
    sizes = np.array([source.sizes[p] for p in positions], dtype=np.uint64)
    shard = Shard(
        plan_sha256="",
        split="train",
        number=0,
        first_view=0,
        num_views=num_views,
        keys=[source.keys[p] for p in positions],
        blocks=encoding.blocks(Rows(labels), num_views),
        images=Images(  # how large the images are is not looked at: nothing is drawn from it
            np.zeros((len(positions), 2), dtype=np.uint32),
            sizes,
            np.array([source.labels[p] for p in positions], dtype=np.uint32),
        ),
        stored_views=StoredViews(
            packed_boxes(np.stack([file.boxes for file in files])),
            np.stack([file.flips for file in files]).astype(np.uint8),
        ),
    )
    return replace(shard, boxes_sha256=boxes_of(shard))


def _read(path: Path, num_views: int) -> FkdFile:
    file = fkd.read_file(path)
    if len(file.boxes) != num_views:
        raise LabelSetError(
            f"label file {path} has {len(file.boxes)} labelled crops, the first one has "
            f"{num_views}; a label set has as many of every image"
        )
    return file


def _plan(
    config: LabelsImportConfig,
    source: ImageSource,
    positions: Sequence[int],
    encoding: Encoding,
    kind: str,
    num_views: int,
) -> dict[str, Any]:
    images = [(source.labels[p], source.keys[p], source.sizes[p]) for p in positions]
    return {
        "format": label_set.FORMAT,
        "format_version": label_set.FORMAT_VERSION,
        "classes": list(source.classes),
        "teachers": [{"model": config.teacher_name, "weights_sha256": UNKNOWN}],
        "ensemble": UNKNOWN,
        "precision": UNKNOWN,
        "img_size": config.img_size,
        "interpolation": interpolation("pil"),
        "labels": encoding.plan(),
        "shard_size": config.shard_size,
        "derived": {
            "command": "labels import",
            "how": f"imported from FKD's {kind}",
            "from": [],
        },
        "roles": {
            "train": {
                "split": source.split,
                "num_images": len(positions),
                "data_sha256": fingerprint_of(source.classes, images),
                "views": STORED_BOXES,
                "num_views": num_views,
            }
        },
    }
