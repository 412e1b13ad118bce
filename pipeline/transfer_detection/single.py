"""One detector: one backbone, data set, mode and seed, through the training loop."""

import math
from dataclasses import replace
from typing import Any

from mealv2.batches import updates_per_epoch
from mealv2.data.coco import CocoSource
from mealv2.data.coco_name import find_coco
from mealv2.data.source import fingerprint
from mealv2.detection.reader import WholeImageReader
from mealv2.detection.task import DetectionTask, ObjectTargets
from mealv2.detection.views import WholeViews
from mealv2.errors import ConfigError
from mealv2.models.detector import Detector, Thresholds
from pipeline import console
from pipeline.comparison.starts import create_start
from pipeline.config import DEFAULT_IMG_SIZE, NO_SPLIT, TransferDetectionConfig
from pipeline.loading.sources import show_summary
from pipeline.runtime.device import Runtime
from pipeline.runtime.seeds import seed_everything
from pipeline.training.loop import train
from pipeline.training.spec import TrainingSpec
from pipeline.transfer_detection.evaluator import DetectionEvaluator


def train_one(config: TransferDetectionConfig, runtime: Runtime) -> dict[str, Any]:
    """Train one detector and return the report. Raises as training.loop.train."""
    source = _open(config, config.train_split)
    val = None if config.val_split == NO_SPLIT else _open(config, config.val_split)
    if val is not None and val.classes != source.classes:
        raise ConfigError(
            f"{val.path} has other categories than {source.path}: {len(val.classes)} and "
            f"{len(source.classes)}, or of other ids or names"
        )
    positions = source.with_objects()
    if not positions:
        raise ConfigError(f"{source.path} has no object to learn from")
    if val is not None and not val.num_objects:
        raise ConfigError(f"{val.path} has no object to measure an average precision on")
    seed_everything(config.seed)
    student = _detector(config, source, runtime)
    views = WholeViews(
        seed=config.seed,
        size=config.img_size,
        max_size=config.longest,
        train_sizes=config.train_sizes,
        hflip=config.hflip,
    )
    config = _with_epochs(config, len(positions))
    pinned, workers = runtime.should_pin_memory, config.workers
    spec = TrainingSpec(
        command="transfer-detection",
        task=DetectionTask(student),
        student=student,
        source=source,
        positions=positions,
        targets=ObjectTargets(source, views),
        img_size=config.img_size,
        views=None,
        resize="torch",
        evaluator=None if val is None else DetectionEvaluator(val, views, config, runtime),
        batch_source=WholeImageReader(source, views, workers=workers, pin_memory=pinned),
        metric="ap",
        validates_start=False,  # a new head detects nothing
        notes=_notes(source, positions),
    )
    return train(config, runtime, spec)


def fingerprints(config: TransferDetectionConfig) -> list[str]:
    """Return those of the images and objects of both splits. Raises as opening them."""
    splits = [split for split in (config.train_split, config.val_split) if split != NO_SPLIT]
    return [fingerprint(_open(config, split)) for split in splits]


def _open(config: TransferDetectionConfig, split: str) -> CocoSource:
    source = CocoSource(find_coco(config.data_dir, split))
    show_summary(source, strict=config.strict)
    return source


def _detector(config: TransferDetectionConfig, source: CocoSource, runtime: Runtime) -> Detector:
    """Return a detector with the backbone of --model and new pyramid and heads."""
    start = create_start(config, runtime.ranks, classes=source.classes, img_size=DEFAULT_IMG_SIZE)
    return Detector(
        start,
        num_classes=len(source.classes),
        freezes_first_stage=config.mode == "freeze-first-stage",
        channels=config.pyramid_channels,
        thresholds=Thresholds(config.score_threshold, config.nms_threshold, config.max_detections),
    )


def _with_epochs(config: TransferDetectionConfig, num_images: int) -> TransferDetectionConfig:
    """Return the settings with the passes over the images in which --iterations end."""
    return replace(
        config, epochs=math.ceil(config.iterations / updates_per_epoch(config, num_images))
    )


def _notes(source: CocoSource, positions: list[int]) -> tuple[str, ...]:
    empty = len(source) - len(positions)
    if not empty:
        return ()
    return (f"{console.count(empty, 'image')} of {source.name} without an object: not trained on",)
