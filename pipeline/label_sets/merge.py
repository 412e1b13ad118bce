"""`mealv2 labels merge`: sets of disjoint images into one, sets of different teachers into one."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mealv2.data.source import fingerprint_of
from mealv2.errors import ConfigError, LabelSetError
from mealv2.label_set import UNKNOWN, Encoding, LabelSet, Shard, ShardFile
from mealv2.metrics import num_correct
from pipeline import console
from pipeline.config import LabelsMergeConfig
from pipeline.label_sets.writing import (
    Writer,
    all_rows,
    averaged,
    derived_plan,
    images_of,
    mean_probs,
    new_encoding,
    open_splits,
    require_outside,
)
from pipeline.labelling.manifest import accuracy_of

_COMMAND = "labels merge"
_SAME = ("classes", "ensemble", "precision", "img_size", "interpolation", "probe_sha256")


@dataclass(frozen=True)
class _Set:
    """One of the sets to merge: its folder, plan and roles."""

    folder: Path
    plan: dict[str, Any]
    splits: dict[str, LabelSet]

    @property
    def teachers(self) -> list[str]:
        """What tells its teachers from others, sorted."""
        return sorted(map(_identity, self.plan["teachers"]))


def run(config: LabelsMergeConfig) -> dict[str, Any]:
    """Merge sets; return the report. Raises MealError and OSError.

    Sets with the same teachers are joined, and keep their encoding; others are averaged.
    """
    require_outside(config.output, config.sets)
    sets = [_opened(folder) for folder in config.sets]
    for other in sets[1:]:
        _check_same(other, sets[0])
    if any(f"{UNKNOWN} {UNKNOWN}" in each.teachers for each in sets):
        raise ConfigError(
            "nobody knows whether imported sets have the same teachers; import them with "
            "--teacher-name, the same name or another"
        )
    if all(other.teachers == sets[0].teachers for other in sets):
        return _join(config, sets)
    every = [teacher for each in sets for teacher in each.teachers]
    if len(set(every)) < len(every):
        raise ConfigError(
            "some of the sets share a teacher and some do not: join those of the same teachers, "
            "average those of different ones"
        )
    return _average(config, sets)


def _opened(folder: Path) -> _Set:
    splits = open_splits(folder)
    return _Set(folder, next(iter(splits.values())).manifest["plan"], splits)


def _identity(teacher: dict[str, Any]) -> str:
    """Return what tells a teacher from others: weights and normalisation, else its name."""
    if teacher["weights_sha256"] == UNKNOWN:
        return f"{UNKNOWN} {teacher['model']}"
    return f"{teacher['weights_sha256']} {teacher['mean']} {teacher['std']}"


def _check_same(other: _Set, first: _Set) -> None:
    """Raise LabelSetError where two sets differ in what all that are merged have in common."""
    _compare(other, first, other.plan, first.plan, _SAME)
    if other.splits.keys() != first.splits.keys():
        has, first_values = ", ".join(other.splits), ", ".join(first.splits)
        raise _merge_error(other, first, f"one has {has} labels, the other {first_values}")


def _compare(
    other: _Set, first: _Set, other_values: Any, first_values: Any, names: Sequence[str]
) -> None:
    for name in names:
        if other_values.get(name) != first_values.get(name):
            a, b = (_short(part.get(name)) for part in (other_values, first_values))
            raise _merge_error(other, first, f"{name} differs ({a} and {b})")


def _merge_error(other: _Set, first: _Set, why: str) -> LabelSetError:
    return LabelSetError(f"{other.folder} and {first.folder} cannot be merged: {why}")


def _short(value: object) -> str:
    text = f"{len(value)} of them" if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else text[:57] + "…"


# --- the same teachers, other images --------------------------------------------------------------


def _join(config: LabelsMergeConfig, sets: list[_Set]) -> dict[str, Any]:
    if config.rate is not None or config.topk is not None or config.store_logits:
        raise ConfigError(
            "sets of the same teachers are joined as they are; `mealv2 labels convert` gives them "
            "another encoding"
        )
    first = sets[0]
    for other in sets[1:]:
        _check_joinable(other, first)
    sources = {split: _sources(sets, split) for split in first.splits}
    described = {
        split: {**first.plan["roles"][split], **_data_of(first.plan["classes"], chosen)}
        for split, chosen in sources.items()
    }
    plans = [each.plan for each in sets]
    writer = Writer(
        config.output, derived_plan(first.plan, _COMMAND, "joined", plans, roles=described)
    )
    accuracies = {}
    for split, chosen in sources.items():
        for block, (views, _) in enumerate(chosen[0].blocks):
            files = [file for labels in chosen for file in labels.blocks[block][1]]
            for file in console.progress(
                files, total=len(files), what=f"joining {split}", unit="shards"
            ):
                writer.add(split, views, file.shard)
        if split == "val" and writer.has_counts(split):
            accuracies[split] = accuracy_of(first.plan, writer.files(split))
    for each in sets:
        for file in each.splits["train"].appended_files:
            rows = all_rows(file, each.splits["train"].encoding)
            writer.add_rows(file, range(file.num_images), rows)
    report = writer.finish(accuracies)
    console.info(f"joined {len(sets)} sets: {report['images']} images, {report['views']} labels")
    return {**report, "merged": "joined", "sets": len(sets)}


def _check_joinable(other: _Set, first: _Set) -> None:
    encodings = (other.splits["train"].encoding, first.splits["train"].encoding)
    if encodings[0] != encodings[1]:
        raise _merge_error(
            other, first, f"their labels are kept as {encodings[0]} and {encodings[1]}"
        )
    for split, labels in other.splits.items():
        recipes = (other.plan["roles"][split], first.plan["roles"][split])
        _compare(other, first, *recipes, ("split", "views"))
        other_values, first_values = (
            [(views.start, views.stop) for views, _ in each.blocks]
            for each in (labels, first.splits[split])
        )
        if other_values != first_values:
            raise _merge_error(
                other, first, f"their files hold the views {other_values} and {first_values}"
            )


def _data_of(classes: list[str], chosen: list[LabelSet]) -> dict[str, Any]:
    images = [image for s in chosen for file in s.blocks[0][1] for image in images_of(file)]
    return {"num_images": len(images), "data_sha256": fingerprint_of(classes, images)}


def _sources(sets: list[_Set], split: str) -> list[LabelSet]:
    """Return whose labels of a role are taken: all, or one where all label the same images."""
    data = {each.plan["roles"][split]["data_sha256"] for each in sets}
    if split != "train" and len(data) == 1:
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
    first = sets[0]
    for other in sets[1:]:
        _check_aligned(other, first)
    trains = [each.splits["train"] for each in sets]
    encoding = new_encoding(
        config, trains[0].num_classes, has_logits=all(train.encoding.logits for train in trains)
    )
    _warn_dropped_views(trains)
    teachers = [teacher for each in sets for teacher in each.plan["teachers"]]
    counts = [len(each.plan["teachers"]) for each in sets]
    plans = [each.plan for each in sets]
    changes = {"teachers": teachers, "labels": encoding.plan()}
    writer = Writer(config.output, derived_plan(first.plan, _COMMAND, "averaged", plans, **changes))
    for split, labels in first.splits.items():
        blocks = enumerate(labels.blocks)
        addresses = [(b, views, n) for b, (views, files) in blocks for n in range(len(files))]
        for block, views, number in console.progress(
            addresses, total=len(addresses), what=f"averaging {split}", unit="shards"
        ):
            files = [each.splits[split].blocks[block][1][number] for each in sets]
            encodings = [each.splits[split].encoding for each in sets]
            writer.add(split, views, partial(_mean_shard, files, encodings, counts, encoding))
    accuracies = {}
    if writer.has_counts("val"):
        accuracies["val"] = accuracy_of(writer.plan, writer.files("val"))
        top1 = accuracies["val"]["ensemble"]["top1"]
        console.info(f"{len(teachers)} teachers together: top-1 {top1:.2f} on the validation split")
    report = writer.finish(accuracies)
    return {**report, "merged": "averaged", "sets": len(sets), "teachers": len(teachers)}


def _check_aligned(other: _Set, first: _Set) -> None:
    """Raise LabelSetError where two sets do not have the same views in the same shards."""
    for split, labels in other.splits.items():
        recipes = (other.plan["roles"][split], first.plan["roles"][split])
        _compare(other, first, *recipes, ("split", "views", "data_sha256", "num_images"))
        if not _aligned(labels, first.splits[split]):
            raise _merge_error(
                other,
                first,
                f"their {split} shards hold other images or views; make them with the same "
                "--shard-size and --num-views, and skip the same images",
            )


def _aligned(labels: LabelSet, other: LabelSet) -> bool:
    own_rows, other_rows = labels.blocks, other.blocks
    return [(views, len(files)) for views, files in own_rows] == [
        (views, len(files)) for views, files in other_rows
    ] and all(
        np.array_equal(a.column("keys"), b.column("keys"))
        and np.array_equal(a.column("key_ends"), b.column("key_ends"))
        and a.header["boxes_sha256"] == b.header["boxes_sha256"]
        for (_, files), (_, other_files) in zip(own_rows, other_rows, strict=True)
        for a, b in zip(files, other_files, strict=True)
    )


def _warn_dropped_views(trains: Sequence[LabelSet]) -> None:
    if not all(train.encoding.is_dense for train in trains):
        console.info(
            "not all sets are dense: their means carry what their encodings lost "
            "(precompute with --topk all to lose nothing)"
        )
    appended = sum(train.num_appended for train in trains)
    if appended:
        console.info(f"{appended} labels that were appended are left out: not all sets have them")


def _mean_shard(
    files: Sequence[ShardFile],
    encodings: Sequence[Encoding],
    counts: Sequence[int],
    encoding: Encoding,
) -> Shard:
    """Return the shard of an ensemble of all teachers, ``counts`` of them in each set."""
    rows = [all_rows(file, its) for file, its in zip(files, encodings, strict=True)]
    shard = files[0].shard()
    blocks = encoding.blocks(averaged(rows, counts, encoding), shard.num_views)
    if not shard.counts or shard.images is None:
        return replace(shard, blocks=blocks, counts={})
    truth_N = torch.from_numpy(shard.images.classes_N.astype(np.int64))
    probs_NC = mean_probs(rows, counts)
    correct = {
        # of every teacher, as the sets counted them, and of all together
        name: [
            *(count for file in files for count in file.header["counts"][name][:-1]),
            int(num_correct(probs_NC, truth_N, k)),
        ]
        for name, k in (("top1", 1), ("top5", 5))
    }
    return replace(shard, blocks=blocks, counts=correct)
