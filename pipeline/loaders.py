"""From keys to batches of pixels: one path for stage one, stage two and validation.

A request names images and which views of each to cut; a worker decodes every image once and sends
uint8 pixels. Order and batches are pure functions of (seed, epoch), so a run can begin anywhere.
"""

import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from mealv2.errors import DataError
from mealv2.images import ImageSource, centre_crop, cut, decode
from mealv2.views import Views
from pipeline.config import OnBadImage

T = TypeVar("T")
CENTRE = -1  # the view of an evaluation: the centre crop

# One batch: (position in the source, views to cut of it) for each image.
Request = list[tuple[int, tuple[int, ...]]]


@dataclass(frozen=True)
class Pixels:
    """The views of one request: ``images_BCHW`` uint8 (channels-last in memory), row by row.

    ``positions`` and ``views`` name each row; ``sizes_B2`` are the width and height of its image,
    ``boxes_B5`` top, left, height, width and flip of what was cut (0 of a centre crop). ``failed``
    are the images that could not be read, with the reason: none of their rows are here.
    """

    images_BCHW: torch.Tensor
    sizes_B2: np.ndarray
    boxes_B5: np.ndarray
    positions: list[int] = field(default_factory=list)
    views: list[int] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)

    def pin_memory(self) -> "Pixels":
        """Return the same in page-locked memory; DataLoader calls it, and leaves others alone."""
        return replace(self, images_BCHW=self.images_BCHW.pin_memory())


class ViewReader(Dataset[Pixels]):
    """Cuts the requested views, in a worker process: a bad image is reported, not raised.

    ``views`` says what the views are; centre crops need none.
    """

    def __init__(self, source: ImageSource, *, img_size: int, views: Views | None = None) -> None:
        self._source = source
        self._img_size = img_size
        self._views = views

    def __getitem__(self, request: Request) -> Pixels:
        rows: list[np.ndarray] = []
        boxes: list[tuple[int, ...]] = []
        sizes: list[tuple[int, int]] = []
        positions: list[int] = []
        indices: list[int] = []
        failed: dict[int, str] = {}
        for position, views in request:
            try:
                image = decode(self._source.read(position))
                of_image = list(self._views_of(image, position, views))  # all of them or none
            except (DataError, OSError) as error:
                failed[position] = getattr(error, "strerror", None) or str(error)
                continue
            rows.extend(pixels for pixels, _ in of_image)
            boxes.extend(box for _, box in of_image)
            sizes.extend([image.size] * len(views))
            positions.extend([position] * len(views))
            indices.extend(views)
        size = self._img_size
        images_BHWC = np.stack(rows) if rows else np.empty((0, size, size, 3), dtype=np.uint8)
        images_BCHW = torch.from_numpy(images_BHWC).permute(0, 3, 1, 2)
        sizes_B2 = np.array(sizes, dtype=np.uint32).reshape(-1, 2)
        boxes_B5 = np.array(boxes, dtype=np.uint32).reshape(-1, 5)
        return Pixels(images_BCHW, sizes_B2, boxes_B5, positions, indices, failed)

    def _views_of(
        self, image: Image.Image, position: int, views: Iterable[int]
    ) -> Iterator[tuple[np.ndarray, tuple[int, ...]]]:
        """Yield pixels and box of each view of an image."""
        width, height = image.size
        key = self._source.keys[position]
        for index in views:
            if index == CENTRE:
                yield centre_crop(image, self._img_size), (0, 0, 0, 0, 0)
            else:
                assert self._views is not None, "only centre crops can be cut without views"
                view = self._views.view(key, index, width=width, height=height)
                yield cut(image, view, self._img_size), view.box()


def read_views(
    reader: ViewReader,
    requests: Iterable[Request],
    *,
    workers: int = 0,
    pin_memory: bool = False,
    keep_workers: bool = False,
) -> DataLoader[Pixels]:
    """Return an iterable over the pixels of each request, in order, read by ``workers`` processes.

    ``keep_workers`` is for a loader that is iterated more than once.
    """
    return DataLoader(
        reader,
        sampler=requests,
        batch_size=None,
        num_workers=workers,
        persistent_workers=keep_workers and workers > 0,
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),  # its own: drawing from the global one would change a run
        pin_memory=pin_memory,
    )


def epoch_order(num_images: int, *, seed: int, epoch: int) -> np.ndarray:
    """Return a permutation of 0..num_images-1, int64, a pure function of its arguments.

    Positions sorted by a 64-bit mix (SplitMix64) of (seed, epoch, position).
    """
    positions = np.arange(num_images, dtype=np.uint64)
    start = _mix(np.array([seed], dtype=np.uint64) + _mix(np.array([epoch + 1], dtype=np.uint64)))
    return np.argsort(_mix(positions + start), kind="stable").astype(np.int64)


def batches(order: Sequence[T], batch_size: int) -> list[list[T]]:
    """Cut an order into batches; every image is used, the last batch may be smaller.

    A last batch of one image joins the one before it: batch normalisation cannot learn from one.
    """
    cut_up = [list(order[start : start + batch_size]) for start in range(0, len(order), batch_size)]
    if batch_size > 1 and len(cut_up) > 1 and len(cut_up[-1]) == 1:
        last = cut_up.pop()
        cut_up[-1] += last
    return cut_up


def centre_requests(positions: Sequence[int], batch_size: int) -> list[Request]:
    """Return requests for the centre crops of images, ``batch_size`` at a time."""
    return [
        [(position, (CENTRE,)) for position in positions[start : start + batch_size]]
        for start in range(0, len(positions), batch_size)
    ]


def name_failures(source: ImageSource, failed: dict[int, str]) -> dict[str, str]:
    """Return the reasons by key instead of by position."""
    return {source.keys[position]: reason for position, reason in failed.items()}


def refuse_failures(source: ImageSource, failed: dict[int, str], policy: OnBadImage) -> None:
    """Raise DataError naming the first bad image, unless the policy is to skip them."""
    if failed and policy == "fail":
        position, reason = next(iter(failed.items()))
        raise DataError(
            f"cannot read image {Path(source.name) / source.keys[position]}: {reason}; "
            "replace it, or leave such images out with --on-bad-image skip"
        )


def _mix(words: np.ndarray) -> np.ndarray:
    """SplitMix64's output function: a bijection of 64-bit words, multiplications modulo 2**64."""
    words = words * np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = words ^ (words >> np.uint64(31))
    return mixed


def _ignore_signals(worker: int) -> None:
    """Leave Ctrl-C and SIGTERM, sent to the whole group, to the main process: it saves first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
