"""`mealv2 labels split`: a label set in parts of disjoint images, each a set of its own."""

import itertools
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mealv2.data.source import fingerprint_of
from mealv2.errors import ConfigError
from mealv2.label_set import LabelSet, Shard, ShardFile, StoredViews, boxes_of, check_box_drift
from mealv2.views import Views
from pipeline import console
from pipeline.config import LabelsSplitConfig
from pipeline.label_sets.writing import (
    Writer,
    accuracies_of,
    all_rows,
    derived_plan,
    images_of,
    open_splits,
    require_outside,
)


def run(config: LabelsSplitConfig) -> dict[str, Any]:
    """Write the parts; return the report. Raises MealError and OSError.

    Training images are divided in their order; every part has the whole validation split.
    """
    folders = [config.output / f"part-{number}" for number in range(config.parts)]
    for folder in folders:
        require_outside(folder, [config.labels])
    splits = open_splits(config.labels)
    train = splits["train"]
    _, files = train.blocks[0]
    keys = [key for file in files for key in file.all_keys()]
    if config.parts > len(keys):
        raise ConfigError(
            f"--parts {config.parts}: {config.labels} has {console.count(len(keys), 'image')}"
        )
    borders = [len(keys) * part // config.parts for part in range(config.parts + 1)]
    parts = [set(keys[a:b]) for a, b in itertools.pairwise(borders)]
    # rows can have been appended of images that the set has no views of: to the last part
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
    plan = train.manifest["plan"]
    images = [image for file in train.blocks[0][1] for image in images_of(file) if image[1] in kept]
    of_train = {
        **plan["roles"]["train"],
        "num_images": len(images),
        "data_sha256": fingerprint_of(train.classes, images),
    }
    writer = Writer(
        folder,
        derived_plan(
            plan, "labels split", name, [plan], roles={**plan["roles"], "train": of_train}
        ),
    )
    recipe = train.views()
    for views, files in train.blocks:
        for file in files:
            if not kept.isdisjoint(file.all_keys()):
                writer.add("train", views, partial(_cut, file, kept, recipe))
    for split in splits.keys() - {"train"}:
        for views, files in splits[split].blocks:
            for file in files:
                writer.add(split, views, file.shard)
    for file in train.appended_files:
        chosen = [row for row, key in enumerate(file.keys()) if key in kept]
        rows = all_rows(file, train.encoding).rows(torch.tensor(chosen, dtype=torch.int64))
        writer.add_rows(file, chosen, rows)
    return writer.finish(accuracies_of(splits))


def _cut(file: ShardFile, kept: set[str], views: Views) -> Shard:
    """Return the images of a shard that are kept; raises LabelSetError where its boxes drifted."""
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
            key: {**missing, "position": order.index(key)}
            for key, missing in shard.skipped.items()
            if key in kept
        },
    )
    return replace(cut, boxes_sha256=boxes_of(cut, views))
