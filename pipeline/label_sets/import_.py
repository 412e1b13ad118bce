"""`mealv2 labels import`: a label set from the label files of FKD, MEAL V2 and SRe2L."""

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
from pipeline.label_sets.import_sre2l import read_batches
from pipeline.label_sets.writing import Imported, Writer, describe_images
from pipeline.loading.sources import open_images


def run(config: LabelsImportConfig) -> dict[str, Any]:
    """Import; return the report. Raises MealError and OSError.

    Stores boxes to a 65,535th of the image, and values exactly if no encoding is given. Complete
    shards of an earlier run are kept. Images without labels are left out.
    """
    if config.label_type is not None and not fkd.is_label_type(config.label_type):
        raise ConfigError(
            f"--label-type {config.label_type} is not one of FKD's: {', '.join(fkd.LABEL_TYPES)}"
        )
    source = open_images(config, config.data_dir, config.train_split)
    importers = {"fkd": _read_fkd, "sre2l": read_batches}
    found = importers[config.from_](config, source)
    writer = Writer(config.output, _plan(config, source, found))
    shards = [
        (range(found.num_views), partial(_shard, source, found, part))
        for part in label_set.shard_ranges(len(found.positions), config.shard_size)
    ]
    writer.add("train", shards, what="importing")
    report = writer.finish()
    console.info(
        f"{report['images']} images, {found.num_views} views each, {found.how}, stored as "
        f"{found.encoding}"
    )
    return {**report, **found.report, "num_views": found.num_views}


def _shard(source: ImageSource, found: Imported, part: range) -> Shard:
    """Return the shard of some of the labelled images."""
    rows, boxes_NV4, flips_NV = found.read(part)
    positions = found.positions[part.start : part.stop]
    shard = Shard(
        plan_sha256="",
        split="train",
        number=0,
        first_view=0,
        num_views=found.num_views,
        keys=[source.keys[p] for p in positions],
        blocks=found.encoding.blocks(rows, found.num_views),
        images=Images(  # boxes are stored, so the sizes of the images are not needed
            np.zeros((len(positions), 2), dtype=np.uint32),
            np.array([source.sizes[p] for p in positions], dtype=np.uint64),
            np.array([source.labels[p] for p in positions], dtype=np.uint32),
        ),
        stored_views=StoredViews(packed_boxes(boxes_NV4), flips_NV.astype(np.uint8)),
    )
    return replace(shard, boxes_sha256=boxes_of(shard))


def _plan(config: LabelsImportConfig, source: ImageSource, found: Imported) -> dict[str, Any]:
    images = [(source.labels[p], source.keys[p], source.sizes[p]) for p in found.positions]
    return {
        "format": label_set.FORMAT,
        "format_version": label_set.FORMAT_VERSION,
        "classes": list(source.classes),
        "teachers": [{"model": config.teacher_name, "weights_sha256": UNKNOWN}],
        "ensemble": UNKNOWN,
        "precision": UNKNOWN,
        "img_size": config.img_size,
        "interpolation": interpolation("pil"),
        "labels": found.encoding.plan(),
        "shard_size": config.shard_size,
        "derived": {"command": "labels import", "how": f"imported from {found.how}", "from": []},
        "roles": {
            "train": {
                "split": source.split,
                **describe_images(source.classes, images),
                "views": STORED_BOXES,
                "num_views": found.num_views,
            }
        },
    }


# --- FKD ------------------------------------------------------------------------------------------


def _read_fkd(config: LabelsImportConfig, source: ImageSource) -> Imported:
    """Return the labels of FKD's files, which are those of one image each."""
    matched = fkd.match_files(source.keys, fkd.find_files(config.folder, split=config.train_split))
    if not matched.paths:
        matched.require_all()
    if number := len(matched.without_label):
        console.info(f"left out: {console.count(number, 'image')} without a label file")
    if number := len(matched.without_image):
        console.info(f"left out: {console.count(number, 'label file')} without an image")
    positions = [p for p, key in enumerate(source.keys) if key in matched.paths]
    paths = [matched.paths[source.keys[p]] for p in positions]
    first = fkd.read_file(paths[0])
    num_classes, num_views = len(source.classes), len(first.boxes)
    kind = fkd.kind_of(first.labels, num_classes, config.label_type)
    labels = first.soft_labels(num_classes, kind)
    # float16 would round the probability of the other classes
    has_rest = kind.startswith(("smoothing", "marginal_smoothing"))
    is_half = first.labels.dtype == np.float16 and not has_rest
    topk = labels.indices_NK.shape[1]

    def read(part: range) -> tuple[Rows, np.ndarray, np.ndarray]:
        files = [_read_file(path, num_views) for path in paths[part.start : part.stop]]
        labels = SoftLabels.concat([file.soft_labels(num_classes, kind) for file in files])
        boxes, flips = [file.boxes for file in files], [file.flips for file in files]
        return Rows(labels), np.stack(boxes), np.stack(flips)

    return Imported(
        positions=positions,
        encoding=Encoding(num_classes, "float16" if is_half else "float32", topk=topk),
        num_views=num_views,
        how=f"FKD's {kind}",
        read=read,
        report={"label_type": kind},
    )


def _read_file(path: Path, num_views: int) -> fkd.FkdFile:
    file = fkd.read_file(path)
    if len(file.boxes) != num_views:
        raise LabelSetError(
            f"label file {path} has {len(file.boxes)} labelled crops, the first file has "
            f"{num_views}; every image of a label set has the same number of views"
        )
    return file
