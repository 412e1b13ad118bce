"""Run the models of a run on its validation images: predictions by class, and features."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mealv2.data.held_out import by_name
from mealv2.data.loader import on_device, read_views
from mealv2.data.requests import Batch, centre_requests, check_failures
from mealv2.data.source import ImageSource, multi_labels_of
from mealv2.data.view_reader import ViewReader
from mealv2.errors import ConfigError
from mealv2.models import Classifier, create_classifier
from mealv2.models.factory import is_factory
from mealv2.report.classes import ClassResults
from mealv2.report.run import Run
from mealv2.storage.urls import Location
from pipeline import load_model
from pipeline.config import NO_SPLIT, EvaluateConfig, SourceConfig
from pipeline.loading.sources import held_out_of, open_images
from pipeline.runtime.device import Runtime, create_runtime

MAX_ON_CPU = 2000  # images that a model is run on without a GPU
_FROM_RUN = (
    "val_split",
    "val_fraction",
    "split_seed",
    "exact_pil",
    "interpolation",
    "on_bad_image",
)
_DATA_FLAGS = ("class_map", "cache_dir", "cache_size", "download", "strict")
_SEED = 0


@dataclass(frozen=True)
class Validation:
    """The validation images of a run: ``positions`` are measured, of all or a seeded sample."""

    source: ImageSource
    config: EvaluateConfig
    runtime: Runtime
    positions: list[int]

    @property
    def size_text(self) -> str:
        """The number of images in words."""
        images, total = len(self.positions), len(self.source)
        if images == total:
            return f"all {total:,} validation images"
        return f"a random sample (seed {_SEED}) of {images:,} of {total:,} validation images"

    def of_classes(self, class_ids: list[int], most: int) -> list[int]:
        """Return positions of up to ``most`` images of each of some classes."""
        found: list[int] = []
        labels_N = np.asarray(self.source.labels)
        for class_id in class_ids:
            found += np.flatnonzero(labels_N == class_id)[:most].tolist()
        return found


@dataclass(frozen=True)
class Measured:
    """A model's results on the measured images, and the features (M x D) of some others."""

    results: ClassResults
    features_MD: np.ndarray | None
    hard_M: np.ndarray


def open_validation(run: Run, data_dir: Location, data: SourceConfig) -> Validation:
    """Open the images that a run was validated on, read as ``data`` says.

    Raises ConfigError, DataError and OSError.
    """
    if run.config.get("val_split") == NO_SPLIT:
        raise ConfigError("the run has no validation images")
    known = {name: run.config[name] for name in _FROM_RUN if run.config.get(name) is not None}
    if "val_fraction" not in known:
        known.pop("split_seed", None)
    elif run.config.get("train_split"):
        known["train_split"] = run.config["train_split"]
    if run.config.get("class_map"):
        known["class_map"] = run.config["class_map"]
    flags = {name: value for name, value in data.as_json().items() if name in _DATA_FLAGS}
    known |= {name: value for name, value in flags.items() if value is not None}
    values = {**known, "data_dir": str(data_dir), "checkpoint": str(run.path)}
    config = EvaluateConfig.from_json(values)
    held_out = held_out_of(config, train_split=config.train_split or "train")
    source = open_images(config, config.data_dir, config.val_split, held_out=held_out)
    if multi_labels_of(source) is not None:
        raise ConfigError("its images have several classes")
    classes = (run.student or {}).get("classes")
    matched = by_name(source, classes) if classes else source
    if matched is None:
        raise ConfigError("its validation images have other classes")
    runtime = create_runtime(config)
    positions = list(range(len(matched)))
    if runtime.device.type == "cpu" and len(positions) > MAX_ON_CPU:
        rng = np.random.default_rng(_SEED)
        positions = np.sort(rng.choice(len(positions), MAX_ON_CPU, replace=False)).tolist()
    return Validation(matched, config, runtime, positions)


def load_student(validation: Validation, checkpoint: Path) -> tuple[Classifier, int]:
    """Return the model of a run or checkpoint, and the side of its images; raises MealError."""
    config = EvaluateConfig.from_json(
        {**validation.config.as_json(), "checkpoint": str(checkpoint), "model": None}
    )
    found = load_model.load(config, classes=validation.source.classes)
    return found.model, found.img_size


def load_start(validation: Validation, run: Run, *, img_size: int) -> Classifier:
    """Return the model that a run started from; raises MealError where there is none to load.

    ``img_size`` is the side of the images that its student is evaluated on.

    A start from random weights, or with a new head, has no accuracy to compare with.
    """
    name, checkpoint = str(run.config.get("model")), run.config.get("initial_checkpoint")
    classes = validation.source.classes
    if is_factory(name):
        raise ConfigError("the model is one of your own code")
    if checkpoint is None and run.config.get("pretrained") is False:
        raise ConfigError("the run started from random weights")
    model = create_classifier(
        name,
        num_classes=len(classes) if checkpoint else None,
        pretrained=checkpoint is None,
        checkpoint=Path(checkpoint) if checkpoint else None,
        img_size=img_size,
        classes=classes if checkpoint else None,
    )
    if model.num_classes != len(classes):
        raise ConfigError("the start has a head of other classes")
    return model


def measure(
    validation: Validation, model: Classifier, img_size: int, features_of: list[int]
) -> Measured:
    """Run a model on the measured images; also on those at ``features_of``, for features.

    Raises DataError for an image that cannot be read, unless the run skipped such images.
    """
    model = validation.runtime.to_device(model).eval()
    labels = validation.source.labels
    hard: list[int] = []
    predicted: list[Tensor] = []
    for batch in _batches(validation, validation.positions, img_size):
        with torch.no_grad(), validation.runtime.autocast():
            predicted.append(model(batch.images_BCHW).float().argmax(dim=1).cpu())
        hard += [labels[p] for p in batch.positions]
    results = ClassResults.from_pairs(
        np.array(hard), torch.cat(predicted).numpy(), len(validation.source.classes)
    )
    features: list[Tensor] = []
    of_features: list[int] = []
    if hasattr(model.backbone, "forward_head"):  # timm's models have it
        for batch in _batches(validation, features_of, img_size):
            features.append(_features(model, batch.images_BCHW))
            of_features += [labels[p] for p in batch.positions]
    values = torch.cat(features).numpy() if features else None
    return Measured(results, values, np.array(of_features, dtype=np.int64))


@torch.no_grad()
def _features(model: Classifier, images_BCHW: Tensor) -> Tensor:
    backbone: Any = model.backbone
    maps = backbone.forward_features(model.normalise(images_BCHW))
    features_BD: Tensor = backbone.forward_head(maps, pre_logits=True)
    return features_BD.float().flatten(1).cpu()


def _batches(validation: Validation, positions: list[int], img_size: int) -> Iterator[Batch]:
    """Yield the centre crops of images, on the device."""
    config = validation.config
    loader = read_views(
        ViewReader(validation.source, img_size=img_size, resize=config.resize),
        centre_requests(positions, config.batch_size),
        workers=config.workers,
        pin_memory=validation.runtime.should_pin_memory,
    )
    for batch in on_device(loader, validation.runtime.device):
        check_failures(validation.source, batch.failed, config.on_bad_image)
        if batch.positions:
            yield batch
