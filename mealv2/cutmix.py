"""CutMix by name: a box of one image pasted into another, and who labels the mixture.

``teachers`` (official train.py): the teachers see the mixed image, their answer is the label.
``mixed-labels`` (official FKD_train.py): the labels of both images, weighted by area.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mealv2.devices import to_device

CutMixTarget = Literal["teachers", "mixed-labels"]


@dataclass(frozen=True)
class Box:
    """Rows ``top`` to ``bottom`` and columns ``left`` to ``right`` of an image, ends excluded."""

    top: int
    left: int
    bottom: int
    right: int


@dataclass(frozen=True)
class Mix:
    """How a batch is mixed: image ``order_B[i]`` lends its ``box`` to image i."""

    order_B: Tensor
    box: Box

    def to(self, device: torch.device) -> "Mix":
        """Return the same with the order where the images are."""
        return Mix(to_device(self.order_B, device), self.box)

    def paste(self, images_BCHW: Tensor) -> Tensor:
        """Return the mixed images, any type; the images given stay as they are."""
        box = self.box
        mixed_BCHW = images_BCHW.clone()
        mixed_BCHW[:, :, box.top : box.bottom, box.left : box.right] = images_BCHW[
            self.order_B, :, box.top : box.bottom, box.left : box.right
        ]
        return mixed_BCHW

    def lam(self, img_size: int) -> float:
        """Return the share of an image's area that is still its own (the corrected lambda)."""
        num_pasted = (self.box.bottom - self.box.top) * (self.box.right - self.box.left)
        return 1.0 - num_pasted / img_size**2


def cutmix_box(lam: float, row: int, column: int, img_size: int) -> Box:
    """Return the box of area 1 - ``lam`` around a centre, cut off at the image's border.

    Side int(S sqrt(1 - lambda)), corners clip(centre -+ side // 2, 0, S) (CutMix's rand_bbox, as in
    the official train.py).
    """
    half = int(img_size * math.sqrt(1.0 - lam)) // 2
    top, bottom = (min(max(row + d, 0), img_size) for d in (-half, half))
    left, right = (min(max(column + d, 0), img_size) for d in (-half, half))
    return Box(top, left, bottom, right)


def draw_mix(
    batch_size: int,
    img_size: int,
    *,
    beta: float,
    probability: float,
    seed: tuple[int, ...],
) -> Mix | None:
    """Draw how a batch is mixed; None where it is not (probability, CutMix's coin per batch).

    A pure function of ``seed`` (seed, epoch, step, and what else names a batch), so that a run
    can go on anywhere: lambda ~ Beta(beta, beta), a uniform centre, a random partner for every
    image.
    """
    rng = np.random.default_rng(seed)
    if rng.random() >= probability:
        return None
    lam = rng.beta(beta, beta)
    order_B = torch.from_numpy(rng.permutation(batch_size))
    row, column = rng.integers(img_size, size=2).tolist()
    return Mix(order_B, cutmix_box(lam, row, column, img_size))
