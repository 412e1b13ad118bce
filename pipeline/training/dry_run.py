"""What a training run will take: steps, time and memory, from a few real steps; writes nothing."""

import itertools
import time
from collections.abc import Iterator
from typing import Any

from mealv2.batches import BatchSampler, num_steps
from mealv2.data.loader import WaitTimer, on_device
from mealv2.data.requests import Batch
from mealv2.errors import DataError
from pipeline import console, timing
from pipeline.config import TrainConfig
from pipeline.loading.cache import image_cache
from pipeline.runtime.device import Runtime
from pipeline.training.spec import TrainingSpec
from pipeline.training.step import TrainStep

_MAX_STEPS = 256  # of a sample


def dry_run(config: TrainConfig, runtime: Runtime, spec: TrainingSpec) -> dict[str, Any]:
    """Measure a few seconds of steps; return steps, seconds and bytes of memory of the whole run.

    Without validation. Raises DataError for a run without images.
    """
    if not spec.positions:
        raise DataError(f"{spec.source.name} has no image to train on")
    timing.reset_peak_memory(runtime.device)
    steps = num_steps(config, len(spec.positions))
    sample = sample_steps(config, runtime, spec)
    seconds = steps / sample.rate
    peak_bytes = timing.peak_bytes(runtime.device)
    console.info(
        f"{steps} steps of {config.batch_size} views, about {console.duration(seconds)} at "
        f"{1 / sample.rate:.3g} s a step on this machine, without validation; memory up to "
        f"{console.size_of(peak_bytes)}"
    )
    timing.print_limit(sample)
    return {
        "dry_run": True,
        "images": len(spec.positions),
        "steps": steps,
        "seconds_per_step": round(1 / sample.rate, 4),
        "seconds": round(seconds, 1),
        "peak_bytes": peak_bytes,
        "limit": sample.limit,
        "waiting_share": round(sample.waiting_share, 3),
    }


def sample_steps(config: TrainConfig, runtime: Runtime, spec: TrainingSpec) -> timing.Sample:
    """Do one step to warm up, then some seconds of steps, on images from all over the set."""
    num_images = min(len(spec.positions), _MAX_STEPS * config.batch_size)
    stride = len(spec.positions) // num_images
    positions = spec.positions[::stride][:num_images]
    sampler = BatchSampler(config, spec.source, positions, spec.targets)
    cache = image_cache(config, spec.source)
    step = TrainStep(config, runtime, spec)
    step.compile(sampler.full_batch())
    step.log_sizes(sampler.full_batch())
    spec.task.train()

    def run(num_steps: int) -> timing.Sample:
        batches = itertools.cycle(list(sampler.batches(0)))
        requests = list(itertools.islice(batches, min(num_steps, _MAX_STEPS)))
        loader = spec.load(
            requests,
            cache=cache,
            workers=config.workers,
            pin_memory=runtime.should_pin_memory,
        )
        return _time_steps(step, on_device(loader, runtime.device))

    return timing.sample(run, min_size=1)


def _time_steps(step: TrainStep, batches: Iterator[Batch]) -> timing.Sample:
    """Do a step on every batch that is read; return the steps and the time spent waiting."""
    device = step.runtime.device
    timing.synchronize(device)
    timer, units, start_s = WaitTimer(batches), 0, time.perf_counter()
    for batch in timer:
        if batch.positions:
            step.update(batch, len(batch.positions))
            timing.synchronize(device)  # a wait for the device is not one for images
        step.state.progress.step += 1  # CutMix and mixup draw another mix
        step.state.progress.total_steps += 1
        units += 1
    seconds = time.perf_counter() - start_s
    return timing.Sample(units, seconds, timer.take_after_start())
