"""The lines on stage two: a step with stored labels, beside hard labels and online teachers."""

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch

from mealv2.models import Classifier
from mealv2.models.discriminator import Discriminator
from mealv2.targets import HardLabels, OnlineTeachers, StoredLabels, Targets
from mealv2.task import DistillTask, HardLabelTask
from mealv2.views import DrawnViews
from pipeline.bench.lines import Line, ratios
from pipeline.bench.room import NUM_CLASSES, NUM_VIEWS, BenchContext
from pipeline.config import DistillConfig
from pipeline.loading.loader import Batch
from pipeline.timing import (
    forward_macs,
    repeated,
    step_macs,
    take_turns,
    times_for,
)
from pipeline.training.spec import TrainingSpec
from pipeline.training.step import TrainStep

_TURN_S = 1.0  # about how long a turn takes at least
_PAPER_MACS = (46.0, 12.3)  # in thousands of millions: a step online, and one without teachers
_LR = 1e-4  # weights are random and labels mean nothing: nothing is to diverge


def measure_hard(bench: BenchContext, wanted: Sequence[str]) -> list[Line]:
    """Return the line on what stored labels cost beside class ids, with a discriminator.

    Twice the rounds: the two differ by less than a machine does from minute to minute.
    """
    student = bench.network(bench.config.model)
    workloads = {
        "hard labels": stepping(bench, hard(bench, student)),
        "stored labels": stepping(bench, stored(bench, student)),
        "stored labels, no discriminator": stepping(bench, stored(bench, student, alone=True)),
    }
    times = times_for(workloads["hard labels"], bench.device, seconds=_TURN_S)
    workloads = {name: repeated(spec, times) for name, spec in workloads.items()}
    turns = take_turns(workloads, rounds=2 * bench.config.rounds, device=bench.device)
    without = ratios(turns, "hard labels", "stored labels, no discriminator")
    notes = {
        "batch_size": bench.batch_size,
        "without_discriminator": round(median(without), 4),
        **bench.cpu_note(turns, "hard labels", "stored labels"),
    }
    return [Line("step-hard", ratios(turns, "hard labels", "stored labels"), turns, notes)]


def measure_online(bench: BenchContext, wanted: Sequence[str]) -> list[Line]:
    """Return the line on what stored labels save beside teachers that answer in every step."""
    student = bench.network(bench.config.model)
    workloads = {
        "stored labels": stepping(bench, stored(bench, student)),
        "online": stepping(bench, online(bench, student)),
    }
    times = times_for(workloads["stored labels"], bench.device, seconds=_TURN_S)
    workloads["stored labels"] = repeated(workloads["stored labels"], times)
    workloads["online"] = repeated(workloads["online"], max(1, times // 3))
    turns = take_turns(workloads, rounds=bench.config.rounds, device=bench.device)
    notes = {
        "batch_size": bench.batch_size,
        **arithmetic(bench),
        **bench.cpu_note(turns, "stored labels", "online"),
    }
    return [Line("step-online", ratios(turns, "stored labels", "online"), turns, notes)]


def arithmetic(bench: BenchContext) -> dict[str, Any]:
    """Return what multiplications alone say of a step online and one with stored labels, a view."""
    size = bench.config.img_size
    with torch.device("meta"):
        teachers = sum(forward_macs(bench.network(name), size) for name in bench.config.teacher)
        student = step_macs(bench.network(bench.config.model), size)
    tabled_online, tabled_stored = _PAPER_MACS
    return {
        "teachers_gmacs": round(teachers / 1e9, 2),
        "student_step_gmacs": round(student / 1e9, 2),
        "arithmetic_bound": round((teachers + student) / student, 3),
        "tabled_bound": round(tabled_online / tabled_stored, 2),
    }


def stepping(bench: BenchContext, step: TrainStep) -> Callable[[], int]:
    """Return one step on a batch that lies on the device; lookup included."""
    positions, size = bench.images.positions, bench.batch_size
    batch = Batch(
        bench.resident(size),
        np.zeros((size, 2), np.uint32),
        np.zeros((size, 5), np.uint32),
        [positions[n % len(positions)] for n in range(size)],
        [n // len(positions) % NUM_VIEWS for n in range(size)],
    )

    def one_step() -> int:
        step.update(batch, size)
        return size

    return one_step


def hard(bench: BenchContext, student: Classifier) -> TrainStep:
    """Return steps with class ids."""
    return _train_step(
        bench, student, HardLabels(bench.images.source.labels), HardLabelTask(student)
    )


def stored(bench: BenchContext, student: Classifier, *, alone: bool = False) -> TrainStep:
    """Return steps with labels looked up; ``alone`` leaves out the discriminator."""
    source = bench.images.source
    targets = StoredLabels(bench.labels, source.keys, source.labels, seed=0)
    return _distilling(bench, student, targets, alone=alone)


def online(bench: BenchContext, student: Classifier) -> TrainStep:
    """Return steps in which the teachers answer."""
    targets = OnlineTeachers(bench.ensemble, bench.images.source.labels)
    return _distilling(bench, student, targets)


def _distilling(
    bench: BenchContext, student: Classifier, targets: Targets, *, alone: bool = False
) -> TrainStep:
    discriminator = None if alone else Discriminator(NUM_CLASSES, "paper")
    return _train_step(bench, student, targets, DistillTask(student, discriminator))


def _train_step(bench: BenchContext, student: Classifier, targets: Targets, task: Any) -> TrainStep:
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
    discriminator = getattr(task, "discriminator", None)
    spec = TrainingSpec(
        command="bench",
        task=task,
        student=student,
        source=bench.images.source,
        positions=bench.images.positions,
        targets=targets,
        img_size=bench.config.img_size,
        views=DrawnViews(0),
        resize="torch",
        evaluator=None,
        extra={} if discriminator is None else {"discriminator": (discriminator, _LR)},
    )
    step = TrainStep(config, bench.runtime, spec)
    step.state.set_lr(config.lr_factor(0))
    task.train()
    return step
