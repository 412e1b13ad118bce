"""What `distill --method meal` trains: its teachers, its targets and its task, paired by block."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from mealv2.data.source import ImageSource
from mealv2.errors import ConfigError
from mealv2.meal import (
    BlockLayers,
    MealTask,
    Network,
    SelectedTeachers,
    block_discriminators,
    pair_blocks,
)
from mealv2.models import Classifier
from mealv2.models.discriminator import PLATEAUS
from mealv2.models.ensemble import TeacherEnsemble
from mealv2.task import Task
from pipeline.config import DEFAULT_IMG_SIZE, DistillConfig
from pipeline.runtime.device import Runtime
from pipeline.runtime.seeds import seed_everything
from pipeline.training.label_source import LabelSource
from pipeline.training.online_labels import build_teachers, label_online
from pipeline.training.spec import create_student
from pipeline.training.teacher_labels import from_sets_of_teachers


@dataclass(frozen=True)
class Parts:
    """What a method of distillation trains: student, task, labels, modules trained beside it."""

    student: Classifier
    task: Task
    labels: LabelSource
    extra: dict[str, tuple[nn.Module, float]]
    notes: tuple[str, ...]


def prepare_meal(
    config: DistillConfig,
    runtime: Runtime,
    source: ImageSource,
    val: ImageSource | None,
    folder: Path | None,
) -> Parts:
    """Return what MEAL trains, with the label sets of the teachers in a folder or with teachers.

    Raises ConfigError for blocks that do not pair, before anything is labelled.
    """
    if folder is None:
        return _prepare_online(config, runtime, source, val)
    labels = from_sets_of_teachers(config, folder, source, val)
    student = _student(config, source, labels.img_size)
    layers, widths = BlockLayers(), (student.num_classes,)
    task, extra = _task(config, student, layers, widths)
    return Parts(student, task, labels, extra, _notes(config, layers, widths))


def _prepare_online(
    config: DistillConfig, runtime: Runtime, source: ImageSource, val: ImageSource | None
) -> Parts:
    built = build_teachers(config, runtime, source)
    img_size = config.img_size or DEFAULT_IMG_SIZE
    student = _student(config, source, img_size)
    layers, widths = _pair(config, student, built, img_size)
    task, extra = _task(config, student, layers, widths)
    labels = label_online(config, runtime, source, val, built)
    targets = SelectedTeachers(
        built[0],
        layers,
        source.labels,
        seed=config.seed,
        selection=config.teacher_selection,
        mode=config.teacher_mode,
    )
    notes = _notes(config, layers, widths)
    return Parts(student, task, replace(labels, targets=targets), extra, notes)


def _student(config: DistillConfig, source: ImageSource, img_size: int) -> Classifier:
    seed_everything(config.seed)
    return create_student(config, classes=list(source.classes), img_size=img_size)


def _task(
    config: DistillConfig, student: Classifier, layers: BlockLayers, widths: tuple[int, ...]
) -> tuple[MealTask, dict[str, tuple[nn.Module, float]]]:
    """Return the task, and the discriminators for the optimizer, if any."""
    discriminators = _discriminators(config, widths)
    task = MealTask(
        student,
        layers,
        discriminators,
        loss=config.block_loss,
        gammas=config.of_blocks("gamma"),
        etas=config.of_blocks("eta"),
    )
    if discriminators is None:
        return task, {}
    lr = config.lr if config.discriminator_lr is None else config.discriminator_lr
    return task, {"discriminator": (discriminators, lr)}


def _pair(
    config: DistillConfig,
    student: Classifier,
    built: tuple[TeacherEnsemble, list[dict[str, Any]]],
    img_size: int,
) -> tuple[BlockLayers, tuple[int, ...]]:
    ensemble, described = built
    networks = [Network(f"student {student.tag}", student, img_size)]
    for teacher, about, size in zip(ensemble.teachers, described, ensemble.img_sizes, strict=True):
        networks.append(Network(f"teacher {about['model']}", teacher, size or img_size))
    pool = config.pool if config.align else None
    return pair_blocks(networks, config.out_layer, sizes=config.out_dims, pool=pool)


def _discriminators(config: DistillConfig, widths: tuple[int, ...]) -> nn.ModuleList | None:
    """Return the discriminators, if any."""
    if config.discriminator == "off":
        return None
    try:
        return block_discriminators(widths, config.discriminator_variant)
    except ValueError as error:
        raise ConfigError(f"{error}; use --discriminator off") from None


def _notes(config: DistillConfig, layers: BlockLayers, widths: tuple[int, ...]) -> tuple[str, ...]:
    """Return the lines on what is compared, and on the plateaus of the discriminators' loss."""
    compared = ", ".join(
        f"{position} ({width} values)"
        for position, width in zip(layers.positions, widths, strict=True)
    )
    chosen = {"random": "one drawn a batch", "round-robin": "in turn", "all": "all in each batch"}
    notes: tuple[str, ...] = (
        f"MEAL: --out-layer {compared}; teachers {chosen[config.teacher_selection]}, "
        f"{'from stored labels' if config.labels else f'in {config.teacher_mode} mode'}",
    )
    if layers.pool is not None and None not in layers.sizes:  # only the logits have no size
        notes += ("no loss compares the logits: the head of the student is not trained",)
    if config.discriminator == "off":
        return notes
    total = sum(config.of_blocks("eta"))
    plateaus = PLATEAUS[config.discriminator_variant].items()
    text = ", ".join(f"{value * total:.3f} {name}" for name, value in plateaus)
    each = f"{len(widths)} discriminators" if len(widths) > 1 else "discriminator"
    return (*notes, f"{each} {config.discriminator}: plateaus of the loss: {text}")
