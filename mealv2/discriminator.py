"""The discriminator: tells the student's outputs from the ensemble's."""

from typing import Literal, get_args

from torch import Tensor, nn

Variant = Literal["paper", "official"]
VARIANTS: tuple[str, ...] = get_args(Variant)

REDUCTION = 8  # official code: each layer is 8 times narrower than the one before
MIN_WIDTH = 8  # below 512 classes the paper's widths would shrink to a single unit


class Discriminator(nn.Module):
    """Three fully connected layers over a row of class outputs, C -> C/8 -> C/64 -> out.

    ``paper`` (eq. 4-5): ReLU between the layers, one logit for a sigmoid; hidden widths not below
    8. ``official`` (models/discriminator.py of the code): widths as they fall (at least 1), two
    outputs, and a ReLU after the last layer too, so that no output is negative.
    ``forward`` maps float32 B x C to B x 1 (paper) or B x 2 (official). Initialised as PyTorch
    initialises linear layers. Raises ValueError for another variant or fewer than 2 classes.
    """

    def __init__(self, num_classes: int, variant: Variant = "paper") -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        if num_classes < 2:
            raise ValueError(f"a discriminator needs at least 2 classes, got {num_classes}")
        self.num_classes = num_classes
        self.variant = variant
        floor = 1 if variant == "official" else MIN_WIDTH
        first = max(floor, num_classes // REDUCTION)
        second = max(floor, num_classes // REDUCTION // REDUCTION)
        layers = [
            nn.Linear(num_classes, first),
            nn.ReLU(),
            nn.Linear(first, second),
            nn.ReLU(),
            nn.Linear(second, 2 if variant == "official" else 1),
        ]
        if variant == "official":
            layers.append(nn.ReLU())
        self.layers = nn.Sequential(*layers)

    def forward(self, rows_BC: Tensor) -> Tensor:
        outputs: Tensor = self.layers(rows_BC)
        return outputs
