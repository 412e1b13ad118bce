"""`mealv2 labels merge`: join sets of different images, or average sets of different teachers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mealv2.errors import ConfigError, LabelSetError
from mealv2.label_set import UNKNOWN, Encoding, LabelSet, Shard, ShardFile, read_manifest
from mealv2.metrics import num_correct
from mealv2.storage.json_format import json_sha256
from mealv2.teacher_sets import sets_of
from pipeline import console
from pipeline.config import LabelsMergeConfig
from pipeline.label_sets import writing

_COMMAND = "labels merge"
_SAME = (
    *("classes", "ensemble", "precision", "img_size", "interpolation"),
    *("probe_sha256", "operations_sha256"),
)


@dataclass(frozen=True)
class _Set:
    """A label set to merge."""

    folder: Path
    splits: dict[str, LabelSet]

    @property
    def train(self) -> LabelSet:
        return self.splits["train"]

    @property
    def plan(self) -> dict[str, Any]:
        plan: dict[str, Any] = self.train.manifest["plan"]
        return plan


def run(config: LabelsMergeConfig) -> dict[str, Any]:
    """Merge sets; return the report. Raises MealError and OSError.

    Sets with the same teachers are joined and keep their encoding; others are writing.averaged.
    """
    folders = [folder for given in config.sets for folder in sets_of(given)]
    sets = [_Set(folder, writing.open_splits(folder, config.output)) for folder in folders]
    _check_same(sets, _common)
    teachers = [sorted(map(_identity, each.plan["teachers"])) for each in sets]
    if any(f"{UNKNOWN} {UNKNOWN}" in each for each in teachers):
        raise ConfigError(
            "the teachers of an imported set are unknown; import it again with --teacher-name: "
            "the same name for the same teacher"
        )
    if all(each == teachers[0] for each in teachers):
        return _join(config, sets)
    if len(set().union(*teachers)) < sum(map(len, teachers)):
        raise ConfigError(
            "some of the sets share a teacher and some do not: first join the sets of the same "
            "teachers, then average the results"
        )
    return _average(config, sets)


def _identity(teacher: dict[str, Any]) -> str:
    """Return what identifies a teacher: weights and normalisation, else its name."""
    if teacher["weights_sha256"] == UNKNOWN:
        return f"{UNKNOWN} {teacher['model']}"
    identity = f"{teacher['weights_sha256']} {teacher['mean']} {teacher['std']}"
    return f"{identity} {teacher['img_size']}" if "img_size" in teacher else identity


# --- what must be equal ---------------------------------------------------------------------------


def _check_same(sets: Sequence[_Set], describe: Callable[[_Set], dict[str, Any]]) -> None:
    """Raise LabelSetError if a set differs from the first one in what ``describe`` returns."""
    expected = describe(sets[0])
    for other in sets[1:]:
        found = describe(other)
        for name in found | expected:
            a, b = found.get(name), expected.get(name)
            if a != b:
                raise _merge_error(
                    other, sets[0], f"different {name} ({_short(a)} and {_short(b)})"
                )


def _common(each: _Set) -> dict[str, Any]:
    """Return what all merged sets have in common."""
    splits = ", ".join(sorted(each.splits))
    return {"splits": splits, **{name: each.plan.get(name) for name in _SAME}}


def _joinable(each: _Set) -> dict[str, Any]:
    """Return what joined sets also have in common."""
    blocks = {
        f"{split} views in the files": ", ".join(
            f"{views.start} to {views.stop - 1}" for views, _ in labels.blocks
        )
        for split, labels in each.splits.items()
    }
    return {"encodings": each.train.encoding, **_recipe(each), **blocks}


def _alignable(each: _Set) -> dict[str, Any]:
    """Return what averaged sets also have in common, beside the layout of their shards."""
    return _recipe(each, "data_sha256", "num_images")


def _recipe(each: _Set, *names: str) -> dict[str, Any]:
    """Return what determines the views of every split, and more entries of its plan."""
    recipe: dict[str, Any] = {}
    for split, entry in each.plan["roles"].items():
        recipe |= {f"{split} {name}": entry.get(name) for name in ("split", "held_out", *names)}
        recipe |= {f"{split} view {name}": value for name, value in entry["views"].items()}
    return recipe


def _layout(labels: LabelSet) -> list[Any]:
    """Return the views of each block of a split, and the images and boxes of each shard."""
    return [
        (views, [(json_sha256(file.keys()), file.header["boxes_sha256"]) for file in files])
        for views, files in labels.blocks
    ]


def _check_same_pictures(sets: Sequence[_Set], split: str) -> None:
    """Raise LabelSetError if images of one key have different content hashes in two sets.

    Logs how many images have a hash in no set or in some of them only.
    """
    seen: dict[str, tuple[int, _Set]] = {}
    num_compared = num_images = 0
    for each in sets:
        labels = each.splits[split]
        num_images += len(labels) + len(labels.skipped)
        for file in labels.blocks[0][1]:
            for key, value in file.content_hashes().items():
                first, other = seen.setdefault(key, (value, each))
                num_compared += 1
                if first != value:
                    raise _merge_error(
                        each, other, f"they were made from different pictures {key} of {split}"
                    )
    if num_compared < num_images:
        console.info(
            f"{split}: not all sets have content hashes of their images, so it is unknown whether "
            "they were made from the same pictures"
        )


def _merge_error(other: _Set, first: _Set, why: str) -> LabelSetError:
    return LabelSetError(f"{other.folder} and {first.folder} cannot be merged: {why}")


def _short(value: object) -> str:
    text = f"{len(value)} of them" if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else text[:57] + "…"


# --- the same teachers, other images --------------------------------------------------------------


def _join(config: LabelsMergeConfig, sets: list[_Set]) -> dict[str, Any]:
    if config.rate is not None or config.topk is not None or config.store_logits:
        raise ConfigError(
            "sets of the same teachers are joined without a change of encoding; leave out --rate, "
            "--topk and --store-logits, and use `mealv2 labels convert` on the result"
        )
    _check_same(sets, _joinable)
    first = sets[0]
    sources = {split: _sources(sets, split) for split in first.splits}
    roles = {
        split: first.plan["roles"][split]
        | writing.describe_images(
            first.train.classes, writing.images_of(file for s in chosen for file in s.blocks[0][1])
        )
        for split, chosen in sources.items()
    }
    plans = [each.plan for each in sets]
    writer = writing.Writer.derive(config.output, _COMMAND, "joined", plans, roles=roles)
    for split, chosen in sources.items():
        shards = [
            (views, file.shard)
            for block, (views, _) in enumerate(chosen[0].blocks)
            for labels in chosen
            for file in labels.blocks[block][1]
        ]
        writer.add(split, shards, what=f"joining {split}")
    for each in sets:
        writer.add_appended(each.train)
    report = writer.finish()
    console.info(f"joined {len(sets)} sets: {report['images']} images, {report['views']} labels")
    return {**report, "merged": "joined", "sets": len(sets)}


def _sources(sets: list[_Set], split: str) -> list[LabelSet]:
    """Return the sets whose labels of a split are used.

    All of them; one, if all have labels of the same validation images.
    """
    data = {each.plan["roles"][split]["data_sha256"] for each in sets}
    if split != "train" and len(data) == 1:
        _check_same_pictures(sets, split)
        return [sets[0].splits[split]]
    seen: dict[str, Path] = {}
    for each in sets:
        for file in each.splits[split].blocks[0][1]:
            for key in file.all_keys():
                if key in seen:
                    raise LabelSetError(
                        f"{seen[key]} and {each.folder} both have {split} labels of {key!r}; sets "
                        "of the same teachers must have different images to be joined"
                    )
                seen[key] = each.folder
    return [each.splits[split] for each in sets]


# --- other teachers, the same views ---------------------------------------------------------------


def _average(config: LabelsMergeConfig, sets: list[_Set]) -> dict[str, Any]:
    _check_same(sets, _alignable)
    first, trains = sets[0], [each.train for each in sets]
    for other in sets[1:]:
        for split, labels in other.splits.items():
            if _layout(labels) != _layout(first.splits[split]):
                raise _merge_error(
                    other,
                    first,
                    f"their {split} shards hold other images or views; make them with the same "
                    "--shard-size and --num-views, and skip the same images",
                )
    for split in first.splits:
        _check_same_pictures(sets, split)
    encoding = writing.new_encoding(config, [train.encoding for train in trains])
    _warn_dropped_labels(trains)
    teachers = [teacher for each in sets for teacher in each.plan["teachers"]]
    counts = [len(each.plan["teachers"]) for each in sets]
    plans = [each.plan for each in sets]
    changes = {"teachers": teachers, "labels": encoding.plan()}
    writer = writing.Writer.derive(config.output, _COMMAND, "averaged", plans, **changes)
    for split, labels in first.splits.items():
        encodings = [each.splits[split].encoding for each in sets]
        shards = [
            (views, partial(_mean_shard, same, encodings, counts, encoding))
            for block, (views, _) in enumerate(labels.blocks)
            for same in zip(*(each.splits[split].blocks[block][1] for each in sets), strict=True)
        ]
        writer.add(split, shards, what=f"averaging {split}")
    report = writer.finish()
    validation = read_manifest(config.output)["roles"].get("val", {})
    if "accuracy" in validation:
        top1 = validation["accuracy"]["ensemble"]["top1"]
        console.info(f"{len(teachers)} teachers together: top-1 {top1:.2f} on the validation split")
    return {**report, "merged": "averaged", "sets": len(sets), "teachers": len(teachers)}


def _warn_dropped_labels(trains: Sequence[LabelSet]) -> None:
    if not all(train.encoding.is_dense for train in trains):
        console.info(
            "not all sets are dense: the means contain the errors of their encodings "
            "(precompute with --topk all for exact means)"
        )
    if appended := sum(train.num_appended for train in trains):
        appended_labels = console.count(appended, "appended label")
        console.info(f"left out: {appended_labels}, which are not in all sets")


def _mean_shard(
    files: Sequence[ShardFile],
    encodings: Sequence[Encoding],
    counts: Sequence[int],
    encoding: Encoding,
) -> Shard:
    """Return the shard of the ensemble of all teachers; ``counts`` are the teachers per set."""
    rows = [writing.all_rows(file, its) for file, its in zip(files, encodings, strict=True)]
    # images without a hash in one set may have it in another
    shard = max(files, key=lambda file: len(file.content_hashes())).shard()
    averaged = writing.averaged(rows, counts, encoding, shard.num_views)
    loss = writing.loss_of(rows, counts, encodings, averaged, shard.num_views)
    shard = replace(shard, blocks=encoding.blocks(averaged, shard.num_views), loss=loss)
    if not shard.counts or shard.images is None:
        return replace(shard, counts={})
    truth_N = torch.from_numpy(shard.images.classes_N.astype(np.int64))
    probs_NC = writing.mean_probs(rows, counts)
    correct = {
        # of every teacher, as the sets counted them, and of the ensemble
        name: [
            *(count for file in files for count in file.header["counts"][name][:-1]),
            int(num_correct(probs_NC, truth_N, k)),
        ]
        for name, k in (("top1", 1), ("top5", 5))
    }
    return replace(shard, counts=correct)
