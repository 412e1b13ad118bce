"""The order of images in an epoch, and its batches: pure functions, so a run can begin anywhere."""

import itertools
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")

# Groups whose images are shuffled together: with so many, neighbours in a file hardly meet in a
# batch, and so many files are to be at hand at a time, or twice as many while one window follows
# another.
WINDOW = 8


def epoch_order(
    num_images: int, *, seed: int, epoch: int, groups: Sequence[int] | None = None
) -> np.ndarray:
    """Return a permutation of 0..num_images-1, int64, a pure function of its arguments.

    Positions sorted by a 64-bit mix (SplitMix64) of (seed, epoch, position). ``groups`` are the
    positions at which groups begin that should be read together, ascending from 0: these are put in
    such an order, and the images of WINDOW of them at a time.
    """
    positions = np.arange(num_images, dtype=np.uint64)
    start = _mix(np.array([seed], dtype=np.uint64) + _mix(np.array([epoch + 1], dtype=np.uint64)))
    words = _mix(positions + start)
    if groups is None:
        return np.argsort(words, kind="stable").astype(np.int64)
    places = np.argsort(epoch_order(len(groups), seed=seed, epoch=epoch))
    window_N = np.repeat(places // WINDOW, np.diff([*groups, num_images]))
    return np.lexsort((words, window_N)).astype(np.int64)


def batches(order: Sequence[T], batch_size: int) -> list[list[T]]:
    """Cut an order into batches; every image is used, the last batch may be smaller.

    A last batch of one image joins the one before it: batch normalisation cannot learn from one.
    """
    return [list(order[cut.start : cut.stop]) for cut in cuts(len(order), batch_size)]


def cuts(num_images: int, batch_size: int) -> list[range]:
    """Return the places of each batch in an order of so many images; see ``batches``."""
    starts = list(range(0, num_images, batch_size))
    if batch_size > 1 and len(starts) > 1 and starts[-1] == num_images - 1:
        starts.pop()
    return [range(a, b) for a, b in itertools.pairwise([*starts, num_images])]


def _mix(words: np.ndarray) -> np.ndarray:
    """SplitMix64's output function: a bijection of 64-bit words, multiplications modulo 2**64."""
    words = words * np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = words ^ (words >> np.uint64(31))
    return mixed
