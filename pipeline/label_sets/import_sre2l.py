"""Labels from the batch files of SRe2L and LPLD, put in the order of the images."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from math import ceil, sqrt
from pathlib import Path

import numpy as np
import torch

from mealv2 import fkd
from mealv2.data.source import ImageSource
from mealv2.errors import LabelSetError
from mealv2.label_set import Encoding, Rows
from pipeline import console
from pipeline.config import LabelsImportConfig
from pipeline.label_sets.image_order import torchvision_order
from pipeline.label_sets.writing import SLICE, Imported
from pipeline.labelling.annotate import encoding_of

_MAX_BYTES = 1 << 31  # of logits at once; labels of more images are read in several passes


def read_batches(config: LabelsImportConfig, source: ImageSource) -> Imported:
    """Return the labels of SRe2L's files; epoch e is view e. Raises MealError and OSError.

    Of pruned labels, where an image is in fewer epochs than another, its views are repeated.
    """
    batches = _Batches(
        _files_of(config.folder),
        source,
        torchvision_order(source, config.data_dir, config.train_split),
    )
    encoding = _encoding(config, source, batches.num_classes)
    if number := len(source) - len(batches.positions):
        console.info(f"left out: {console.count(number, 'image')} without labels")
    if number := batches.num_repeated:
        where = "of images in fewer epochs than others"
        console.info(f"repeated: {console.count(number, 'label')} {where}")
    per_image = batches.num_views * batches.num_classes * batches.dtype.itemsize
    step = max(1, _MAX_BYTES // (per_image * config.shard_size)) * config.shard_size
    loaded: dict[int, _Views] = {}

    def read(part: range) -> tuple[Rows, np.ndarray, np.ndarray]:
        first = part.start // step * step
        if first not in loaded:
            loaded.clear()
            loaded[first] = batches.read(batches.positions[first : first + step])
        views, some = loaded[first], slice(part.start - first, part.stop - first)
        return _encoded(views.logits[some], encoding), views.boxes[some], views.flips[some]

    return Imported(
        positions=batches.positions.tolist(),
        encoding=encoding,
        num_views=batches.num_views,
        how="SRe2L's logits",
        read=read,
        report={"top1_agreement": batches.top1_agreement()},
    )


def _files_of(folder: Path) -> Path:
    """Return the folder of the epochs: ``folder``, or its ``labels``, as our export writes it."""
    inner = folder / "labels"
    is_export = not (folder / "epoch_0").is_dir() and (inner / "epoch_0").is_dir()
    return inner if is_export else folder


def _encoding(config: LabelsImportConfig, source: ImageSource, num_classes: int) -> Encoding:
    """Return the encoding; the default keeps every label exactly, also at a temperature."""
    if num_classes != len(source.classes):
        raise LabelSetError(
            f"{config.folder} has labels of {num_classes} classes, {source.name} has "
            f"{len(source.classes)}; name all classes of the teacher with --class-map"
        )
    if config.rate is None and config.topk is None:
        return Encoding(num_classes, "float32", topk=num_classes, logits=config.store_logits)
    return encoding_of(config, num_classes)


def _encoded(logits_NVC: np.ndarray, encoding: Encoding) -> Rows:
    """Return the labels of N images, image by image: q = softmax(logits)."""
    parts, num_views = [], logits_NVC.shape[1]
    rows = max(1, SLICE // num_views) * num_views
    for logits_BC in torch.split(torch.from_numpy(logits_NVC).flatten(0, 1), rows):
        probs_BC = torch.softmax(logits_BC.double(), dim=1).float()
        logits = logits_BC.float() if encoding.logits else None
        parts.append(encoding.encode(probs_BC, logits, num_views=num_views))
    return Rows.concat(parts)


@dataclass(frozen=True)
class _Views:
    """The views of N images: boxes N x V x 4, flips N x V, logits N x V x C."""

    boxes: np.ndarray
    flips: np.ndarray
    logits: np.ndarray


class _Batches:
    """The batch files of a folder, and which images each one labels."""

    def __init__(self, folder: Path, source: ImageSource, images: np.ndarray) -> None:
        self._folder, self._source = folder, source
        self._images = images  # the position in ``source`` of each number in the files
        self._num_batches = fkd.find_batches(folder)
        first = fkd.read_batch(fkd.batch_path(folder, 0, 0))
        self._batch_size, self.num_classes = first.logits.shape
        self.dtype = first.logits.dtype
        self._stored_order = fkd.stored_order(folder, len(self._num_batches), len(images))
        counts = np.zeros(len(source), np.int64)
        for epoch, order in enumerate(self._orders()):
            self._check_epoch(epoch, len(order))
            counts[images[order[: self._num_batches[epoch] * self._batch_size]]] += 1
        self.positions = np.flatnonzero(counts)
        self._counts = counts
        self.num_views = int(counts.max())
        self.num_repeated = int((self.num_views - counts[self.positions]).sum())
        *_, (path, positions) = self._files(0)
        self._read(path, positions)  # the last batch of an epoch shows another number of images

    def _orders(self) -> Iterator[np.ndarray]:
        if self._stored_order is not None:
            return iter(self._stored_order)
        return islice(fkd.sampled_order(len(self._images)), len(self._num_batches))

    def _check_epoch(self, epoch: int, num_images: int) -> None:
        """Raise LabelSetError if an epoch's files cannot be those of this many images.

        LPLD drops the last batch if it is smaller, and ends in the middle of an epoch.
        """
        found, size = self._num_batches[epoch], self._batch_size
        complete = ceil(num_images / size)
        is_complete = found == complete
        if self._stored_order is not None:
            is_last = epoch == len(self._num_batches) - 1
            is_complete |= found == num_images // size or (is_last and found < complete)
        if not is_complete:
            raise LabelSetError(
                f"{self._folder}/epoch_{epoch} has {console.count(found, 'batch file')} of {size} "
                f"images, but the {num_images} images of {self._source.name} make {complete}; "
                "give the images that were labelled"
            )

    def _files(self, epoch: int) -> Iterator[tuple[Path, np.ndarray]]:
        """Yield the files of an epoch with the positions of their images."""
        order = next(islice(self._orders(), epoch, None))
        yield from self._files_of(epoch, order)

    def _files_of(self, epoch: int, order: np.ndarray) -> Iterator[tuple[Path, np.ndarray]]:
        for batch in range(self._num_batches[epoch]):
            numbers = order[batch * self._batch_size : (batch + 1) * self._batch_size]
            yield fkd.batch_path(self._folder, epoch, batch), self._images[numbers]

    def _read(self, path: Path, positions: np.ndarray) -> fkd.BatchFile:
        batch = fkd.read_batch(path)
        expected = (len(positions), self.num_classes)
        if batch.logits.shape != expected or batch.logits.dtype != self.dtype:
            raise LabelSetError(
                f"label file {path} has {batch.logits.dtype} logits of shape "
                f"{batch.logits.shape}; the first file and the {len(self._images)} images of "
                f"{self._source.name} need {self.dtype} of {expected}"
            )
        return batch

    def read(self, positions: np.ndarray) -> _Views:
        """Return the views of some images, by position; repeats those of images with fewer."""
        shape = (len(positions), self.num_views)
        views = _Views(
            np.zeros((*shape, 4), np.float32),
            np.zeros(shape, np.bool_),
            np.zeros((*shape, self.num_classes), self.dtype),
        )
        row_of = np.full(len(self._source), -1)
        row_of[positions] = np.arange(len(positions))
        filled = np.zeros(len(positions), np.int64)
        for epoch, order in enumerate(self._orders()):
            for path, images in self._files_of(epoch, order):
                is_wanted = row_of[images] >= 0
                if is_wanted.any():
                    batch, rows = self._read(path, images), row_of[images[is_wanted]]
                    at = rows, filled[rows]
                    views.boxes[at] = batch.boxes[is_wanted]
                    views.flips[at] = batch.flips[is_wanted]
                    views.logits[at] = batch.logits[is_wanted]
                    filled[rows] += 1
        for view in range(int(filled.min()), self.num_views):
            rows = np.flatnonzero(filled <= view)
            for array in (views.boxes, views.flips, views.logits):
                array[rows, view] = array[rows, view % filled[rows]]
        return views

    def top1_agreement(self) -> float:
        """Return the percent of labels whose likeliest class is the image's, of two files.

        Shows a warning if it is as by chance: a wrong folder or order looks like this.
        """
        true_class = np.asarray(self._source.labels)
        right = []
        for epoch in {0, len(self._num_batches) - 1}:
            path, images = next(self._files(epoch))
            right.append(self._read(path, images).logits.argmax(axis=1) == true_class[images])
        is_right = np.concatenate(right)
        by_chance = len(is_right) / self.num_classes
        percent = round(100 * float(is_right.mean()), 2)
        if is_right.sum() <= by_chance + 2 * sqrt(by_chance):
            console.info(
                f"warning: {percent:g} % of {console.count(len(is_right), 'label')} name the class "
                f"of their image, as by chance: is {self._source.name} what was labelled?"
            )
        return percent
