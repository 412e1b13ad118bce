"""Check that a label set matches the images of a source and the arithmetic of this machine."""

from mealv2.data.source import ImageSource, fingerprint
from mealv2.errors import LabelSetError
from mealv2.label_set.boxes import check_box_drift
from mealv2.label_set.reader import LabelSet
from mealv2.text import first_names


def check_same_data(
    labels: LabelSet, source: ImageSource, *, allow_missing: bool = False, advice: str = ""
) -> None:
    """Raise LabelSetError, naming the difference, if the set was made from other images.

    With ``allow_missing`` the source may have more images than the set. ``advice`` ends the message
    if missing labels are the only difference.
    """
    if list(source.classes) != labels.classes:
        odd = sorted(set(source.classes) ^ set(labels.classes))
        raise LabelSetError(
            f"{labels.folder} is a label set of {labels.num_classes} classes, {source.name} has "
            f"{len(source.classes)} (only in one of them: {first_names(odd)}); "
            "give the --data-dir it was made from, and the --class-map, if it had one"
        )
    known = set(labels.keys()) | labels.skipped.keys()
    made_from = labels.manifest["plan"]["roles"][labels.split]["data_sha256"]
    if fingerprint(source, only=known if allow_missing else None) == made_from:
        return
    new, gone = sorted(set(source.keys) - known), sorted(known - set(source.keys))
    if allow_missing:
        new = []
    groups = (("images without labels", new), ("missing images with labels", gone))
    differences = [f"{what}: {len(keys)} ({first_names(keys)})" for what, keys in groups if keys]
    fix = "give the data it was made from, or precompute labels for this data"
    if new and not gone:
        fix += advice
    raise LabelSetError(
        f"{labels.folder} was made from other data than {source.name}: "
        f"{' and '.join(differences) or 'the same names, but other files'}; {fix}"
    )


def check_boxes(labels: LabelSet) -> None:
    """Raise LabelSetError where this machine computes other boxes than those that were labelled.

    Looks at the smallest shard: different arithmetic differs everywhere.
    """
    files = [file for file in labels.blocks[0][1] if file.num_images]
    if not files:
        raise LabelSetError(f"{labels.folder} has labels of no image")
    check_box_drift(min(files, key=lambda file: file.num_images), labels.views())
