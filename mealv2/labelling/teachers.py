"""Load the teachers of a label set, and describe them in its plan."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mealv2.errors import ConfigError
from mealv2.label_set import UNKNOWN
from mealv2.messages import info
from mealv2.models import Classifier, create_classifier, read_metadata, weights_sha256
from mealv2.models.ensemble import TeacherEnsemble
from mealv2.models.onnx_file import OnnxClassifier, is_onnx


def own_size(name: str, checkpoint: Path | None) -> int | None:
    """Return the image size that a checkpoint or an ONNX file is for, None if it does not say."""
    if is_onnx(name):
        return OnnxClassifier(Path(name)).img_size
    size = read_metadata(checkpoint).get("img_size") if checkpoint else None
    return size if isinstance(size, int) else None


def teacher_size(name: str, checkpoint: Path | None, img_size: int, given: int | None) -> int:
    """Return the size at which a teacher sees views of ``img_size``, and show where it differs.

    It is the ``given`` size, else that which its checkpoint was trained at, else that of the views.
    """
    own = own_size(name, checkpoint)
    size = given or own or img_size
    if size != img_size:
        info(
            f"teacher {name} sees views of {size} pixels"
            f"{', which it was trained at' if size == own else ''}; the student's are {img_size} "
            f"(--teacher-img-size {img_size} for the same)"
        )
    elif own not in (None, size):
        info(
            f"teacher {name} was trained at {own} pixels and labels views of {size} "
            "(--teacher-img-size)"
        )
    return size


def load_teacher(
    name: str, checkpoint: Path | None, *, classes: Sequence[str], img_size: int
) -> Classifier | OnnxClassifier:
    """Return timm's model of a name with its weights, or those of a checkpoint, for a size.

    ``name`` may be the path of an ONNX file. Raises ConfigError if its head has another number of
    classes than the data.
    """
    if is_onnx(name):
        return _load_onnx(Path(name), classes=classes, img_size=img_size)
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
    return model


def _load_onnx(path: Path, *, classes: Sequence[str], img_size: int) -> OnnxClassifier:
    model = OnnxClassifier(path)
    for note in model.notes:
        info(note)
    if model.has_fixed_size and model.img_size != img_size:
        raise ConfigError(
            f"teacher {path} takes images of {model.img_size} pixels only, not of {img_size}; "
            f"leave out --teacher-img-size, or give {model.img_size}"
        )
    size = model.img_size or img_size
    num_classes = model.num_classes or model(torch.zeros(1, 3, size, size)).shape[1]
    if num_classes != len(classes):
        raise ConfigError(
            f"teacher {path} has {num_classes} classes, the data has {len(classes)}; give a file "
            "of a model of these classes"
        )
    if model.classes is not None and model.classes != list(classes):
        raise ConfigError(f"teacher {path} was trained on other classes than the data has")
    return model


def make_ensemble(
    models: Sequence[nn.Module], sizes: Sequence[int], *, img_size: int
) -> tuple[TeacherEnsemble, list[dict[str, Any]]]:
    """Return the ensemble, and the description of each teacher in the plan.

    ``sizes`` are those at which they see views of ``img_size``; a description has the size where
    it is another one. Raises ConfigError if two teachers have the same weights.
    """
    others = [None if size == img_size else size for size in sizes]
    described = [
        describe(model) | ({} if size is None else {"img_size": size})
        for model, size in zip(models, others, strict=True)
    ]
    for one, other in itertools.combinations(described, 2):
        if one["weights_sha256"] == other["weights_sha256"] != UNKNOWN:
            raise ConfigError(
                f"teachers {one['model']} and {other['model']} have the same weights; give "
                "different teachers, with the full tag of their weights"
            )
    return TeacherEnsemble(models, others), described


def sizes_in(plan: dict[str, Any]) -> tuple[int, ...]:
    """Return the sizes at which the teachers of a plan see a view, beside that of the views."""
    sizes = {teacher["img_size"] for teacher in plan.get("teachers", ()) if "img_size" in teacher}
    return tuple(sorted(sizes - {plan["img_size"]}))


def describe(model: nn.Module) -> dict[str, Any]:
    """Return the name, the hash of the weights and the normalisation of a teacher."""
    if isinstance(model, Classifier):
        return {
            "model": model.tag,
            "weights_sha256": weights_sha256(model.backbone),
            "mean": list(model.preprocessing.mean),
            "std": list(model.preprocessing.std),
        }
    if isinstance(model, OnnxClassifier):
        figures = {"mean": model.mean, "std": model.std}
        return {"model": model.name, "weights_sha256": model.sha256, **figures}
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
