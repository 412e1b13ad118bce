"""The lines on stage two: a training step with stored labels, with hard labels, and online."""

from collections.abc import Callable
from statistics import median
from typing import Any, Literal

import numpy as np
import torch

from mealv2.data.requests import Batch
from mealv2.models import Classifier
from mealv2.models.cost import forward_macs
from mealv2.models.discriminator import Discriminator
from mealv2.targets import HardLabels, OnlineTeachers, StoredLabels, Targets
from mealv2.task import DistillTask, HardLabelTask, Task
from mealv2.views import DrawnViews
from pipeline.bench.context import NUM_CLASSES, NUM_VIEWS, BenchContext
from pipeline.bench.lines import Line, ratios
from pipeline.config import DistillConfig
from pipeline.timing import repeated, step_macs, take_turns, times_for
from pipeline.training.spec import TrainingSpec
from pipeline.training.step import TrainStep

_TURN_S = 1.0  # minimum duration of a turn, about
_PAPER_GMACS = (46.0, 12.3)  # a step online, and one without teachers
_LR = 1e-4  # small, because training on random labels must not diverge


def measure_hard(bench: BenchContext) -> list[Line]:
    """Return the line on the cost of stored labels over class ids, with a discriminator.

    It takes twice the rounds: the difference is smaller than the noise of most machines.
    """
    student = bench.network(bench.config.model)
    steps = {
        "hard labels": train_step(bench, student, "hard"),
        "stored labels": train_step(bench, student, "stored"),
        "stored labels, no discriminator": train_step(
            bench, student, "stored", has_discriminator=False
        ),
    }
    workloads = {name: workload(bench, step) for name, step in steps.items()}
    times = times_for(workloads["hard labels"], bench.device, seconds=_TURN_S)
    workloads = {name: repeated(work, times) for name, work in workloads.items()}
    turns = take_turns(workloads, rounds=2 * bench.config.rounds, device=bench.device)
    without = median(ratios(turns, "hard labels", "stored labels, no discriminator"))
    notes = {
        "batch_size": bench.batch_size,
        "without_discriminator": round(without, 4),
        **bench.cpu_note(turns, "hard labels", "stored labels"),
    }
    return [Line("step-hard", ratios(turns, "hard labels", "stored labels"), turns, notes)]


def measure_online(bench: BenchContext) -> list[Line]:
    """Return the line on the speed of stored labels over teachers that run in every step."""
    student = bench.network(bench.config.model)
    stored = workload(bench, train_step(bench, student, "stored"))
    online = workload(bench, train_step(bench, student, "online"))
    times = times_for(stored, bench.device, seconds=_TURN_S)
    workloads = {
        "stored labels": repeated(stored, times),
        "online": repeated(online, max(1, times // 3)),
    }
    turns = take_turns(workloads, rounds=bench.config.rounds, device=bench.device)
    notes = {
        "batch_size": bench.batch_size,
        **arithmetic(bench),
        **bench.cpu_note(turns, "stored labels", "online"),
    }
    return [Line("step-online", ratios(turns, "stored labels", "online"), turns, notes)]


def arithmetic(bench: BenchContext) -> dict[str, Any]:
    """Return the multiply-accumulates per view, and the speedup that they alone allow."""
    size = bench.config.img_size
    with torch.device("meta"):
        teachers = sum(forward_macs(bench.network(name), size) for name in bench.config.teacher)
        student = step_macs(bench.network(bench.config.model), size)
    paper_online, paper_stored = _PAPER_GMACS
    return {
        "teachers_gmacs": round(teachers / 1e9, 2),
        "student_step_gmacs": round(student / 1e9, 2),
        "arithmetic_bound": round((teachers + student) / student, 3),
        "tabled_bound": round(paper_online / paper_stored, 2),
    }


def workload(
    bench: BenchContext, step: TrainStep, batch_size: int | None = None
) -> Callable[[], int]:
    """Return a function that does one step on a batch on the device; the lookup is included."""
    positions, size = bench.images.positions, batch_size or bench.batch_size
    batch = Batch(
        bench.random_images(size, step.spec.img_size),
        np.zeros((size, 2), np.uint32),
        np.zeros((size, 5), np.uint32),
        [positions[n % len(positions)] for n in range(size)],
        [n // len(positions) % NUM_VIEWS for n in range(size)],
    )
    return lambda: sum(output.num_views for output in step.update(batch, size))


def train_step(
    bench: BenchContext,
    student: Classifier,
    labels: Literal["hard", "stored", "online"],
    *,
    has_discriminator: bool = True,
    img_size: int | None = None,
) -> TrainStep:
    """Return the training step of the real run, with labels of one kind.

    ``img_size`` is that of the config by default. Hard labels have no discriminator.
    """
    source = bench.images.source
    discriminator = None
    targets: Targets = HardLabels(source.labels)
    task: Task = HardLabelTask(student)
    if labels != "hard":
        discriminator = Discriminator(NUM_CLASSES, "paper") if has_discriminator else None
        task = DistillTask(student, discriminator)
        targets = (
            StoredLabels(bench.labels, source.keys, source.labels, seed=0)
            if labels == "stored"
            else OnlineTeachers(bench.ensemble, source.labels)
        )
    config = DistillConfig(
        data_dir=bench.images.root,
        model=bench.config.model,
        labels=bench.folder / "labels",
        pretrained=False,
        batch_size=bench.batch_size,
        lr=_LR,
        device=bench.config.device,
        amp=bench.config.amp,
        amp_dtype=bench.config.amp_dtype,
    )
    spec = TrainingSpec(
        command="bench",
        task=task,
        student=student,
        source=source,
        positions=bench.images.positions,
        targets=targets,
        img_size=img_size or bench.config.img_size,
        views=DrawnViews(0),
        resize="torch",
        evaluator=None,
        extra={} if discriminator is None else {"discriminator": (discriminator, _LR)},
    )
    step = TrainStep(config, bench.runtime, spec)
    task.train()
    return step
