"""Stage two: train a student and a discriminator with stored labels or online teachers."""

from pathlib import Path
from typing import Any

from torch import nn

from mealv2.data.source import ImageSource
from mealv2.errors import ConfigError
from mealv2.models.discriminator import PLATEAUS, Discriminator
from mealv2.task import DistillTask
from mealv2.teacher_sets import sets_of
from pipeline.config import FEW_CLASSES, DistillConfig
from pipeline.labelling.store import local_folder
from pipeline.runtime import env
from pipeline.runtime.device import Runtime, distributed_runtime
from pipeline.runtime.seeds import seed_everything
from pipeline.training.dry_run import dry_run
from pipeline.training.evaluator import Evaluator
from pipeline.training.images import open_splits
from pipeline.training.label_source import from_label_set
from pipeline.training.loop import train
from pipeline.training.meal import Parts, prepare_meal
from pipeline.training.online_labels import from_online_teachers
from pipeline.training.spec import TrainingSpec, create_student, mixing_of


def run(config: DistillConfig) -> dict[str, Any]:
    """Distil and return the report. Raises as training.loop.train."""
    if config.dry_run:
        env.require_single_process("distill --dry-run")
    with distributed_runtime(config) as runtime:
        return _train_distillation(config, runtime)


def _train_distillation(config: DistillConfig, runtime: Runtime) -> dict[str, Any]:
    folder = None if config.labels is None else local_folder(config, config.labels)
    source, val = open_splits(config, None if folder is None else sets_of(folder)[0])
    given, config = config, config.resolved(len(source.classes))
    if config.dry_run:
        val = None  # online teachers would label the whole split first
    if config.method == "meal":
        parts = prepare_meal(config, runtime, source, val, folder)
    else:
        parts = _prepare(config, runtime, source, val, folder)
    labels = parts.labels
    evaluator = None
    if val is not None:
        evaluator = Evaluator(
            val,
            runtime,
            config,
            img_size=labels.img_size,
            resize=labels.resize,
            labels=labels.val_labels,
            check=labels.val_check,
        )
    spec = TrainingSpec(
        command="distill",
        task=parts.task,
        student=parts.student,
        source=source,
        positions=labels.positions,
        targets=labels.targets,
        img_size=labels.img_size,
        views=labels.views,
        resize=labels.resize,
        evaluator=evaluator,
        extra=parts.extra,
        mixing=mixing_of(
            config,
            mixup_target=config.mixup_target,
            cutmix_target=config.cutmix_target,
        ),
        teachers=labels.accuracies,
        teacher_forwards=labels.teacher_forwards,
        notes=(*_notes_on_rate(config, is_given=config is given), *parts.notes),
        labels=labels.provenance,
        check=labels.check,
    )
    return (dry_run if config.dry_run else train)(config, runtime, spec)


def _prepare(
    config: DistillConfig,
    runtime: Runtime,
    source: ImageSource,
    val: ImageSource | None,
    folder: Path | None,
) -> Parts:
    """Return what MEAL V2 trains, with the label set in a folder or with online teachers."""
    labels = (
        from_online_teachers(config, runtime, source, val)
        if folder is None
        else from_label_set(config, folder, runtime, source, val)
    )
    seed_everything(config.seed)
    student = create_student(config, classes=list(source.classes), img_size=labels.img_size)
    discriminator, extra = _discriminator(config, student.num_classes)
    task = DistillTask(
        student,
        discriminator,
        discriminator_weight=config.discriminator_weight,
        discriminator_input=config.discriminator_input,
        label_temperature=config.label_temperature,
        student_temperature=config.student_temperature,
        hard_label_weight=config.hard_label_weight,
    )
    return Parts(student, task, labels, extra, _notes_on_plateaus(config))


def _discriminator(
    config: DistillConfig, num_classes: int
) -> tuple[Discriminator | None, dict[str, tuple[nn.Module, float]]]:
    """Return the discriminator, if any, and the extra modules for the optimizer."""
    if config.discriminator == "off":
        return None, {}
    if num_classes < 2:
        raise ConfigError("a discriminator needs at least 2 classes; use --discriminator off")
    discriminator = Discriminator(num_classes, config.discriminator_variant)
    # a resumed run may be from before the default depended on the classes
    lr = config.lr if config.discriminator_lr is None else config.discriminator_lr
    return discriminator, {"discriminator": (discriminator, lr)}


def _notes_on_plateaus(config: DistillConfig) -> tuple[str, ...]:
    if config.discriminator == "off":
        return ()
    variant = config.discriminator_variant
    plateaus = ", ".join(f"{v:.3f} {name}" for name, v in PLATEAUS[variant].items())
    return (f"discriminator {variant}: plateaus of its loss: {plateaus}",)


def _notes_on_rate(config: DistillConfig, *, is_given: bool) -> tuple[str, ...]:
    """Return the line on the discriminator's learning rate, if it is the default."""
    if config.discriminator == "off" or is_given:
        return ()
    lr = config.discriminator_lr
    why = (
        "as --lr"
        if lr == config.lr
        else f"the default below {FEW_CLASSES} classes (the paper's, for 1,000, is --lr)"
    )
    return (f"discriminator at learning rate {lr:g}, {why}; --discriminator-lr sets it",)
