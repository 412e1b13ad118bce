"""One label file of FKD: the boxes, flips and labels of an image's crops."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mealv2.errors import LabelSetError
from mealv2.fkd.labels import kind_of, labels_of
from mealv2.fkd.torch_files import read_arrays
from mealv2.soft_labels import SoftLabels
from mealv2.storage.atomic import write_atomic


@dataclass(frozen=True)
class FkdFile:
    """The labelled crops of an image.

    ``boxes`` float32 (M, 4): top, left, height, width as fractions of the original image; ``flips``
    bool (M,); ``labels`` as stored, M first (see ``kind_of``).
    """

    path: Path
    boxes: np.ndarray
    flips: np.ndarray
    labels: np.ndarray

    def soft_labels(self, num_classes: int, label_type: str | None = None) -> SoftLabels:
        """Return the labels as distributions; raises LabelSetError as kind_of and labels_of."""
        try:
            kind = kind_of(self.labels, num_classes, label_type)
            return labels_of(self.labels, kind, num_classes)
        except LabelSetError as error:
            raise LabelSetError(f"label file {self.path}: {error}") from None


def read_file(path: Path) -> FkdFile:
    """Read a label file of FKD or MEAL V2 without executing anything in it.

    Skips crops without a label: FKD's generator stores all boxes, but labels only full segments of
    crops. Raises OSError, and LabelSetError for a damaged or unknown file.
    """
    boxes, flips, labels = read_arrays(path)
    try:
        boxes, flips, labels = _checked(boxes, flips, labels)
    except ValueError as error:
        raise LabelSetError(f"label file {path}: {error}") from None
    return FkdFile(path, boxes, flips, labels)


def write_file(path: Path, boxes: np.ndarray, flips: np.ndarray, labels: Tensor) -> None:
    """Write a label file that FKD's readers load.

    ``boxes`` (M, 4) are fractions, ``labels`` the output of ``pack``. The file has tensors, because
    torch.load rejects arrays by default. Raises OSError, ValueError for what read_file rejects.
    """
    boxes, flips, stored = _checked(boxes, flips, labels.detach().cpu().numpy())
    buffer = io.BytesIO()
    torch.save([torch.tensor(array) for array in (boxes, flips, stored)], buffer)
    write_atomic(path, buffer.getvalue())


def _checked(
    boxes: np.ndarray, flips: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return boxes, flips and labels of the labelled crops; raises ValueError."""
    num_boxes = boxes.shape[0] if boxes.ndim == 2 else 0
    if boxes.shape != (num_boxes, 4) or boxes.dtype.kind != "f":
        raise ValueError(f"boxes are {boxes.dtype} of shape {boxes.shape}, not (crops, 4)")
    if flips.shape != (num_boxes,) or flips.dtype != np.bool_:
        raise ValueError(f"flips are {flips.dtype} of shape {flips.shape} for {num_boxes} boxes")
    num_labels = labels.shape[0] if labels.ndim else 0
    if not 1 <= num_labels <= num_boxes:
        raise ValueError(f"{num_labels} labels for {num_boxes} boxes")
    check_boxes(boxes)
    if labels.dtype.kind == "f" and not np.isfinite(labels).all():
        raise ValueError("a label is not finite")
    labels = labels.astype(labels.dtype.newbyteorder("="), copy=False)
    return boxes[:num_labels].astype(np.float32), flips[:num_labels].astype(np.bool_), labels


def check_boxes(boxes: np.ndarray) -> None:
    """Raise ValueError for a box, (top, left, height, width), that is not inside the image."""
    # rounding moves a number below 1 by at most eps / 4, so top + height can exceed 1
    allowed = 1.0 + float(np.finfo(boxes.dtype).eps)
    top, left, height, width = boxes.astype(np.float64).T
    inside = (top >= 0) & (left >= 0) & (top + height <= allowed) & (left + width <= allowed)
    invalid = ~(inside & (height > 0) & (width > 0))  # true for NaN, too
    if invalid.any():
        first = int(invalid.argmax())
        raise ValueError(f"box {first} is not inside the image: {boxes[first].tolist()}")
