"""Where the labels of a distillation come from: a label set, online teachers, or both."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mealv2.data.content_hash import ImageCheck
from mealv2.data.loader import read_views
from mealv2.data.pixels import Resize
from mealv2.data.source import ImageSource
from mealv2.data.view_reader import ViewReader
from mealv2.errors import ConfigError, LabelSetError
from mealv2.label_set import (
    Appender,
    Encoding,
    LabelSet,
    check_boxes,
    check_same_data,
)
from mealv2.labelling.annotator import Annotator
from mealv2.models.ensemble import TeacherEnsemble
from mealv2.soft_labels import Labels
from mealv2.storage.json_format import read_json
from mealv2.targets import OnlineTeachers, StoredLabels, Targets
from mealv2.views import DrawnViews, Views
from pipeline import console
from pipeline.config import DEFAULT_IMG_SIZE, DistillConfig, plain
from pipeline.labelling import teachers
from pipeline.labelling.compatibility import (
    build_original_teachers,
    choose_resize,
    image_check,
)
from pipeline.loading.small_images import propose_crop
from pipeline.runtime.device import Runtime
from pipeline.training.evaluator import LabelTable, local_centre_requests
from pipeline.training.run_folder import LABELS_NAME

Teachers = tuple[TeacherEnsemble, list[dict[str, Any]]]  # and the description of each
_VAL_TOPK = 100  # classes kept in memory of each validation label of online teachers


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


class CentreLabels:
    """The labels of a validation split's centre crops, in memory; a LabelTable."""

    def __init__(self, keys: Sequence[str], labels: Labels) -> None:
        self._rows = {key: row for row, key in enumerate(keys)}
        self._labels = labels

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def soft_labels(self, keys: Sequence[str], views: Sequence[int]) -> Labels:
        """Return the labels of images; there is one view of each."""
        return self._labels.rows(torch.tensor([self._rows[key] for key in keys]))


def from_online_teachers(
    config: DistillConfig, runtime: Runtime, source: ImageSource, val: ImageSource | None
) -> LabelSource:
    """Let the --teacher models label every step; they label the validation split first."""
    return label_online(config, runtime, source, val, build_teachers(config, runtime, source))


def build_teachers(config: DistillConfig, runtime: Runtime, source: ImageSource) -> Teachers:
    """Return the ensemble of --teacher, on its device, and the description of each teacher."""
    return teachers.build(
        config.teacher,
        classes=list(source.classes),
        img_size=config.img_size or DEFAULT_IMG_SIZE,
        teacher_img_size=config.teacher_img_size,
        runtime=runtime,
    )


def label_online(
    config: DistillConfig,
    runtime: Runtime,
    source: ImageSource,
    val: ImageSource | None,
    built: Teachers,
) -> LabelSource:
    """Return labels of built teachers, which label the validation split first."""
    img_size = config.img_size or DEFAULT_IMG_SIZE
    ensemble, described = built
    if config.resume is None:
        propose_crop(config, source, config.data_dir)
    val_labels, teacher_forwards = None, 0
    accuracies: dict[str, dict[str, float]] = {}
    if val is not None:
        val_labels, metrics = _label_validation(
            config, runtime, ensemble, val, img_size=img_size, resize=config.resize
        )
        teacher_forwards = len(val_labels)
        names = [*(f"teacher {teacher['model']}" for teacher in described), "ensemble"]
        accuracies = dict(zip(names, metrics, strict=True))
    return LabelSource(
        OnlineTeachers(ensemble, source.labels),
        list(range(len(source))),
        img_size,
        DrawnViews(config.view_seed or 0, config.view_recipe),
        config.resize,
        {"online": True, "teachers": described},
        val_labels,
        accuracies,
        teacher_forwards,
    )


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
    labels = LabelSet.open(folder, **_resumed_label_set(config))
    _check_logits(config, labels)
    check_boxes(labels)
    check_same_data(
        labels,
        source,
        allow_missing=config.missing != "fail",
        advice=", or choose what to do with them: --missing teach or --missing skip",
    )
    _check_epochs(config, labels)
    val_labels = val_check = None
    val_plan = labels.manifest["plan"]["roles"].get("val", {})
    if val is not None and val.split == val_plan.get("split"):
        val_labels = LabelSet.open(folder, split="val")
        check_same_data(val_labels, val)
        val_check = image_check(val_labels, val, config.check_images)
    check = image_check(labels, source, config.check_images)
    provenance = {
        "path": str(plain(config.labels)),
        "plan_sha256": labels.manifest["plan_sha256"],
        "appended": labels.appended,
        "num_views": labels.num_views,
    }
    return LabelSource(
        _stored_targets(config, folder, runtime, labels, source, check),
        _positions_to_train_on(config, labels, source),
        labels.img_size,
        labels.views(),
        choose_resize(labels, config.exact_pil, config.interpolation),
        provenance,
        val_labels,
        _accuracies(val_labels),
        check=check,
        val_check=val_check,
    )


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


