"""Which views of which images make up each batch of a run: pure functions of the settings."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Protocol, TypeVar, overload

import numpy as np

from mealv2.data.requests import BatchRequest, announce
from mealv2.data.source import ImageSource
from mealv2.targets import Targets

T = TypeVar("T")

# Shards of images whose images are shuffled together: neighbours in a file rarely meet in a batch,
# and this many files are open at a time, twice as many where one window follows another.
SHUFFLE_WINDOW = 8
_SKIPPED = -1  # in place of a view


def split_evenly(sizes: Sequence[int], num: int, *, min_size: int = 1) -> list[range]:
    """Split a row of items into ``num`` neighbouring ranges that differ by at most one item.

    Where one would hold less than ``min_size``, the sum of its items' ``sizes``, fewer are filled:
    those at the end are empty.
    """
    for filled in range(min(num, len(sizes)), 0, -1):
        ends = [number * len(sizes) // filled for number in range(filled + 1)]
        cuts = [range(start, end) for start, end in itertools.pairwise(ends)]
        if filled == 1 or all(sum(sizes[i] for i in cut) >= min_size for cut in cuts):
            return cuts + [range(len(sizes), len(sizes))] * (num - filled)
    return [range(0)] * num


def rank_rows(
    request: BatchRequest, rank: int, num_ranks: int, *, min_views: int = 1
) -> BatchRequest:
    """Return the images of a batch that one of several ranks reads, neighbours in the batch.

    A rank has ``min_views`` views or none, as far as the batch has so many.
    """
    if num_ranks == 1:
        return list(request)
    cuts = split_evenly([len(views) for _, views in request], num_ranks, min_size=min_views)
    return list(request[cuts[rank].start : cuts[rank].stop])


def batch_ranges(num_images: int, batch_size: int) -> list[range]:
    """Return where each batch lies in an order of so many images; the last one may be smaller.

    A last batch of one image joins the one before it: batch normalisation cannot learn from one.
    """
    starts = list(range(0, num_images, batch_size))
    if batch_size > 1 and len(starts) > 1 and starts[-1] == num_images - 1:
        starts.pop()
    return [range(a, b) for a, b in itertools.pairwise([*starts, num_images])]


def num_steps(config: "Schedule", num_images: int) -> int:
    """Return how many steps a run has; some fewer where views are skipped."""
    full, rest = divmod(config.epochs, config.views_per_image)
    full_steps = full * _steps_of_pass(config, num_images, config.views_per_image)
    return full_steps + (_steps_of_pass(config, num_images, rest) if rest else 0)


def updates_per_epoch(config: "Schedule", num_images: int) -> float:
    """Return the steps of a pass in which no view is skipped, for each epoch that it counts as."""
    num_views = config.views_per_image
    return max(1, _steps_of_pass(config, num_images, num_views)) / num_views


def _steps_of_pass(config: "Schedule", num_images: int, num_views: int) -> int:
    return len(batch_ranges(num_images, math.ceil(config.batch_size / num_views)))


def epoch_order(
    num_images: int, *, seed: int, epoch: int, groups: Sequence[int] | None = None
) -> np.ndarray:
    """Return a permutation of 0..num_images-1, int64, a pure function of its arguments.

    Positions sorted by a 64-bit mix (SplitMix64) of (seed, epoch, position). ``groups`` are the
    positions at which groups begin that should be read together, ascending from 0: the groups are
    put in such an order, and the images of SHUFFLE_WINDOW of them at a time.
    """
    positions = np.arange(num_images, dtype=np.uint64)
    start = _mix(np.array([seed], dtype=np.uint64) + _mix(np.array([epoch + 1], dtype=np.uint64)))
    words = _mix(positions + start)
    if groups is None:
        return np.argsort(words, kind="stable").astype(np.int64)
    ranks_G = np.argsort(epoch_order(len(groups), seed=seed, epoch=epoch))
    window_N = np.repeat(ranks_G // SHUFFLE_WINDOW, np.diff([*groups, num_images]))
    return np.lexsort((words, window_N)).astype(np.int64)


def _mix(words: np.ndarray) -> np.ndarray:
    """SplitMix64's output function: a bijection of 64-bit words, multiplications modulo 2**64."""
    words = words * np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = words ^ (words >> np.uint64(31))
    return mixed


