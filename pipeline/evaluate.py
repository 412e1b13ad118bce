"""Measure the accuracy of a checkpoint or timm model on a split, also per class."""

from typing import Any

from mealv2.data.held_out import by_name
from mealv2.errors import ConfigError
from pipeline import load_model
from pipeline.config import EvaluateConfig
from pipeline.loading.sources import held_out_of, open_images, warn_missing
from pipeline.runtime.device import create_runtime
from pipeline.training.evaluator import Evaluator


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate; return the report. Raises MealError and OSError."""
    runtime = create_runtime(config)
    held_out = held_out_of(config, train_split=config.train_split or "train")
    source = open_images(config, config.data_dir, config.val_split, held_out=held_out)
    known = load_model.known_classes(config)
    if known and (matched := by_name(source, known)) not in (None, source):
        missing = sorted(set(known) - set(source.classes))
        warn_missing(config.val_split, config.data_dir, missing)
        source = matched
    found = load_model.load(config, classes=source.classes)
    model = runtime.to_device(found.model)
    if model.num_classes != len(source.classes):
        raise ConfigError(
            f"{found.name} has {model.num_classes} classes, {source.name} has {len(source.classes)}"
        )
    evaluator = Evaluator(source, runtime, config, img_size=found.img_size, resize=config.resize)
    figures = evaluator(model, num_classes=model.num_classes)
    report = {"model": model.tag, "img_size": found.img_size, **figures.summary()}
    if config.results_file is not None:
        rows = [
            {
                "class": name,
                "images": images,
                "correct": correct,
                "top1": 100.0 * correct / max(1, images),
            }
            for name, (images, correct) in zip(source.classes, figures.per_class(), strict=True)
        ]
        load_model.write_results(config.results_file, {**report, "per_class": rows}, rows)
    return report
