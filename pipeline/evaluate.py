"""Accuracy of any checkpoint or timm model on a split, per class too."""

import csv
import io
from typing import Any

from mealv2.errors import ConfigError
from mealv2.files import canonical_json, write_whole
from mealv2.images import open_source
from mealv2.metrics import Evaluation
from mealv2.models import Preprocessing, create_classifier, find_checkpoint, read_metadata
from mealv2.released import find
from pipeline import runtime
from pipeline.config import DEFAULT_IMG_SIZE, EvaluateConfig
from pipeline.evaluation import Evaluator


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate; return the report. Raises MealError and OSError."""
    machine = runtime.start(config)
    source = open_source(config.data_dir, config.val_split)
    checkpoint = find_checkpoint(config.checkpoint) if config.checkpoint else None
    stored = read_metadata(checkpoint) if checkpoint else {}
    name = config.model or stored.get("architecture")
    if name is None:
        raise ConfigError(f"{checkpoint} does not say what model it is; give --model")
    released = find(name)
    own_size = stored.get("img_size") or (released.img_size if released else DEFAULT_IMG_SIZE)
    img_size = config.img_size or own_size
    model = create_classifier(
        name,
        num_classes=len(source.classes) if checkpoint else None,
        pretrained=checkpoint is None,
        checkpoint=checkpoint,
        img_size=img_size,
        classes=source.classes,
        preprocessing=Preprocessing(config.mean, config.std)
        if config.mean and config.std
        else None,
    )
    if model.num_classes != len(source.classes):
        raise ConfigError(
            f"{name} knows {model.num_classes} classes, {source.name} has {len(source.classes)}"
        )
    evaluator = Evaluator(source, machine, config, img_size=img_size)
    figures = evaluator(model.to(machine.device), num_classes=model.num_classes)
    report = {"model": model.tag, "img_size": img_size, **figures.summary()}
    if config.results_file is not None:
        _write_per_class(config, source.classes, figures, report)
    return report


def _write_per_class(
    config: EvaluateConfig, classes: list[str], figures: Evaluation, report: dict[str, Any]
) -> None:
    rows = [
        {
            "class": name,
            "images": images,
            "correct": correct,
            "top1": 100.0 * correct / max(1, images),
        }
        for name, (images, correct) in zip(classes, figures.per_class(), strict=True)
    ]
    assert config.results_file is not None
    if config.results_file.suffix == ".json":
        data = canonical_json({**report, "per_class": rows})
    else:
        text = io.StringIO()
        writer = csv.DictWriter(text, ["class", "images", "correct", "top1"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        data = text.getvalue()
    write_whole(config.results_file, data.encode())
