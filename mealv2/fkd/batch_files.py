"""The batch files of SRe2L: the boxes, flips and logits of the images of one batch.

SRe2L's relabel step writes EPOCH/BATCH.tar below a folder, and LPLD's does too. Facts from
VILA-Lab/SRe2L, SRe2L/relabel/{generate_soft_label,utils_fkd}.py at commit 8d00cba, and
he-y/soft-label-pruning-for-dataset-distillation, relabel_and_validate/ at commit 63eee18.
"""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mealv2.errors import LabelSetError
from mealv2.fkd.files import check_boxes
from mealv2.fkd.torch_files import read_list
from mealv2.storage.atomic import write_atomic
from mealv2.storage.json_format import read_json

ORDER_NAME = "sampler_indices_epoch.json"  # LPLD: the images of every epoch in order

# SRe2L: the loader recomputes the order with the default seed of its function, whatever the flag
_ORDER_SEED = 42


@dataclass(frozen=True)
class BatchFile:
    """The labelled views of a batch's images, in the batch's order.

    ``boxes`` float32 (B, 4): top, left, height, width as fractions of the image; ``flips`` bool
    (B,); ``logits`` (B, C), float16 or float32: the teacher's output before the softmax.
    """

    path: Path
    boxes: np.ndarray
    flips: np.ndarray
    logits: np.ndarray


def batch_path(folder: Path, epoch: int, batch: int) -> Path:
    """Return the path of a batch's file."""
    return folder / f"epoch_{epoch}" / f"batch_{batch}.tar"


def find_batches(folder: Path) -> list[int]:
    """Return the number of batch files of each epoch.

    Raises LabelSetError for no file, and for one that is missing before the last of its epoch.
    """
    num_epochs = _count(folder, r"epoch_(0|[1-9]\d*)", "epoch_{}")
    found = [
        _count(folder / f"epoch_{epoch}", r"batch_(0|[1-9]\d*)\.tar", "batch_{}.tar")
        for epoch in range(num_epochs)
    ]
    if not found or not all(found):
        missing = batch_path(folder, found.index(0) if found else 0, 0)
        raise LabelSetError(f"no label files in {folder}; expected {missing}")
    return found


def _count(folder: Path, pattern: str, name: str) -> int:
    """Return how many numbered entries a folder has; raises LabelSetError for a gap."""
    matches = [re.fullmatch(pattern, path.name, re.ASCII) for path in folder.iterdir()]
    numbers = sorted(int(match[1]) for match in matches if match)
    for expected, number in enumerate(numbers):
        if number != expected:
            missing, last = name.format(expected), name.format(numbers[-1])
            raise LabelSetError(
                f"{folder} has {last} but no {missing}; download or make the labels again"
            )
    return len(numbers)


def read_batch(path: Path) -> BatchFile:
    """Read a batch file without executing anything in it.

    Raises OSError, and LabelSetError for a damaged or unknown file, and for labels of images that
    MixUp, CutMix or Cutout changed: they are no labels of a view.
    """
    values = read_list(path, 6)
    try:
        boxes, flips, logits = _checked(values[0], values[1], values[5])
        if mixing := _mixing(*values[2:5], num_images=len(logits)):
            raise ValueError(
                f"its images were mixed by {mixing}, and a label set has labels of single images; "
                "import labels made without --mix-type, or label with `mealv2 precompute`"
            )
    except ValueError as error:
        raise LabelSetError(f"label file {path}: {error}") from None
    return BatchFile(path, boxes, flips, logits)


