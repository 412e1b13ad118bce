"""mealv2.soft_labels: what top-k keeps, what the tail restores, and the same for a student."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import reference
from mealv2.discriminator import Discriminator
from mealv2.losses import discriminator_loss
from mealv2.soft_labels import SoftLabels, through_top_k, top_k
from mealv2.targets import Answer
from mealv2.task import DistillTask

quickly = settings(max_examples=80, deadline=None, derandomize=True, database=None)


def distributions(num_rows: int, num_classes: int, *, scale: float = 2.0, seed: int = 0) -> Tensor:
    """Rows of probabilities, float32; a higher scale makes more confident ones."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(num_rows, num_classes, generator=generator)
    return torch.softmax(logits.double(), 1).float()


def stored(probs: Tensor, k: int, dtype: torch.dtype = torch.float32) -> SoftLabels:
    """Return the labels as a label set gives them back: top-k, rounded to a stored type."""
    label = top_k(probs, k)
    kept, rest = (part.to(dtype).float() for part in (label.probs_NK, label.rest_N))
    return SoftLabels(label.indices_NK, kept, rest, probs.shape[1])


@st.composite
def labels(draw: st.DrawFn) -> tuple[Tensor, SoftLabels]:
    """Return (probabilities N x C, their top-k as stored)."""
    num_classes = draw(st.integers(2, 1200))
    probs = distributions(
        draw(st.integers(1, 4)),
        num_classes,
        scale=draw(st.sampled_from([0.0, 1.0, 5.0, 40.0])),
        seed=draw(st.integers(0, 999)),
    )
    k = draw(st.integers(1, num_classes))
    return probs, stored(probs, k, draw(st.sampled_from([torch.float32, torch.float16])))


@quickly
@given(labels())
def test_dense_is_a_distribution_and_agrees_with_float64(case):
    _, label = case
    dense = label.dense()
    assert dense.dtype == torch.float32
    assert float(dense.min()) >= 0.0
    np.testing.assert_allclose(dense.sum(1).numpy(), 1.0, atol=1e-5)
    parts = (label.indices_NK, label.probs_NK, label.rest_N)
    expected = reference.dense(*(part.numpy() for part in parts), label.num_classes)
    np.testing.assert_allclose(dense.numpy(), expected, rtol=1e-5, atol=1e-30)


def test_dense_keeps_the_stored_probabilities_and_spreads_the_rest_evenly():
    kept = torch.tensor([[0.5, 0.2]])
    label = SoftLabels(torch.tensor([[3, 0]]), kept, torch.tensor([0.3]), 5)
    torch.testing.assert_close(label.dense(), torch.tensor([[0.2, 0.1, 0.1, 0.5, 0.1]]))


def test_rounded_values_that_sum_to_more_than_1_give_no_negative_tail():
    values = torch.tensor([[0.7, 0.3007, 0.0001]]).half().float()
    assert float(values.sum()) > 1.0
    label = SoftLabels(torch.tensor([[1, 2, 0]]), values, torch.tensor([0.0]), 6)
    assert float(label.dense().min()) == 0.0
    assert float(label.dense().sum()) == pytest.approx(1.0, abs=1e-6)


@quickly
@given(labels())
def test_top_k_keeps_the_largest_in_falling_order(case):
    probs, label = case
    k = label.indices_NK.shape[1]
    kept = top_k(probs, k)
    indices, values = kept.indices_NK, kept.probs_NK
    _, expected = reference.top_k(probs.numpy(), k)
    assert indices.dtype == torch.int64
    assert torch.equal(values, probs.gather(1, indices))
    assert all(len(set(row)) == k for row in indices.tolist())
    if k < probs.shape[1]:
        assert np.array_equal(values.numpy(), expected)
        rest = np.sort(probs.double().numpy(), axis=1)[:, :-k].sum(1)
        np.testing.assert_allclose(kept.rest_N.numpy(), rest, rtol=1e-5)
    else:  # dense: in the order of the classes
        assert np.array_equal(np.sort(values.numpy())[:, ::-1], expected)


