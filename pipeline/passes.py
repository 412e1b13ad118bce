"""Which views of which images stand in which batch of a run: a pure function of the settings."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import overload

import numpy as np

from mealv2.images import ImageSource
from mealv2.targets import Targets
from pipeline.config import TrainConfig
from pipeline.loaders import Request, announce
from pipeline.order import cuts, epoch_order

_LEFT_OUT = -1  # in place of a view


@dataclass(frozen=True, eq=False)
class PassRequests(Sequence[Request]):
    """The batches of a pass, in a tenth of the memory of lists: a batch is made when asked for.

    ``positions_N`` and ``views_NW`` are those of the images in the order of the pass, ``places``
    where in it each batch stands. ``is_sorted``: a batch has its images in the source's order.
    """

    positions_N: np.ndarray
    views_NW: np.ndarray
    places: list[range]
    is_sorted: bool

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Request: ...
    @overload
    def __getitem__(self, index: slice) -> "PassRequests": ...
    def __getitem__(self, index: int | slice) -> "Request | PassRequests":
        if isinstance(index, slice):
            return replace(self, places=self.places[index])
        place = self.places[index]
        positions = self.positions_N[place.start : place.stop].tolist()
        views = self.views_NW[place.start : place.stop].tolist()
        request = [
            (position, tuple(view for view in row if view != _LEFT_OUT))
            for position, row in zip(positions, views, strict=True)
        ]
        return sorted(request) if self.is_sorted else request


@dataclass(frozen=True)
class Passes:
    """The passes of a run over the images of ``source`` at ``positions``, which ascend.

    A pass shows every image once, ``views_per_image`` views of it, and counts as so many epochs
    (official FKD_train.py); the last one may be narrower. Passes are named by their first epoch.
    """

    config: TrainConfig
    source: ImageSource
    positions: Sequence[int]
    targets: Targets

    def width(self, epoch: int) -> int:
        """Return how many epochs the pass that begins at ``epoch`` counts as."""
        return min(self.config.views_per_image, self.config.epochs - epoch)

    def requests(self, epoch: int) -> PassRequests:
        """Return the batches of the pass: images in random order, each with its views.

        Where a source has groups that should be read together, the images of a batch are in the
        order of the source, so that neighbours in it are neighbours there.
        """
        return self._made(epoch)

    @cached_property
    def _made(self) -> Callable[[int], PassRequests]:
        """What makes the batches of a pass, which takes seconds for a million images.

        The two passes made last are kept: who reads and who trains ask for the same one, and
        who reads is ahead.
        """
        return lru_cache(maxsize=2)(self._make)

    def _make(self, epoch: int) -> PassRequests:
        groups = self._groups()
        order = epoch_order(len(self.positions), seed=self.config.seed, epoch=epoch, groups=groups)
        positions_N = np.asarray(self.positions, dtype=np.int64)[order]
        views_NW = self._views(positions_N, epoch)
        shown_N = (views_NW != _LEFT_OUT).any(axis=1)
        if not shown_N.all():
            positions_N, views_NW = positions_N[shown_N], views_NW[shown_N]
        places = cuts(len(positions_N), math.ceil(self.config.batch_size / self.width(epoch)))
        return PassRequests(positions_N, views_NW, places, groups is not None)

    def _views(self, positions_N: np.ndarray, epoch: int) -> np.ndarray:
        """Return the views of images that a pass shows, N x W, _LEFT_OUT where it shows none."""
        keys, view = self.source.keys, self.targets.view
        epochs = range(epoch, epoch + self.width(epoch))
        views_NW = np.empty((len(positions_N), len(epochs)), dtype=np.int64)
        for row, position in enumerate(positions_N.tolist()):
            key = keys[position]
            for column, e in enumerate(epochs):
                found = view(key, e)
                views_NW[row, column] = _LEFT_OUT if found is None else found
        return views_NW

    def _groups(self) -> list[int] | None:
        """Return where in ``positions`` the groups of the source begin, if it has any."""
        if self.source.groups is None:
            return None
        starts: list[int] = np.searchsorted(self.positions, self.source.groups).tolist()
        return starts

    def num_left_out(self, epoch: int, requests: PassRequests) -> int:
        """Return how many views of the pass the targets left out."""
        shown = int((requests.views_NW != _LEFT_OUT).sum())
        return len(self.positions) * self.width(epoch) - shown

    def requests_from(
        self, epoch: int, step: int = 0, *, share: Callable[[Request], Request] = list
    ) -> Iterator[Request]:
        """Yield the batches of this pass from ``step`` on, and of all that follow, to the end.

        ``share`` says what of each is read here. At the beginning of each pass the source is told
        what will be.
        """
        for start in range(epoch, self.config.epochs, self.config.views_per_image):
            requests = self.requests(start)[step if start == epoch else 0 :]
            announce(self.source, map(share, requests))
            yield from map(share, requests)
