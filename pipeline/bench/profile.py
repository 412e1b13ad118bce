"""Where the time of both stages goes: phase by phase, the device idle between any two.

Phases that overlap in a run do not here, so that each has its own seconds.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mealv2 import label_set
from mealv2.data.pixels import cut, decode
from mealv2.label_set import Rows, Shard
from mealv2.models.ensemble import combine
from mealv2.storage.json_format import json_sha256
from mealv2.views import DrawnViews
from pipeline import console
from pipeline.bench.hardware import peak_tflops
from pipeline.bench.labelling import annotator_of
from pipeline.bench.room import NUM_VIEWS, BenchContext, plan_of
from pipeline.bench.steps import stored
from pipeline.loading.loader import Batch, ViewReader, read_views
from pipeline.loading.requests import BatchRequest
from pipeline.timing import forward_macs, step_macs, synchronize
from pipeline.training.batches import split_batches

_STEPS_CPU, _STEPS_GPU = 4, 30  # of a profile, after one that does not count
_WAITING = "waiting for images"


class Phases:
    """Seconds by phase."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        synchronize(self._device)
        began = time.perf_counter()
        yield
        synchronize(self._device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def waiting(self, items: Iterator[Batch]) -> Iterator[Batch]:
        """Yield items, counting the time until each is there."""
        while True:
            with self(_WAITING):
                item = next(items, None)
            if item is None:
                return
            yield item

    def per_step(self, steps: int) -> dict[str, dict[str, float]]:
        """Return seconds a step, and per cent of the step, of every phase."""
        total = sum(self.seconds.values())
        return {
            name: {"seconds": round(s / steps, 6), "percent": round(100 * s / total, 2)}
            for name, s in self.seconds.items()
        }


def both_stages(bench: BenchContext) -> dict[str, Any]:
    """Profile both stages; say and return the tables."""
    found = {"stage_two": stage_two(bench), "stage_one": stage_one(bench)}
    for name, of_stage in found.items():
        for part in ("step", "reading"):
            _print_table(f"{name.replace('_', ' ')}, {part}", of_stage[part])
        speed = ", ".join(f"{value} {what}" for what, value in of_stage["arithmetic"].items())
        console.info(f"{name.replace('_', ' ')}: {speed}")
    return found


def stage_two(bench: BenchContext) -> dict[str, Any]:
    """Profile steps with stored labels, from files to weights."""
    steps = _num_steps(bench)
    step = stored(bench, bench.network(bench.config.model))
    rows: BatchRequest = [(position, (0,)) for position in _cycled(bench, steps * bench.batch_size)]
    phases = Phases(bench.device)
    step.phase = phases
    for number, batch in enumerate(_read(bench, phases, split_batches(rows, bench.batch_size))):
        with phases("copy to the device"):
            images_BCHW = batch.images_BCHW.to(bench.device, non_blocking=True)
        step.update(replace(batch, images_BCHW=images_BCHW), len(batch.positions))
        if number == 0:
            phases.seconds.clear()
    with torch.device("meta"):
        macs = step_macs(bench.network(bench.config.model), bench.config.img_size)
    busy = [phases.seconds[name] for name in ("forward and loss", "backward")]
    return {
        "batch_size": bench.batch_size,
        "step": phases.per_step(steps - 1),
        "reading": reading(bench, rows[: bench.batch_size]),
        "arithmetic": _arithmetic(bench, macs * bench.batch_size * (steps - 1), sum(busy)),
    }


def stage_one(bench: BenchContext) -> dict[str, Any]:
    """Profile labelling, from files to a shard."""
    steps, annotator = _num_steps(bench), annotator_of(bench)
    per_image = min(NUM_VIEWS, bench.batch_size)
    views = tuple(range(per_image))
    num_images = bench.batch_size // per_image
    rows: BatchRequest = [(position, views) for position in _cycled(bench, steps * num_images)]
    phases = Phases(bench.device)
    kept: list[Rows] = []
    for number, batch in enumerate(_read(bench, phases, split_batches(rows, num_images))):
        with phases("copy to the device"):
            images_BCHW = batch.images_BCHW.to(bench.device, non_blocking=True)
        with phases("teachers"), torch.inference_mode(), bench.runtime.autocast():
            logits_TBC = annotator.ensemble.teacher_logits(images_BCHW)
        with phases("softmax and mean"):
            output = combine(logits_TBC)
        with phases("encoding"):
            rows_of_batch = bench.encoding.encode(output.probs_BC, output.mean_logits_BC)
            kept.append(rows_of_batch.to(torch.device("cpu")))
        if number == 0:
            phases.seconds.clear()
            kept.clear()
    with phases("writing"):
        _write(bench, Rows.concat(kept), per_image)
    with torch.device("meta"):
        size = bench.config.img_size
        macs = sum(forward_macs(bench.network(name), size) for name in bench.config.teacher)
    done = macs * num_images * per_image * (steps - 1)
    return {
        "batch_size": num_images * per_image,
        "step": phases.per_step(steps - 1),
        "reading": reading(bench, rows[:num_images]),
        "arithmetic": _arithmetic(bench, done, phases.seconds["teachers"]),
    }


def reading(bench: BenchContext, request: BatchRequest) -> dict[str, dict[str, float]]:
    """Return what reading a batch takes in one thread, part by part."""
    source, views, size = bench.images.source, DrawnViews(0), bench.config.img_size
    phases = Phases(torch.device("cpu"))
    for _ in range(2):
        phases.seconds.clear()
        rows: list[np.ndarray] = []
        for position, indices in request:
            with phases("file"):
                data = source.read(position)
            with phases("decode"):
                image = decode(data)
            height, width, _ = image.shape
            for index in indices:
                with phases("box of a view"):
                    key = source.keys[position]
                    view = views.view(key, index, width=width, height=height)
                with phases("crop, resize, flip"):
                    rows.append(cut(image, view, size))
        with phases("collate"):
            np.stack(rows)
    return phases.per_step(1)


def _read(bench: BenchContext, phases: Phases, requests: list[BatchRequest]) -> Iterator[Batch]:
    reader = ViewReader(bench.images.source, img_size=bench.config.img_size, views=DrawnViews(0))
    return phases.waiting(iter(read_views(reader, requests, workers=bench.config.workers)))


def _write(bench: BenchContext, rows: Rows, num_views: int) -> None:
    """Write rows as a shard."""
    folder = bench.folder / "profile"
    plan = plan_of(bench.encoding, num_views=num_views, img_size=bench.config.img_size)
    label_set.claim(folder, plan)
    blocks = bench.encoding.blocks(rows, num_views)
    keys = [f"{number:08d}" for number in range(len(blocks))]
    shard = Shard(json_sha256(plan), "train", 0, 0, num_views, keys, blocks)
    label_set.write_shard(folder / label_set.shard_name("train", 0), shard)


def _cycled(bench: BenchContext, number: int) -> list[int]:
    return list(itertools.islice(itertools.cycle(bench.images.positions), number))


def _num_steps(bench: BenchContext) -> int:
    return 1 + (_STEPS_GPU if bench.device.type == "cuda" else _STEPS_CPU)


def _arithmetic(bench: BenchContext, macs: int, seconds: float) -> dict[str, float]:
    tflops = 2 * macs / seconds / 1e12
    found = {"TFLOP/s": round(tflops, 3)}
    peak = peak_tflops(bench.device)
    if peak is not None:
        found["TFLOP/s bf16 peak"] = peak
        found["% of the peak"] = round(100 * tflops / peak, 1)
    return found


def _print_table(title: str, phases: dict[str, dict[str, float]]) -> None:
    rows: list[Sequence[str]] = [
        [name, f"{1e3 * of['seconds']:.2f}", f"{of['percent']:.1f}"] for name, of in phases.items()
    ]
    console.info(console.table([[title, "ms", "%"], *map(list, rows)]))
