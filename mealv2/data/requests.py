"""Which views of which images to load, and what was loaded; what to do with bad images."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from mealv2.data.content_hash import NOT_LABELLED
from mealv2.data.source import ImageSource, where_is
from mealv2.errors import DataError, LabelSetError, OnBadImage

CENTRE = -1  # the view number of the centre crop, for evaluation

# One batch: (position in the source, view numbers) for each image.
BatchRequest = list[tuple[int, tuple[int, ...]]]


@dataclass(frozen=True)
class Batch:
    """The views of one request: ``images_BCHW`` uint8 (channels-last in memory), row by row.

    ``positions`` and ``views`` identify each row; ``sizes_B2`` are the width and height of its
    image, ``boxes_B5`` top, left, height, width and flip of the view (0 for a centre crop).
    ``failed`` maps images that could not be read to the reason: they have no rows. ``hashes`` has
    the content hash of every image whose bytes were read, failed ones included, if the reader
    keeps them. ``other_sizes`` has the same views resized to other sizes, by size.
    """

    images_BCHW: torch.Tensor
    sizes_B2: np.ndarray
    boxes_B5: np.ndarray
    positions: list[int] = field(default_factory=list)
    views: list[int] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)
    hashes: dict[int, int] = field(default_factory=dict)
    other_sizes: dict[int, torch.Tensor] = field(default_factory=dict)

    def with_images(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """Return the batch with images of every size changed by a function."""
        others = {size: change(images_BCHW) for size, images_BCHW in self.other_sizes.items()}
        return replace(self, images_BCHW=change(self.images_BCHW), other_sizes=others)


def num_views_of(request: BatchRequest) -> int:
    """Return the number of views in a request."""
    return sum(len(views) for _, views in request)


def announce(source: ImageSource, requests: Iterable[BatchRequest]) -> None:
    """Announce to a source the groups that requests will read, in order of first use."""
    if source.groups is None:
        return
    used: dict[int, None] = {}
    for request in requests:
        positions = [position for position, _ in request]
        numbers = np.searchsorted(source.groups, positions, side="right") - 1
        used.update(dict.fromkeys(numbers.tolist()))
    source.announce(list(used))


def centre_requests(positions: Sequence[int], batch_size: int) -> list[BatchRequest]:
    """Return requests for the centre crops of images, ``batch_size`` images each."""
    return [
        [(position, (CENTRE,)) for position in positions[start : start + batch_size]]
        for start in range(0, len(positions), batch_size)
    ]


def failures_by_key(source: ImageSource, failed: dict[int, str]) -> dict[str, str]:
    """Return the reasons of failures, given by position, by key."""
    return {source.keys[position]: reason for position, reason in failed.items()}


def check_failures(source: ImageSource, failed: dict[int, str], policy: OnBadImage) -> None:
    """Raise DataError for the first bad image, unless the policy is to skip them.

    LabelSetError for an image that can be read, but is not the one that was labelled.
    """
    if failed and policy == "fail":
        position, reason = next(iter(failed.items()))
        where = where_is(source, position)
        if reason.startswith(NOT_LABELLED):
            raise LabelSetError(
                f"image {where}: {reason}; `mealv2 labels verify --data-dir` lists all such "
                "images; give the data that was labelled, or skip them with --on-bad-image skip"
            )
        raise DataError(
            f"cannot read image {where}: {reason}; "
            "replace it, or skip such images with --on-bad-image skip"
        )
