"""Write a label set from other label sets or files: shard by shard, then its manifest."""

import os
from collections import deque
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mealv2 import label_set
from mealv2.data.source import fingerprint_of
from mealv2.errors import ConfigError, LabelSetError
from mealv2.label_set import (
    Encoding,
    EncodingLoss,
    LabelSet,
    PlannedShard,
    Rows,
    Shard,
    ShardFile,
    class_of,
)
from mealv2.labelling import manifest
from mealv2.labelling.encoding_loss import encoding_loss, sample_size
from mealv2.runtime import library_versions
from mealv2.soft_labels import Labels, SoftLabels
from mealv2.storage.json_format import json_sha256
from pipeline import console
from pipeline.config import DEFAULT_RATE, EncodingConfig
from pipeline.labelling.annotate import encoding_of

SLICE = 4096  # dense rows that are averaged or encoded at once


@dataclass(frozen=True)
class Imported:
    """Labels of others' files, for the images of a source.

    ``positions`` are those of the labelled images. ``read`` returns, of a range of these, the
    labels image by image, boxes N x V x 4 in fractions and flips N x V. ``how`` is for the plan.
    """

    positions: list[int]
    encoding: Encoding
    num_views: int
    how: str
    read: Callable[[range], tuple[Rows, np.ndarray, np.ndarray]]
    report: dict[str, Any]


class Writer:
    """Fills the folder of a plan. Complete shards of an earlier run are kept."""

    def __init__(self, folder: Path, plan: dict[str, Any]) -> None:
        label_set.claim(folder, plan)
        self.folder = folder
        self.plan = plan
        self._plan_sha256 = json_sha256(plan)
        self._listed = label_set.listed_sha256(folder, self._plan_sha256)
        self._planned: dict[str, dict[range, list[PlannedShard]]] = {}

    @classmethod
    def derive(
        cls, folder: Path, command: str, how: str, plans: Sequence[dict[str, Any]], **changes: Any
    ) -> "Writer":
        """Return a writer of a set made from the sets of ``plans``.

        Its plan is the first one with ``changes``. It names its sources, so that it differs from
        every plan of precompute.
        """
        derived = {"command": command, "how": how, "from": [json_sha256(plan) for plan in plans]}
        plan = {**plans[0], "derived": derived, **changes}
        splits = {
            name: {key: value for key, value in split.items() if key != "shard_sizes"}
            for name, split in plan["roles"].items()
        }
        return cls(folder, {**plan, "roles": splits})

    def add(
        self, split: str, shards: Sequence[tuple[range, Callable[[], Shard]]], *, what: str
    ) -> None:
        """Add shards, each as its views and a function that makes it if it is not complete.

        Shards of the same views follow each other. ``what`` names the work in the progress bar.
        """
        blocks = self._planned.setdefault(split, {})
        for views, make in console.progress(shards, total=len(shards), what=what, unit="shards"):
            block = blocks.setdefault(views, [])
            planned = PlannedShard(split, len(block), views, None)
            block.append(planned)
            listed = self._listed.get(planned.name)
            if manifest.is_complete(self.folder, planned, self._plan_sha256, listed):
                continue
            shard = replace(
                make(),
                plan_sha256=self._plan_sha256,
                split=split,
                number=planned.number,
                first_view=views.start,
                num_views=len(views),
            )
            if shard.first_sha256 is not None:  # blocks with the models of another shard
                first = ShardFile(self.folder / label_set.shard_name(split, planned.number))
                encoding = Encoding.of_plan(self.plan)
                shard = label_set.bound_to_first(shard, encoding, first.head_sha256)
            path = self.folder / planned.name
            label_set.write_shard(path, shard, replace=os.path.lexists(path))

    def add_appended(self, labels: LabelSet, kept: Container[str] | None = None) -> None:
        """Add the rows that were appended to a set; of the images in ``kept``, if it is given."""
        encoding = Encoding.of_plan(self.plan)
        for file in labels.appended_files:
            keys = file.keys()
            chosen = [row for row, key in enumerate(keys) if kept is None or key in kept]
            if chosen:
                rows = all_rows(file, labels.encoding).rows(torch.tensor(chosen))
                shard = file.shard()
                hashes_N = shard.hashes_N
                shard = replace(
                    shard,
                    plan_sha256=self._plan_sha256,
                    keys=[keys[row] for row in chosen],
                    blocks=encoding.blocks(encoded(rows, labels.encoding, encoding, 1), 1),
                    views_N=file.column("views")[chosen],
                    hashes_N=None if hashes_N is None else hashes_N[chosen],
                )
                label_set.write_rows(self.folder, shard)

    def finish(self) -> dict[str, Any]:
        """Check the shards and write the manifest; return the report."""
        checked = {
            split: [
                (views, manifest.require_complete(self.folder, shards, self._plan_sha256))
                for views, shards in blocks.items()
            ]
            for split, blocks in self._planned.items()
        }
        splits = {
            name: manifest.describe_split(self.folder, self.plan, name, blocks, listed=self._listed)
            for name, blocks in checked.items()
        }
        label_set.write_manifest(self.folder, self.plan, roles=splits, versions=library_versions())
        return {
            "labels": str(self.folder),
            "images": splits["train"]["num_images"],
            "views": sum(len(views) * s.num_images for views, ss in checked["train"] for s in ss),
            "bytes": sum(shard["bytes"] for shard in label_set.listed_shards(splits)),
        }


