"""CutMix: a box of one image replaces that box in another, and the labels of the mixed image.

``teachers`` (official train.py): the teachers label the mixed image.
``mixed-labels`` (official FKD_train.py): the labels of both images, weighted by area.
"""

import math
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mealv2.codec import to_device

CutMixTarget = Literal["teachers", "mixed-labels"]


class Box(NamedTuple):
    """Rows ``top`` to ``bottom`` and columns ``left`` to ``right`` of an image, ends excluded."""

    top: int
    left: int
    bottom: int
    right: int


class Mix(NamedTuple):
    """How to mix a batch: image i gets the ``box`` of image ``order_B[i]``."""

    order_B: Tensor
    box: Box

    def to(self, device: torch.device) -> "Mix":
        """Return the mix with ``order_B`` on a device."""
        return Mix(to_device(self.order_B, device), self.box)

    def paste(self, images_BCHW: Tensor) -> Tensor:
        """Return mixed copies of the images, of any dtype."""
        top, left, bottom, right = self.box
        mixed_BCHW = images_BCHW.clone()
        mixed_BCHW[:, :, top:bottom, left:right] = images_BCHW[
            self.order_B, :, top:bottom, left:right
        ]
        return mixed_BCHW

    def lam(self, img_size: int) -> float:
        """Return the fraction of an image that stays its own: the corrected lambda."""
        top, left, bottom, right = self.box
        return 1.0 - (bottom - top) * (right - left) / img_size**2


def cutmix_box(lam: float, row: int, column: int, img_size: int) -> Box:
    """Return the box of area 1 - ``lam`` around a centre, clipped to the image.

    Side int(S sqrt(1 - lambda)), corners clip(centre -+ side // 2, 0, S) (CutMix's rand_bbox, as in
    the official train.py).
    """
    half = int(img_size * math.sqrt(1.0 - lam)) // 2
    top, bottom = (min(max(row + d, 0), img_size) for d in (-half, half))
    left, right = (min(max(column + d, 0), img_size) for d in (-half, half))
    return Box(top, left, bottom, right)


def draw_mix(
    batch_size: int, img_size: int, *, beta: float, probability: float, seed: tuple[int, ...]
) -> Mix | None:
    """Draw how to mix a batch: lambda ~ Beta(beta, beta), a uniform centre, random partners.

    Returns None for a batch that stays unmixed (1 - ``probability``). A pure function of ``seed``
    (seed, epoch, step, ...), so that a resumed run draws the same.
    """
    rng = np.random.default_rng(seed)
    if rng.random() >= probability:
        return None
    lam = rng.beta(beta, beta)
    order_B = torch.from_numpy(rng.permutation(batch_size))
    row, column = rng.integers(img_size, size=2).tolist()
    return Mix(order_B, cutmix_box(lam, row, column, img_size))
