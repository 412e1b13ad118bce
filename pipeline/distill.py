"""Stage two: train a student and a discriminator from a label set."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from mealv2.discriminator import Discriminator
from mealv2.errors import ConfigError, LabelSetError
from mealv2.images import ImageSource, fingerprint, open_source
from mealv2.label_set import LabelSet
from mealv2.targets import StoredLabels
from mealv2.task import DistillTask
from pipeline import runtime, training
from pipeline.config import DistillConfig
from pipeline.evaluation import Evaluator, open_split


def run(config: DistillConfig) -> dict[str, Any]:
    """Distil; return the report. Raises MealError and OSError, see training.train."""
    machine = runtime.start(config)
    labels = LabelSet.open(config.labels)
    plan = labels.manifest["plan"]["roles"]
    source = open_source(config.data_dir, plan["train"]["split"])
    check_same_data(labels, source)
    val = open_split(config.data_dir, config.val_split, classes=source.classes)
    val_labels = None
    if val is not None and val.split == plan.get("val", {}).get("split"):
        val_labels = LabelSet.open(config.labels, role="val")
        check_same_data(val_labels, val)

    runtime.seed_everything(config.seed)
    student = training.make_student(config, classes=labels.classes, img_size=labels.img_size)
    discriminator, extra = _discriminator(config, labels.num_classes)
    evaluator = None
    if val is not None:
        evaluator = Evaluator(val, machine, config, img_size=labels.img_size, labels=val_labels)
    work = training.Work(
        command="distill",
        task=DistillTask(student, discriminator, discriminator_weight=config.discriminator_weight),
        student=student,
        source=source,
        positions=[p for p, key in enumerate(source.keys) if key in labels],
        targets=StoredLabels(labels, source.keys, seed=config.seed),
        img_size=labels.img_size,
        view_seed=plan["train"]["views"]["seed"],
        evaluator=evaluator,
        extra=extra,
        teachers=_accuracies(val_labels),
    )
    return training.train(config, machine, work)


def check_same_data(labels: LabelSet, source: ImageSource) -> None:
    """Raise LabelSetError, saying what differs, when the labels are of other images."""
    if source.classes != labels.classes:
        odd = sorted(set(source.classes) ^ set(labels.classes))
        raise LabelSetError(
            f"{labels.folder} labels {labels.num_classes} classes, {source.name} has "
            f"{len(source.classes)}; only in one of them: {_some(odd)}"
        )
    if fingerprint(source) == labels.manifest["plan"]["roles"][labels.role]["data_sha256"]:
        return
    there = set(labels.keys()) | labels.skipped.keys()
    new, gone = sorted(set(source.keys) - there), sorted(there - set(source.keys))
    what = [f"{len(new)} images without labels ({_some(new)})"] if new else []
    what += [f"{len(gone)} labelled images missing ({_some(gone)})"] if gone else []
    raise LabelSetError(
        f"{labels.folder} was made from other data than {source.name}: "
        f"{' and '.join(what) or 'the same names, but other files'}; "
        "give the data it was made from, or precompute labels for this data"
    )


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


def _accuracies(labels: LabelSet | None) -> dict[str, dict[str, float]]:
    """Return what stage one measured of the teachers, by name."""
    if labels is None:
        return {}
    accuracy = labels.manifest["roles"]["val"]["accuracy"]
    named = {f"teacher {t['model']}": t for t in accuracy["teachers"]}
    return {**named, "ensemble": accuracy["ensemble"]}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + (", …" if len(names) > 2 else "")
