"""Build the ensemble of --teacher: NAME, NAME=CHECKPOINT, or several separated by commas."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mealv2.errors import ConfigError
from mealv2.models import Classifier, create_classifier, read_metadata, weights_sha256
from mealv2.models.ensemble import TeacherEnsemble
from mealv2.storage.weight_files import find_checkpoint
from pipeline import console
from pipeline.config import split_teachers
from pipeline.runtime.device import Runtime


def parse(specs: Sequence[str]) -> list[tuple[str, Path | None]]:
    """Return the model name and the checkpoint, if there is one, of every teacher."""
    teachers = []
    for spec in split_teachers(specs):
        name, _, checkpoint = spec.partition("=")
        if not name or spec.endswith("="):
            raise ConfigError(f"--teacher {spec!r}: write NAME or NAME=CHECKPOINT")
        teachers.append((name, find_checkpoint(Path(checkpoint)) if checkpoint else None))
    return teachers


def build(
    specs: Sequence[str], *, classes: Sequence[str], img_size: int, runtime: Runtime
) -> tuple[TeacherEnsemble, list[dict[str, Any]]]:
    """Return the ensemble on its device, and the description of each teacher in the plan.

    Raises ConfigError if a head has another number of classes than the data, or if two teachers
    have the same weights.
    """
    models: list[Classifier] = []
    described: list[dict[str, Any]] = []
    for name, checkpoint in parse(specs):
        model = create_classifier(
            name,
            num_classes=len(classes) if checkpoint else None,
            pretrained=checkpoint is None,
            checkpoint=checkpoint,
            img_size=img_size,
            classes=classes,
        )
        for note in model.notes:
            console.info(note)
        if model.num_classes != len(classes):
            raise ConfigError(
                f"teacher {name} has {model.num_classes} classes, the data has {len(classes)}; "
                f"fine-tune it first (mealv2 finetune --model {name} …) and give {name}=RUN"
            )
        own_size = read_metadata(checkpoint).get("img_size") if checkpoint else None
        if own_size not in (None, img_size):
            console.info(
                f"teacher {name} was trained at {own_size} pixels and labels views of {img_size} "
                f"(--img-size {own_size}?)"
            )
        models.append(model)
        described.append(
            {
                "model": model.tag,
                "weights_sha256": weights_sha256(model.backbone),
                "mean": list(model.preprocessing.mean),
                "std": list(model.preprocessing.std),
            }
        )
    for one, other in itertools.combinations(described, 2):
        if one["weights_sha256"] == other["weights_sha256"]:
            raise ConfigError(
                f"teachers {one['model']} and {other['model']} have the same weights; give "
                "different teachers, with the full tag of their weights"
            )
    return runtime.to_device(TeacherEnsemble(models)), described
