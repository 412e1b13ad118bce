"""How whole images are resized and flipped: pure functions of seed, key and view number."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mealv2.data.requests import CENTRE
from mealv2.hash_draws import below, hash_words, uniform

_PURPOSE = "whole-image"


class WholeView(NamedTuple):
    """The size of a resized image in pixels, and whether it is mirrored left to right."""

    height: int
    width: int
    is_flipped: bool


@dataclass(frozen=True)
class WholeViews:
    """Views of whole images: the shorter side has a length, unless the longer one gets too long.

    Training draws one of ``train_sizes`` and a flip of probability ``hflip``, evaluation (view
    ``CENTRE``) uses ``size``. The longer side has at most ``max_size`` pixels. The resized sides
    are rounded as detectron2 does, a half up.
    """

    seed: int
    size: int
    max_size: int
    train_sizes: Sequence[int]
    hflip: float

    def view(self, key: str, index: int, *, width: int, height: int) -> WholeView:
        """Return view ``index`` of an image of ``width`` x ``height`` pixels."""
        if index == CENTRE:
            return WholeView(*self._resized(self.size, width, height), False)
        words = hash_words(_PURPOSE, key, self.seed, index)
        size = self.train_sizes[below(len(self.train_sizes), next(words))]
        is_flipped = uniform(next(words)) < self.hflip
        return WholeView(*self._resized(size, width, height), is_flipped)

    def _resized(self, size: int, width: int, height: int) -> tuple[int, int]:
        """Return height and width."""
        scale = min(size / min(width, height), self.max_size / max(width, height))
        return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
