"""`mealv2 labels split`: a label set in parts of disjoint images, each a set of its own."""

import itertools
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mealv2.errors import ConfigError
from mealv2.label_set import LabelSet, Shard, ShardFile, StoredViews, boxes_of, check_box_drift
from mealv2.views import Views
from pipeline import console
from pipeline.config import LabelsSplitConfig
from pipeline.label_sets import writing


def run(config: LabelsSplitConfig) -> dict[str, Any]:
    """Write the parts; return the report. Raises MealError and OSError.

    Each part has consecutive training images and the complete validation split.
    """
    folders = [config.output / f"part-{number}" for number in range(config.parts)]
    splits = writing.open_splits(config.labels, *folders)
    train = splits["train"]
    _, files = train.blocks[0]
    keys = [key for file in files for key in file.all_keys()]
    if config.parts > len(keys):
        raise ConfigError(
            f"--parts {config.parts}: {config.labels} has only {console.count(len(keys), 'image')}"
        )
    borders = [len(keys) * part // config.parts for part in range(config.parts + 1)]
    parts = [set(keys[a:b]) for a, b in itertools.pairwise(borders)]
    # the last part gets the appended rows of images that are in no shard
    appended = itertools.chain.from_iterable(file.keys() for file in train.appended_files)
    parts[-1] |= set(appended) - set(keys)
    reports = []
    for number, (folder, part) in enumerate(zip(folders, parts, strict=True)):
        reports.append(_write_part(folder, f"part {number} of {config.parts}", splits, part))
        console.info(f"{folder}: {console.count(reports[-1]['images'], 'image')}")
    return {"labels": str(config.labels), "parts": reports}


def _write_part(
    folder: Path, name: str, splits: dict[str, LabelSet], kept: set[str]
) -> dict[str, Any]:
    train = splits["train"]
    plan, recipe = train.manifest["plan"], train.views()
    images = [image for image in writing.images_of(train.blocks[0][1]) if image[1] in kept]
    roles = {
        **plan["roles"],
        "train": plan["roles"]["train"] | writing.describe_images(train.classes, images),
    }
    writer = writing.Writer.derive(folder, "labels split", name, [plan], roles=roles)
    shards = [
        (views, partial(_cut, file, kept, recipe))
        for views, file in writing.shards_of(train)
        if not kept.isdisjoint(file.all_keys())
    ]
    writer.add("train", shards, what=f"train of {name}")
    for split in splits.keys() - {"train"}:
        copies = [(views, file.shard) for views, file in writing.shards_of(splits[split])]
        writer.add(split, copies, what=f"{split} of {name}")
    writer.add_appended(train, kept)
    return writer.finish()


def _cut(file: ShardFile, kept: set[str], views: Views) -> Shard:
    """Return the images of a shard that are kept; raises LabelSetError if its boxes drifted."""
    shard = file.shard()
    assert shard.images is not None
    check_box_drift(file, views)
    rows = [row for row, key in enumerate(shard.keys) if key in kept]
    order = [key for key in file.all_keys() if key in kept]
    stored = shard.stored_views
    if stored is not None:
        stored = StoredViews(stored.boxes_NV4[rows], stored.flips_NV[rows])
    cut = replace(
        shard,
        keys=[shard.keys[row] for row in rows],
        blocks=[shard.blocks[row] for row in rows],
        images=shard.images.rows(rows),
        stored_views=stored,
        skipped={
            key: {**image, "position": order.index(key)}
            for key, image in shard.skipped.items()
            if key in kept
        },
        loss=None,  # it is of images that may be in another part
    )
    return replace(cut, boxes_sha256=boxes_of(cut, views))
