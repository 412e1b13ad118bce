"""One transfer: one backbone, one data set, one mode and seed, through the training loop."""

from pathlib import Path
from typing import Any

from mealv2.data.layout_name import layout_name
from mealv2.data.source import ImageSource, fingerprint, multi_labels_of
from mealv2.errors import ConfigError
from mealv2.models import Classifier
from mealv2.models.frozen import FrozenClassifier
from mealv2.multi_label import MultiLabels, MultiLabelTask, labels_of
from mealv2.targets import HardLabels
from mealv2.task import HardLabelTask, Task
from mealv2.views import DrawnViews
from pipeline.comparison.starts import create_start
from pipeline.config import TransferConfig
from pipeline.loading.small_images import propose_crop
from pipeline.loading.sources import held_out_of, open_images, open_split, warn_single_class
from pipeline.runtime.device import Runtime
from pipeline.runtime.seeds import seed_everything
from pipeline.training.evaluator import Evaluator, MultiLabelEvaluator
from pipeline.training.features import FeatureTable
from pipeline.training.image_list import with_deleted
from pipeline.training.loop import train
from pipeline.training.resume import load_newest_weights
from pipeline.training.run_folder import has_checkpoint
from pipeline.training.spec import TrainingSpec, mixing_of
from pipeline.transfer.frozen import cached_features


def train_one(config: TransferConfig, runtime: Runtime) -> dict[str, Any]:
    """Train one model on one set and return the report. Raises as training.loop.train."""
    source, val = _open(config)
    seed_everything(config.seed)
    student = _student(config, list(source.classes), runtime)
    if config.resume is None and config.data_dir is not None:
        propose_crop(config, source, config.data_dir)
    features = val_features = None
    if isinstance(student, FrozenClassifier):
        features, val_features = cached_features(config, student, source, val, runtime)
    task, targets = _task(config, student, source)
    spec = TrainingSpec(
        command="transfer",
        task=task,
        student=student,
        source=source,
        positions=list(range(len(source))),
        targets=targets,
        img_size=config.img_size,
        views=DrawnViews(config.view_seed, config.view_recipe),
        resize=config.resize,
        mixing=mixing_of(config),
        evaluator=None if val is None else _evaluator(config, runtime, val, val_features),
        batch_source=features,
        metric=_metric(config, source),
    )
    return train(config, runtime, spec)


def fingerprints(config: TransferConfig) -> list[str]:
    """Return those of the images of both splits. Raises as opening them."""
    return [fingerprint(source) for source in _open(config) if source is not None]


def _open(config: TransferConfig) -> tuple[ImageSource, ImageSource | None]:
    """Open the images to train on and those to validate on, if any."""
    held_out = held_out_of(config, train_split=config.train_split)
    data_dir = config.data_dir
    assert data_dir is not None, "checked by the settings"
    source = open_images(config, data_dir, config.train_split, held_out=held_out, multi_label=True)
    if multi_labels_of(source) is None:
        warn_single_class(source)
        source = with_deleted(config, source)
    elif config.smoothing:
        raise ConfigError(f"--smoothing has no effect on {source.name}: images of several classes")
    val = open_split(
        config, data_dir, config.val_split, train=source, held_out=held_out, multi_label=True
    )
    return source, val


def _student(config: TransferConfig, classes: list[str], runtime: Runtime) -> Classifier:
    """Return the backbone with a new head for these classes, frozen with --mode frozen.

    The features of a resumed run are those of the backbone in its checkpoint, also where --model
    has other weights by now.
    """
    student = create_start(config, runtime.ranks, classes=classes, img_size=config.img_size)
    if config.mode != "frozen":
        return student
    if config.resume is not None and has_checkpoint(config.resume):
        load_newest_weights(config.resume, runtime.ranks, student)
    return FrozenClassifier(student, img_size=config.img_size)


def _task(
    config: TransferConfig, student: Classifier, source: ImageSource
) -> tuple[Task, HardLabels]:
    """Return loss and targets: softmax cross-entropy, or sigmoid for images of several classes."""
    num_views, seed = config.num_stored_views, config.seed
    several = multi_labels_of(source)
    if several is None:
        task = HardLabelTask(student, smoothing=config.smoothing)
        return task, HardLabels(source.labels, num_views=num_views, seed=seed)
    targets = MultiLabels(labels_of(source, several), num_views=num_views, seed=seed)
    return MultiLabelTask(student), targets


def _evaluator(
    config: TransferConfig, runtime: Runtime, val: ImageSource, features: FeatureTable | None
) -> Evaluator:
    kind = Evaluator if multi_labels_of(val) is None else MultiLabelEvaluator
    return kind(
        val,
        runtime,
        config,
        img_size=config.img_size,
        resize=config.resize,
        features=features,
    )


def _metric(config: TransferConfig, source: ImageSource) -> str:
    """Return the metric that chooses the best epoch: for VOC2007 its own 11-point mAP."""
    if multi_labels_of(source) is None:
        return "top1"
    data_dir = config.data_dir
    named = layout_name(data_dir) if isinstance(data_dir, Path) else None
    return "map_11point" if named is not None and named.layout == "voc2007" else "map"
