"""The discriminator: distinguishes the student's outputs from those of the ensemble."""

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

Variant = Literal["paper", "official", "adversarial"]
VARIANTS: tuple[str, ...] = get_args(Variant)

REDUCTION = 8  # official code: each layer is 8 times narrower than the one before
MIN_WIDTH = 8  # with fewer than 512 classes the paper's widths would shrink to a few units

# Characteristic values of the loss in a log, nats. In the official code no output is negative, so
# the sigmoid of a dead output stays at 1/2, and a separated one cannot get below half of ln 2.
PLATEAUS: dict[str, dict[str, float]] = {
    "paper": {"chance": math.log(2.0)},
    "adversarial": {"chance": math.log(2.0)},
    "official": {
        "dead": math.log(2.0),
        "half dead": 0.75 * math.log(2.0),
        "floor": 0.5 * math.log(2.0),
    },
}

_MAX_REDRAWS = 100  # with the official widths about one draw in four has a dead output


class Discriminator(nn.Module):
    """Three fully connected layers over a row of class outputs, C -> C/8 -> C/64 -> out.

    ``paper`` (eq. 4-5): ReLU between the layers, one logit for a sigmoid, hidden widths of at least
    8. ``official`` (models/discriminator.py of the code): hidden widths of at least 1, two outputs,
    and a ReLU after the last layer, so that no output is negative. ``adversarial``: the paper's
    layers behind a gradient reversal, so that the student maximises what the discriminator
    minimises (the title of MEAL; not the results of either paper).
    Each layer is ``reduction`` times narrower than the one before: 8 in MEAL V2, 2 in MEAL.
    ``two_outputs`` gives another variant the widths and the two outputs of ``official``, as MEAL
    has them, without its last ReLU. ``forward`` maps float32 B x C to B x 1, or B x 2. Raises
    ValueError for another variant or fewer than 2 classes.
    """

    def __init__(
        self,
        num_classes: int,
        variant: Variant = "paper",
        *,
        reduction: int = REDUCTION,
        two_outputs: bool = False,
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        if num_classes < 2:
            raise ValueError(f"a discriminator needs at least 2 classes, got {num_classes}")
        self.num_classes = num_classes
        self.variant = variant
        num_outputs = 2 if two_outputs or variant == "official" else 1
        floor = 1 if num_outputs == 2 else MIN_WIDTH
        first = max(floor, num_classes // reduction)
        second = max(floor, num_classes // reduction // reduction)
        layers = [
            nn.Linear(num_classes, first),
            nn.ReLU(),
            nn.Linear(first, second),
            nn.ReLU(),
            nn.Linear(second, num_outputs),
        ]
        if variant == "official":
            layers.append(nn.ReLU())
        self.layers = nn.Sequential(*layers)

    def forward(self, rows_BC: Tensor) -> Tensor:
        if self.variant == "adversarial":
            rows_BC = _Reversal.apply(rows_BC)
        outputs: Tensor = self.layers(rows_BC)
        return outputs

    def redraw(self) -> None:
        """Draw new weights from torch's generator."""
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()


class _Reversal(torch.autograd.Function):
    """The identity; backward changes the sign of the gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return -grads[0]


def num_dead_outputs(discriminator: Discriminator, rows_BC: Tensor) -> int:
    """Return the number of outputs without gradient for all rows: training cannot change them."""
    with torch.enable_grad():
        rows_BC = rows_BC.detach().requires_grad_()
        outputs = discriminator(rows_BC)
        dead = 0
        for column in outputs.unbind(dim=1):
            (grad_BC,) = torch.autograd.grad(column.sum(), rows_BC, retain_graph=True)
            dead += int(not bool(grad_BC.any()))
    return dead


def redraw_dead_outputs(discriminator: Discriminator, rows_BC: Tensor) -> int:
    """Redraw the weights until every output has a gradient; return the number of redraws.

    Raises RuntimeError after 100 draws.
    """
    for redraws in range(_MAX_REDRAWS):
        if not num_dead_outputs(discriminator, rows_BC):
            return redraws
        discriminator.redraw()
    raise RuntimeError("every initialisation of the discriminator has dead outputs on these rows")
