"""Stage one: run the teachers once on the views of every image and store their soft labels.

The plan has everything that determines the labels. A run makes the missing shards of the plan, then
writes the manifest, so an interrupted run or a parallel job continues from the existing shards. The
validation split comes first, with one centre crop per image.
"""

import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mealv2 import label_set
from mealv2.data.loader import WaitTimer, on_device, read_views
from mealv2.data.source import ImageSource
from mealv2.labelling import manifest
from mealv2.labelling.annotator import Annotator
from mealv2.labelling.encoding_loss import kl_sum
from mealv2.labelling.label_set import make_label_set
from mealv2.labelling.plan import LabelSplit, batch_requests, make_plan, splits_of
from mealv2.labelling.row_encoder import complete_images
from mealv2.labelling.shards import CompleteCheck, check_complete
from mealv2.labelling.store import Store
from mealv2.models.ensemble import EnsembleOutput
from mealv2.teacher_sets import claim_sets
from pipeline import console, timing
from pipeline.config import PrecomputeConfig, split_teachers
from pipeline.labelling import jobs, teachers, workers
from pipeline.labelling.annotate import encoding_of, make_annotator
from pipeline.labelling.sources import open_sources
from pipeline.labelling.stopping import stop_between_batches
from pipeline.labelling.store import open_store
from pipeline.loading.small_images import propose_crop
from pipeline.loading.sources import held_out_of
from pipeline.runtime.device import create_runtime

_INDEX_BYTES = 48  # per image of a shard, beside its key and its labels
_HEADER_BYTES = 7500  # per shard, about
_MEASURED_KL = 0.21  # the most of labels that trained measured students, docs/benchmarks/rates.md


def run(config: PrecomputeConfig) -> dict[str, Any]:
    """Label a data set, or a job's part of it; return the report.

    Complete shards are kept. Raises MealError and OSError.
    """
    return _label_each(config) if config.store == "per-teacher" else _label(config)


def _label_each(config: PrecomputeConfig) -> dict[str, Any]:
    """Make the label set of one teacher after the other; return their reports.

    Images are read once for each teacher, which costs little beside its forward passes.
    """
    assert isinstance(config.output, Path)
    specs = split_teachers(config.teacher)
    names = [name for name, _ in teachers.parse(specs)]
    folders = [config.output] * len(specs) if config.dry_run else claim_sets(config.output, names)
    reports = []
    for name, spec, folder in zip(names, specs, folders, strict=True):
        console.info(f"teacher {name}: {folder}")
        reports.append(_label(replace(config, teacher=(spec,), output=folder, store="mean")))
    return {"labels": str(config.output), "teachers": reports}


def _label(config: PrecomputeConfig) -> dict[str, Any]:
    """Make one label set, or a job's part of it; return the report."""
    job = jobs.choose_job(config)
    if config.num_procs > 1:
        return _run_in_processes(config, job)

    # Equal plans give equal labels, so a later run or another job with this plan can continue.
    sources = open_sources(config)
    annotator, described = _load_annotator(config, sources)
    held_out = held_out_of(config, train_split=config.train_split)
    plan = make_plan(config, sources, annotator, described, held_out=held_out)
    splits = splits_of(config, sources, plan)
    propose_crop(config, sources["train"], config.data_dir)
    if config.dry_run:
        return _estimate(config, annotator, splits)

    # Claiming writes the plan into an empty folder, or checks that the folder has this plan.
    began = time.monotonic()
    store = open_store(config, config.output)
    store.claim(plan)
    if job.is_part:  # `mealv2 labels finish` writes the manifest after the last job
        check = _complete_check(config, store)
        return jobs.label_part(
            job, splits, annotator, store, workers=config.workers, check_complete=check
        )

    with stop_between_batches() as stop:
        written, num_made = make_label_set(
            splits,
            plan,
            annotator,
            store,
            workers=config.workers,
            stop=stop,
            check_complete=_complete_check(config, store),
        )
    return manifest.report_of(store, written) | _made(num_made, began)


def _complete_check(config: PrecomputeConfig, store: Store) -> CompleteCheck | None:
    """Return what compares the images of complete shards; None for --check-images never."""
    if config.check_images == "never":
        return None
    is_lenient = config.on_bad_image == "skip"
    return partial(check_complete, store=store, workers=config.workers, skip_unreadable=is_lenient)


def _run_in_processes(config: PrecomputeConfig, job: jobs.Job) -> dict[str, Any]:
    """Label in several processes, each a job; then write the manifest unless this is a part."""
    began = time.monotonic()
    num_made = workers.run_workers(["precompute"], config, job)
    store = open_store(config, config.output)
    if job.is_part:
        return jobs.job_report(job, store, num_made, began)
    plan = label_set.read_plan(store.folder)
    batch_size = config.batch_size if num_made and config.batch_size != "auto" else None
    return manifest.finalize(store, plan, batch_size=batch_size) | _made(num_made, began)


def _made(num_shards: int, began: float) -> dict[str, Any]:
    return {"shards_made": num_shards, "seconds": round(time.monotonic() - began, 2)}


