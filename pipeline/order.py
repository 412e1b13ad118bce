"""The order of images in an epoch, and its batches: pure functions, so a run can begin anywhere."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


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


def _mix(words: np.ndarray) -> np.ndarray:
    """SplitMix64's output function: a bijection of 64-bit words, multiplications modulo 2**64."""
    words = words * np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = words ^ (words >> np.uint64(31))
    return mixed
