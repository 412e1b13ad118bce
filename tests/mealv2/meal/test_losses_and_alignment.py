"""Alignment, block losses and block discriminators against float64 NumPy, for random shapes."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from conftest import linear_layers
from mealv2.losses import discriminator_loss
from mealv2.meal import (
    BLOCK_LOSSES,
    BlockLayers,
    MealTask,
    align,
    block_discriminators,
    block_loss,
)
from mealv2.models.discriminator import Discriminator
from mealv2.targets import BatchTargets

Array = np.ndarray
CLOSE = {"rtol": 2e-4, "atol": 2e-6}

seeds = st.integers(0, 2**32 - 1)


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def float32(values: Array) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))


# --- float64 ------------------------------------------------------------------------------------


def aligned(features_BCHW: Array, size: int, pool: str) -> Array:
    """Pool each channel to ``size`` bins, then the channels, one value at a time."""
    batch, channels = features_BCHW.shape[:2]
    rows = features_BCHW.reshape(batch, channels, -1)
    num, mean = rows.shape[2], pool == "avg"
    found = np.zeros((batch, size))
    for b in range(batch):
        for j in range(size):
            start, end = math.floor(j * num / size), math.ceil((j + 1) * num / size)
            bins = [(np.mean if mean else np.max)(rows[b, c, start:end]) for c in range(channels)]
            found[b, j] = np.mean(bins) if mean else np.max(bins)
    return found


def softmax(rows: Array) -> Array:
    powers = np.exp(rows - rows.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def loss_and_gradient(a: Array, b: Array, kind: str) -> tuple[float, Array]:
    """Return the loss of a block, and its gradient on the student's values, in closed form."""
    p, q = softmax(a), softmax(b)
    if kind == "ce":
        return float(-(q * np.log(p)).sum(axis=1).mean()), (p - q) / len(a)
    difference = p - q if kind.endswith("_soft") else a - b
    absolute = kind.startswith("l1")
    loss = np.abs(difference).mean() if absolute else (difference**2).mean()
    grad = (np.sign(difference) if absolute else 2 * difference) / a.size
    if kind.endswith("_soft"):  # through the softmax: p (g - sum p g)
        grad = p * (grad - (p * grad).sum(axis=1, keepdims=True))
    return float(loss), grad


def official_output(discriminator: nn.Module, rows: Array) -> Array:
    for layer in linear_layers(discriminator):  # type: ignore[arg-type]
        weight, bias = (x.detach().double().numpy() for x in (layer.weight, layer.bias))
        rows = np.maximum(rows @ weight.T + bias, 0.0)
    return rows


def official_loss(discriminator: nn.Module, a: Array, b: Array) -> float:
    outputs = official_output(discriminator, np.concatenate([a, b]))
    targets = np.zeros_like(outputs)
    targets[: len(a), 0] = targets[len(a) :, 1] = 1.0
    return float((np.logaddexp(0.0, outputs) - targets * outputs).mean())


# --- comparisons --------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 5),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    size=st.integers(1, 40),
    pool=st.sampled_from(["avg", "max"]),
    seed=seeds,
)
def test_alignment_agrees_with_float64_also_for_a_batch_of_one(
    batch: int, channels: int, height: int, width: int, size: int, pool: Any, seed: int
) -> None:
    features = normal(seed, batch, channels, height, width)
    found = align(float32(features), size, pool)
    assert found.shape == (batch, size)
    np.testing.assert_allclose(found, aligned(features, size, pool), **CLOSE)


def test_a_vector_counts_as_positions_of_one_channel() -> None:
    values = normal(1, 2, 12)
    expected = aligned(values.reshape(2, 1, 3, 4), 5, "avg")
    np.testing.assert_allclose(align(float32(values), 5, "avg"), expected, **CLOSE)


def test_tokens_without_space_are_refused() -> None:
    with pytest.raises(ValueError, match="not 3-d"):
        align(torch.zeros(2, 3, 4), 5)


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 4),
    size=st.integers(2, 20),
    kind=st.sampled_from(BLOCK_LOSSES),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
    seed=seeds,
)
def test_block_losses_and_gradients_agree_with_float64(
    batch: int, size: int, kind: Any, scale: float, seed: int
) -> None:
    a, b = scale * normal(seed, 2, batch, size)
    student, teacher = float32(a).requires_grad_(), float32(b).requires_grad_()
    loss = block_loss(student, teacher, kind)
    loss.backward()
    expected, grad = loss_and_gradient(a, b, kind)
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    np.testing.assert_allclose(student.grad, grad, **CLOSE)
    assert teacher.grad is None


def test_an_unknown_block_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="l1_soft"):
        block_loss(torch.zeros(1, 2), torch.zeros(1, 2), "kl")  # type: ignore[arg-type]