def _positions_to_train_on(
    config: DistillConfig, labels: LabelSet, source: ImageSource
) -> list[int]:
    """Return the images with labels, and those without where --missing allows them."""
    has_labels = labels.has_labels(source.keys)
    num_missing = int((~has_labels).sum()) - len(labels.skipped)
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
        if is_stored or (config.missing != "fail" and key not in labels.skipped)
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
    raise ConfigError(
        f"--no-reuse-views: {config.epochs} epochs need as many views, {labels.folder} has "
        f"{labels.num_views}; let its teachers label the rest with --missing teach, or use fewer "
        "--epochs"
    )


def _label_validation(
    config: DistillConfig,
    runtime: Runtime,
    ensemble: TeacherEnsemble,
    val: ImageSource,
    *,
    img_size: int,
    resize: Resize,
) -> tuple[CentreLabels, list[dict[str, float]]]:
    """Label the validation split once; return the labels, and the accuracy of every teacher and of
    the ensemble. Each rank labels the images that it will evaluate.
    """
    num_classes, ranks = len(val.classes), runtime.ranks
    requests = local_centre_requests(val, config.batch_size, ranks)
    annotator = Annotator(
        ensemble,
        runtime,
        Encoding(num_classes, "float32", topk=min(num_classes, _VAL_TOPK)),
        batch_size=config.batch_size,
        on_bad_image=config.on_bad_image,
    )
    batches = console.progress(
        read_views(
            ViewReader(val, img_size=img_size, resize=resize, other_sizes=ensemble.other_sizes),
            requests,
            workers=config.workers,
            pin_memory=runtime.should_pin_memory,
        ),
        total=sum(map(len, requests)),
        what="teachers on the validation split",
        unit="images",
        size=lambda item: len(item.positions) + len(item.failed),
    )
    found = annotator.annotate(val, batches, count_correct=True)
    num_images = int(ranks.all_reduce(torch.tensor(len(found.positions))))
    percent = ranks.all_reduce(torch.from_numpy(found.correct)).numpy() * 100.0 / max(1, num_images)
    metrics = [{"top1": float(a), "top5": float(b)} for a, b in percent.T]
    return CentreLabels([val.keys[p] for p in found.positions], found.rows.labels), metrics


def _check_logits(config: DistillConfig, labels: LabelSet) -> None:
    """Raise ConfigError where the discriminator's input is logits that the set does not have."""
    if config.discriminator_input == "logits" and not labels.encoding.logits:
        raise ConfigError(
            f"--discriminator-input logits: {labels.folder} has none; precompute with "
            "--store-logits, use --online, or --discriminator-input log-probs"
        )


def _resumed_label_set(config: DistillConfig) -> dict[str, Any]:
    """Return which files and views a resumed run started with; nothing for a new run."""
    if config.resume is None or not (path := config.resume / LABELS_NAME).exists():
        return {}
    try:
        kept = read_json(path)
        num_views = kept["num_views"]
        if not isinstance(num_views, int):
            raise TypeError("num_views is no number")
        return {"appended": [Path(name).name for name in kept["appended"]], "num_views": num_views}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged: {error}") from None


def _accuracies(labels: LabelSet | None) -> dict[str, dict[str, float]]:
    """Return what stage one measured of the teachers, by name."""
    accuracy = None if labels is None else labels.manifest["roles"]["val"].get("accuracy")
    if accuracy is None:
        return {}
    named = {f"teacher {t['model']}": t for t in accuracy["teachers"]}
    return {**named, "ensemble": accuracy["ensemble"]}
