"""The lines on labels: the cost of looking them up, and the speed of stage one."""

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mealv2 import label_set
from mealv2.data.pixels import decode
from mealv2.data.source import ImageSource
from mealv2.data.view_reader import ViewReader
from mealv2.labelling.annotator import Annotator
from mealv2.labelling.manifest import write_manifest
from mealv2.labelling.plan import LabelSplit
from mealv2.labelling.shards import find_missing, label_shards
from mealv2.labelling.store import Store
from mealv2.storage.json_format import json_sha256
from mealv2.views import DrawnViews
from pipeline.bench.context import NUM_VIEWS, BenchContext, make_plan
from pipeline.bench.lines import Line, ratios
from pipeline.timing import repeated, take_turns, times_for

LOOKUP_SIZE = 512  # views of a batch
_NUM_LOOKUPS = 20  # in a turn
_TURN_S = 4.0  # minimum duration of a turn of the networks, about


def measure_lookup(bench: BenchContext) -> list[Line]:
    """Return the line on the lookup of labels, in one thread, like the decoding."""
    images, labels = bench.images, bench.labels
    rng = random.Random(0)
    keys = [images.source.keys[p] for p in rng.choices(images.positions, k=LOOKUP_SIZE)]
    views = rng.choices(range(NUM_VIEWS), k=LOOKUP_SIZE)
    positions = itertools.islice(itertools.cycle(images.positions), LOOKUP_SIZE)
    files = [images.source.read(position) for position in positions]

    def look_up() -> int:
        found = labels.rows(keys, views).labels.to(bench.device)
        found.kept()  # for the loss; the dense labels are for the discriminator
        return len(found.to_dense())

    def decode_all() -> int:
        return sum(len(decode(data)) > 0 for data in files)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        workloads = {"labels": repeated(look_up, _NUM_LOOKUPS), "JPEGs": decode_all}
        turns = take_turns(workloads, rounds=bench.config.rounds, device=bench.device)
    finally:
        torch.set_num_threads(threads)
    percent = [100.0 / ratio for ratio in ratios(turns, "labels", "JPEGs")]
    num_bytes = sum(Path(f.path).stat().st_size for _, files in labels.blocks for f in files)
    notes = {"bytes_per_view": round(num_bytes / (len(labels) * NUM_VIEWS), 1)}
    return [Line("labels", percent, turns, notes)]


def measure_stage_one(bench: BenchContext) -> list[Line]:
    """Return the line on stage one, from image files to a shard, over its teachers alone."""
    annotator = create_annotator(bench)
    images_BCHW = bench.random_images(bench.batch_size)
    folders = (bench.folder / "stage-one" / str(number) for number in itertools.count())

    def teachers_alone() -> int:
        with torch.inference_mode(), bench.runtime.autocast():
            annotator.ensemble.teacher_logits(images_BCHW)
        return len(images_BCHW)

    times = times_for(teachers_alone, bench.device, seconds=_TURN_S)
    num_images = -(-times * bench.batch_size // NUM_VIEWS)
    cycle = itertools.islice(itertools.cycle(bench.images.positions), num_images)
    positions = list(dict.fromkeys(cycle))
    num_views = -(-times * bench.batch_size // len(positions))

    def stage_one() -> int:
        store = Store(next(folders))
        plan = label_images(
            annotator,
            bench.images.source,
            store,
            positions=positions,
            num_views=num_views,
            shard_size=len(positions),
            img_size=bench.config.img_size,
            workers=bench.config.workers,
        )
        write_manifest(store, plan, batch_size=annotator.batch_size)
        return len(positions) * num_views

    workloads = {"stage one": stage_one, "teachers alone": repeated(teachers_alone, times)}
    turns = take_turns(workloads, rounds=bench.config.rounds, device=bench.device)
    notes = {
        "batch_size": bench.batch_size,
        "views_per_image": NUM_VIEWS,
        **bench.cpu_note(turns, "stage one", "teachers alone"),
    }
    return [Line("stage-one", ratios(turns, "stage one", "teachers alone"), turns, notes)]


def create_annotator(bench: BenchContext) -> Annotator:
    """Return the teachers as stage one runs them."""
    return Annotator(
        bench.ensemble, bench.runtime, bench.encoding, bench.batch_size, bench.config.on_bad_image
    )


def label_images(
    annotator: Annotator,
    source: ImageSource,
    store: Store,
    *,
    positions: Sequence[int],
    num_views: int,
    shard_size: int,
    img_size: int,
    workers: int,
) -> dict[str, Any]:
    """Write the shards of stage one into an empty store; return their plan."""
    plan = make_plan(
        annotator.encoding,
        num_images=len(positions),
        num_views=num_views,
        shard_size=shard_size,
        img_size=img_size,
    )
    shards = [
        positions[r.start : r.stop] for r in label_set.shard_ranges(len(positions), shard_size)
    ]
    reader = ViewReader(source, img_size=img_size, views=DrawnViews(0))
    split = LabelSplit("train", reader, tuple(range(num_views)), shards, json_sha256(plan))
    store.claim(plan)
    label_shards(split, find_missing(split, store), annotator, store, workers=workers)
    return plan
