"""Check that a label set matches teachers and the arithmetic of this machine; read its views."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mealv2.data.content_hash import ImageCheck
from mealv2.data.pixels import Resize, operations_sha256, probe_sha256, resize_of
from mealv2.data.source import ImageSource
from mealv2.data.view_reader import ViewReader
from mealv2.errors import ConfigError, LabelSetError
from mealv2.label_set import UNKNOWN, LabelSet, labelled_hashes
from mealv2.labelling.teachers import sizes_in
from mealv2.models.ensemble import TeacherEnsemble
from mealv2.runtime import library_versions
from pipeline import console
from pipeline.config import CheckImages, Interpolation, resize_name
from pipeline.labelling import teachers
from pipeline.runtime.device import Runtime


def _library(resize: Resize) -> str:
    return "pillow" if resize.startswith("pil") else "torch"


def build_original_teachers(
    folder: Path, given: Sequence[str], plan: dict[str, Any], runtime: Runtime
) -> TeacherEnsemble:
    """Build the teachers that made a set, from --teacher or from the names in its plan.

    Raises LabelSetError if the weights differ or are unknown.
    """
    _check_teachers_known(folder, plan)
    made_by = plan["teachers"]
    specs = list(given)
    if not specs:
        for teacher in made_by:
            if teacher["model"].lower().endswith(".onnx"):
                raise ConfigError(
                    f"{folder} was made with the ONNX file {teacher['model']}; give the path of "
                    f"every teacher: --teacher …/{teacher['model']}"
                )
            if "." not in teacher["model"] or ":" in teacher["model"]:  # a file, or own code
                raise ConfigError(
                    f"{folder} was made with a local checkpoint of {teacher['model']}; give the "
                    f"path of every teacher: --teacher {teacher['model']}=RUN"
                )
        specs = [teacher["model"] for teacher in made_by]
    expected = [_identity(teacher, plan) for teacher in made_by]
    ensemble, described = teachers.build_for(
        specs,
        classes=plan["classes"],
        img_size=plan["img_size"],
        sizes=_sizes_of(plan),
        is_right=lambda teacher: _identity(teacher, plan) in expected,
        runtime=runtime,
    )
    found = [_identity(teacher, plan) for teacher in described]
    if sorted(expected) != sorted(found):
        new = [t["model"] for t, ids in zip(described, found, strict=True) if ids not in expected]
        raise LabelSetError(
            f"{folder} was made by {console.count(len(expected), 'teacher')} with other weights or "
            f"normalisation than {new[0] if new else f'these {len(found)}'}; give the teachers of "
            f"its manifest: {', '.join(teacher['model'] for teacher in made_by)}"
        )
    return ensemble


def _sizes_of(plan: dict[str, Any]) -> list[int]:
    """Return the sizes at which the teachers of a plan see a view, each once."""
    img_size = plan["img_size"]
    return list(dict.fromkeys(teacher.get("img_size", img_size) for teacher in plan["teachers"]))


def _identity(teacher: dict[str, Any], plan: dict[str, Any]) -> tuple[Any, ...]:
    """Return what a teacher's labels depend on: weights, normalisation, size of its views."""
    size = teacher.get("img_size", plan["img_size"])
    return teacher["weights_sha256"], teacher["mean"], teacher["std"], size


def check_precision(folder: Path, plan: dict[str, Any], runtime: Runtime) -> None:
    """Raise ConfigError if the teachers would run in another precision than the set's."""
    _check_teachers_known(folder, plan)
    if runtime.precision != plan["precision"]:
        raise ConfigError(
            f"{folder} was computed in {plan['precision']}, this run computes in "
            f"{runtime.precision}; use --amp and --amp-dtype as when it was made"
        )


def _check_teachers_known(folder: Path, plan: dict[str, Any]) -> None:
    if any(teacher["weights_sha256"] == UNKNOWN for teacher in plan["teachers"]):
        raise LabelSetError(
            f"{folder} was imported and the weights of its teachers are unknown: no teacher can "
            "add labels or be compared with them"
        )


def choose_resize(
    labels: LabelSet, exact_pil: bool | None = None, interpolation: Interpolation | None = None
) -> Resize:
    """Return how to resize the views of a set: as when it was labelled, unless a flag differs.

    Logs a warning if the pixels will differ from the labelled ones. Raises ConfigError for another
    filter.
    """
    plan = labels.manifest["plan"]
    _check_operations(labels)
    resize = resize_of(plan.get("interpolation"))
    labelled: Interpolation = "bicubic" if resize.endswith("bicubic") else "bilinear"
    if interpolation not in (None, labelled):
        raise ConfigError(
            f"--interpolation {interpolation}: the views of {labels.folder} were resized with the "
            f"{labelled} filter; leave out the flag"
        )
    if exact_pil is not None and exact_pil != resize.startswith("pil"):
        console.info(
            f"the views of {labels.folder} were resized by {_library(resize)}; the pixels of this "
            "run differ by up to 2 of 255"
        )
        return resize_name(exact_pil, labelled)
    if plan.get("probe_sha256") not in (None, probe_sha256(resize)):
        library = _library(resize)
        version = labels.manifest.get("versions", {}).get(library, "another version")
        console.info(
            f"the views of {labels.folder} were resized by {library} {version}; "
            f"{library_versions()[library]} on this machine gives slightly different pixels"
        )
    return resize


def _check_operations(labels: LabelSet) -> None:
    """Log a warning if RandAugment and the like give other pixels on this machine."""
    plan = labels.manifest["plan"]
    if plan.get("operations_sha256") in (None, operations_sha256()):
        return
    made_with, found = labels.manifest.get("versions", {}), library_versions()
    libraries = " and ".join(
        f"{name} {made_with.get(name, 'of another version')} (here {found[name]})"
        for name in ("timm", "pillow")
    )
    console.info(
        f"the pixels of the views of {labels.folder} were changed by {libraries}; this machine "
        "gives other pixels"
    )


def view_reader(
    labels: LabelSet, source: ImageSource, *, check_images: CheckImages = "first"
) -> ViewReader:
    """Return a reader of the views that a set labels, cut and resized as for its labels.

    It compares the images with those that were labelled, and keeps their hashes.
    """
    return ViewReader(
        source,
        img_size=labels.img_size,
        views=labels.views(),
        resize=choose_resize(labels),
        other_sizes=sizes_in(labels.manifest["plan"]),
        check=image_check(labels, source, check_images),
        keeps_hashes=True,
    )


def image_check(labels: LabelSet, source: ImageSource, when: CheckImages) -> ImageCheck | None:
    """Return what compares the images of a source with those that a set labels, by content.

    None for ``never``, or if the set has no content hashes. Logs how many images have none.
    """
    if when == "never":
        return None
    known = labelled_hashes(labels, source.keys)
    if not known.num_known:
        console.info(
            f"{labels.folder} has no content hashes: its images are compared by name and size only"
        )
        return None
    has_labels_N = labels.has_labels(source.keys)
    if unknown := int((has_labels_N & ~known.is_known_N).sum()):
        console.info(
            f"{labels.folder} has no content hashes of {console.count(unknown, 'image')}: compared "
            "by name and size only"
        )
    return ImageCheck(known, always=when == "always")
