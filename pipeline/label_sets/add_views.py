"""`mealv2 labels add-views`: more views of a set's images, in new files beside its shards."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from mealv2 import label_set
from mealv2.errors import ConfigError, LabelSetError
from mealv2.label_set import LabelSet, read_manifest
from pipeline import jobs, logs, processes, runtime
from pipeline.compatibility import (
    build_original_teachers,
    check_precision,
    check_same_data,
    choose_resize,
)
from pipeline.config import LabelsAddViewsConfig
from pipeline.finishing import block_views, describe_block
from pipeline.labelling import make_labeller
from pipeline.mirror import Folder
from pipeline.sources import open_images
from pipeline.stage_one import ReadSettings, Role, StageOne


def run(config: LabelsAddViewsConfig) -> dict[str, Any]:
    """Label views up to --num-views, or a job's share of them; return the report.

    Raises MealError and OSError.
    """
    job = jobs.chosen(config)
    last = _last(config, read_manifest(config.labels)["plan"])
    if config.num_procs == 1:
        return _run(config, job, last)
    began = time.monotonic()
    made = processes.run(["labels", "add-views"], config, job)
    if job.is_part:
        return jobs.report_of(job, Folder(config.labels), made, began, last=last)
    alone = replace(config, num_procs=1, job_index=0, num_jobs=1)
    return _run(alone, jobs.Job(0, 1), last) | {"shards_made": made}


def _last(config: LabelsAddViewsConfig, plan: dict[str, Any]) -> str | None:
    """Return what ends a set after jobs, where `labels finish` cannot."""
    again = f"the same `mealv2 labels add-views {config.labels}` with --job-index 0 --num-jobs 1"
    return again if "derived" in plan else None


def _run(config: LabelsAddViewsConfig, job: jobs.Job, last: str | None) -> dict[str, Any]:
    """Label views in this process.

    Whole shards stay, in blocks that were added before too: those of them that are damaged or
    missing are made again, also where the set holds --num-views already. Until all are there the
    set is what it was.
    """
    manifest = read_manifest(config.labels)
    plan = manifest["plan"]
    if plan["format_version"] != label_set.FORMAT_VERSION:
        raise LabelSetError(
            f"{config.labels} is of an old format; `mealv2 labels convert` it first"
        )
    first, *added = _views_of(manifest)
    held = added[-1].stop if added else first.stop
    if config.num_views < held:
        raise ConfigError(
            f"--num-views {config.num_views}: {config.labels} holds {held} already, and keeps them"
        )
    # without the views that were added: these are made again where they are damaged
    labels = LabelSet.open(config.labels, appended=[], num_views=first.stop)
    machine = runtime.start(config)
    stage, role = _stage(config, labels, machine)
    blocks = [*added, *_to_add(config.labels, held, config.num_views)]
    began = time.monotonic()
    made = 0
    described = []
    lacking: set[str] = set()
    parts = [replace(role, views=tuple(views)) for views in blocks]
    if job.is_part:
        return jobs.label_share(job, stage, parts, last=last)
    for views, block in zip(blocks, parts, strict=True):
        made += stage.label([block])
        files = stage.shards(block)
        described.append(describe_block(views, files))
        lacking |= {key for file in files for key in file.header["skipped"]}
    lacking -= labels.skipped.keys()
    if lacking:
        logs.say(f"{len(lacking)} images could not be read: they keep their first views alone")
    entry = manifest["roles"]["train"]
    entries = {
        **manifest["roles"],
        "train": {**entry, "blocks": [entry["blocks"][0], *described]},
    }
    kept = {"batch_size": manifest["batch_size"]} if "batch_size" in manifest else {}
    versions = manifest.get("versions", runtime.versions())
    label_set.write_manifest(config.labels, plan, roles=entries, versions=versions, **kept)
    logs.say(f"{config.labels} holds views 0 to {config.num_views - 1} now")
    return {
        "labels": str(config.labels),
        "images": len(labels),
        "views": config.num_views,
        "added": [held, config.num_views],
        "skipped": len(lacking),
        "bytes": sum(s["bytes"] for block in described[len(added) :] for s in block["shards"]),
        "shards_made": made,
        "seconds": round(time.monotonic() - began, 2),
    }


def _views_of(manifest: dict[str, Any]) -> list[range]:
    """Return the views of each block of training labels."""
    if "train" not in manifest["roles"]:
        raise ConfigError("the label set has no train labels to add views to")
    return [range(*block["views"]) for block in manifest["roles"]["train"]["blocks"]]


def _to_add(folder: Path, held: int, num_views: int) -> list[range]:
    """Return the blocks to add: those that were begun, then one of what is lacking."""
    blocks = []
    for views in block_views(folder, "train"):
        if views.start == held and views.stop <= num_views:
            blocks.append(views)
            held = views.stop
    return blocks + ([range(held, num_views)] if held < num_views else [])


def _stage(
    config: LabelsAddViewsConfig, labels: LabelSet, machine: runtime.Runtime
) -> tuple[StageOne, Role]:
    """Return what makes the shards, and the images of them, in no views yet."""
    plan = labels.manifest["plan"]
    source = open_images(config, config.data_dir, plan["roles"]["train"]["split"])
    check_same_data(labels, source, allow_missing=True)  # a part of a set has some of them
    check_precision(config.labels, plan, machine)
    ensemble = build_original_teachers(config.labels, config.teacher, plan, machine)
    labeller = make_labeller(
        config, machine, ensemble, labels.encoding, img_size=labels.img_size, most=len(labels)
    )
    position_of = {key: position for position, key in enumerate(source.keys)}
    _, files = labels.blocks[0]
    shards = [[position_of[key] for key in file.all_keys()] for file in files]
    reading = ReadSettings(
        config.workers,
        labels.img_size,
        labels.views(),
        choose_resize(labels),
        pin_memory=machine.pins,
    )
    return StageOne(Folder(config.labels), plan, labeller, reading), Role(
        "train", source, (), list(shards)
    )
