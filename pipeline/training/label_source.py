"""Where the labels of a distillation come from; here a label set, with its teachers or without."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mealv2.data.content_hash import ImageCheck
from mealv2.data.pixels import Resize
from mealv2.data.source import ImageSource
from mealv2.errors import ConfigError, LabelSetError
from mealv2.label_set import (
    Appender,
    LabelSet,
    check_boxes,
    check_same_data,
)
from mealv2.storage.json_format import read_json
from mealv2.targets import StoredLabels, Targets
from mealv2.views import Views
from pipeline import console
from pipeline.config import DistillConfig, plain
from pipeline.labelling.compatibility import (
    build_original_teachers,
    choose_resize,
    image_check,
)
from pipeline.runtime.device import Runtime
from pipeline.training.evaluator import LabelTable
from pipeline.training.run_folder import LABELS_NAME


@dataclass(frozen=True)
class LabelSource:
    """Where the labels of a run come from, and the teachers' results on the validation split.

    ``accuracies`` are those of the teachers there, by name, and ``teacher_forwards`` the views that
    they saw for it; ``provenance`` is what the run folder keeps. ``check`` and ``val_check``
    compare the images with those that were labelled.
    """

    targets: Targets
    positions: list[int]
    img_size: int
    views: Views
    resize: Resize
    provenance: dict[str, Any]
    val_labels: LabelTable | None = None
    accuracies: dict[str, dict[str, float]] = field(default_factory=dict)
    teacher_forwards: int = 0
    check: ImageCheck | None = None
    val_check: ImageCheck | None = None


def from_label_set(
    config: DistillConfig,
    folder: Path,
    runtime: Runtime,
    source: ImageSource,
    val: ImageSource | None,
) -> LabelSource:
    """Use the label set in a folder, and its teachers where --missing asks for them."""
    if config.write_back and not os.access(folder, os.W_OK):  # now, not an epoch later
        raise LabelSetError(f"cannot append to {folder}: no permission; leave out --write-back")
    labels = LabelSet.open(folder, **next(iter(resumed_labels(config)), {}))
    check_labels(config, labels, source)
    _check_logits(config, labels)
    val_labels = open_val_labels(labels, val)
    check = image_check(labels, source, config.check_images)
    val_check = None
    if val_labels is not None and val is not None:
        val_check = image_check(val_labels, val, config.check_images)
    provenance = {"path": str(plain(config.labels)), **what_is_used(labels)}
    return LabelSource(
        _stored_targets(config, folder, runtime, labels, source, check),
        positions_to_train_on(config, [labels], source),
        labels.img_size,
        labels.views(),
        choose_resize(labels, config.exact_pil, config.interpolation),
        provenance,
        val_labels,
        accuracies_of(val_labels),
        check=check,
        val_check=val_check,
    )


def check_labels(config: DistillConfig, labels: LabelSet, source: ImageSource) -> None:
    """Compare labels with the images and the settings of a run.

    Raises LabelSetError for those of other images, ConfigError where the views are too few.
    """
    check_boxes(labels)
    choices = "--missing skip"
    if config.method == "mealv2":
        choices = f"--missing teach or {choices}"
    check_same_data(
        labels,
        source,
        allow_missing=config.missing != "fail",
        advice=f", or choose what to do with them: {choices}",
    )
    _check_epochs(config, labels)


def open_val_labels(labels: LabelSet, val: ImageSource | None) -> LabelSet | None:
    """Return the labels of the validation images; None if the set labels others, or none."""
    val_plan = labels.manifest["plan"]["roles"].get("val", {})
    if val is None or val.split != val_plan.get("split"):
        return None
    val_labels = LabelSet.open(labels.folder, split="val")
    check_same_data(val_labels, val)
    return val_labels


def what_is_used(labels: LabelSet) -> dict[str, Any]:
    """Return what a run uses of a label set: a resumed one uses the same."""
    return {
        "plan_sha256": labels.manifest["plan_sha256"],
        "appended": labels.appended,
        "num_views": labels.num_views,
    }


def _stored_targets(
    config: DistillConfig,
    folder: Path,
    runtime: Runtime,
    labels: LabelSet,
    source: ImageSource,
    check: ImageCheck | None,
) -> StoredLabels:
    ensemble = appender = None
    if config.write_back:
        position_of = {key: position for position, key in enumerate(source.keys)}
        hash_of = None if check is None else lambda key: check.hash_of(position_of[key])
        appender = Appender(labels, hash_of)
    if config.missing == "teach":
        plan = labels.manifest["plan"]
        ensemble = build_original_teachers(folder, config.teacher, plan, runtime)
    return StoredLabels(
        labels,
        source.keys,
        source.labels,
        seed=config.seed,
        reuse=config.reuses_views,
        missing=config.missing,
        ensemble=ensemble,
        appender=appender,
    )


def positions_to_train_on(
    config: DistillConfig, sets: Sequence[LabelSet], source: ImageSource
) -> list[int]:
    """Return the images with labels in all sets, and those without where --missing allows them."""
    has_labels = np.all([labels.has_labels(source.keys) for labels in sets], axis=0)
    skipped = set().union(*(labels.skipped for labels in sets))
    num_missing = int((~has_labels).sum()) - len(skipped)
    if num_missing:
        action = "skipped" if config.missing == "skip" else "labelled online by the teachers"
        console.info(
            f"{num_missing} images are not in the label set; they are {action}, except for "
            "appended views"
        )
    return [
        position
        for position, (key, is_stored) in enumerate(
            zip(source.keys, has_labels.tolist(), strict=True)
        )
        if is_stored or (config.missing != "fail" and key not in skipped)
    ]


def _check_epochs(config: DistillConfig, labels: LabelSet) -> None:
    """Raise ConfigError where the stored views end before the epochs do, or within one batch."""
    if config.reuses_views and config.views_per_image > labels.num_views:
        raise ConfigError(
            f"--views-per-image {config.views_per_image}: {labels.folder} has only "
            f"{labels.num_views} views of an image"
        )
    if config.reuses_views or config.missing == "teach" or config.epochs <= labels.num_views:
        return
    advice = "use fewer --epochs"
    if config.method == "mealv2":
        advice = f"let its teachers label the rest with --missing teach, or {advice}"
    raise ConfigError(
        f"--no-reuse-views: {config.epochs} epochs need as many views, {labels.folder} has "
        f"{labels.num_views}; {advice}"
    )


def _check_logits(config: DistillConfig, labels: LabelSet) -> None:
    """Raise ConfigError where the discriminator's input is logits that the set does not have."""
    if config.discriminator_input == "logits" and not labels.encoding.logits:
        raise ConfigError(
            f"--discriminator-input logits: {labels.folder} has none; precompute with "
            "--store-logits, use --online, or --discriminator-input log-probs"
        )


def resumed_labels(config: DistillConfig) -> list[dict[str, Any]]:
    """Return which files and views of each set a resumed run started with; none for a new run.

    Raises ConfigError for a damaged file.
    """
    if config.resume is None or not (path := config.resume / LABELS_NAME).exists():
        return []
    try:
        kept = read_json(path)
        return [_used(each) for each in kept.get("sets", [kept])]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged: {error}") from None


def _used(kept: dict[str, Any]) -> dict[str, Any]:
    num_views = kept["num_views"]
    if not isinstance(num_views, int):
        raise TypeError("num_views is no number")
    return {"appended": [Path(name).name for name in kept["appended"]], "num_views": num_views}


def accuracies_of(labels: LabelSet | None) -> dict[str, dict[str, float]]:
    """Return what stage one measured of the teachers, by name."""
    accuracy = None if labels is None else labels.manifest["roles"]["val"].get("accuracy")
    if accuracy is None:
        return {}
    named = {f"teacher {t['model']}": t for t in accuracy["teachers"]}
    return {**named, "ensemble": accuracy["ensemble"]}
