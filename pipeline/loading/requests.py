"""Batch requests: which views of which images to load, and what to do with unreadable images."""

from collections.abc import Iterable, Sequence

import numpy as np

from mealv2.data.source import ImageSource
from mealv2.errors import DataError
from pipeline.config import OnBadImage

CENTRE = -1  # the view of an evaluation: the centre crop

# One batch: (position in the source, views to cut of it) for each image.
BatchRequest = list[tuple[int, tuple[int, ...]]]


def num_views_of(request: BatchRequest) -> int:
    """Return how many views a request asks for."""
    return sum(len(views) for _, views in request)


def announce(source: ImageSource, requests: Iterable[BatchRequest]) -> None:
    """Announce to a source which of its groups requests will read, in the order of first use."""
    if source.groups is None:
        return
    used: dict[int, None] = {}
    for request in requests:
        positions = [position for position, _ in request]
        numbers = np.searchsorted(source.groups, positions, side="right") - 1
        used.update(dict.fromkeys(numbers.tolist()))
    source.announce(list(used))


def centre_requests(positions: Sequence[int], batch_size: int) -> list[BatchRequest]:
    """Return requests for the centre crops of images, ``batch_size`` at a time."""
    return [
        [(position, (CENTRE,)) for position in positions[start : start + batch_size]]
        for start in range(0, len(positions), batch_size)
    ]


def failures_by_key(source: ImageSource, failed: dict[int, str]) -> dict[str, str]:
    """Return the reasons by key instead of by position."""
    return {source.keys[position]: reason for position, reason in failed.items()}


def check_failures(source: ImageSource, failed: dict[int, str], policy: OnBadImage) -> None:
    """Raise DataError naming the first bad image, unless the policy is to skip them."""
    if failed and policy == "fail":
        position, reason = next(iter(failed.items()))
        where = "/".join(filter(None, (source.name, source.keys[position])))
        raise DataError(
            f"cannot read image {where}: {reason}; "
            "replace it, or leave such images out with --on-bad-image skip"
        )