def _checked(boxes: Any, flips: Any, logits: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the arrays of a batch; raises ValueError."""
    if not all(isinstance(array, np.ndarray) for array in (boxes, flips, logits)):
        raise ValueError("its boxes, flips or logits are not tensors")
    if logits.ndim != 2 or logits.dtype not in (np.float16, np.float32):
        raise ValueError(
            f"logits are {logits.dtype} of shape {logits.shape}, not (images, classes)"
        )
    num_images = len(logits)
    if boxes.shape != (num_images, 4) or boxes.dtype != np.float32:
        raise ValueError(f"boxes are {boxes.dtype} of shape {boxes.shape}, not ({num_images}, 4)")
    if flips.dtype == np.float32 and flips.shape == (num_images, 7):
        raise ValueError(
            "its images have Cutout (LPLD's labels of ImageNet-21K), which the views of a label "
            "set have not"
        )
    if flips.shape != (num_images,) or flips.dtype != np.bool_:
        raise ValueError(f"flips are {flips.dtype} of shape {flips.shape} for {num_images} boxes")
    check_boxes(boxes)
    if not np.isfinite(logits).all():
        raise ValueError("a logit is not finite")
    return boxes, flips, logits


def _mixing(index: Any, weight: Any, box: Any, *, num_images: int) -> str:
    """Return how the images of a batch were mixed, "" if each kept its own pixels.

    ``index`` has the partner of each image, ``weight`` is lambda, ``box`` CutMix's (first row,
    first column, end row, end column); all are None without mixing. Raises ValueError.
    """
    if index is None:
        if weight is not None or box is not None:
            raise ValueError("it has a mixing weight or box, but no partners")
        return ""
    is_index = isinstance(index, np.ndarray) and index.dtype == np.int64
    if not is_index or sorted(index.reshape(-1).tolist()) != list(range(num_images)):
        raise ValueError("its mix index is not an order of its images")
    if not isinstance(weight, float) or not 0 <= weight <= 1:
        raise ValueError(f"its mixing weight is {weight}")
    if box is not None and not (
        isinstance(box, list) and len(box) == 4 and all(type(n) is int and n >= 0 for n in box)
    ):
        raise ValueError("its CutMix box is not four numbers")
    if (index == np.arange(num_images)).all():
        return ""
    if box is None:
        return "" if weight == 1 else f"MixUp (lambda {weight:.3g})"
    first_row, first_column, end_row, end_column = box
    is_empty = first_row >= end_row or first_column >= end_column
    return "" if is_empty else f"CutMix (lambda {weight:.3g})"


def write_batch(path: Path, boxes: np.ndarray, flips: np.ndarray, logits_BC: Tensor) -> None:
    """Write a batch file that the loaders of SRe2L and LPLD read.

    ``boxes`` (B, 4) are fractions; ``logits_BC`` are stored in float16. Every image is mixed with
    itself: SRe2L's loader requires partners, also without mixing. Raises OSError, and ValueError
    for what read_batch rejects.
    """
    logits = logits_BC.half().cpu().numpy()
    boxes, flips, logits = _checked(boxes.astype(np.float32), flips, logits)
    tensors = [torch.tensor(array) for array in (boxes, flips, logits)]
    partners = torch.arange(len(logits))
    buffer = io.BytesIO()
    torch.save([*tensors[:2], partners, 1.0, [0, 0, 0, 0], tensors[2]], buffer)
    write_atomic(path, buffer.getvalue())


def sampled_order(num_images: int) -> Iterator[np.ndarray]:
    """Yield the order of the images in each epoch, int64: torch's RandomSampler with seed 42.

    Its ``__iter__`` draws a second permutation to fill an incomplete round; torch 2.0 to 2.14.
    """
    generator = torch.Generator().manual_seed(_ORDER_SEED)
    while True:
        yield torch.randperm(num_images, generator=generator).numpy()
        torch.randperm(num_images, generator=generator)


def stored_order(folder: Path, num_epochs: int, num_images: int) -> list[np.ndarray] | None:
    """Return the order of the images in each epoch from LPLD's file; None without the file.

    Raises LabelSetError for a file that does not list distinct images of ``num_images``.
    """
    path = folder / ORDER_NAME
    if not path.exists():
        return None
    try:
        value = read_json(path)
        listed = [value[str(epoch)] for epoch in range(num_epochs)]
        return [_order(epoch, num_images) for epoch in listed]
    except (KeyError, TypeError, ValueError) as error:
        why = f"no epoch {error}" if isinstance(error, KeyError) else str(error)
        raise LabelSetError(f"cannot read {path}: {why}; download or make it again") from None


def _order(listed: Any, num_images: int) -> np.ndarray:
    if not isinstance(listed, list) or not all(type(number) is int for number in listed):
        raise ValueError("an epoch is not a list of image numbers")
    if not listed or min(listed) < 0 or max(listed) >= num_images:
        raise ValueError(f"an epoch has image numbers outside 0 to {num_images - 1}")
    if len(set(listed)) != len(listed):
        raise ValueError("an epoch has an image twice")
    return np.array(listed, np.int64)
