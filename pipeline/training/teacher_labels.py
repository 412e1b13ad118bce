"""Labels of teachers stored apart, in a folder with a label set of each: MEAL without teachers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mealv2.data.source import ImageSource
from mealv2.errors import ConfigError, LabelSetError
from mealv2.label_set import LabelSet, labelled_hashes
from mealv2.meal import StoredTeachers
from mealv2.soft_labels import Labels, SoftLabels
from mealv2.storage.json_format import json_sha256
from mealv2.targets import StoredLabels
from mealv2.teacher_sets import sets_of
from pipeline import console
from pipeline.config import DistillConfig, plain, without_effect
from pipeline.labelling.compatibility import choose_resize, image_check
from pipeline.training.label_source import (
    LabelSource,
    accuracies_of,
    check_labels,
    open_val_labels,
    positions_to_train_on,
    resumed_labels,
    what_is_used,
)

_PER_TEACHER = "`mealv2 precompute --store per-teacher`"


class MeanLabels:
    """The mean of what several label sets have of a validation split; a LabelTable."""

    def __init__(self, sets: Sequence[LabelSet]) -> None:
        self._sets = sets

    def __contains__(self, key: object) -> bool:
        return all(key in labels for labels in self._sets)

    def soft_labels(self, keys: Sequence[str], views: Sequence[int]) -> Labels:
        """Return the labels of images, dense; raises as LabelSet.lookup."""
        dense = [labels.soft_labels(keys, views).to_dense() for labels in self._sets]
        return SoftLabels.from_dense(torch.stack(dense).mean(dim=0))


def from_sets_of_teachers(
    config: DistillConfig, folder: Path, source: ImageSource, val: ImageSource | None
) -> LabelSource:
    """Use the label sets in a folder, one for each teacher; or the set of a single teacher.

    Raises ConfigError for a set that has the mean of several teachers or lacks what the losses
    need, LabelSetError for sets of different images or views.
    """
    folders = sets_of(folder)
    kept = resumed_labels(config) or [{}] * len(folders)
    if len(kept) != len(folders):
        raise LabelSetError(
            f"{folder} has {console.count(len(folders), 'label set')}, the run started with "
            f"{len(kept)}; restore them, or start a new run"
        )
    num_sets = len(folders)
    sets = [
        LabelSet.open(each, **used, num_sets=num_sets)
        for each, used in zip(folders, kept, strict=True)
    ]
    _check_teachers(config, sets)
    _check_same_views(sets)
    for labels in sets:
        check_labels(config, labels, source)
    _check_same_images(sets, source)
    val_sets = [found for labels in sets if (found := open_val_labels(labels, val)) is not None]
    val_check = None
    if val_sets and val is not None:
        val_check = image_check(val_sets[0], val, config.check_images)
    used = [what_is_used(labels) for labels in sets]
    provenance = {
        "path": str(plain(config.labels)),
        "plan_sha256": json_sha256([each["plan_sha256"] for each in used]),
        "num_views": sets[0].num_views,
        "teachers": [labels.manifest["plan"]["teachers"][0] for labels in sets],
        "sets": used,
    }
    return LabelSource(
        _targets(config, sets, source),
        positions_to_train_on(config, sets, source),
        sets[0].img_size,
        sets[0].views(),
        choose_resize(sets[0], config.exact_pil, config.interpolation),
        provenance,
        MeanLabels(val_sets) if val_sets else None,
        _accuracies(val_sets),
        check=image_check(sets[0], source, config.check_images),
        val_check=val_check,
    )


def _targets(
    config: DistillConfig, sets: Sequence[LabelSet], source: ImageSource
) -> StoredTeachers:
    return StoredTeachers(
        [
            StoredLabels(
                labels,
                source.keys,
                seed=config.seed,
                reuse=config.reuses_views,
                missing=config.missing,
            )
            for labels in sets
        ],
        source.labels,
        seed=config.seed,
        selection=config.teacher_selection,
    )


def _accuracies(val_sets: Sequence[LabelSet]) -> dict[str, dict[str, float]]:
    """Return what stage one measured of each teacher, by name."""
    found: dict[str, dict[str, float]] = {}
    for labels in val_sets:
        found |= accuracies_of(labels)
    found.pop("ensemble", None)  # of one teacher
    return found


# --- what the sets must have ----------------------------------------------------------------------


def _check_teachers(config: DistillConfig, sets: Sequence[LabelSet]) -> None:
    """Raise ConfigError for a set of several teachers, or without logits that a loss needs."""
    for labels in sets:
        num = len(labels.manifest["plan"]["teachers"])
        if num > 1:
            raise ConfigError(
                f"{labels.folder} has the mean of {num} teachers, and --method meal needs the "
                f"labels of each: make them with {_PER_TEACHER}, or use --method mealv2"
            )
        if config.needs_stored_logits and not labels.encoding.logits:
            raise ConfigError(_no_logits(config, labels))
    if len(sets) == 1:
        without_effect(config, "with labels of one teacher", "teacher_selection")


def _no_logits(config: DistillConfig, labels: LabelSet) -> str:
    """Return the message that names the settings that need logits, and those that do not."""
    needs, others = [], []
    if config.discriminator != "off":
        needs.append(f"--discriminator {config.discriminator}")
        others.append("--discriminator off")
    if config.block_loss in ("l1", "l2"):
        needs.append(f"--block-loss {config.block_loss}")
        others.append(f"--block-loss {config.block_loss}_soft")
    verb = "needs" if len(needs) == 1 else "need"
    return (
        f"{' and '.join(needs)} {verb} logits, and {labels.folder} has none: make the labels with "
        f"--store-logits, or use {' and '.join(others)}"
    )


def _check_same_views(sets: Sequence[LabelSet]) -> None:
    """Raise LabelSetError for sets that label different images, or different views of them."""
    expected = _views_of(sets[0])
    for labels in sets[1:]:
        found = _views_of(labels)
        for name in expected | found:
            if expected.get(name) != found.get(name):
                both = f"{_short(expected.get(name))} and {_short(found.get(name))}"
                raise LabelSetError(
                    f"{sets[0].folder} and {labels.folder} do not label the same: different "
                    f"{name} ({both}); make both with one {_PER_TEACHER}"
                )


def _views_of(labels: LabelSet) -> dict[str, Any]:
    """Return what determines the images and the views of a set, by name in a message."""
    plan = labels.manifest["plan"]
    found = {name: plan.get(name) for name in ("classes", "img_size", "interpolation")}
    found["num_views"] = labels.num_views
    for split, entry in plan["roles"].items():
        names = ("split", "held_out", "extra", "data_sha256")
        found |= {f"{split} {name}": entry.get(name) for name in names}
        found |= {f"{split} view {name}": value for name, value in entry["views"].items()}
    return found


def _short(value: object) -> str:
    text = f"{len(value)} of them" if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _check_same_images(sets: Sequence[LabelSet], source: ImageSource) -> None:
    """Raise LabelSetError where the images of one key had different contents."""
    first = labelled_hashes(sets[0], source.keys)
    for labels in sets[1:]:
        found = labelled_hashes(labels, source.keys)
        differs_N = first.is_known_N & found.is_known_N & (first.hashes_N != found.hashes_N)
        if differs_N.any():
            keys = [source.keys[position] for position in differs_N.nonzero()[0].tolist()]
            raise LabelSetError(
                f"{sets[0].folder} and {labels.folder} were made from different pictures of the "
                f"same names ({console.first_names(keys)}); make both with one {_PER_TEACHER}"
            )