def open_splits(folder: Path, *outputs: Path) -> dict[str, LabelSet]:
    """Open every split of a finished set; raises ConfigError if an output folder is in the set."""
    for output in outputs:
        require_outside(output, folder)
    names = label_set.read_manifest(folder)["roles"]
    return {name: LabelSet.open(folder, split=name) for name in names}


def shards_of(labels: LabelSet) -> list[tuple[range, ShardFile]]:
    """Return the shards of a split, each with its views."""
    return [(views, file) for views, files in labels.blocks for file in files]


def all_rows(file: ShardFile, encoding: Encoding) -> Rows:
    """Return every label of a shard, image by image; raises LabelSetError if one is damaged."""
    deque(file.intact_blocks(), maxlen=0)  # checks them without a copy
    ends = file.column("label_ends")
    firsts = label_set.first_labels_of(file, encoding)
    rows = encoding.all_rows_of(file.column("labels"), ends, file.num_views)
    return rows.with_models(firsts)


def encoded(rows: Rows, of: Encoding, to: Encoding, num_views: int) -> Rows:
    """Return rows in another encoding, through their distributions."""
    return rows if to == of else averaged([rows], [1], to, num_views)


def averaged(parts: Sequence[Rows], weights: Sequence[int], to: Encoding, num_views: int) -> Rows:
    """Return the weighted means of the same rows of several sets, in an encoding.

    The ``num_views`` views of an image follow each other. A few rows at a time: dense rows can be a
    hundred times as large as their shard.
    """
    done = []
    images = max(1, SLICE // num_views)
    for some in torch.split(torch.arange(len(parts[0].labels)), images * num_views):
        rows = [part.rows(some) for part in parts]
        mean_logits_NC = None
        if to.logits:
            logits = [
                part.logits.to_dense(part.labels.kept(), to.num_classes)
                for part in rows
                if part.logits is not None
            ]
            mean_logits_NC = _mean(logits, weights)
        done.append(to.encode(mean_probs(rows, weights), mean_logits_NC, num_views=num_views))
    return Rows.concat(done)


def loss_of(
    parts: Sequence[Rows],
    weights: Sequence[int],
    of: Sequence[Encoding],
    rows: Rows,
    num_views: int,
) -> EncodingLoss | None:
    """Return what ``rows`` lose of the weighted means; None if the sets are not dense."""
    if not all(encoding.is_dense for encoding in of):
        return None
    first = torch.arange(min(len(rows.labels), sample_size(num_views)))
    return encoding_loss(mean_probs([part.rows(first) for part in parts], weights), rows.labels)


def mean_probs(parts: Sequence[Rows], weights: Sequence[int]) -> torch.Tensor:
    """Return the weighted means of the same rows of several sets, float32 N x C."""
    return _mean([_probs(part.labels) for part in parts], weights)


def _probs(labels: Labels) -> torch.Tensor:
    """Return distributions N x C, float32: dense float32 labels to the bit."""
    if (
        isinstance(labels, SoftLabels)
        and labels.is_dense
        and labels.probs_NK.dtype == torch.float32
    ):
        return labels.probs_NK  # to_dense would divide by the sum, which is 1 up to rounding
    return labels.to_dense()


def _mean(parts: Sequence[torch.Tensor], weights: Sequence[int]) -> torch.Tensor:
    if len(parts) == 1:
        return parts[0]
    # q = sum_s n_s q_s / sum_s n_s, with n_s teachers in set s
    total = torch.zeros(parts[0].shape, dtype=torch.float64)
    for weight, part in zip(weights, parts, strict=True):
        total += weight * part.double()
    return (total / sum(weights)).float()


def require_outside(output: Path, folder: Path) -> None:
    """Raise ConfigError if an output folder is a source folder or is in it."""
    if output.resolve().is_relative_to(folder.resolve()):
        what = "is" if output.resolve() == folder.resolve() else "lies in"
        raise ConfigError(f"--output {output} {what} the label set itself; give another folder")


def new_encoding(config: EncodingConfig, sources: Sequence[Encoding]) -> Encoding:
    """Return the encoding that a command asks for; by default, a single set keeps its own.

    Raises ConfigError for --store-logits without logits in every set.
    """
    if config.store_logits and not all(source.logits for source in sources):
        raise ConfigError("--store-logits: not every label set has logits; leave it out")
    num_classes = sources[0].num_classes
    if config.rate is not None or config.topk is not None:
        return encoding_of(config, num_classes)
    if len(sources) == 1:
        return sources[0]  # with its logits
    return Encoding(num_classes, rate=DEFAULT_RATE, logits=config.store_logits)


def images_of(files: Iterable[ShardFile]) -> list[tuple[int, str, int]]:
    """Return (class, key, bytes) of the images of shards, skipped ones included."""
    found: list[tuple[int, str, int]] = []
    for file in files:
        images = file.images
        if images is None:
            raise LabelSetError(
                f"{file.path} has no image sizes, so the set cannot be split or joined; make it "
                "again with `mealv2 precompute`"
            )
        classes = map(class_of, images.classes_N.tolist())
        columns = (classes, file.keys(), images.file_bytes_N.tolist())
        found += zip(*columns, strict=True)
        skipped = file.header["skipped"].items()
        found += [(class_of(image["class"]), key, image["bytes"]) for key, image in skipped]
    return found


def describe_images(
    classes: Sequence[str], images: Sequence[tuple[int, str, int]]
) -> dict[str, Any]:
    """Return the part of a plan that describes the images of a split."""
    return {"num_images": len(images), "data_sha256": fingerprint_of(classes, images)}
