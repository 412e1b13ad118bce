"""Stage two: train a student and a discriminator, from a label set or from teachers online."""

from typing import Any

from torch import nn

from mealv2.discriminator import PLATEAUS, Discriminator
from mealv2.errors import ConfigError
from mealv2.task import DistillTask
from pipeline import environment, foresight, labels, runtime, training
from pipeline.config import DistillConfig
from pipeline.evaluation import Evaluator
from pipeline.mirror import folder_of
from pipeline.runtime import Runtime
from pipeline.sources import open_split
from pipeline.work import CutMix, Work, make_student


def run(config: DistillConfig) -> dict[str, Any]:
    """Distil; return the report. Raises MealError and OSError, see training.train."""
    if config.dry_run:
        environment.refuse_ranks("distill --dry-run")
    with runtime.joined(config) as machine:
        return _distil(config, machine)


def _distil(config: DistillConfig, machine: Runtime) -> dict[str, Any]:
    folder = None if config.labels is None else folder_of(config, config.labels)
    source = labels.open_training_images(config, folder)
    val = open_split(config, config.data_dir, config.val_split, classes=list(source.classes))
    if config.dry_run:
        val = None  # online teachers would label all of it first
    answers = (
        labels.online(config, machine, source, val)
        if folder is None
        else labels.stored(config, folder, machine, source, val)
    )

    runtime.seed_everything(config.seed)
    student = make_student(config, classes=list(source.classes), img_size=answers.img_size)
    discriminator, extra = _discriminator(config, student.num_classes)
    evaluator = None
    if val is not None:
        evaluator = Evaluator(
            val,
            machine,
            config,
            img_size=answers.img_size,
            resize=answers.resize,
            labels=answers.of_validation,
        )
    work = Work(
        command="distill",
        task=DistillTask(
            student,
            discriminator,
            discriminator_weight=config.discriminator_weight,
            discriminator_input=config.discriminator_input,
            label_temperature=config.label_temperature,
            hard_label_weight=config.hard_label_weight,
        ),
        student=student,
        source=source,
        positions=answers.positions,
        targets=answers.targets,
        img_size=answers.img_size,
        views=answers.views,
        resize=answers.resize,
        evaluator=evaluator,
        extra=extra,
        cutmix=_cutmix(config),
        teachers=answers.accuracies,
        teacher_forwards=answers.num_asked,
        legend=_legend(config),
        labels=answers.provenance,
    )
    if config.dry_run:
        return foresight.foresee(config, machine, work)
    return training.train(config, machine, work)


def _discriminator(
    config: DistillConfig, num_classes: int
) -> tuple[Discriminator | None, dict[str, tuple[nn.Module, float]]]:
    """Return the discriminator, if any, and what the optimizer is to know of it."""
    if config.discriminator == "off":
        return None, {}
    if num_classes < 2:
        raise ConfigError("a discriminator needs at least 2 classes; use --discriminator off")
    discriminator = Discriminator(num_classes, config.discriminator)
    lr = config.lr if config.discriminator_lr is None else config.discriminator_lr
    return discriminator, {"discriminator": (discriminator, lr)}


def _cutmix(config: DistillConfig) -> CutMix | None:
    if config.cutmix_target is None:
        return None
    beta = 1.0 if config.cutmix_beta is None else config.cutmix_beta
    probability = 1.0 if config.cutmix_prob is None else config.cutmix_prob
    return CutMix(config.cutmix_target, beta, probability)


def _legend(config: DistillConfig) -> dict[str, str]:
    """Return what to print behind an epoch's discriminator loss: the values to know it by."""
    if config.discriminator == "off":
        return {}
    known = ", ".join(f"{name} {v:.3f}" for name, v in PLATEAUS[config.discriminator].items())
    return {"train_discriminator_loss": f" ({known})"}
