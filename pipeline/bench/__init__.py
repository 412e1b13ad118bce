"""`mealv2 bench`: this machine's figures beside the goals, each a ratio within one run."""

import dataclasses
import datetime
import json
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mealv2.storage.atomic import write_atomic
from pipeline import console
from pipeline.bench import (
    command,
    hardware,
    imagenet,
    labelling,
    loading,
    memory,
    profile,
    steps,
)
from pipeline.bench.lines import HEAD, Line, NotMeasuredError
from pipeline.bench.room import BenchContext
from pipeline.config import BenchConfig, flag
from pipeline.runtime.device import Runtime, create_runtime
from pipeline.runtime.seeds import seed_everything

Measure = Callable[[BenchContext, Sequence[str]], list[Line]]

# Lines that take turns with one another stand together.
GROUPS: tuple[tuple[tuple[str, ...], Measure], ...] = (
    (("loader-1", "loader-packed", "loader-4", "loader-16"), loading.measure),
    (("loader-tar",), loading.measure_tar),
    (("labels",), labelling.measure_lookup),
    (("step-hard",), steps.measure_hard),
    (("step-online",), steps.measure_online),
    (("stage-one",), labelling.measure_stage_one),
    (("help",), command.measure),
    (("memory",), memory.measure),
)


def run(config: BenchConfig) -> dict[str, Any]:
    """Measure; say the table; return the report. Raises MealError and OSError."""
    runtime = create_runtime(config)
    seed_everything(0)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mealv2-bench-") as folder:
        bench = BenchContext(config, runtime, Path(folder))
        lines = measure(bench, config.chosen)
        more: dict[str, Any] = {}
        if lines:
            console.info(console.table([HEAD, *(line.row() for line in lines)]))
        if config.profile:
            more["profile"] = profile.both_stages(bench)
        if not config.lines and not config.profile:
            more["estimate"] = (
                imagenet.gpu_hours(bench)
                if runtime.device.type == "cuda"
                else steps.arithmetic(bench)
            )
        if "images" in vars(bench):
            more["images"] = dataclasses.asdict(bench.images.described)
    report = {
        **about(config, runtime),
        "seconds": round(time.monotonic() - began, 1),
        "lines": [line.summary() for line in lines],
        **more,
    }
    if config.results_file is not None:
        raw = {**report, "lines": [line.raw() for line in lines]}
        write_atomic(config.results_file, (json.dumps(raw, indent=1) + "\n").encode(), replace=True)
    return report


def measure(bench: BenchContext, names: Sequence[str]) -> list[Line]:
    """Return the lines of these names, in their order; a group that cannot run says why."""
    found: dict[str, Line] = {}
    for of_group, measure_group in GROUPS:
        wanted = [name for name in of_group if name in names]
        if not wanted:
            continue
        console.info(f"measuring {', '.join(wanted)}")
        try:
            found |= {line.name: line for line in measure_group(bench, wanted)}
        except NotMeasuredError as error:
            found |= {name: Line(name, why=str(error)) for name in wanted}
        except torch.cuda.OutOfMemoryError:
            why = "the GPU's memory is too small; give a smaller --batch-size"
            found |= {name: Line(name, why=why) for name in wanted}
    return [found[name] for name in names]


def about(config: BenchConfig, runtime: Runtime) -> dict[str, Any]:
    """Return what a reader of the figures must know: command, day, machine, versions."""
    return {
        "command": command_of(config),
        "date": datetime.date.today().isoformat(),
        "precision": runtime.precision,
        "rounds": config.rounds,
        "hardware": hardware.describe(runtime.device),
        "versions": hardware.versions(),
    }


def command_of(config: BenchConfig) -> str:
    """Return the command line that gives these settings, without anyone's paths."""
    words = ["mealv2", "bench"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == field.default:
            continue
        if isinstance(value, bool):
            words.append(flag(field.name) if value else f"--no-{field.name}")
        elif isinstance(value, Path):
            words += [flag(field.name), field.name.upper()]
        else:
            words += [
                flag(field.name),
                ",".join(value) if isinstance(value, tuple) else str(value),
            ]
    return shlex.join(words)
