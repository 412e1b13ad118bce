"""`mealv2 labels add-views`: more views of a set's images, in new files beside its shards."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from mealv2 import label_set
from mealv2.errors import ConfigError
from mealv2.label_set import LabelSet, read_manifest
from mealv2.storage.json_format import json_sha256
from pipeline import console
from pipeline.config import LabelsAddViewsConfig
from pipeline.labelling import jobs, workers
from pipeline.labelling.annotate import Annotator, make_annotator
from pipeline.labelling.compatibility import (
    build_original_teachers,
    check_precision,
    check_same_data,
    choose_resize,
)
from pipeline.labelling.manifest import block_views, describe_block
from pipeline.labelling.plan import LabelSplit
from pipeline.labelling.shards import (
    complete_shards,
    find_missing,
    label_shards,
    stop_between_batches,
)
from pipeline.labelling.store import Store
from pipeline.loading.loader import ViewReader
from pipeline.loading.sources import open_images
from pipeline.runtime.device import create_runtime, library_versions


def run(config: LabelsAddViewsConfig) -> dict[str, Any]:
    """Label views up to --num-views, or a job's part of them; return the report.

    Raises MealError and OSError.
    """
    job = jobs.choose_job(config)
    last_step = _last_step(config, read_manifest(config.labels)["plan"])
    if config.num_procs == 1:
        return _run(config, job, last_step)
    began = time.monotonic()
    num_made = workers.run_workers(["labels", "add-views"], config, job)
    if job.is_part:
        return jobs.job_report(job, Store(config.labels), num_made, began, last_step=last_step)
    alone = replace(config, num_procs=1, job_index=0, num_jobs=1)
    return _run(alone, jobs.Job(0, 1), last_step) | {"shards_made": num_made}


def _last_step(config: LabelsAddViewsConfig, plan: dict[str, Any]) -> str | None:
    """Return what completes a set after jobs, if `labels finish` cannot."""
    again = f"the same `mealv2 labels add-views {config.labels}` with --job-index 0 --num-jobs 1"
    return again if "derived" in plan else None


def _run(config: LabelsAddViewsConfig, job: jobs.Job, last_step: str | None) -> dict[str, Any]:
    """Label views in this process.

    Complete shards are kept. Missing or damaged ones are made, also in blocks that were added
    before. The manifest lists the views when all of their shards are complete.
    """
    manifest = read_manifest(config.labels)
    plan = manifest["plan"]
    first, *added = _views_of(manifest)
    num_stored = added[-1].stop if added else first.stop
    if config.num_views < num_stored:
        raise ConfigError(
            f"--num-views {config.num_views}: {config.labels} holds {num_stored} already, and "
            f"keeps them"
        )
    # opened without the added views: their damaged shards must not be an error here
    labels = LabelSet.open(config.labels, appended=[], num_views=first.stop)
    annotator, split = _load(config, labels)
    began = time.monotonic()
    blocks = [*added, *_blocks_to_add(config.labels, num_stored, config.num_views)]
    splits = [replace(split, views=tuple(views)) for views in blocks]
    store = Store(config.labels)
    if job.is_part:
        return jobs.label_part(
            job, splits, annotator, store, workers=config.workers, last_step=last_step
        )
    listed = label_set.listed_sha256(store.folder, json_sha256(plan))
    described, num_made, skipped = _label_blocks(config, splits, annotator, store, listed)
    skipped -= labels.skipped.keys()
    if skipped:
        console.info(f"{len(skipped)} images could not be read: they keep only their first views")
    _write_manifest(config.labels, manifest, described)
    console.info(f"{config.labels} now holds views 0 to {config.num_views - 1}")
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


def _label_blocks(
    config: LabelsAddViewsConfig,
    blocks: list[LabelSplit],
    annotator: Annotator,
    store: Store,
    listed: dict[str, str],
) -> tuple[list[dict[str, Any]], int, set[str]]:
    """Return the manifest entries of the blocks, how many shards were made, and skipped keys."""
    num_made = 0
    entries = []
    skipped: set[str] = set()
    for block in blocks:
        with stop_between_batches() as stop:
            missing = find_missing(block, store, listed=listed)
            label_shards(block, missing, annotator, store, workers=config.workers, stop=stop)
        num_made += len(missing)
        files = complete_shards(block, store)
        entries.append(describe_block(range(block.views[0], block.views[-1] + 1), files))
        skipped |= {key for file in files for key in file.header["skipped"]}
    return entries, num_made, skipped


def _write_manifest(
    folder: Path, manifest: dict[str, Any], described: list[dict[str, Any]]
) -> None:
    """Write the manifest with other added blocks; all else stays."""
    train = manifest["roles"]["train"]
    kept = {"batch_size": manifest["batch_size"]} if "batch_size" in manifest else {}
    label_set.write_manifest(
        folder,
        manifest["plan"],
        roles={
            **manifest["roles"],
            "train": {**train, "blocks": [train["blocks"][0], *described]},
        },
        versions=manifest.get("versions", library_versions()),
        **kept,
    )


def _views_of(manifest: dict[str, Any]) -> list[range]:
    """Return the views of each block of training labels."""
    if "train" not in manifest["roles"]:
        raise ConfigError("the label set has no train labels to add views to")
    return [range(*block["views"]) for block in manifest["roles"]["train"]["blocks"]]


def _blocks_to_add(folder: Path, num_stored: int, num_views: int) -> list[range]:
    """Return the blocks to add: those that were started before, then one of the rest."""
    blocks = []
    for views in block_views(folder, "train"):
        if views.start == num_stored and views.stop <= num_views:
            blocks.append(views)
            num_stored = views.stop
    return blocks + ([range(num_stored, num_views)] if num_stored < num_views else [])


def _load(config: LabelsAddViewsConfig, labels: LabelSet) -> tuple[Annotator, LabelSplit]:
    """Return the teachers that made the set, and its images, without views so far."""
    plan = labels.manifest["plan"]
    runtime = create_runtime(config)
    source = open_images(config, config.data_dir, plan["roles"]["train"]["split"])
    check_same_data(labels, source, allow_missing=True)  # a split set has a part of the images
    check_precision(config.labels, plan, runtime)
    ensemble = build_original_teachers(config.labels, config.teacher, plan, runtime)
    annotator = make_annotator(
        config,
        runtime,
        ensemble,
        labels.encoding,
        img_size=labels.img_size,
        max_batch_size=len(labels),
    )
    position_of = {key: position for position, key in enumerate(source.keys)}
    _, files = labels.blocks[0]
    shards = [[position_of[key] for key in file.all_keys()] for file in files]
    reader = ViewReader(
        source, img_size=labels.img_size, views=labels.views(), resize=choose_resize(labels)
    )
    return annotator, LabelSplit("train", reader, (), shards, json_sha256(plan))