def _load_annotator(
    config: PrecomputeConfig, sources: dict[str, ImageSource]
) -> tuple[Annotator, list[dict[str, Any]]]:
    """Return the teachers on their device, and their description for the plan."""
    runtime = create_runtime(config)
    train = sources["train"]
    encoding = encoding_of(config, len(train.classes))
    ensemble, described = teachers.build(
        config.teacher,
        classes=list(train.classes),
        img_size=config.img_size,
        teacher_img_size=config.teacher_img_size,
        runtime=runtime,
    )
    sizes = {"img_size": config.img_size, "max_batch_size": len(train) * config.num_views}
    return make_annotator(config, runtime, ensemble, encoding, **sizes), described


# --- --dry-run ------------------------------------------------------------------------------------


def _estimate(
    config: PrecomputeConfig, annotator: Annotator, splits: list[LabelSplit]
) -> dict[str, Any]:
    """Label for a few seconds; return the views, bytes and seconds of the whole run."""
    device, train = annotator.runtime.device, splits[-1]
    num_views = len(train.source) * len(train.views)
    num_labels = sum(len(split.source) * len(split.views) for split in splits)
    of_val = f" ({num_labels - num_views} of validation)" if len(splits) > 1 else ""
    timing.reset_peak_memory(device)
    sample, label_bytes = _measure(config, annotator, train)
    rate, peak_bytes = sample.rate, timing.peak_bytes(device)
    num_bytes = round(num_labels * label_bytes) + sum(map(_bytes_beside_labels, splits))
    console.info(
        f"{num_labels} views{of_val}, {console.size_of(num_bytes)}, about "
        f"{console.duration(num_labels / rate)} at {rate:.3g} views/s on this machine, peak memory "
        f"{console.size_of(peak_bytes)}"
    )
    timing.print_limit(sample)
    kl, num_sampled = _encoding_loss(config, annotator, train)
    if kl is not None:
        console.info(f"the encoding loses {kl:.3g} nats a view (KL, {num_sampled} views)")
        if kl > _MEASURED_KL:
            console.info(
                f"that is more than any of the measured label sets loses ({_MEASURED_KL} nats, "
                "docs/benchmarks/rates.md): keep more with a smaller --rate or a larger --topk"
            )
    if isinstance(config.output, Path):
        output = config.output.absolute()
        existing = next(path for path in (output, *output.parents) if path.is_dir())
        if (free := shutil.disk_usage(existing).free) < num_bytes:
            console.info(f"only {console.size_of(free)} are free at {config.output}")
    return {
        "dry_run": True,
        "images": len(train.source),
        "views": num_views,
        "val_views": num_labels - num_views,
        "bytes": num_bytes,
        "kl_of_encoding": kl,
        "views_per_second": round(rate, 1),
        "seconds": round(num_labels / rate, 1),
        "peak_bytes": peak_bytes,
        "limit": sample.limit,
        "waiting_share": round(sample.waiting_share, 3),
    }


def _measure(
    config: PrecomputeConfig, annotator: Annotator, split: LabelSplit
) -> tuple[timing.Sample, float]:
    """Return a sample of the labelling, and the bytes per label."""
    num_views, batch_size = len(split.views), annotator.batch_size
    label_bytes = 0.0

    def label(units: int) -> timing.Sample:
        nonlocal label_bytes
        num_images = min(max(1, units // num_views), len(split.source))
        batches = read_views(
            split.reader,
            batch_requests(range(num_images), split.views, batch_size),
            workers=config.workers,
            pin_memory=annotator.runtime.should_pin_memory,
        )
        timer, start_s = WaitTimer(batches), time.perf_counter()
        annotations = annotator.annotate(
            split.source, timer, num_views=num_views, count_correct=False
        )
        seconds = time.perf_counter() - start_s
        blocks = annotator.encoding.blocks(annotations.rows, num_views)
        label_bytes = sum(map(len, blocks)) / max(1, len(annotations.positions))
        waited_s = timer.take_after_start()
        return timing.Sample(max(1, len(annotations.positions)), seconds, waited_s)

    return timing.sample(label, min_size=batch_size), label_bytes


def _encoding_loss(
    config: PrecomputeConfig, annotator: Annotator, split: LabelSplit
) -> tuple[float | None, int]:
    """Return the mean KL(p || recovered) of all views of some evenly spaced images, in nats.

    Also returns the number of views, about a batch; None and 0 if none of them can be read.
    """
    num_views = len(split.views)
    num_images = min(len(split.source), -(-annotator.batch_size // num_views))
    chosen = [n * len(split.source) // num_images for n in range(num_images)]
    batches = read_views(
        split.reader,
        batch_requests(chosen, split.views, annotator.batch_size),
        workers=config.workers,
        pin_memory=annotator.runtime.should_pin_memory,
    )
    positions: list[int] = []
    outputs: list[EnsembleOutput] = []
    for batch in on_device(batches, annotator.runtime.device):
        if batch.positions:
            positions += batch.positions
            outputs.append(annotator.predict(batch.images_BCHW, batch.other_sizes)[1])
    rows = complete_images(positions, num_views)
    if not len(rows):
        return None, 0
    probs_NC, logits_NC = (
        torch.cat(column)[rows.to(column[0].device)] for column in zip(*outputs, strict=True)
    )
    labels = annotator.encoding.encode(probs_NC, logits_NC, num_views=num_views).labels
    return kl_sum(probs_NC, labels.to_dense()) / len(rows), len(rows)


def _bytes_beside_labels(split: LabelSplit) -> int:
    """Return the approximate bytes of keys, index and headers in the shards of a split."""
    keys = sum(len(key.encode()) + _INDEX_BYTES for key in split.source.keys)
    return keys + len(split.shards) * _HEADER_BYTES
