"""Parameters and multiply-accumulates of a model from its name: no weights, no computation."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mealv2.errors import MealError
from mealv2.models.classifier import Classifier, create_classifier
from mealv2.models.factory import is_factory
from mealv2.models.timm_models import SOURCES

_CANNOT_BUILD = (MealError, RuntimeError, NotImplementedError, TypeError, ValueError)
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Cost:
    """What a model costs: its parameters, and the multiply-accumulates of one image."""

    parameters: int
    macs: int


def stored_parameters(weights: Path) -> int | None:
    """Return the parameters of a model by its safetensors file; None if it cannot be read.

    The statistics of batch normalisation are left out; other buffers of own code are counted.
    """
    try:
        with safe_open(str(weights), framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return None
    kept = [shape for name, shape in shapes.items() if not name.endswith(_STATISTICS)]
    return sum(int(math.prod(shape)) for shape in kept)


def count_macs(call: Callable[[], Any]) -> int:
    """Return the multiply-accumulates of the convolutions and matrix products in a call.

    With tensors on the meta device, nothing is computed.
    """
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops()) // 2


def forward_macs(model: nn.Module, img_size: int) -> int:
    """Return the multiply-accumulates of the forward pass of one view; ``model`` is on meta."""
    return count_macs(lambda: model.eval()(torch.empty(1, 3, img_size, img_size, device="meta")))


@lru_cache(maxsize=256)
def model_cost(name: str, *, num_classes: int, img_size: int) -> Cost | None:
    """Return the cost of a timm, released or CIFAR model.

    None for one that this version of timm cannot build from its name, and for files, repositories
    and the user's own code: nothing is downloaded or imported.
    """
    try:
        if (model := _on_meta(name, num_classes=num_classes, img_size=img_size)) is None:
            return None
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return Cost(parameters, forward_macs(model, img_size))
    except _CANNOT_BUILD:
        return None


@lru_cache(maxsize=256)
def parameter_names(name: str, *, num_classes: int, img_size: int) -> tuple[str, ...] | None:
    """Return the names of a model's parameters in its own order; None as ``model_cost``."""
    try:
        model = _on_meta(name, num_classes=num_classes, img_size=img_size)
    except _CANNOT_BUILD:
        return None
    return None if model is None else tuple(n for n, _ in model.backbone.named_parameters())


def _on_meta(name: str, *, num_classes: int, img_size: int) -> Classifier | None:
    """Build a model without weights; None for a name that nothing is built from."""
    if is_factory(name) or name.startswith(SOURCES) or name.lower().endswith(".onnx"):
        return None
    with torch.device("meta"):
        model = create_classifier(name, num_classes=num_classes, img_size=img_size)
    return model.to("meta")
