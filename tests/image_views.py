"""Probabilities of the views of images: what differs between the views has a few directions."""

import torch
from torch import Tensor


def views_of_images(
    num_images: int,
    num_views: int,
    num_classes: int,
    *,
    scale: float = 3.0,
    spread: float = 0.6,
    noise: float = 0.15,
    rank: int = 4,
    seed: int = 0,
) -> Tensor:
    """Return float32 rows, image by image: logits of the image, a few directions, noise."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logits_IVC = scale * normal(num_images, 1, num_classes)
    directions_IRC = spread * normal(num_images, rank, num_classes)
    logits_IVC = logits_IVC + normal(num_images, num_views, rank) @ directions_IRC
    logits_IVC = logits_IVC + noise * normal(num_images, num_views, num_classes)
    return torch.softmax(logits_IVC, 2).float().flatten(0, 1)
