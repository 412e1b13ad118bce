"""Weights of layers: which ones of a model to look at, their names, their percentiles."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from torch import Tensor, nn

from mealv2.errors import ConfigError

MIDDLE = "auto"  # stands for the middle layer
# paper figure 8: 10, 25, 50, 75 and 90
PERCENTILES = (10, 20, 25, 30, 40, 50, 60, 70, 75, 80, 90)
_WEIGHT = ".weight"
# layers beside the main path: shortcuts, and squeeze-and-excitation
_ASIDE = re.compile(r"\.(downsample|shortcut|se)\.")
_NUM_NEAR = 5


def main_layers(shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Return the layers of a model in its own order, by the shapes of its tensors.

    The convolutions, without shortcuts and squeeze-and-excitation; for a model with fewer than
    three of them, such as a vision transformer, the linear layers.
    """
    weights = [name for name in shapes if name.endswith(_WEIGHT) and not _ASIDE.search(name)]
    convolutions = [name for name in weights if len(shapes[name]) > 2]
    linear = [name for name in weights if len(shapes[name]) == 2]
    return list(map(layer_of, convolutions if len(convolutions) > 2 else linear or convolutions))


def first_middle_last(shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Return the first, the middle and the last of the ``main_layers`` (paper figure 7)."""
    layers = main_layers(shapes)
    return list(dict.fromkeys(layers[at] for at in (0, len(layers) // 2, -1))) if layers else []


def find_parameters(model: nn.Module, layers: Iterable[str]) -> dict[str, nn.Parameter]:
    """Return parameters by the names of layers: ``conv1`` is ``conv1.weight``; auto the middle one.

    The names are those of ``named_parameters``, or of modules that have a weight. Raises
    ConfigError for a name that the model does not have.
    """
    known = dict(model.named_parameters())
    found = {}
    for layer in layers:
        name = _middle(known) if layer == MIDDLE else layer
        name = name if name in known else f"{name}{_WEIGHT}"
        if name not in known:
            raise ConfigError(f"--log-weights {layer}: {_near(layer, known)}")
        found[layer_of(name)] = known[name]
    return found


def tensor_of(state: Mapping[str, Tensor], layer: str) -> Tensor | None:
    """Return the weights of a layer in a state dict; None without it."""
    return state.get(f"{layer}{_WEIGHT}", state.get(layer))


def layer_of(name: str) -> str:
    """Return the name of the layer that a parameter is the weight of; of others their own."""
    return name.removesuffix(_WEIGHT)


def percentiles_of(weights: Tensor) -> list[float]:
    """Return the ``PERCENTILES`` of a tensor, in float64, by linear interpolation."""
    values_N = weights.detach().cpu().double().flatten().numpy()
    return [float(value) for value in np.percentile(values_N, PERCENTILES)]


def _middle(parameters: Mapping[str, nn.Parameter]) -> str:
    layers = main_layers({name: value.shape for name, value in parameters.items()})
    if not layers:
        raise ConfigError(f"--log-weights {MIDDLE}: the student has no layer; name a parameter")
    return layers[len(layers) // 2]


def _near(layer: str, parameters: Mapping[str, nn.Parameter]) -> str:
    """Return that a layer is unknown, and what may be meant."""
    known = {layer_of(name): value for name, value in parameters.items()}
    # a module without a weight of its own; then names like it
    near = [name for name in known if name.startswith(f"{layer}.") and known[name].ndim > 1]
    near = near or difflib.get_close_matches(layer, known, n=_NUM_NEAR)
    shapes = {name: value.shape for name, value in parameters.items()}
    names = ", ".join((near or first_middle_last(shapes))[:_NUM_NEAR])
    hint = f"did you mean {names}?" if near else f"it has {names}, …"
    return f"the student has no weights of this name; {hint}"
