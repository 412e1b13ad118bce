"""Load the teachers of a label set, and describe them in its plan."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mealv2.errors import ConfigError
from mealv2.label_set import UNKNOWN
from mealv2.messages import info
from mealv2.models import Classifier, create_classifier, read_metadata, weights_sha256
from mealv2.models.ensemble import TeacherEnsemble


def load_teacher(
    name: str, checkpoint: Path | None, *, classes: Sequence[str], img_size: int
) -> Classifier:
    """Return timm's model of a name with its weights, or those of a checkpoint.

    Raises ConfigError if its head has another number of classes than the data.
    """
    model = create_classifier(
        name,
        num_classes=len(classes) if checkpoint else None,
        pretrained=checkpoint is None,
        checkpoint=checkpoint,
        img_size=img_size,
        classes=classes,
    )
    for note in model.notes:
        info(note)
    if model.num_classes != len(classes):
        raise ConfigError(
            f"teacher {name} has {model.num_classes} classes, the data has {len(classes)}; "
            f"fine-tune it first (mealv2 finetune --model {name} …) and give {name}=RUN"
        )
    own_size = read_metadata(checkpoint).get("img_size") if checkpoint else None
    if own_size not in (None, img_size):
        info(
            f"teacher {name} was trained at {own_size} pixels and labels views of {img_size} "
            f"(--img-size {own_size}?)"
        )
    return model


def make_ensemble(models: Sequence[nn.Module]) -> tuple[TeacherEnsemble, list[dict[str, Any]]]:
    """Return the ensemble, and the description of each teacher in the plan.

    Raises ConfigError if two teachers have the same weights.
    """
    described = [_describe(model) for model in models]
    for one, other in itertools.combinations(described, 2):
        if one["weights_sha256"] == other["weights_sha256"] != UNKNOWN:
            raise ConfigError(
                f"teachers {one['model']} and {other['model']} have the same weights; give "
                "different teachers, with the full tag of their weights"
            )
    return TeacherEnsemble(models), described


def _describe(model: nn.Module) -> dict[str, Any]:
    if isinstance(model, Classifier):
        return {
            "model": model.tag,
            "weights_sha256": weights_sha256(model.backbone),
            "mean": list(model.preprocessing.mean),
            "std": list(model.preprocessing.std),
        }
    if isinstance(model, FunctionTeacher):
        return {"model": model.name, "weights_sha256": UNKNOWN, "mean": [], "std": []}
    name = f"{type(model).__module__}:{type(model).__qualname__}"
    return {"model": name, "weights_sha256": weights_sha256(model), "mean": [], "std": []}


class FunctionTeacher(nn.Module):
    """A function from images, uint8 B x 3 x S x S, to logits B x C, as a teacher."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        kind = function if hasattr(function, "__qualname__") else type(function)
        self.name = f"{kind.__module__}:{kind.__qualname__}"

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.function(images_BCHW)
