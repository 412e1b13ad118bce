"""MEAL's own numbers: its alignment, block losses with gamma, discriminators with eta.

golden/official_meal_v1.npz holds what the modules of the MEAL repository computed on a CPU.
"""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conftest import linear_layers
from mealv2.meal import (
    BLOCK_LOSSES,
    BlockLayers,
    MealTask,
    align,
    block_discriminators,
)
from mealv2.targets import BatchTargets
from official import GOLDEN_V1

TOLERANCE = {"rtol": 1e-3, "atol": 1e-6}  # float32 with another BLAS
NUM_BLOCKS = 3
LAYERS = BlockLayers((0, 1, -1), (None, None, None), None)


class Blocks(nn.Module):
    """A student whose blocks are parameters, the last of them the logits."""

    def __init__(self, blocks: Sequence[Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ParameterList(blocks)

    def forward_blocks(self, images_BCHW: Tensor) -> list[Tensor]:
        return list(self.blocks)


def tensors(name: str) -> list[Tensor]:
    return [torch.from_numpy(GOLDEN_V1[f"{name}{number}"]) for number in range(NUM_BLOCKS)]


def official_discriminators() -> nn.ModuleList:
    """Return ours with the weights of the official ones' three convolutions."""
    found = block_discriminators([x.shape[1] for x in tensors("out")], "official")
    with torch.no_grad():
        for number, discriminator in enumerate(found):
            for conv, layer in enumerate(linear_layers(discriminator), start=1):
                layer.weight.copy_(torch.from_numpy(GOLDEN_V1[f"D{number}_conv{conv}_w"]))
                layer.bias.copy_(torch.from_numpy(GOLDEN_V1[f"D{number}_conv{conv}_b"]))
    return found


def targets() -> BatchTargets:
    return BatchTargets(blocks=(tuple(tensors("ans")),))


@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize("case", range(3))
def test_alignment_is_the_official_one(pool: str, case: int) -> None:
    features, expected = (GOLDEN_V1[f"pool_{pool}_{case}_{end}"] for end in ("in", "out"))
    aligned = align(torch.from_numpy(features), expected.shape[1], pool)
    np.testing.assert_allclose(aligned, expected, **TOLERANCE)


@pytest.mark.parametrize("loss", BLOCK_LOSSES)
def test_block_losses_and_their_gradients_are_the_official_ones(loss: str) -> None:
    student = Blocks(tensors("out"))
    gammas = GOLDEN_V1["gamma"].tolist()
    task = MealTask(student, LAYERS, loss=loss, gammas=gammas, etas=gammas)
    result = task(torch.zeros(5, 3, 1, 1), targets())
    result["loss"].backward()
    np.testing.assert_allclose(result["loss"].item(), GOLDEN_V1[f"loss_{loss}"], **TOLERANCE)
    for number, block in enumerate(student.blocks):
        np.testing.assert_allclose(block.grad, GOLDEN_V1[f"grad_{loss}_{number}"], **TOLERANCE)


def test_discriminators_their_loss_and_its_gradients_are_the_official_ones() -> None:
    student, discriminators = Blocks(tensors("out")), official_discriminators()
    etas = GOLDEN_V1["eta"].tolist()
    zeros = [0.0] * NUM_BLOCKS
    task = MealTask(student, LAYERS, discriminators, gammas=zeros, etas=etas)
    result = task(torch.zeros(5, 3, 1, 1), targets())
    result["loss"].backward()
    np.testing.assert_allclose(result["loss"].item(), GOLDEN_V1["d_loss"], **TOLERANCE)
    np.testing.assert_allclose(
        result["parts"]["discriminator_loss"], GOLDEN_V1["d_loss"], **TOLERANCE
    )
    for number, (block, discriminator) in enumerate(
        zip(student.blocks, discriminators, strict=True)
    ):
        np.testing.assert_allclose(block.grad, GOLDEN_V1[f"grad_d_{number}"], **TOLERANCE)
        for conv, layer in enumerate(linear_layers(discriminator), start=1):
            for end, parameter in (("w", layer.weight), ("b", layer.bias)):
                expected = GOLDEN_V1[f"gradD{number}_conv{conv}_{end}"]
                np.testing.assert_allclose(parameter.grad, expected, **TOLERANCE)