@dataclass(frozen=True, eq=False)
class PassBatches(Sequence[BatchRequest]):
    """The batches of a pass, in a tenth of the memory of lists: one is made when asked for.

    ``positions_N`` and ``views_NE`` are those of the images in the order of the pass, ``ranges``
    where in it each batch lies. ``is_sorted``: a batch has its images in the source's order.
    """

    positions_N: np.ndarray
    views_NE: np.ndarray
    ranges: list[range]
    is_sorted: bool

    def __len__(self) -> int:
        return len(self.ranges)

    @overload
    def __getitem__(self, index: int) -> BatchRequest: ...
    @overload
    def __getitem__(self, index: slice) -> "PassBatches": ...
    def __getitem__(self, index: int | slice) -> "BatchRequest | PassBatches":
        if isinstance(index, slice):
            return replace(self, ranges=self.ranges[index])
        rows = self.ranges[index]
        positions = self.positions_N[rows.start : rows.stop].tolist()
        views = self.views_NE[rows.start : rows.stop].tolist()
        request = [
            (position, tuple(view for view in row if view != _SKIPPED))
            for position, row in zip(positions, views, strict=True)
        ]
        return sorted(request) if self.is_sorted else request

    @property
    def num_views(self) -> int:
        """How many views the whole pass shows."""
        return int((self.views_NE != _SKIPPED).sum())


class Schedule(Protocol):
    """The settings that determine the batches of a run; a TrainConfig has them.

    ``batch_size`` is the number of views.
    """

    @property
    def seed(self) -> int: ...

    @property
    def epochs(self) -> int: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def views_per_image(self) -> int: ...


@dataclass(frozen=True)
class BatchSampler:
    """The batches of a run over the images of ``source`` at ``positions``, which ascend.

    A pass shows every image once, ``views_per_image`` views of it, and counts as so many epochs
    (official FKD_train.py); the last one may have fewer. A pass is named by its first epoch.
    """

    config: Schedule
    source: ImageSource
    positions: Sequence[int]
    targets: Targets

    def num_epochs(self, epoch: int) -> int:
        """Return how many epochs the pass that begins at ``epoch`` counts as."""
        return min(self.config.views_per_image, self.config.epochs - epoch)

    def full_batch(self) -> BatchRequest:
        """Return a request as long as that of a full batch."""
        num_views = self.num_epochs(0)
        num_images = math.ceil(self.config.batch_size / num_views)
        return [(0, tuple(range(num_views)))] * min(num_images, len(self.positions))

    def batches(self, epoch: int) -> PassBatches:
        """Return the batches of a pass: images in random order, each with its views.

        Where a source has groups that should be read together, the images of a batch are in the
        order of the source, so that neighbours in it are neighbours there.
        """
        return self._cached(epoch)

    @cached_property
    def _cached(self) -> Callable[[int], PassBatches]:
        """Two passes are kept, which take seconds each for a million images.

        The loop and the reader ask for the same one, and the reader is ahead.
        """
        return lru_cache(maxsize=2)(self._make_requests)

    def _make_requests(self, epoch: int) -> PassBatches:
        groups = self._groups()
        order = epoch_order(len(self.positions), seed=self.config.seed, epoch=epoch, groups=groups)
        positions_N = np.asarray(self.positions, dtype=np.int64)[order]
        views_NE = self._views(positions_N, epoch)
        shown_N = (views_NE != _SKIPPED).any(axis=1)
        if not shown_N.all():
            positions_N, views_NE = positions_N[shown_N], views_NE[shown_N]
        num_images = math.ceil(self.config.batch_size / self.num_epochs(epoch))
        ranges = batch_ranges(len(positions_N), num_images)
        return PassBatches(positions_N, views_NE, ranges, groups is not None)

    def _views(self, positions_N: np.ndarray, epoch: int) -> np.ndarray:
        """Return the views of images that a pass shows, N x E, _SKIPPED where it shows none."""
        keys, view_of = self.source.keys, self.targets.view
        epochs = range(epoch, epoch + self.num_epochs(epoch))
        views_NE = np.empty((len(positions_N), len(epochs)), dtype=np.int64)
        for row, position in enumerate(positions_N.tolist()):
            key = keys[position]
            for column, e in enumerate(epochs):
                view = view_of(key, e)
                views_NE[row, column] = _SKIPPED if view is None else view
        return views_NE

    def _groups(self) -> list[int] | None:
        """Return where in ``positions`` the groups of the source begin, if it has any."""
        if self.source.groups is None:
            return None
        starts: list[int] = np.searchsorted(self.positions, self.source.groups).tolist()
        return starts

    def num_skipped(self, epoch: int) -> int:
        """Return how many views of the pass the targets skip."""
        return len(self.positions) * self.num_epochs(epoch) - self.batches(epoch).num_views

    def batches_from(
        self, epoch: int, step: int = 0, *, local: Callable[[BatchRequest], BatchRequest] = list
    ) -> Iterator[BatchRequest]:
        """Yield the batches of this pass from ``step`` on, and of all passes after it.

        ``local`` picks the rows that are read here. At the beginning of each pass the source learns
        what will be read.
        """
        for start in range(epoch, self.config.epochs, self.config.views_per_image):
            batches = self.batches(start)[step if start == epoch else 0 :]
            announce(self.source, map(local, batches))
            yield from map(local, batches)


def split_batches(order: Sequence[T], batch_size: int) -> list[list[T]]:
    """Split an order into batches as ``batch_ranges`` does; every item is used."""
    return [list(order[cut.start : cut.stop]) for cut in batch_ranges(len(order), batch_size)]