@pytest.mark.parametrize("num_classes", [2, 10, 1000])
def test_top_k_of_all_classes_is_the_identity(num_classes):
    probs = distributions(4, num_classes)
    kept = top_k(probs, num_classes)
    assert torch.equal(kept.probs_NK, probs)
    assert torch.equal(kept.indices_NK, torch.arange(num_classes).expand(4, -1))
    recovered = kept.dense()
    torch.testing.assert_close(recovered, probs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("k", [-1, 0, 11])
def test_k_out_of_range_raises_value_error(k):
    with pytest.raises(ValueError, match=r"1\.\.10"):
        top_k(distributions(2, 10), k)


@quickly
@given(labels())
def test_through_top_k_agrees_with_float64(case):
    probs, label = case
    logits = 3.0 * torch.randn(probs.shape, generator=torch.Generator().manual_seed(0)) + 50.0
    expected = reference.through_top_k(logits.numpy(), label.indices_NK.numpy())
    log_probs = through_top_k(logits, label.indices_NK)
    assert log_probs.dtype == torch.float32
    np.testing.assert_allclose(log_probs.numpy(), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(log_probs.exp().sum(1).numpy(), 1.0, atol=1e-4)


@pytest.mark.parametrize("k", [1, 3, 9, 10])
def test_through_top_k_has_the_gradient_of_its_formula(k):
    probs = distributions(3, 10)
    indices = top_k(probs, k).indices_NK
    weights = torch.randn(3, 10, generator=torch.Generator().manual_seed(1))
    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(2)).requires_grad_()
    (through_top_k(logits, indices) * weights).sum().backward()
    expected = np.zeros((3, 10))
    for place in np.ndindex(3, 10):  # central differences of the float64 reference
        step = np.zeros((3, 10))
        step[place] = 1e-5
        ends = (
            (
                reference.through_top_k(logits.detach().numpy() + s, indices.numpy())
                * weights.numpy()
            )
            for s in (step, -step)
        )
        expected[place] = (next(ends).sum() - next(ends).sum()) / 2e-5
    np.testing.assert_allclose(logits.grad.numpy(), expected, rtol=1e-3, atol=1e-4)


def test_through_top_k_has_finite_gradients_where_the_rest_has_no_mass():
    logits = torch.tensor([[200.0, 0.0, -100.0, -300.0]], requires_grad=True)
    through_top_k(logits, torch.tensor([[0]])).sum().backward()
    assert torch.isfinite(logits.grad).all()


# --- student equal to the teachers: the discriminator must see nothing ----------------------------


def both_rows(probs: Tensor, label: SoftLabels) -> tuple[Tensor, Tensor]:
    """Return the rows that DistillTask shows for a student that says what the teachers said."""
    rows: list[Tensor] = []
    discriminator = Discriminator(label.num_classes)
    discriminator.register_forward_pre_hook(lambda _, inputs: rows.extend(inputs))
    log_probs = probs.double().clamp_min(1e-30).log().float()
    DistillTask(nn.Identity(), discriminator)(log_probs, Answer(label))
    student, teacher = rows[0].split(len(label))
    return student, teacher


@pytest.mark.parametrize("num_classes", [2, 10, 100, 1000])
@pytest.mark.parametrize("kept", [1, 2, 5, "all"])
def test_a_student_equal_to_the_teacher_gives_the_labels_own_rows(num_classes, kept):
    k = num_classes if kept == "all" else min(kept, num_classes)
    probs = distributions(32, num_classes, scale=1.0)
    student, teacher = both_rows(probs, stored(probs, k))
    torch.testing.assert_close(student, teacher, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rest", [1e-1, 1e-2, 1e-3, 1e-4, 1e-6])
@pytest.mark.parametrize(("k", "num_classes"), [(3, 10), (10, 1000)])
def test_a_student_equal_to_a_confident_teacher_gives_its_rows_within_a_tenth_nat(
    rest, dtype, k, num_classes
):
    kept, others = distributions(64, k), distributions(64, num_classes - k, seed=1)
    probs = torch.cat([kept.double() * (1 - rest), others.double() * rest], dim=1)
    kept, others = (part.to(dtype).float() for part in (probs[:, :k], probs[:, k:].sum(1)))
    label = SoftLabels(torch.arange(k).expand(64, -1), kept, others, num_classes)
    student, teacher = both_rows(probs, label)
    torch.testing.assert_close(student, teacher, rtol=0, atol=0.1)


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_discriminator_stays_at_chance_when_the_student_equals_the_teacher(variant):
    probs = distributions(64, 100, scale=1.0)
    student, teacher = both_rows(probs, stored(probs, 5))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        discriminator = Discriminator(100, variant)
    optimizer = torch.optim.SGD(discriminator.parameters(), lr=0.1, momentum=0.9)
    for _ in range(100):
        loss, accuracy = discriminator_loss(discriminator, student, teacher)
        assert float(accuracy) == pytest.approx(0.5, abs=0.02)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) == pytest.approx(np.log(2), abs=1e-3)


def test_labels_move_to_a_device_whole():
    label = stored(distributions(3, 10), 4)
    moved = label.to(torch.device("meta"))
    assert moved.indices_NK.device.type == moved.probs_NK.device.type == "meta"
    assert len(moved) == len(label) == 3
    assert moved.num_classes == 10
