"""`mealv2 bench`: measure the speed of this machine and compare it with the goals."""

import dataclasses
import datetime
import json
import shlex
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mealv2.storage.atomic import write_atomic
from pipeline import console
from pipeline.bench import (
    hardware,
    help_time,
    imagenet,
    labelling,
    loading,
    memory,
    profile,
    steps,
)
from pipeline.bench.context import BenchContext
from pipeline.bench.lines import HEAD, Line, NotMeasuredError
from pipeline.config import BenchConfig, flag
from pipeline.runtime.device import create_runtime
from pipeline.runtime.seeds import seed_everything

# Lines that are measured in alternation are in one group.
GROUPS: tuple[tuple[tuple[str, ...], Callable[[BenchContext], list[Line]]], ...] = (
    (("loader-1", "loader-packed", "loader-4", "loader-16"), loading.measure),
    (("loader-tar",), loading.measure_tar),
    (("labels",), labelling.measure_lookup),
    (("step-hard",), steps.measure_hard),
    (("step-online",), steps.measure_online),
    (("stage-one",), labelling.measure_stage_one),
    (("help",), help_time.measure),
    (("memory",), memory.measure),
)


def run(config: BenchConfig) -> dict[str, Any]:
    """Measure, print the table and return the report. Raises MealError and OSError."""
    runtime = create_runtime(config)
    seed_everything(0)
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mealv2-bench-") as folder:
        bench = BenchContext(config, runtime, Path(folder))
        lines = measure(bench)
        more: dict[str, Any] = {}
        if lines:
            console.info(console.table([HEAD, *(line.row() for line in lines)]))
        if config.profile:
            more["profile"] = profile.both_stages(bench)
        elif not config.lines:
            is_gpu = runtime.device.type == "cuda"
            more["estimate"] = imagenet.gpu_hours(bench) if is_gpu else steps.arithmetic(bench)
        if "images" in vars(bench):
            more["images"] = dataclasses.asdict(bench.images.stats)
        if config.data_dir is not None and "drawn" in vars(bench):
            more["drawn_images"] = dataclasses.asdict(bench.drawn.stats)
    report = {
        "command": command_of(config),
        "date": datetime.date.today().isoformat(),
        "precision": runtime.precision,
        "rounds": config.rounds,
        "hardware": hardware.describe(runtime.device),
        "versions": hardware.versions(),
        "seconds": round(time.monotonic() - start_s, 1),
        "lines": [line.summary() for line in lines],
        **more,
    }
    if config.results_file is not None:
        raw = {**report, "lines": [line.raw() for line in lines]}
        write_atomic(config.results_file, (json.dumps(raw, indent=1) + "\n").encode(), replace=True)
    return report


def measure(bench: BenchContext) -> list[Line]:
    """Return the chosen lines in order; a line that cannot be measured gives the reason."""
    found: list[Line] = []
    for group, measure_group in GROUPS:
        names = [name for name in group if name in bench.config.chosen]
        if not names:
            continue
        console.info(f"measuring {', '.join(names)}")
        try:
            found += measure_group(bench)
        except NotMeasuredError as error:
            found += [Line(name, why=str(error)) for name in names]
        except torch.cuda.OutOfMemoryError:
            why = "out of GPU memory; use a smaller --batch-size"
            found += [Line(name, why=why) for name in names]
    return sorted(found, key=lambda line: bench.config.chosen.index(line.name))


def command_of(config: BenchConfig) -> str:
    """Return the command line that gives these settings, with placeholders for paths."""
    words = ["mealv2", "bench"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == field.default:
            continue
        if isinstance(value, bool):
            words.append(flag(field.name) if value else f"--no-{field.name}")
            continue
        if isinstance(value, Path):
            value = field.name.upper()
        words += [flag(field.name), ",".join(value) if isinstance(value, tuple) else str(value)]
    return shlex.join(words)
