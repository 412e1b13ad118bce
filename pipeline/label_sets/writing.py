"""Writing a label set that is made of others: shard by shard, finished by its manifest."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mealv2 import label_set
from mealv2.errors import ConfigError, LabelSetError
from mealv2.label_set import Encoding, LabelSet, PlannedShard, Rows, Shard, ShardFile
from mealv2.soft_labels import Labels, SoftLabels
from mealv2.storage.json_format import json_sha256
from pipeline.config import DEFAULT_RATE, EncodingConfig
from pipeline.labelling.annotate import encoding_of
from pipeline.labelling.manifest import (
    added_blocks,
    describe_block,
    load_complete_shard,
    skipped_images,
)
from pipeline.runtime.device import library_versions


class Writer:
    """Fills the folder of a plan; whole shards that are there are kept, so it can be run again."""

    def __init__(self, folder: Path, plan: dict[str, Any]) -> None:
        label_set.claim(folder, plan)
        self.folder = folder
        self.plan = plan
        self._plan_sha256 = json_sha256(plan)
        self._listed = label_set.listed_sha256(folder, self._plan_sha256)
        self._files: dict[str, dict[range, list[ShardFile]]] = {}

    def add(self, split: str, views: range, make: Callable[[], Shard]) -> None:
        """Add the next shard of a role's block of views; ``make`` is asked where it is lacking."""
        files = self._files.setdefault(split, {}).setdefault(views, [])
        number = len(files)
        planned = PlannedShard(split, number, views, None)
        path = self.folder / planned.name
        listed = self._listed.get(planned.name)
        file = load_complete_shard(self.folder, planned, self._plan_sha256, listed)
        if file is None:
            shard = replace(
                make(),
                plan_sha256=self._plan_sha256,
                split=split,
                number=number,
                first_view=views.start,
                num_views=len(views),
            )
            label_set.write_shard(path, shard, replace=os.path.lexists(path))
            file = ShardFile(path)
        files.append(file)

    def add_rows(self, file: ShardFile, chosen: Sequence[int], rows: Rows) -> None:
        """Add some of the rows that were appended to a set; ``rows`` are those, as kept here."""
        keys, views_N = file.keys(), file.column("views")
        if chosen:
            shard = replace(
                file.shard(),
                plan_sha256=self._plan_sha256,
                keys=[keys[row] for row in chosen],
                blocks=Encoding.of_plan(self.plan).blocks(rows, 1),
                views_N=views_N[list(chosen)],
            )
            label_set.write_rows(self.folder, shard)

    def files(self, split: str) -> list[ShardFile]:
        """Return the shards of a role that were added."""
        return [file for files in self._files.get(split, {}).values() for file in files]

    def has_counts(self, split: str) -> bool:
        """Return whether the shards of a role say how many answers were right."""
        files = self.files(split)
        return bool(files) and all(file.header["counts"] for file in files)

    def finish(self, accuracies: dict[str, Any]) -> dict[str, Any]:
        """Write the manifest; return the report. ``accuracies`` are the teachers' by role."""
        splits = {
            split: self._entry(split)
            | ({"accuracy": accuracies[split]} if split in accuracies else {})
            for split in self._files
        }
        label_set.write_manifest(self.folder, self.plan, roles=splits, versions=library_versions())
        views = sum(
            len(views) * sum(file.num_images for file in files)
            for views, files in self._files.get("train", {}).items()
        )
        return {
            "labels": str(self.folder),
            "images": splits["train"]["num_images"] if "train" in splits else 0,
            "views": views,
            "bytes": sum(shard["bytes"] for shard in label_set.listed_shards(splits)),
        }

    def _entry(self, split: str) -> dict[str, Any]:
        """Return what the manifest says of a role; views that were added later stay in it."""
        blocks = self._files[split]
        first = next(iter(blocks.values()))
        described = [describe_block(views, files) for views, files in blocks.items()]
        described += added_blocks(  # since: `labels add-views` on the set that was made
            self.folder, split, described[-1], self._plan_sha256, listed=self._listed
        )
        return {
            "blocks": described,
            "num_images": sum(file.num_images for file in first),
            "skipped": skipped_images(first),
        }


def open_splits(folder: Path) -> dict[str, LabelSet]:
    """Open every role of a finished set."""
    names = label_set.read_manifest(folder)["roles"]
    return {name: LabelSet.open(folder, split=name) for name in names}


def accuracies_of(splits: dict[str, LabelSet]) -> dict[str, Any]:
    """Return what a set's manifest says of the teachers' accuracies, by role."""
    entries = {name: labels.manifest["roles"][name] for name, labels in splits.items()}
    return {name: entry["accuracy"] for name, entry in entries.items() if "accuracy" in entry}


