"""The time of both stages by phase.

The host waits for the device between phases, so that each phase has its own seconds. In a run they
overlap, and torch.profiler would show launches instead.
"""

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mealv2.batches import split_batches
from mealv2.data.loader import WaitTimer, read_views
from mealv2.data.pixels import cut, decode
from mealv2.data.requests import Batch, BatchRequest
from mealv2.data.view_reader import ViewReader
from mealv2.label_set import Rows
from mealv2.models.cost import forward_macs
from mealv2.views import DrawnViews
from pipeline import console
from pipeline.bench.context import NUM_VIEWS, BenchContext, write_labels
from pipeline.bench.hardware import peak_tflops
from pipeline.bench.labelling import create_annotator
from pipeline.bench.steps import train_step
from pipeline.timing import step_macs, synchronize

_STEPS_CPU, _STEPS_GPU = 4, 30  # of a profile, after one to warm up
_WAITING = "waiting for images"


class Phases:
    """Seconds by phase; calling it with a name opens a phase."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        synchronize(self._device)
        start_s = time.perf_counter()
        yield
        synchronize(self._device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start_s

    def on_device(self, bench: BenchContext, requests: list[BatchRequest]) -> Iterator[Batch]:
        """Yield batches on the device, with phases for the wait and the copy.

        The first batch warms up: its phases are dropped.
        """
        size = bench.config.img_size
        reader = ViewReader(bench.images.source, img_size=size, views=DrawnViews(0))
        timer = WaitTimer(read_views(reader, requests, workers=bench.config.workers))
        for number, batch in enumerate(timer):
            if number == 1:
                self.seconds.clear()
            waited_s = self.seconds.get(_WAITING, 0.0)
            self.seconds[_WAITING] = waited_s + timer.take()
            with self("copy to the device"):
                images_BCHW = batch.images_BCHW.to(self._device, non_blocking=True)
            yield replace(batch, images_BCHW=images_BCHW)

    def per_step(self, num_steps: int) -> dict[str, dict[str, float]]:
        """Return the seconds per step, and the percentage of the step, of every phase."""
        total_s = sum(self.seconds.values())
        return {
            name: {"seconds": round(s / num_steps, 6), "percent": round(100 * s / total_s, 2)}
            for name, s in self.seconds.items()
        }


def both_stages(bench: BenchContext) -> dict[str, Any]:
    """Profile both stages; print and return the tables."""
    found = {"stage_two": stage_two(bench), "stage_one": stage_one(bench)}
    for name, of_stage in found.items():
        title = name.replace("_", " ")
        for part in ("step", "reading"):
            _print_table(f"{title}, {part}", of_stage[part])
        speed = ", ".join(f"{value} {what}" for what, value in of_stage["arithmetic"].items())
        console.info(f"{title}: {speed}")
    return found


def stage_two(bench: BenchContext) -> dict[str, Any]:
    """Profile training steps with stored labels, from image files to weights."""
    num_steps = _num_steps(bench)
    step = train_step(bench, bench.network(bench.config.model), "stored")
    rows: BatchRequest = [(p, (0,)) for p in _cycled(bench, (1 + num_steps) * bench.batch_size)]
    step.phase = phases = Phases(bench.device)
    for batch in phases.on_device(bench, split_batches(rows, bench.batch_size)):
        step.update(batch, len(batch.positions))
    with torch.device("meta"):
        macs = step_macs(bench.network(bench.config.model), bench.config.img_size)
    busy_s = phases.seconds["forward and loss"] + phases.seconds["backward"]
    return {
        "batch_size": bench.batch_size,
        "step": phases.per_step(num_steps),
        "reading": reading(bench, rows[: bench.batch_size]),
        "arithmetic": _arithmetic(bench, macs * bench.batch_size * num_steps, busy_s),
    }


def stage_one(bench: BenchContext) -> dict[str, Any]:
    """Profile labelling, from image files to a shard."""
    num_steps, annotator = _num_steps(bench), create_annotator(bench)
    num_views = min(NUM_VIEWS, bench.batch_size)
    num_images = bench.batch_size // num_views  # of a batch
    views = tuple(range(num_views))
    rows: BatchRequest = [(p, views) for p in _cycled(bench, (1 + num_steps) * num_images)]
    phases = Phases(bench.device)
    encoded: list[Rows] = []
    for batch in phases.on_device(bench, split_batches(rows, num_images)):
        with phases("teachers"):
            _, output = annotator.predict(batch.images_BCHW)
        with phases("encoding"):
            rows_of_batch = bench.encoding.encode(
                output.probs_BC, output.mean_logits_BC, num_views=num_views
            )
            encoded.append(rows_of_batch.to(torch.device("cpu")))
    with phases("writing"):
        keys = [f"{number:08d}" for number in range(num_steps * num_images)]
        write_labels(bench.folder / "profile", bench.encoding, keys, Rows.concat(encoded[1:]))
    size = bench.config.img_size
    with torch.device("meta"):
        macs = sum(forward_macs(bench.network(name), size) for name in bench.config.teacher)
    num_macs = macs * num_images * num_views * num_steps
    return {
        "batch_size": num_images * num_views,
        "step": phases.per_step(num_steps),
        "reading": reading(bench, rows[:num_images]),
        "arithmetic": _arithmetic(bench, num_macs, phases.seconds["teachers"]),
    }


def reading(bench: BenchContext, request: BatchRequest) -> dict[str, dict[str, float]]:
    """Return the phases of reading a batch in one thread, after one pass to warm up."""
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


def _cycled(bench: BenchContext, number: int) -> list[int]:
    return list(itertools.islice(itertools.cycle(bench.images.positions), number))


def _num_steps(bench: BenchContext) -> int:
    return _STEPS_GPU if bench.device.type == "cuda" else _STEPS_CPU


def _arithmetic(bench: BenchContext, macs: int, seconds: float) -> dict[str, float]:
    tflops = 2 * macs / seconds / 1e12
    found = {"TFLOP/s": round(tflops, 3)}
    peak = peak_tflops(bench.device)
    if peak is not None:
        found["TFLOP/s bf16 peak"] = peak
        found["% of the peak"] = round(100 * tflops / peak, 1)
    return found


def _print_table(title: str, phases: dict[str, dict[str, float]]) -> None:
    rows = [
        [name, f"{1e3 * of['seconds']:.2f}", f"{of['percent']:.1f}"] for name, of in phases.items()
    ]
    console.info(console.table([[title, "ms", "%"], *rows]))
