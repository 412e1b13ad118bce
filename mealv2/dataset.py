"""A label set as a torch Dataset, for anyone's DataLoader: pixels of views and their soft labels.

The same images, views, order and labels as `mealv2 distill` of the same seed.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from mealv2.batches import BatchSampler, rank_rows
from mealv2.data.content_hash import ImageCheck
from mealv2.data.extra import WithExtra, open_unlabelled
from mealv2.data.held_out import HeldOut, by_name
from mealv2.data.open import open_source
from mealv2.data.own_source import ImageDataset, as_source
from mealv2.data.pixels import operations_sha256, probe_sha256, resize_of
from mealv2.data.requests import CENTRE, check_failures
from mealv2.data.source import ImageSource
from mealv2.data.view_reader import ViewReader
from mealv2.label_set import (
    LabelSet,
    WebSet,
    check_boxes,
    check_same_data,
    is_web,
    labelled_hashes,
    read_manifest,
)
from mealv2.soft_labels import Labels, concat
from mealv2.targets import BatchTargets, StoredLabels

# What an item has beside the pixels.
Label = Literal["labels", "probs", "targets"]
ItemLabel = Labels | Tensor | BatchTargets
Index = int | tuple[int, int]


class SoftLabelDataset(Dataset[tuple[Tensor, ItemLabel]]):
    """The views of the images of a label set, each with its soft label.

    ``labels`` is the folder of a finished label set or its ``https://`` URL, ``source`` the data
    that it labels: a folder as for ``--data-dir``, of which the set's split is taken, also one that
    was held out, or an ImageSource; ``extra_data`` are the folders of unlabelled pictures that the
    set was made with. With ``split`` val it has the centre crops of the validation split.

    Item i is a view of the i-th image that has labels: in epoch e (``set_epoch``) the view that
    `mealv2 distill --seed` shows. Item (i, v) is its view v. An item is a pair: the pixels, uint8
    3 x S x S, changed by ``transform`` if it is given, and, by ``label``:

    - ``labels``: the label as it is stored, compressed: EncodedLabels or SoftLabels of one row,
      for ``collate`` and ``similarity_loss``;
    - ``probs``: all probabilities, float32 C, for any collate function and loss;
    - ``targets``: BatchTargets of one row, for a DistillTask: also the class id, and the
      teachers' logits if the set stores them.

    The worker processes of a DataLoader, forked or spawned, open files of their own and follow
    ``set_epoch``, persistent ones too. ``notes`` are lines for the user. Raises LabelSetError for a
    label set that is damaged or was made from other data, and, from an item, DataError for an image
    that cannot be read and LabelSetError for one that is not the labelled one (``check_images``).
    """

    def __init__(
        self,
        labels: str | os.PathLike[str],
        source: str | os.PathLike[str] | ImageSource | ImageDataset,
        *,
        seed: int = 0,
        split: Literal["train", "val"] = "train",
        label: Label = "labels",
        transform: Callable[[Tensor], Any] | None = None,
        check_images: bool = True,
        extra_data: Sequence[str | os.PathLike[str]] = (),
    ) -> None:
        if is_web(labels):
            labels = WebSet(str(labels))
        if isinstance(source, str | os.PathLike):
            source = _open(Path(source), Path(labels), split)
        source = as_source(source, f"{type(source).__name__} ({split})", split=split)
        if extra_data and split == "train":
            folders = [open_unlabelled(Path(f), classes=source.classes) for f in extra_data]
            source = WithExtra(source, folders)
        self.label_set = LabelSet.open(labels, split=split)
        self.source = source
        self.seed = seed
        self.classes = self.label_set.classes
        self.img_size = self.label_set.img_size
        self._label = label
        self._transform = transform
        self._is_val = split == "val"
        self._checks_images = check_images
        check_same_data(self.label_set, source)
        if not self._is_val:
            check_boxes(self.label_set)
        self.notes = _pixel_notes(self.label_set)
        self.positions = np.flatnonzero(self.label_set.has_labels(source.keys))
        # in shared memory: worker processes that run already see a new epoch
        self._epoch = torch.zeros(1, dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def epoch(self) -> int:
        """The epoch whose views are shown, counted from 0."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Show the views of an epoch, counted from 0; call it before an iterator is made."""
        self._epoch[0] = epoch

    def view(self, index: int, epoch: int | None = None) -> int:
        """Return the view that an image shows in an epoch, by default the current one."""
        key = self.source.keys[int(self.positions[index])]
        view = self.targets.view(key, self.epoch if epoch is None else epoch)
        assert view is not None, "a stored view is never skipped"
        return view

    def __getitem__(self, index: Index) -> tuple[Tensor, ItemLabel]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[Index]) -> list[tuple[Tensor, ItemLabel]]:
        """Return several items; neighbouring views of one image are decoded once."""
        pairs = [i if isinstance(i, tuple | list) else (i, self.view(i)) for i in indices]
        positions = [int(self.positions[index]) for index, _ in pairs]
        views = [0 if self._is_val else int(view) for _, view in pairs]
        shown = [CENTRE] * len(views) if self._is_val else views
        rows = zip(positions, shown, strict=True)
        batch = self._reader.read(
            [(p, tuple(v for _, v in row)) for p, row in groupby(rows, key=lambda row: row[0])]
        )
        check_failures(self.source, batch.failed, "fail")
        targets = self.targets.batch(positions, views, batch.images_BCHW)
        images: list[Any] = list(batch.images_BCHW)
        if self._transform is not None:
            images = [self._transform(image_CHW) for image_CHW in images]
        return list(zip(images, self._item_labels(targets, len(images)), strict=True))

    def _item_labels(self, targets: BatchTargets, number: int) -> Sequence[ItemLabel]:
        if self._label == "probs":
            assert targets.soft_labels is not None
            return list(targets.soft_labels.to_dense())
        rows = [targets.rows(torch.tensor([row])) for row in range(number)]
        if self._label == "targets":
            return rows
        return [row.soft_labels for row in rows if row.soft_labels is not None]

    @cached_property
    def targets(self) -> StoredLabels:
        """The labels by position in the source, as a training step asks for them."""
        source = self.source
        return StoredLabels(self.label_set, source.keys, source.labels, seed=self.seed)

    @cached_property
    def _reader(self) -> ViewReader:
        labels, check = self.label_set, None
        if self._checks_images:
            check = ImageCheck(labelled_hashes(labels, self.source.keys))
        return ViewReader(
            self.source,
            img_size=labels.img_size,
            views=None if self._is_val else labels.views(),
            resize=resize_of(labels.manifest["plan"].get("interpolation")),
            check=check,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for another process, which opens files of its own."""
        own = ("targets", "_reader")
        return {name: value for name, value in vars(self).items() if name not in own}


@dataclass(frozen=True)
class _Schedule:
    """The settings of a run that determine its batches."""

    seed: int
    batch_size: int
    views_per_image: int
    epochs: int


class EpochBatchSampler(Sampler[list[tuple[int, int]]]):
    """The batches of an epoch, in the order of `mealv2 distill` of the same seed and batch size.

    For ``DataLoader(dataset, batch_sampler=…)``. ``set_epoch``, here or of the dataset, chooses the
    epoch. With ``views_per_image`` V a batch has V views of each image, and a pass over the data
    counts as V epochs: set epoch 0, V, 2 V, …; the last pass ends at ``epochs``, if given. With
    ``num_replicas`` processes each gets its rows of the same batches by its ``rank``; a last batch
    with fewer images than processes is left out. ``batch_size`` counts views of all processes.
    Raises ValueError for more views than the set has.
    """

    def __init__(
        self,
        dataset: SoftLabelDataset,
        batch_size: int,
        *,
        views_per_image: int = 1,
        epochs: int | None = None,
        rank: int = 0,
        num_replicas: int = 1,
    ) -> None:
        if not 1 <= views_per_image <= dataset.label_set.num_views:
            raise ValueError(
                f"views_per_image must lie in 1..{dataset.label_set.num_views}, the views of the "
                f"label set; got {views_per_image}"
            )
        if batch_size < 1 or not 0 <= rank < num_replicas:
            raise ValueError(f"batch_size {batch_size}, rank {rank} of {num_replicas}")
        self.dataset = dataset
        self._rank, self._num_replicas = rank, num_replicas
        schedule = _Schedule(dataset.seed, batch_size, views_per_image, epochs or sys.maxsize)
        positions = dataset.positions.tolist()
        self._batches = BatchSampler(schedule, dataset.source, positions, dataset.targets)

    @property
    def sampler(self) -> "EpochBatchSampler":
        """Itself: Lightning and Accelerate call ``batch_sampler.sampler.set_epoch``."""
        return self

    @property
    def batch_size(self) -> int:
        """The number of views in a full batch, of all processes."""
        return self._batches.config.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, counted from 0, of the dataset too."""
        self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        batches = self._batches.batches(self.dataset.epoch)
        return len(batches) - bool(len(batches) and len(batches[-1]) < self._num_replicas)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for request in self._batches.batches(self.dataset.epoch)[: len(self)]:
            rows = rank_rows(request, self._rank, self._num_replicas)
            indices = np.searchsorted(self.dataset.positions, [p for p, _ in rows]).tolist()
            yield [(i, v) for i, (_, views) in zip(indices, rows, strict=True) for v in views]


def collate(items: Sequence[tuple[Tensor, ItemLabel]]) -> tuple[Tensor, ItemLabel]:
    """Return the batch of some items of a SoftLabelDataset; its labels stay compressed.

    Images B x 3 x S x S, channels-last in memory as the items are, and the labels of B rows, of
    the items' kind.
    """
    images = [image for image, _ in items]
    labels: list[Any] = [label for _, label in items]
    if images[0].is_contiguous():
        images_BCHW = torch.stack(images)
    else:
        images_BCHW = torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
    if isinstance(labels[0], Tensor):
        return images_BCHW, torch.stack(labels)
    if isinstance(labels[0], BatchTargets):
        return images_BCHW, BatchTargets.concat(labels)
    return images_BCHW, concat(labels)


def _open(data_dir: Path, labels: Path, split: str) -> ImageSource:
    """Open the images that a label set names as its split, with its class ids."""
    plan = read_manifest(labels)["plan"]
    entry, classes = plan["roles"].get(split, {}), plan["classes"]
    held_out = HeldOut.from_json(entry.get("held_out"))
    named = entry.get("split", split)
    source = open_source(data_dir, named, held_out=held_out, names=lambda: classes)
    return by_name(source, classes) or source


def _pixel_notes(labels: LabelSet) -> list[str]:
    """Return a line for each step of a view that gives other pixels than those labelled."""
    plan, notes = labels.manifest["plan"], []
    if plan.get("probe_sha256") not in (None, probe_sha256(resize_of(plan.get("interpolation")))):
        notes.append(
            f"the views of {labels.folder} were resized by another version of torch or Pillow; the "
            "pixels on this machine differ by up to 2 of 255"
        )
    if plan.get("operations_sha256") not in (None, operations_sha256()):
        notes.append(
            f"the pixels of the views of {labels.folder} were changed by another version of timm "
            "or Pillow; this machine gives other pixels"
        )
    return notes
