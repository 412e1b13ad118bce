"""Which layers of a model are looked at, and the percentiles of their weights."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

from mealv2.errors import ConfigError
from mealv2.models.layers import PERCENTILES, find_parameters, first_middle_last, percentiles_of


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    return {key: tuple(value.shape) for key, value in state.items()}


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        ("resnet50", ["conv1", "layer3.0.conv3", "layer4.2.conv3"]),  # not a shortcut
        ("mobilenetv3_small_100", ["conv_stem", "blocks.2.2.conv_pwl", "conv_head"]),
        ("test_vit", ["blocks.0.attn.qkv", "blocks.3.attn.qkv", "head"]),
    ],
)
def test_layers_are_convolutions_or_of_a_transformer_linear(model: str, layers: list[str]) -> None:
    assert first_middle_last(shapes_of(model)) == layers


def test_a_model_of_few_layers_has_each_once() -> None:
    assert first_middle_last({"a.weight": (2, 3), "a.bias": (2,), "b.weight": (2, 2)}) == ["a", "b"]
    assert first_middle_last({"scale": (1,)}) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_percentiles_are_those_of_the_sorted_values_in_float64(dtype: torch.dtype) -> None:
    weights = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    ordered = np.array(sorted(weights.flatten().tolist()))
    at = np.array(PERCENTILES) / 100 * (len(ordered) - 1)
    low = np.floor(at).astype(int)
    expected = ordered[low] + (at - low) * (ordered[low + 1] - ordered[low])
    assert percentiles_of(weights) == pytest.approx(expected, rel=1e-12)


def test_parameters_are_found_by_layer_and_by_their_own_name() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 4)))
    found = find_parameters(model, ["0", "1.0.weight", "0.bias", "auto"])
    assert list(found) == ["0", "1.0", "0.bias"]
    assert found["0"] is model[0].weight
    with pytest.raises(ConfigError, match=r"--log-weights 1: .*; did you mean 1\.0\?"):
        find_parameters(model, ["1"])
    with pytest.raises(ConfigError, match="no layer; name a parameter"):
        find_parameters(nn.ReLU(), ["auto"])
