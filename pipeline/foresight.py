"""What a training run will take: steps, time and memory, from a few real steps; writes nothing."""

import itertools
from typing import Any

from mealv2.errors import DataError
from pipeline import logs, measuring
from pipeline.config import TrainConfig
from pipeline.loaders import read_views
from pipeline.order import cuts
from pipeline.passes import Passes
from pipeline.runtime import Runtime
from pipeline.work import Work

_MOST_STEPS = 256  # of a sample


def foresee(config: TrainConfig, machine: Runtime, work: Work) -> dict[str, Any]:
    """Measure a few seconds of steps; return steps, seconds and bytes of memory of the whole run.

    Without validation. Raises DataError for a run without images.
    """
    if not work.positions:
        raise DataError(f"{work.source.name} has no image to train on")
    measuring.forget_peak(machine.device)
    steps = num_steps(config, len(work.positions))
    found = sample_steps(config, machine, work)
    seconds = steps / found.rate
    peak_bytes = measuring.peak_bytes(machine.device)
    logs.say(
        f"{steps} steps of {config.batch_size} views, about {logs.duration(seconds)} at "
        f"{1 / found.rate:.3g} s a step on this machine, validation apart; memory up to "
        f"{logs.size_of(peak_bytes)}"
    )
    measuring.say_limit(found)
    return {
        "dry_run": True,
        "images": len(work.positions),
        "steps": steps,
        "seconds_per_step": round(1 / found.rate, 4),
        "seconds": round(seconds, 1),
        "peak_bytes": peak_bytes,
        "limit": found.limit,
        "waiting_share": round(found.waiting_share, 3),
    }


def num_steps(config: TrainConfig, num_images: int) -> int:
    """Return how many steps a run has; some fewer where views are left out."""

    def of_pass(width: int) -> int:
        return len(cuts(num_images, -(-config.batch_size // width)))

    whole, narrow = divmod(config.epochs, config.views_per_image)
    return whole * of_pass(config.views_per_image) + (of_pass(narrow) if narrow else 0)


def sample_steps(config: TrainConfig, machine: Runtime, work: Work) -> measuring.Sample:
    """Do a step to warm up, then some seconds of steps, reading images from all over the set."""
    num_images = min(len(work.positions), _MOST_STEPS * config.batch_size)
    stride = len(work.positions) // num_images
    passes = Passes(config, work.source, work.positions[::stride][:num_images], work.targets)
    stepper = measuring.Stepper(config, machine, work)

    def do(steps: int) -> measuring.Sample:
        every = itertools.chain.from_iterable(itertools.repeat(list(passes.requests(0))))
        requests = list(itertools.islice(every, min(steps, _MOST_STEPS)))
        pixels = read_views(
            work.reader(), requests, workers=config.workers, pin_memory=machine.pins
        )
        return stepper.steps(pixels)

    return measuring.sample(do, least=1)
