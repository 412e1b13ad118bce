"""Which views of which images stand in which batch of a run: a pure function of the settings."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mealv2.images import ImageSource
from mealv2.targets import Targets
from pipeline.config import TrainConfig
from pipeline.loaders import Request, announce
from pipeline.order import batches, epoch_order


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

    def requests(self, epoch: int) -> list[Request]:
        """Return the batches of the pass: images in random order, each with its views.

        Where a source has groups that should be read together, the images of a batch are in the
        order of the source, so that neighbours in it are neighbours there.
        """
        keys, view = self.source.keys, self.targets.view
        epochs = range(epoch, epoch + self.width(epoch))
        groups = self._groups()
        order = epoch_order(len(self.positions), seed=self.config.seed, epoch=epoch, groups=groups)
        rows: Request = []
        for position in (self.positions[i] for i in order):
            views = [view(keys[position], e) for e in epochs]
            if shown := tuple(v for v in views if v is not None):
                rows.append((position, shown))
        cut_up = batches(rows, math.ceil(self.config.batch_size / self.width(epoch)))
        return cut_up if groups is None else [sorted(batch) for batch in cut_up]

    def _groups(self) -> list[int] | None:
        """Return where in ``positions`` the groups of the source begin, if it has any."""
        if self.source.groups is None:
            return None
        starts: list[int] = np.searchsorted(self.positions, self.source.groups).tolist()
        return starts

    def num_left_out(self, epoch: int, requests: list[Request]) -> int:
        """Return how many views of the pass the targets left out."""
        shown = sum(len(views) for request in requests for _, views in request)
        return len(self.positions) * self.width(epoch) - shown

    def requests_from(self, epoch: int, step: int = 0) -> Iterator[Request]:
        """Yield the batches of this pass from ``step`` on, and of all that follow, to the end.

        At the beginning of each pass the source is told what will be read.
        """
        for start in range(epoch, self.config.epochs, self.config.views_per_image):
            requests = self.requests(start)[step if start == epoch else 0 :]
            announce(self.source, requests)
            yield from requests
