"""Whether a label set fits these images, these teachers, this machine's arithmetic."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mealv2.data.pixels import Resize, probe_sha256, resize_of
from mealv2.data.source import ImageSource, fingerprint
from mealv2.errors import ConfigError, LabelSetError
from mealv2.label_set import UNKNOWN, LabelSet
from mealv2.models.ensemble import TeacherEnsemble
from pipeline import console
from pipeline.console import first_names
from pipeline.labelling import teachers
from pipeline.runtime.device import Runtime, library_versions

_LIBRARY: dict[Resize, str] = {"torch": "torch", "pil": "pillow"}


def check_same_data(
    labels: LabelSet, source: ImageSource, *, allow_missing: bool = False, advice: str = ""
) -> None:
    """Raise LabelSetError, naming the difference, when the labels are of other images.

    With ``allow_missing`` the source may have images that the set does not. ``advice`` is added to
    the message where missing labels are the only difference.
    """
    if list(source.classes) != labels.classes:
        odd = sorted(set(source.classes) ^ set(labels.classes))
        raise LabelSetError(
            f"{labels.folder} is a label set of {labels.num_classes} classes, {source.name} has "
            f"{len(source.classes)} (only in one of them: {first_names(odd)}); "
            "give its own --data-dir"
        )
    known = set(labels.keys()) | labels.skipped.keys()
    made_from = labels.manifest["plan"]["roles"][labels.split]["data_sha256"]
    if fingerprint(source, only=known if allow_missing else None) == made_from:
        return
    new, gone = sorted(set(source.keys) - known), sorted(known - set(source.keys))
    if allow_missing:
        new = []
    differences = [f"images without labels: {len(new)} ({first_names(new)})"] if new else []
    differences += (
        [f"missing images with labels: {len(gone)} ({first_names(gone)})"] if gone else []
    )
    fix = "give the data it was made from, or precompute labels for this data"
    if new and not gone:
        fix += advice
    raise LabelSetError(
        f"{labels.folder} was made from other data than {source.name}: "
        f"{' and '.join(differences) or 'the same names, but other files'}; {fix}"
    )


def build_original_teachers(
    folder: Path, given: Sequence[str], plan: dict[str, Any], runtime: Runtime
) -> TeacherEnsemble:
    """Build the teachers of the set in a folder, as its plan or --teacher names them.

    Raises LabelSetError where the weights differ or are unknown.
    """
    _check_teachers_known(folder, plan)
    made_by = plan["teachers"]
    specs = list(given)
    if not specs:
        for teacher in made_by:
            if "." not in teacher["model"]:
                raise ConfigError(
                    f"{folder} was made by a local checkpoint of {teacher['model']}; "
                    f"give its path: --teacher {teacher['model']}=RUN, for every teacher"
                )
        specs = [teacher["model"] for teacher in made_by]
    ensemble, described = teachers.build(
        specs, classes=plan["classes"], img_size=plan["img_size"], runtime=runtime
    )
    expected, found = (
        [(teacher["weights_sha256"], teacher["mean"], teacher["std"]) for teacher in group]
        for group in (made_by, described)
    )
    if sorted(expected) != sorted(found):
        new = [t["model"] for t, ids in zip(described, found, strict=True) if ids not in expected]
        raise LabelSetError(
            f"{folder} was made by {len(expected)} teachers with other weights or "
            f"normalisation than {new[0] if new else f'these {len(found)}'}; give those of its "
            f"manifest: {', '.join(teacher['model'] for teacher in made_by)}"
        )
    return ensemble


def check_precision(folder: Path, plan: dict[str, Any], runtime: Runtime) -> None:
    """Raise ConfigError where teachers would compute in another precision than the set's."""
    _check_teachers_known(folder, plan)
    if runtime.precision != plan["precision"]:
        raise ConfigError(
            f"{folder} was computed in {plan['precision']}, this is {runtime.precision}; give or "
            "leave out --amp and --amp-dtype as when it was made"
        )


def _check_teachers_known(folder: Path, plan: dict[str, Any]) -> None:
    if any(teacher["weights_sha256"] == UNKNOWN for teacher in plan["teachers"]):
        raise LabelSetError(
            f"the labels of {folder} were imported, and the weights of their teachers are unknown: "
            "no teacher can add to them or be compared with them"
        )


def choose_resize(labels: LabelSet, exact_pil: bool | None = None) -> Resize:
    """Return how to resize the views of a set: as when it was labelled, unless a flag differs.

    Warns where the pixels will differ from those that were labelled.
    """
    plan = labels.manifest["plan"]
    resize = resize_of(plan.get("interpolation"))
    if exact_pil is not None and exact_pil != (resize == "pil"):
        console.info(
            f"{labels.folder} was labelled on views resized by {_LIBRARY[resize]}; the pixels of "
            "this run differ from them by up to 2 of 255"
        )
        return "pil" if exact_pil else "torch"
    if plan.get("probe_sha256") not in (None, probe_sha256(resize)):
        library = _LIBRARY[resize]
        version = labels.manifest.get("versions", {}).get(library, "another version")
        console.info(
            f"{labels.folder} was labelled on views resized by {library} {version}; "
            f"{library_versions()[library]} on this machine gives slightly different pixels"
        )
    return resize