@settings(deadline=None, max_examples=15)
@given(
    batch=st.integers(1, 4),
    widths=st.lists(st.integers(2, 12), min_size=1, max_size=3),
    num_teachers=st.integers(1, 3),
    kind=st.sampled_from(BLOCK_LOSSES),
    seed=seeds,
)
def test_task_is_the_weighted_sum_over_blocks_and_the_mean_over_teachers(
    batch: int, widths: list[int], num_teachers: int, kind: Any, seed: int
) -> None:
    students = [normal(seed + d, batch, d) for d in widths]
    teachers = [
        [normal(seed + 1000 * t + d, batch, d) for d in widths] for t in range(1, num_teachers + 1)
    ]
    gammas, etas = np.abs(normal(seed, 2, len(widths)))
    torch.manual_seed(seed % 1000)
    discriminators = block_discriminators(widths)
    layers = BlockLayers(tuple(range(len(widths))), (None,) * len(widths), None)
    task = MealTask(
        _Blocks([float32(a) for a in students]),
        layers,
        discriminators,
        loss=kind,
        gammas=gammas.tolist(),
        etas=etas.tolist(),
    )
    blocks = tuple(tuple(map(float32, blocks)) for blocks in teachers)
    parts = task(torch.zeros(batch, 3, 1, 1), BatchTargets(blocks=blocks))["parts"]
    similarity = adversary = 0.0
    for number, (gamma, eta) in enumerate(zip(gammas, etas, strict=True)):
        pairs = [(students[number], of_teacher[number]) for of_teacher in teachers]
        similarity += gamma * np.mean([loss_and_gradient(a, b, kind)[0] for a, b in pairs])
        each = [official_loss(discriminators[number], a, b) for a, b in pairs]
        adversary += eta * np.mean(each)
    assert parts["similarity_loss"].item() == pytest.approx(similarity, rel=1e-4, abs=1e-6)
    assert parts["discriminator_loss"].item() == pytest.approx(adversary, rel=1e-4, abs=1e-6)


class _Blocks(nn.Module):
    """A network that has these blocks for any image."""

    def __init__(self, blocks: list[Tensor]) -> None:
        super().__init__()
        self.blocks = blocks

    def forward_blocks(self, images_BCHW: Tensor) -> list[Tensor]:
        return self.blocks


# --- discriminators -----------------------------------------------------------------------------


def test_discriminators_halve_their_width_and_official_ones_have_two_outputs_and_a_last_relu() -> (
    None
):
    wide, narrow = block_discriminators([5000, 10], "official")
    shapes = [tuple(layer.weight.shape) for layer in linear_layers(wide)]  # type: ignore[arg-type]
    assert shapes == [(2500, 5000), (1250, 2500), (2, 1250)]
    shapes = [tuple(layer.weight.shape) for layer in linear_layers(narrow)]  # type: ignore[arg-type]
    assert shapes == [(5, 10), (2, 5), (2, 2)]
    assert all(isinstance(d.layers[n], nn.ReLU) for d in (wide, narrow) for n in (1, 3, 5))


def test_adversarial_ones_have_the_same_widths_and_outputs_without_the_last_relu() -> None:
    (discriminator,) = block_discriminators([10], "adversarial")
    shapes = [tuple(layer.weight.shape) for layer in linear_layers(discriminator)]  # type: ignore[arg-type]
    assert shapes == [(5, 10), (2, 5), (2, 2)]
    assert not isinstance(discriminator.layers[-1], nn.ReLU)


def test_adversarial_reverses_the_gradient_of_the_student_and_not_of_the_discriminator() -> None:
    torch.manual_seed(0)
    (joint,), (adversarial,) = (
        [Discriminator(16, variant, reduction=2, two_outputs=True)]
        for variant in ("paper", "adversarial")
    )
    adversarial.load_state_dict(joint.state_dict())
    teacher = torch.randn(6, 16)
    grads = []
    for discriminator in (joint, adversarial):
        student = torch.randn(6, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        loss, _ = discriminator_loss(discriminator, student, teacher)
        loss.backward()
        grads.append((student.grad, linear_layers(discriminator)[0].weight.grad))
    (of_joint, own_joint), (of_adversarial, own_adversarial) = grads
    assert of_joint.abs().max() > 0
    assert torch.equal(of_joint, -of_adversarial)
    assert torch.equal(own_joint, own_adversarial)


def test_as_many_weights_as_blocks() -> None:
    with pytest.raises(ValueError, match="etas has 2 values for 1 blocks"):
        MealTask(nn.Identity(), BlockLayers(), etas=(1.0, 2.0))
