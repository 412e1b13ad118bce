"""`mealv2 labels add-views`: label more views of a set's images, in new shards."""

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from mealv2.errors import ConfigError
from mealv2.label_set import LabelSet, check_same_data, listed_sha256, read_manifest, write_manifest
from mealv2.labelling import manifest, shards
from mealv2.labelling.annotator import Annotator
from mealv2.labelling.plan import LabelSplit
from mealv2.labelling.store import Store
from mealv2.storage.json_format import json_sha256
from pipeline import console
from pipeline.config import LabelsAddViewsConfig
from pipeline.labelling import compatibility, jobs, workers
from pipeline.labelling.annotate import make_annotator
from pipeline.labelling.stopping import stop_between_batches
from pipeline.loading.sources import open_labelled
from pipeline.runtime.device import create_runtime


def run(config: LabelsAddViewsConfig) -> dict[str, Any]:
    """Label views up to --num-views, or a job's part of them; return the report.

    Complete shards of added views are kept, missing or damaged ones are made. The manifest lists
    the views when all of their shards are complete. Raises MealError and OSError.
    """
    job = jobs.choose_job(config)
    plan = read_manifest(config.labels)["plan"]
    if not os.access(config.labels, os.W_OK):  # now, not a shard later
        raise ConfigError(f"cannot add to {config.labels}: no permission; give a copy of the set")
    if "derived" in plan:  # `labels finish` cannot complete it
        same = f"the same `mealv2 labels add-views {config.labels}`"
        job = replace(job, last_step=f"{same} with --job-index 0 --num-jobs 1")
    if config.num_procs == 1:
        return _run(config, job)
    began = time.monotonic()
    num_made = workers.run_workers(["labels", "add-views"], config, job)
    if job.is_part:
        return jobs.job_report(job, Store(config.labels), num_made, began)
    alone = replace(config, num_procs=1, job_index=0, num_jobs=1)
    return _run(alone, jobs.Job(0, 1)) | {"shards_made": num_made}


def _run(config: LabelsAddViewsConfig, job: jobs.Job) -> dict[str, Any]:
    """Label views in this process."""
    before = read_manifest(config.labels)
    first, *added = _views_of(before)
    num_stored = added[-1].stop if added else first.stop
    if config.num_views < num_stored:
        raise ConfigError(
            f"--num-views {config.num_views}: {config.labels} has {num_stored} already; give a "
            "larger number"
        )
    # without the added views, because some of their shards may be damaged
    labels = LabelSet.open(config.labels, appended=[], num_views=first.stop)
    annotator, split = _load(config, labels)
    began = time.monotonic()
    blocks = [*added, *_blocks_to_add(config.labels, num_stored, config.num_views)]
    splits = [replace(split, views=tuple(views)) for views in blocks]
    store = Store(config.labels)
    if job.is_part:
        return jobs.label_part(job, splits, annotator, store, workers=config.workers)
    listed = listed_sha256(store.folder, split.plan_sha256)
    num_made, described, skipped = 0, [], set[str]()
    with stop_between_batches() as stop:
        for views, block in zip(blocks, splits, strict=True):
            missing = shards.find_missing(block, store, listed=listed)
            shards.label_shards(block, missing, annotator, store, workers=config.workers, stop=stop)
            num_made += len(missing)
            checked = manifest.require_complete(store.folder, block.planned, split.plan_sha256)
            described.append(manifest.describe_block(views, checked))
            skipped |= {key for shard in checked for key in shard.header["skipped"]}
    if skipped := skipped - labels.skipped.keys():
        images = console.count(len(skipped), "image")
        console.info(f"{images} could not be read: only their first views have labels")
    _write_manifest(config.labels, before, described)
    console.info(f"{config.labels} has views 0 to {config.num_views - 1} now")
    return {
        "labels": str(config.labels),
        "images": len(labels),
        "views": config.num_views,
        "added": [num_stored, config.num_views],
        "skipped": len(skipped),
        "bytes": sum(s["bytes"] for block in described[len(added) :] for s in block["shards"]),
        "shards_made": num_made,
        "seconds": round(time.monotonic() - began, 2),
    }


def _write_manifest(folder: Path, before: dict[str, Any], described: list[dict[str, Any]]) -> None:
    """Write the manifest with other added blocks of views."""
    train = before["roles"]["train"]
    roles = {"train": {**train, "blocks": [train["blocks"][0], *described]}}
    kept = {name: before[name] for name in ("batch_size", "versions") if name in before}
    write_manifest(folder, before["plan"], roles=before["roles"] | roles, **kept)


def _views_of(manifest: dict[str, Any]) -> list[range]:
    """Return the views of each block of training labels."""
    if "train" not in manifest["roles"]:
        raise ConfigError("the label set has no train split to add views to")
    return [range(*block["views"]) for block in manifest["roles"]["train"]["blocks"]]


def _blocks_to_add(folder: Path, num_stored: int, num_views: int) -> list[range]:
    """Return the blocks to add: the blocks of earlier, unfinished runs, then one block."""
    blocks = []
    for views in manifest.block_views(folder, "train"):
        if views.start == num_stored and views.stop <= num_views:
            blocks.append(views)
            num_stored = views.stop
    return blocks + ([range(num_stored, num_views)] if num_stored < num_views else [])


def _load(config: LabelsAddViewsConfig, labels: LabelSet) -> tuple[Annotator, LabelSplit]:
    """Return the teachers that made the set, and its train split without views."""
    folder, plan = config.labels, labels.manifest["plan"]
    runtime = create_runtime(config)
    source = open_labelled(config, config.data_dir, plan, "train")
    check_same_data(labels, source, allow_missing=True)  # for a part of a split set
    compatibility.check_precision(folder, plan, runtime)
    ensemble = compatibility.build_original_teachers(folder, config.teacher, plan, runtime)
    sizes = {"img_size": labels.img_size, "max_batch_size": len(labels)}
    annotator = make_annotator(config, runtime, ensemble, labels.encoding, **sizes)
    annotator = replace(annotator, first=labels)
    position_of = {key: position for position, key in enumerate(source.keys)}
    _, files = labels.blocks[0]
    images = [[position_of[key] for key in file.all_keys()] for file in files]
    reader = compatibility.view_reader(labels, source, check_images=config.check_images)
    return annotator, LabelSplit("train", reader, (), images, json_sha256(plan))