def all_rows(file: ShardFile, encoding: Encoding) -> Rows:
    """Return every label of a shard, image by image; raises LabelSetError where any is damaged."""
    deque(file.intact_blocks(), maxlen=0)  # which checks them, and copies none
    ends = file.column("label_ends")
    return encoding.all_rows_of(file.column("labels"), ends, file.num_views)


def encoded(rows: Rows, of: Encoding, to: Encoding) -> Rows:
    """Return rows in another encoding, through the distributions that they stand for."""
    return rows if to == of else averaged([rows], [1], to)


def averaged(parts: Sequence[Rows], weights: Sequence[int], to: Encoding) -> Rows:
    """Return the weighted means of the same rows of several sets, in an encoding.

    A few at a time: dense rows of a shard can be a hundred times as large as the shard.
    """
    done = []
    for some in torch.split(torch.arange(len(parts[0].labels)), _SLICE):
        rows = [part.rows(some) for part in parts]
        mean_logits_NC = None
        if to.logits:
            logits = [
                part.logits.to_dense(part.labels.kept(), to.num_classes)
                for part in rows
                if part.logits is not None
            ]
            mean_logits_NC = _mean(logits, weights)
        done.append(to.encode(mean_probs(rows, weights), mean_logits_NC))
    return Rows.concat(done)


def mean_probs(parts: Sequence[Rows], weights: Sequence[int]) -> torch.Tensor:
    """Return the weighted means of the same rows of several sets, float32 N x C."""
    return _mean([_probs(part.labels) for part in parts], weights)


def _probs(labels: Labels) -> torch.Tensor:
    """Return distributions N x C, float32: the teachers' own bits where they were kept."""
    if isinstance(labels, SoftLabels) and labels.is_dense:
        # float32: softmax gave rows whose sum is 1 but for rounding
        return labels.probs_NK if labels.probs_NK.dtype is torch.float32 else labels.to_dense()
    return labels.to_dense()


def _mean(parts: Sequence[torch.Tensor], weights: Sequence[int]) -> torch.Tensor:
    if len(parts) == 1:
        return parts[0]
    # q = sum_s n_s q_s / sum_s n_s, with n_s teachers in set s
    total = torch.zeros(parts[0].shape, dtype=torch.float64)
    for weight, part in zip(weights, parts, strict=True):
        total += weight * part.double()
    return (total / sum(weights)).float()


def require_outside(out: Path, other_folders: Iterable[Path]) -> None:
    """Raise ConfigError where something would be written over, or into, what it is made of."""
    for other in other_folders:
        if out.resolve().is_relative_to(other.resolve()):
            what = "is" if out.resolve() == other.resolve() else "lies in"
            raise ConfigError(f"--output {out} {what} the label set itself; give another folder")


def new_encoding(
    config: EncodingConfig, num_classes: int, *, default: Encoding | None = None, has_logits: bool
) -> Encoding:
    """Return the encoding a command asks for, ``default`` where it does not say."""
    if config.store_logits and not has_logits:
        raise ConfigError("--store-logits: the set holds no logits to keep")
    if config.rate is None and config.topk is None:
        if default is not None:
            return replace(default, logits=default.logits or config.store_logits)
        return Encoding(num_classes, rate=DEFAULT_RATE, logits=config.store_logits)
    return encoding_of(config, num_classes)


def derived_plan(
    plan: dict[str, Any], command: str, how: str, sets: Iterable[dict[str, Any]], **changes: Any
) -> dict[str, Any]:
    """Return the plan of a set made of others; it names them, so no precompute takes it for its."""
    made_of = [json_sha256(other) for other in sets]
    made = {
        **plan,
        "derived": {"command": command, "how": how, "from": made_of},
        **changes,
    }
    splits = {name: dict(split) for name, split in made["roles"].items()}
    for split in splits.values():
        split.pop("shard_sizes", None)  # of the others' shards
    return {**made, "roles": splits}


_SLICE = 4096  # rows


def images_of(file: ShardFile) -> list[tuple[int, str, int]]:
    """Return (class, key, bytes) of the images a shard was made from, skipped ones included."""
    images = file.images
    if images is None:
        raise LabelSetError(
            f"{file.path} does not say how large its images are; label them again to divide or "
            "join them"
        )
    listed = zip(images.classes_N.tolist(), file.keys(), images.file_bytes_N.tolist(), strict=True)
    skipped = file.header["skipped"].items()
    return [*listed, *((missing["class"], key, missing["bytes"]) for key, missing in skipped)]
