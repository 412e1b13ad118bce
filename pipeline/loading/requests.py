"""Batch requests: which views of which images to load; what to do with unreadable images."""

from collections.abc import Iterable, Sequence

import numpy as np

from mealv2.data.source import ImageSource
from mealv2.errors import DataError
from pipeline.config import OnBadImage

CENTRE = -1  # the view number of the centre crop, for evaluation

# One batch: (position in the source, view numbers) for each image.
BatchRequest = list[tuple[int, tuple[int, ...]]]


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
    """Raise DataError for the first bad image, unless the policy is to skip them."""
    if failed and policy == "fail":
        position, reason = next(iter(failed.items()))
        where = "/".join(filter(None, (source.name, source.keys[position])))
        raise DataError(
            f"cannot read image {where}: {reason}; "
            "replace it, or skip such images with --on-bad-image skip"
        )
