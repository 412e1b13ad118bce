"""Make a label set from its plan: the missing shards, then the manifest."""

from collections.abc import Sequence
from typing import Any

from mealv2 import label_set
from mealv2.labelling import manifest
from mealv2.labelling.annotator import Annotator
from mealv2.labelling.plan import LabelSplit
from mealv2.labelling.shards import CompleteCheck, Stop, find_missing, label_shards
from mealv2.labelling.store import Store
from mealv2.storage.json_format import json_sha256


def make_label_set(
    splits: Sequence[LabelSplit],
    plan: dict[str, Any],
    annotator: Annotator,
    store: Store,
    *,
    workers: int,
    stop: Stop | None = None,
    check_complete: CompleteCheck | None = None,
) -> tuple[dict[str, Any], int]:
    """Make the missing shards of a plan that was claimed; return the manifest, and their number.

    Complete shards are kept; if others are missing, ``check_complete`` checks their images first.
    Raises MealError and OSError.
    """
    # The SHA-256 in the manifest of an earlier run detect damage in bytes that the checksums inside
    # a shard do not cover.
    listed = label_set.listed_sha256(store.folder, json_sha256(plan))
    num_made = 0
    missing_of = {split.name: find_missing(split, store, listed=listed) for split in splits}
    if any(missing_of.values()) and check_complete is not None:
        for split in splits:
            missing = missing_of[split.name]
            check_complete(split, [n for n in range(len(split.shards)) if n not in missing])
    for split in splits:
        missing = missing_of[split.name]
        label_shards(split, missing, annotator, store, workers=workers, stop=stop)
        num_made += len(missing)
        if split.name == "val":  # shows bad teachers before the hours of train
            checked = manifest.require_complete(store.folder, split.planned, split.plan_sha256)
            manifest.log_accuracy(manifest.accuracy_of(plan, checked), len(plan["classes"]))

    # Readers refuse a folder without a manifest.
    # If nothing was made, keep the batch size that the labels were made with.
    recorded = None if num_made else manifest.recorded_batch_size(store.folder)
    batch_size = recorded or annotator.batch_size
    return manifest.write_manifest(store, plan, batch_size=batch_size, listed=listed), num_made
