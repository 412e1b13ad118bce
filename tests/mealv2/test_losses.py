"""mealv2.losses: the formulas in float64 (the official code's numbers: test_official.py)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from conftest import linear_layers
from mealv2.losses import discriminator_loss, similarity_loss
from mealv2.models.discriminator import Discriminator
from mealv2.models.ensemble import combine

pytestmark = pytest.mark.usefixtures("seeded_weights")


# --- against the float64 reference ----------------------------------------------------------------


def near(actual: Tensor, expected: np.ndarray) -> None:
    """Equal to 1e-4 of each value, or of the largest one where float32 sums have cancelled."""
    atol = 1e-5 * float(np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=1e-4, atol=atol)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Return (student logits B x C, teachers' logits T x B x C), as ImageNet models give them."""
    num_classes = draw(st.integers(2, 3000))
    num_teachers, batch_size = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    scale = draw(st.sampled_from([0.1, 2.0, 12.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = scale * torch.randn(num_teachers + 1, batch_size, num_classes, generator=generator)
    return logits[0].requires_grad_(), logits[1:]


quickly = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@quickly
@given(batches())
def test_similarity_loss_and_its_gradient_agree_with_float64(batch):
    student, teachers = batch
    probs, _ = reference.ensemble(teachers.numpy())
    expected, gradient = reference.similarity(student.detach().numpy(), probs)
    loss = similarity_loss(student, combine(teachers).probs_BC)
    loss.backward()
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
    near(student.grad, gradient)


@quickly
@given(batches(), st.sampled_from(["paper", "official"]), st.integers(0, 99))
def test_discriminator_loss_and_all_gradients_agree_with_float64(batch, variant, seed):
    student, teachers = batch
    teacher = combine(teachers).mean_logits_BC
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        discriminator = Discriminator(student.shape[1], variant)
    layers = linear_layers(discriminator)
    loss, accuracy = discriminator_loss(discriminator, student, teacher)
    loss.backward()

    weights = [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in layers]
    expected = reference.discriminate(
        weights, student.detach().numpy(), teacher.numpy(), variant=variant
    )
    assert float(loss.detach()) == pytest.approx(expected.loss, rel=1e-4)
    assert float(accuracy) == pytest.approx(expected.accuracy, abs=1e-6)
    near(student.grad, expected.grad_student)
    for layer, (weight, bias) in zip(layers, expected.grad_layers, strict=True):
        near(layer.weight.grad, weight)
        near(layer.bias.grad, bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_half_precision_logits_are_computed_in_float32(dtype):
    student = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    probs = torch.softmax(torch.randn(4, 50, generator=torch.Generator().manual_seed(1)), 1)
    assert torch.equal(similarity_loss(student, probs), similarity_loss(student.float(), probs))
    discriminator = Discriminator(50)
    half, full = (
        discriminator_loss(discriminator, s, probs)[0] for s in (student, student.float())
    )
    assert half.dtype == torch.float32
    assert torch.equal(half, full)


def test_similarity_loss_survives_logits_of_ten_thousand():
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = similarity_loss(student, torch.tensor([[0.0, 0.5, 0.5]]))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(15_000)
    assert torch.isfinite(student.grad).all()


def test_student_and_discriminator_both_minimise_the_discriminator_loss():
    # not adversarial: a step of the student down its gradient makes the rows easier to tell apart
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(16, 64, generator=generator).requires_grad_()
    teacher = torch.randn(16, 64, generator=generator)
    discriminator = Discriminator(64)
    loss, _ = discriminator_loss(discriminator, student, teacher)
    loss.backward()
    with torch.no_grad():
        after, _ = discriminator_loss(discriminator, student - 1.0 * student.grad, teacher)
    assert float(after) < float(loss.detach())


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_accuracy_counts_rows_told_apart_and_half_of_the_undecided(variant):
    discriminator = Discriminator(2, variant)
    with torch.no_grad():  # reads the first class: says "teacher" where it is above 1
        for layer in linear_layers(discriminator):
            layer.weight.zero_()
            layer.bias.zero_()
            layer.weight[0, 0] = 1.0
        last = linear_layers(discriminator)[-1]
        if variant == "official":
            last.weight[:, 0] = torch.tensor([0.0, 1.0])
            last.bias[0] = 1.0
        else:
            last.bias[0] = -1.0
    student = torch.tensor(
        [[0.0, 9.0], [1.0, 9.0], [5.0, 9.0], [0.5, 9.0]]
    )  # right, half, wrong, right
    teacher = torch.tensor(
        [[2.0, 9.0], [0.0, 9.0], [3.0, 9.0], [1.0, 9.0]]
    )  # right, wrong, right, half
    _, accuracy = discriminator_loss(discriminator, student, teacher)
    assert float(accuracy) == 5 / 8
