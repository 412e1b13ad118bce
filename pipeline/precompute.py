"""Stage one: run the ensemble over views of every image once and keep what it said.

The validation split is labelled first, one centre crop an image; it says how good the teachers are.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mealv2 import label_set
from mealv2.images import fingerprint
from mealv2.pixels import interpolation, probe_sha256
from mealv2.views import RECIPE, RESIZE_OVER_CROP, DrawnViews
from pipeline import jobs, logs, processes, runtime, teachers, timing
from pipeline.config import PrecomputeConfig
from pipeline.finishing import accuracy_of, finish_and_tell, report_of, say_accuracy
from pipeline.labelling import Labeller, encoding_of, make_labeller
from pipeline.loading.requests import CENTRE
from pipeline.mirror import store_at
from pipeline.planning import open_roles, shards_plan
from pipeline.stage_one import ReadSettings, Role, StageOne, requests_of

_INDEX_BYTES = 48  # of an image in a shard, beside its key and its labels
_HEADER_BYTES = 7500  # of a shard, about


def run(config: PrecomputeConfig) -> dict[str, Any]:
    """Label a data set, or a job's share of it; return the report.

    Whole shards stay. Raises MealError and OSError.
    """
    job = jobs.chosen(config)
    if config.num_procs > 1:
        return _in_processes(config, job)
    machine = runtime.start(config)
    roles = _roles(config)
    classes = list(roles[-1].source.classes)
    encoding = encoding_of(config, len(classes))
    ensemble, described = teachers.build(
        config.teacher, classes=classes, img_size=config.img_size, runtime=machine
    )
    labeller = make_labeller(
        config,
        machine,
        ensemble,
        encoding,
        img_size=config.img_size,
        most=roles[-1].num_labels,
    )
    plan = _plan(config, labeller, roles, described)
    roles = [replace(role, shards=_shards_of(plan, role)) for role in roles]
    if config.dry_run:
        return _estimate(config, labeller, roles)
    began = time.monotonic()
    store = store_at(config, config.out)
    store.claim(plan)
    stage = StageOne(store, plan, labeller, _reading(config, machine))
    if job.is_part:
        return jobs.label_share(job, stage, roles)
    made = 0
    for role in roles:
        made += stage.label([role])
        if role.name == "val":
            say_accuracy(accuracy_of(plan, stage.shards(role)), len(classes))
    manifest = stage.finish()
    return report_of(store, manifest) | {
        "shards_made": made,
        "seconds": round(time.monotonic() - began, 2),
    }


def _in_processes(config: PrecomputeConfig, job: jobs.Job) -> dict[str, Any]:
    """Label in processes of the same command, then finish the set unless others are at it too."""
    began = time.monotonic()
    made = processes.run(["precompute"], config, job)
    store = store_at(config, config.out)
    if job.is_part:
        return jobs.report_of(job, store, made, began)
    plan = label_set.read_plan(store.folder)
    asked = config.batch_size if made and config.batch_size != "auto" else None
    return finish_and_tell(store, plan, batch_size=asked) | {
        "shards_made": made,
        "seconds": round(time.monotonic() - began, 2),
    }


def _roles(config: PrecomputeConfig) -> list[Role]:
    """Return what is labelled, validation first; its shards are the plan's to say."""
    views = {"val": (CENTRE,), "train": tuple(range(config.num_views))}
    return [Role(name, source, views[name], []) for name, source in open_roles(config).items()]


def _shards_of(plan: dict[str, Any], role: Role) -> list[Sequence[int]]:
    """Return the images of each shard of a role."""
    shards = [shard for shard in label_set.planned_shards(plan) if shard.role == role.name]
    return [shard.images for shard in shards if shard.images is not None]


def _reading(config: PrecomputeConfig, machine: runtime.Runtime) -> ReadSettings:
    return ReadSettings(
        config.workers,
        config.img_size,
        DrawnViews(config.view_seed),
        config.resize,
        pin_memory=machine.pins,
    )


def _plan(
    config: PrecomputeConfig, labeller: Labeller, roles: list[Role], described: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return everything that determines the labels, as JSON."""
    views = {
        "train": {**RECIPE, "seed": config.view_seed},
        "val": {"name": "centre-crop", "resize_over_crop": list(RESIZE_OVER_CROP)},
    }
    shards = shards_plan(config, {role.name: role.source for role in roles})
    return {
        **shards,
        "format": label_set.FORMAT,
        "classes": list(roles[-1].source.classes),
        "teachers": described,
        "ensemble": "mean of softmax",
        "precision": labeller.machine.precision,
        "img_size": config.img_size,
        "interpolation": interpolation(config.resize),
        "probe_sha256": probe_sha256(config.resize),
        "labels": labeller.encoding.plan(),
        "roles": {
            role.name: {
                **shards["roles"][role.name],
                "split": role.source.split,
                "data_sha256": fingerprint(role.source),
                "views": views[role.name],
            }
            for role in roles
        },
    }


def _estimate(config: PrecomputeConfig, labeller: Labeller, roles: list[Role]) -> dict[str, Any]:
    """Measure a few seconds of work; return rows, bytes and seconds of the whole."""
    num_labels = sum(role.num_labels for role in roles)
    timing.forget_peak(labeller.machine.device)
    sample, label_bytes = _measure(config, labeller, roles[-1])
    rate, peak_bytes = sample.rate, timing.peak_bytes(labeller.machine.device)
    num_bytes = round(num_labels * label_bytes) + sum(
        sum(len(key.encode()) + _INDEX_BYTES for key in role.source.keys)
        + len(role.shards) * _HEADER_BYTES
        for role in roles
    )
    logs.say(
        f"{num_labels} views, {logs.size_of(num_bytes)}, about "
        f"{logs.duration(num_labels / rate)} at {rate:.3g} views/s on this machine, memory up to "
        f"{logs.size_of(peak_bytes)}"
    )
    timing.say_limit(sample)
    if isinstance(config.out, Path):
        free = shutil.disk_usage(_existing(config.out)).free
        if free < num_bytes:
            logs.say(f"only {logs.size_of(free)} are free at {config.out}")
    return {
        "dry_run": True,
        "images": len(roles[-1].source),
        "views": num_labels,
        "bytes": num_bytes,
        "views_per_second": round(rate, 1),
        "seconds": round(num_labels / rate, 1),
        "peak_bytes": peak_bytes,
        "limit": sample.limit,
        "waiting_share": round(sample.waiting_share, 3),
    }


def _measure(
    config: PrecomputeConfig, labeller: Labeller, role: Role
) -> tuple[timing.Sample, float]:
    """Return a sample of the work, and bytes a view."""
    reading, num_views = _reading(config, labeller.machine), len(role.views)
    label_bytes = 0.0

    def label(views: int) -> timing.Sample:
        nonlocal label_bytes
        num_images = min(max(1, views // num_views), len(role.source))
        requests = requests_of(role, range(num_images), labeller.batch_size)
        found, answers = timing.label(labeller, role.source, reading.pixels(role, requests))
        blocks = labeller.encoding.blocks(answers.rows, num_views)
        label_bytes = sum(map(len, blocks)) / max(1, len(answers.positions))
        return found

    return timing.sample(label, least=labeller.batch_size), label_bytes


def _existing(path: Path) -> Path:
    """Return the nearest folder at or above a path that exists."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.is_dir())
