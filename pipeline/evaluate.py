"""Accuracy of any checkpoint or timm model on a split, per class too."""

import csv
import io
from typing import Any

from mealv2.errors import ConfigError
from mealv2.files import canonical_json, write_whole
from mealv2.metrics import Evaluation
from pipeline import ready, runtime
from pipeline.config import EvaluateConfig
from pipeline.sources import open_images
from pipeline.training.evaluator import Evaluator


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate; return the report. Raises MealError and OSError."""
    machine = runtime.start(config)
    source = open_images(config, config.data_dir, config.val_split)
    found = ready.load(config, classes=source.classes)
    model = found.model
    if model.num_classes != len(source.classes):
        raise ConfigError(
            f"{found.name} knows {model.num_classes} classes, {source.name} has "
            f"{len(source.classes)}"
        )
    evaluator = Evaluator(source, machine, config, img_size=found.img_size, resize=config.resize)
    figures = evaluator(machine.place(model), num_classes=model.num_classes)
    report = {"model": model.tag, "img_size": found.img_size, **figures.summary()}
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
