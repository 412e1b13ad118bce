"""CutMix and mixup: what a mixed image takes from another, and the labels of the mixture.

CutMix pastes a box of one image into another; mixup blends both. ``teachers`` (official train.py):
the teachers label the mixed image. ``mixed-labels`` (official FKD_train.py): the labels of both
images, weighted by area, or as their pixels.
"""

import math
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mealv2.codec import to_device

MixTarget = Literal["teachers", "mixed-labels"]


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

    def at(self, scale: float) -> "Mix":
        """Return the mix of the same images of another size, ``scale`` times this one."""
        return Mix(self.order_B, Box(*(round(scale * corner) for corner in self.box)))

    def apply(self, images_BCHW: Tensor) -> Tensor:
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


class Blend(NamedTuple):
    """How to blend a batch: ``weight`` of image i and 1 - ``weight`` of image ``order_B[i]``."""

    order_B: Tensor
    weight: float

    def to(self, device: torch.device) -> "Blend":
        """Return the blend with ``order_B`` on a device."""
        return Blend(to_device(self.order_B, device), self.weight)

    def at(self, scale: float) -> "Blend":
        """Return the blend of the same images of another size: itself."""
        return self

    def apply(self, images_BCHW: Tensor) -> Tensor:
        """Return blended copies of the images, of their dtype; uint8 is rounded, half to even.

        The same pixels as timm's FastCollateMixup makes of float32 and uint8 images.
        """
        partners_BCHW = images_BCHW[self.order_B]
        # x' = l x + (1 - l) x[order]
        mixed_BCHW = images_BCHW.float() * self.weight + partners_BCHW.float() * (1.0 - self.weight)
        if not images_BCHW.is_floating_point():
            mixed_BCHW = mixed_BCHW.round_()
        return mixed_BCHW.to(images_BCHW.dtype)

    def lam(self, img_size: int) -> float:
        """Return the weight of an image's own label."""
        return self.weight


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
    batch_size: int,
    img_size: int,
    *,
    cutmix: float = 0.0,
    mixup: float = 0.0,
    probability: float = 1.0,
    switch_probability: float = 0.5,
    seed: tuple[int, ...],
) -> Mix | Blend | None:
    """Draw how to mix a batch: lambda ~ Beta(a, a), random partners, and a uniform centre of a box.

    ``cutmix`` and ``mixup`` are a; 0 leaves one out, and with both ``switch_probability`` is that
    of CutMix (timm: Mixup). Returns None for a batch that stays unmixed (1 - ``probability``). A
    pure function of ``seed`` (seed, epoch, step, ...), so that a resumed run draws the same.
    """
    rng = np.random.default_rng(seed)
    if rng.random() >= probability or not (cutmix or mixup):
        return None
    is_cutmix = rng.random() < switch_probability if cutmix and mixup else cutmix > 0
    alpha = cutmix if is_cutmix else mixup
    lam = rng.beta(alpha, alpha)
    order_B = torch.from_numpy(rng.permutation(batch_size))
    if not is_cutmix:
        return Blend(order_B, lam)
    row, column = rng.integers(img_size, size=2).tolist()
    return Mix(order_B, cutmix_box(lam, row, column, img_size))
