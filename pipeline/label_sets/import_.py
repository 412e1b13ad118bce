"""`mealv2 labels import`: a label set from the label files of FKD and MEAL V2."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mealv2 import fkd, label_set
from mealv2.data.pixels import interpolation
from mealv2.data.source import ImageSource
from mealv2.errors import ConfigError, LabelSetError
from mealv2.label_set import UNKNOWN, Encoding, Images, Rows, Shard, StoredViews, boxes_of
from mealv2.soft_labels import SoftLabels
from mealv2.views import STORED_BOXES, packed_boxes
from pipeline import console
from pipeline.config import LabelsImportConfig
from pipeline.label_sets.writing import Writer, describe_images
from pipeline.loading.sources import open_images


def run(config: LabelsImportConfig) -> dict[str, Any]:
    """Import; return the report. Raises MealError and OSError.

    Stores values exactly and boxes to a 65,535th of the image. Complete shards of an earlier run
    are kept. Images without labels are left out.
    """
    if config.label_type is not None and not fkd.is_label_type(config.label_type):
        raise ConfigError(
            f"--label-type {config.label_type} is not one of FKD's: {', '.join(fkd.LABEL_TYPES)}"
        )
    source = open_images(config, config.data_dir, config.train_split)
    matched = fkd.match_files(source.keys, fkd.find_files(config.folder, split=config.train_split))
    if not matched.paths:
        matched.require_all()
    if number := len(matched.without_label):
        console.info(f"left out: {console.count(number, 'image')} without a label file")
    if number := len(matched.without_image):
        console.info(f"left out: {console.count(number, 'label file')} without an image")
    positions = [p for p, key in enumerate(source.keys) if key in matched.paths]
    first = fkd.read_file(matched.paths[source.keys[positions[0]]])
    num_classes = len(source.classes)
    kind = fkd.kind_of(first.labels, num_classes, config.label_type)
    labels = first.soft_labels(num_classes, kind)
    # float16 would round the probability of the other classes
    has_rest = kind.startswith(("smoothing", "marginal_smoothing"))
    is_half = first.labels.dtype == np.float16 and not has_rest
    topk = labels.indices_NK.shape[1]
    encoding = Encoding(num_classes, "float16" if is_half else "float32", topk=topk)
    num_views = len(first.boxes)
    writer = Writer(config.output, _plan(config, source, positions, encoding, kind, num_views))
    shards = []
    for part in label_set.shard_ranges(len(positions), config.shard_size):
        of_shard = positions[part.start : part.stop]
        paths = [matched.paths[source.keys[p]] for p in of_shard]
        make = partial(_shard, source, of_shard, paths, encoding, kind, num_views)
        shards.append((range(num_views), make))
    writer.add("train", shards, what="importing")
    report = writer.finish()
    console.info(f"{report['images']} images, {num_views} views each, {kind}, stored as {encoding}")
    return {**report, "label_type": kind, "num_views": num_views}


def _shard(
    source: ImageSource,
    positions: Sequence[int],
    paths: Sequence[Path],
    encoding: Encoding,
    kind: str,
    num_views: int,
) -> Shard:
    """Return the shard of some images from their label files."""
    files = [fkd.read_file(path) for path in paths]
    for path, file in zip(paths, files, strict=True):
        if len(file.boxes) != num_views:
            raise LabelSetError(
                f"label file {path} has {len(file.boxes)} labelled crops, the first file has "
                f"{num_views}; every image of a label set has the same number of views"
            )
    labels = SoftLabels.concat([file.soft_labels(encoding.num_classes, kind) for file in files])
    shard = Shard(
        plan_sha256="",
        split="train",
        number=0,
        first_view=0,
        num_views=num_views,
        keys=[source.keys[p] for p in positions],
        blocks=encoding.blocks(Rows(labels), num_views),
        images=Images(  # boxes are stored, so the sizes of the images are not needed
            np.zeros((len(positions), 2), dtype=np.uint32),
            np.array([source.sizes[p] for p in positions], dtype=np.uint64),
            np.array([source.labels[p] for p in positions], dtype=np.uint32),
        ),
        stored_views=StoredViews(
            packed_boxes(np.stack([file.boxes for file in files])),
            np.stack([file.flips for file in files]).astype(np.uint8),
        ),
    )
    return replace(shard, boxes_sha256=boxes_of(shard))


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
        "derived": {"command": "labels import", "how": f"imported from FKD's {kind}", "from": []},
        "roles": {
            "train": {
                "split": source.split,
                **describe_images(source.classes, images),
                "views": STORED_BOXES,
                "num_views": num_views,
            }
        },
    }
