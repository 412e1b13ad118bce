"""mealv2.discriminator: widths, variants, initialisation."""

import numpy as np
import pytest
import torch
from torch import nn

import reference
from mealv2.discriminator import Discriminator


@pytest.fixture(autouse=True)
def _seeded_weights():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def linear_layers(discriminator: Discriminator) -> list[nn.Linear]:
    return [layer for layer in discriminator.layers if isinstance(layer, nn.Linear)]


def widths(discriminator: Discriminator) -> list[int]:
    layers = linear_layers(discriminator)
    return [layers[0].in_features, *(layer.out_features for layer in layers)]


def num_parameters(discriminator: Discriminator) -> int:
    return sum(parameter.numel() for parameter in discriminator.parameters())


def test_official_variant_has_127047_parameters_at_1000_classes():
    discriminator = Discriminator(1000, "official")
    assert widths(discriminator) == [1000, 125, 15, 2]
    assert num_parameters(discriminator) == 127_047


@pytest.mark.parametrize(
    ("variant", "num_classes", "expected"),
    [
        ("paper", 1000, [1000, 125, 15, 1]),
        ("paper", 512, [512, 64, 8, 1]),
        ("paper", 10, [10, 8, 8, 1]),  # never below 8
        ("paper", 2, [2, 8, 8, 1]),
        ("official", 64, [64, 8, 1, 2]),
        ("official", 10, [10, 1, 1, 2]),
        ("official", 2, [2, 1, 1, 2]),
        ("official", 21_843, [21_843, 2730, 341, 2]),
    ],
)
def test_widths_fall_by_eight_to_the_variants_floor(variant, num_classes, expected):
    assert widths(Discriminator(num_classes, variant)) == expected


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("num_classes", [2, 10, 1000])
def test_forward_agrees_with_float64(variant, num_classes):
    discriminator = Discriminator(num_classes, variant)
    rows = 5 * torch.randn(7, num_classes, generator=torch.Generator().manual_seed(num_classes))
    weights = [
        (layer.weight.detach().numpy(), layer.bias.detach().numpy())
        for layer in linear_layers(discriminator)
    ]
    expected, _, _ = reference.discriminator_forward(
        weights, rows.numpy(), last_relu=variant == "official"
    )
    outputs = discriminator(rows)
    assert outputs.dtype == torch.float32
    np.testing.assert_allclose(outputs.detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_only_the_official_variant_ends_in_a_relu():
    rows = 10 * torch.randn(500, 20, generator=torch.Generator().manual_seed(0))
    for variant, floor in (("paper", False), ("official", True)):
        outputs = torch.cat([Discriminator(20, variant)(rows) for _ in range(20)])
        assert (float(outputs.detach().min()) >= 0.0) is floor


def test_weights_start_uniform_within_one_over_the_root_of_the_inputs():
    for layer in linear_layers(Discriminator(1000)):
        bound = layer.in_features**-0.5
        assert float(layer.weight.detach().abs().max()) <= bound
        assert float(layer.bias.detach().abs().max()) <= bound
    first = linear_layers(Discriminator(1000))[0].weight.detach()
    assert float(first.std()) == pytest.approx(1000**-0.5 / 3**0.5, rel=0.02)


@pytest.mark.parametrize(
    ("num_classes", "variant", "reason"),
    [(10, "joint", "variant must be one of paper, official"), (1, "paper", "at least 2 classes")],
)
def test_what_makes_no_discriminator_raises_value_error(num_classes, variant, reason):
    with pytest.raises(ValueError, match=reason):
        Discriminator(num_classes, variant)
