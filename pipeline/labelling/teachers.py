"""Build the ensemble of --teacher: NAME, NAME=CHECKPOINT, FILE.onnx, or several."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mealv2.errors import ConfigError
from mealv2.labelling.teachers import (
    describe,
    load_teacher,
    make_ensemble,
    own_size,
    teacher_size,
)
from mealv2.models import read_metadata
from mealv2.models.ensemble import TeacherEnsemble
from mealv2.models.onnx_file import OnnxClassifier, is_onnx
from mealv2.storage.weight_files import find_checkpoint
from pipeline import console
from pipeline.config import split_teachers
from pipeline.runtime import env
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
    specs: Sequence[str],
    *,
    classes: Sequence[str],
    img_size: int,
    teacher_img_size: int | None = None,
    runtime: Runtime,
) -> tuple[TeacherEnsemble, list[dict[str, Any]]]:
    """Return the ensemble on its device, and the description of each teacher in the plan.

    ``teacher_img_size`` is the size at which all of them see the views of ``img_size``, None as
    ``teacher_size``. Raises ConfigError if a head has another number of classes than the data, or
    if two teachers have the same weights.
    """
    parsed = parse(specs)
    sizes = [teacher_size(*teacher, img_size, teacher_img_size) for teacher in parsed]
    models = [
        load_teacher(name, checkpoint, classes=classes, img_size=size)
        for (name, checkpoint), size in zip(parsed, sizes, strict=True)
    ]
    ensemble, described = make_ensemble(models, sizes, img_size=img_size)
    return runtime.to_device(ensemble), described


def build_for(
    specs: Sequence[str],
    *,
    classes: Sequence[str],
    img_size: int,
    sizes: Sequence[int],
    is_right: Callable[[dict[str, Any]], bool],
    runtime: Runtime,
) -> tuple[TeacherEnsemble, list[dict[str, Any]]]:
    """Return as ``build`` the teachers of a plan, each at one of the plan's ``sizes``.

    It is the first one at which ``is_right`` accepts its description; that which its checkpoint was
    trained at is tried first.
    """
    models, chosen = [], []
    for name, checkpoint in parse(specs):
        own = own_size(name, checkpoint)
        tried = []
        for size in sorted(sizes, key=lambda size: size != own):
            model = load_teacher(name, checkpoint, classes=classes, img_size=size)
            tried.append((model, size))
            if is_right(describe(model) | {"img_size": size}):
                break
        else:
            tried = tried[:1]
        models.append(tried[-1][0])
        chosen.append(tried[-1][1])
    ensemble, described = make_ensemble(models, chosen, img_size=img_size)
    return runtime.to_device(ensemble), described


def classes_of(specs: Sequence[str]) -> list[str]:
    """Return the class names in the teachers' checkpoints and ONNX files, for pictures without
    classes.

    Raises ConfigError for a teacher without names, and if two have different ones.
    """
    known: dict[str, list[str]] = {}
    for name, checkpoint in parse(specs):
        classes = read_metadata(checkpoint).get("classes") if checkpoint else None
        if is_onnx(name):
            classes = OnnxClassifier(Path(name)).classes
        if not classes:
            raise ConfigError(
                f"the pictures have no classes, and --teacher {name} has no class names; "
                "give NAME=RUN, the run of `mealv2 finetune`, or its file of `mealv2 export`"
            )
        known[f"{name}={checkpoint}" if checkpoint else name] = list(classes)
    (first, expected), *others = known.items()
    for other, classes in others:
        if classes != expected:
            raise ConfigError(
                "the pictures have no classes, and the teachers have different classes: "
                f"{first} has {len(expected)}, {other} has {len(classes)}, or in another order"
            )
    if not env.is_child_process():
        names = console.first_names(expected)
        console.info(f"pictures without classes: the classes are the teachers' ({names})")
    return expected
