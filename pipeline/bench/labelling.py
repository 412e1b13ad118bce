"""The lines on labels: looking them up beside decoding, making them beside the networks alone."""

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import torch

from mealv2.data.pixels import decode
from mealv2.storage.json_format import json_sha256
from mealv2.views import DrawnViews
from pipeline.bench.lines import Line, ratios
from pipeline.bench.room import NUM_VIEWS, BenchContext, plan_of
from pipeline.labelling.annotate import Annotator
from pipeline.labelling.manifest import write_manifest
from pipeline.labelling.plan import LabelSplit
from pipeline.labelling.shards import find_missing, label_shards
from pipeline.labelling.store import Store
from pipeline.loading.loader import ViewReader
from pipeline.timing import repeated, take_turns, times_for

LOOKED_UP = 512  # views of a batch
_LOOK_UPS = 20  # in a turn
_TURN_S = 4.0  # about how long a turn of the networks takes


def measure_lookup(bench: BenchContext, wanted: Sequence[str]) -> list[Line]:
    """Return the line on looking labels up, in one thread as the decoding is."""
    images, labels = bench.images, bench.labels
    drawn = random.Random(0)
    keys = [images.source.keys[p] for p in drawn.choices(images.positions, k=LOOKED_UP)]
    views = drawn.choices(range(NUM_VIEWS), k=LOOKED_UP)
    cycle = itertools.islice(itertools.cycle(images.positions), LOOKED_UP)
    files = [images.source.read(position) for position in cycle]

    def look_up() -> int:
        # what the loss and the discriminator begin with
        found = labels.rows(keys, views).labels.to(bench.device)
        found.kept()
        return len(found.to_dense())

    def decode_all() -> int:
        return sum(len(decode(data)) > 0 for data in files)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        workloads = {"labels": repeated(look_up, _LOOK_UPS), "JPEGs": decode_all}
        turns = take_turns(workloads, rounds=bench.config.rounds, device=bench.device)
    finally:
        torch.set_num_threads(threads)
    percent = [100.0 / ratio for ratio in ratios(turns, "labels", "JPEGs")]
    num_bytes = sum(Path(f.path).stat().st_size for _, files in labels.blocks for f in files)
    notes = {"bytes_per_view": round(num_bytes / (len(labels) * NUM_VIEWS), 1)}
    return [Line("labels", percent, turns, notes)]


def measure_stage_one(bench: BenchContext, wanted: Sequence[str]) -> list[Line]:
    """Return the line on stage one: from files to a shard, beside its networks alone."""
    annotator = annotator_of(bench)
    resident_BCHW = bench.resident(bench.batch_size)

    def bare() -> int:
        with torch.inference_mode(), bench.runtime.autocast():
            annotator.ensemble.teacher_logits(resident_BCHW)
        return len(resident_BCHW)

    times = times_for(bare, bench.device, seconds=_TURN_S)
    folders = (bench.folder / "stage-one" / str(number) for number in itertools.count())
    workloads = {
        "stage one": lambda: label_views(bench, annotator, next(folders), times * bench.batch_size),
        "teachers alone": repeated(bare, times),
    }
    turns = take_turns(workloads, rounds=bench.config.rounds, device=bench.device)
    notes = {
        "batch_size": bench.batch_size,
        "views_per_image": NUM_VIEWS,
        **bench.cpu_note(turns, "stage one", "teachers alone"),
    }
    return [Line("stage-one", ratios(turns, "stage one", "teachers alone"), turns, notes)]


def annotator_of(bench: BenchContext) -> Annotator:
    """Return the teachers as stage one runs them."""
    return Annotator(
        bench.ensemble,
        bench.runtime,
        bench.encoding,
        batch_size=bench.batch_size,
        on_bad_image=bench.config.on_bad_image,
    )


def label_views(bench: BenchContext, annotator: Annotator, folder: Path, num_views: int) -> int:
    """Label about so many views, into shards of a new folder; return how many."""
    per_image = min(NUM_VIEWS, num_views)
    num_images = -(-num_views // per_image)
    positions = list(
        dict.fromkeys(itertools.islice(itertools.cycle(bench.images.positions), num_images))
    )
    views = tuple(range(-(-num_views // len(positions))))
    reader = ViewReader(bench.images.source, img_size=bench.config.img_size, views=DrawnViews(0))
    plan = plan_of(bench.encoding, num_views=len(views), img_size=bench.config.img_size)
    plan["shard_size"] = plan["roles"]["train"]["num_images"] = len(positions)
    split = LabelSplit("train", reader, views, [positions], json_sha256(plan))
    store = Store(folder)
    store.claim(plan)
    missing = find_missing(split, store)
    label_shards(split, missing, annotator, store, workers=bench.config.workers)
    write_manifest(store, plan, batch_size=annotator.batch_size)
    return len(positions) * len(views)
