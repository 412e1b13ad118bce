"""mealv2.soft_labels: what top-k keeps, what the tail restores, and the same for a student."""

import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import reference
from image_views import views_of_images
from mealv2.losses import compress_log_probs, compress_logits, discriminator_loss
from mealv2.models.discriminator import Discriminator
from mealv2.soft_labels import (
    Kept,
    KeptLogits,
    Labels,
    SoftLabels,
    concat,
    encode,
    keep_logits,
    top_k,
)
from mealv2.targets import BatchTargets
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
    dense = label.to_dense()
    assert dense.dtype == torch.float32
    assert float(dense.min()) >= 0.0
    np.testing.assert_allclose(dense.sum(1).numpy(), 1.0, atol=1e-5)
    parts = (label.indices_NK, label.probs_NK, label.rest_N)
    expected = reference.dense(*(part.numpy() for part in parts), label.num_classes)
    np.testing.assert_allclose(dense.numpy(), expected, rtol=1e-5, atol=1e-30)


def test_dense_keeps_the_stored_probabilities_and_spreads_the_rest_evenly():
    kept = torch.tensor([[0.5, 0.2]])
    label = SoftLabels(torch.tensor([[3, 0]]), kept, torch.tensor([0.3]), 5)
    torch.testing.assert_close(label.to_dense(), torch.tensor([[0.2, 0.1, 0.1, 0.5, 0.1]]))


def test_rounded_values_that_sum_to_more_than_1_give_no_negative_tail():
    values = torch.tensor([[0.7, 0.3007, 0.0001]]).half().float()
    assert float(values.sum()) > 1.0
    label = SoftLabels(torch.tensor([[1, 2, 0]]), values, torch.tensor([0.0]), 6)
    assert float(label.to_dense().min()) == 0.0
    assert float(label.to_dense().sum()) == pytest.approx(1.0, abs=1e-6)


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
    recovered = kept.to_dense()
    torch.testing.assert_close(recovered, probs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("k", [-1, 0, 11])
def test_k_out_of_range_raises_value_error(k):
    with pytest.raises(ValueError, match=r"1\.\.10"):
        top_k(distributions(2, 10), k)


# --- two forms, one face --------------------------------------------------------------------------


@st.composite
def any_labels(draw: st.DrawFn) -> Labels:
    """Draw labels of either form; encoded ones keep as many classes as each row needs."""
    probs, label = draw(labels())
    how = draw(st.sampled_from(["top-k", "rate", "encoded top-k", "views together"]))
    if how == "views together":
        num_views, num_classes = draw(st.integers(4, 8)), draw(st.integers(2, 200))
        probs = views_of_images(2, num_views, num_classes, seed=draw(st.integers(0, 99)))
        return encode(probs, rate=draw(st.sampled_from([1e-4, 1e-2])), num_views=num_views)
    if how == "rate":
        return encode(probs, rate=draw(st.sampled_from([1e-4, 1e-2])))
    k = label.indices_NK.shape[1]
    return encode(probs, topk=k) if how == "encoded top-k" else label


def ids_of(label: Labels) -> list[list[int]]:
    """Return the classes that each row keeps."""
    kept = label.kept()
    pairs = zip(kept.indices_NK.tolist(), kept.is_kept_NK.tolist(), strict=True)
    return [[c for c, is_kept in zip(*pair, strict=True) if is_kept] for pair in pairs]


@quickly
@given(any_labels())
def test_what_is_kept_and_the_tail_make_the_dense_rows(label):
    kept, dense = label.kept(), label.to_dense()
    assert kept.probs_NK.dtype == kept.tail_N.dtype == torch.float32
    assert kept.indices_NK.dtype == torch.int64
    for row, ids, is_kept, probs, tail in zip(dense, *kept_parts(kept), strict=True):
        expected = torch.full_like(row, float(tail))
        expected[ids[is_kept]] = probs[is_kept]
        torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-30)


def kept_parts(kept: Kept) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return kept.indices_NK, kept.is_kept_NK, kept.probs_NK, kept.tail_N


@quickly
@given(any_labels(), st.randoms(use_true_random=False))
def test_rows_of_labels_joined_are_the_rows_of_each(label, random):
    order = torch.tensor([random.randrange(len(label)) for _ in range(5)])
    # sums in float32 depend on the rows that are decoded together
    near = {"rtol": 1e-5, "atol": 0.0}
    torch.testing.assert_close(label.rows(order).to_dense(), label.to_dense()[order], **near)
    assert torch.equal(label.rows(order).argmax(), label.argmax()[order])
    both = concat([label, label.rows(order)])
    assert type(both) is type(label)
    expected = torch.cat([label.to_dense(), label.to_dense()[order]])
    torch.testing.assert_close(both.to_dense(), expected, **near)
    assert len(both) == len(label) + 5


@pytest.mark.parametrize("k", [1, 5, 10])
def test_the_likeliest_class_is_the_ensembles(k):
    probs = distributions(30, 10)
    for label in (stored(probs, k, torch.float16), encode(probs, topk=k)):
        assert label.argmax().dtype == torch.int64
        assert label.argmax().tolist() == probs.argmax(1).tolist()


def test_labels_of_two_forms_cannot_be_joined():
    probs = distributions(3, 10)
    with pytest.raises(ValueError, match="cannot join"):
        concat([stored(probs, 3), encode(probs, topk=3)])


def test_dense_labels_are_in_class_order_and_stay_so():
    probs = distributions(4, 10)
    label = SoftLabels.from_dense(probs)
    assert label.is_dense
    assert not stored(probs, 9).is_dense
    for again in (
        label.rows(torch.arange(4)),
        label.to(torch.device("cpu")),
        label.rounded(torch.float16).rounded(torch.float32),
        SoftLabels.concat([label.rows(torch.arange(2)), label.rows(torch.arange(2, 4))]),
        pickle.loads(pickle.dumps(label)),  # noqa: S301
        SoftLabels.concat([label.rows(torch.arange(0)), label]),
    ):
        assert again.is_dense
        assert again.indices_NK.tolist() == [list(range(10))] * 4
        assert not again.rest_N.any()
        torch.testing.assert_close(again.probs_NK, probs, rtol=1e-3, atol=1e-6)


# --- a model through the same loss ----------------------------------------------------------------


@quickly
@given(any_labels())
def test_through_kept_agrees_with_float64(label):
    shape = (len(label), label.num_classes)
    logits = 3.0 * torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 50.0
    expected = reference.compress_top_k(logits.numpy(), ids_of(label))
    log_probs = compress_log_probs(logits, label.kept())
    assert log_probs.dtype == torch.float32
    np.testing.assert_allclose(log_probs.numpy(), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(log_probs.exp().sum(1).numpy(), 1.0, atol=1e-4)


LABELS: dict[str, Callable[[Tensor], Labels]] = {
    "top-1": lambda probs: top_k(probs, 1),
    "top-3": lambda probs: top_k(probs, 3),
    "top-9": lambda probs: top_k(probs, 9),
    "all": lambda probs: top_k(probs, 10),
    "rate": lambda probs: encode(probs, rate=2e-2),
    "encoded, all": lambda probs: encode(probs, topk=10),
}


@pytest.mark.parametrize("how", LABELS)
@pytest.mark.parametrize("through", ["through_kept", "logits_through"])
def test_what_goes_through_the_loss_has_the_gradient_of_its_formula(how, through):
    label = LABELS[how](distributions(3, 10))
    if how == "rate":
        assert len({len(ids) for ids in ids_of(label)}) > 1, "rows of different length"
    ours = {"through_kept": compress_log_probs, "logits_through": compress_logits}[through]
    formula = {
        "through_kept": reference.compress_top_k,
        "logits_through": reference.compress_logits,
    }[through]
    weights = torch.randn(3, 10, generator=torch.Generator().manual_seed(1))
    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(2)).requires_grad_()
    (ours(logits, label.kept()) * weights).sum().backward()
    expected = np.zeros((3, 10))
    for place in np.ndindex(3, 10):  # central differences of the float64 reference
        step = np.zeros((3, 10))
        step[place] = 1e-5
        start = logits.detach().double().numpy()
        above, below = (
            (formula(start + s, ids_of(label)) * weights.numpy()).sum() for s in (step, -step)
        )
        expected[place] = (above - below) / 2e-5
    np.testing.assert_allclose(logits.grad.numpy(), expected, rtol=1e-3, atol=1e-4)


def test_through_kept_has_finite_gradients_where_the_rest_has_no_mass():
    logits = torch.tensor([[200.0, 0.0, -100.0, -300.0]], requires_grad=True)
    compress_log_probs(
        logits, top_k(torch.tensor([[0.7, 0.1, 0.1, 0.1]]), 1).kept()
    ).sum().backward()
    assert torch.isfinite(logits.grad).all()


# --- logits ---------------------------------------------------------------------------------------


@quickly
@given(any_labels())
def test_kept_logits_give_back_those_of_the_kept_classes_and_the_mean_of_the_others(label):
    shape = (len(label), label.num_classes)
    logits = 3.0 * torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 20.0
    kept = label.kept()
    logits_kept = keep_logits(logits, kept)
    expected = reference.compress_logits(logits.numpy(), ids_of(label))
    dense = logits_kept.to_dense(kept, label.num_classes)
    assert dense.dtype == torch.float32
    np.testing.assert_allclose(dense.numpy(), expected, rtol=1e-5)
    for row, ids in enumerate(ids_of(label)):
        assert torch.equal(dense[row, ids], logits[row, ids]), "to the bit"
    assert torch.equal(compress_logits(logits, kept), dense)
    half = logits_kept.rounded(torch.float16)
    assert half.values_NK.dtype == half.rest_N.dtype == torch.float16
    rounded = half.to_dense(kept, label.num_classes)
    assert rounded.dtype == torch.float32
    np.testing.assert_allclose(rounded.numpy(), expected, rtol=1e-3, atol=2e-3)


@quickly
@given(any_labels(), st.randoms(use_true_random=False))
def test_rows_of_kept_logits_go_with_the_rows_of_their_labels(label, random):
    shape = (len(label), label.num_classes)
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    kept_logits = keep_logits(logits, label.kept())
    dense = kept_logits.to_dense(label.kept(), label.num_classes)
    order = torch.tensor([random.randrange(len(label)) for _ in range(3)])
    some = label.rows(order)  # its longest row may be shorter
    picked = kept_logits.rows(order)
    assert torch.equal(picked.to_dense(some.kept(), label.num_classes), dense[order])
    both = KeptLogits.concat([keep_logits(logits[order], some.kept()), kept_logits])
    expected = torch.cat([dense[order], dense])
    kept = concat([some, label]).kept()
    assert torch.equal(both.to_dense(kept, label.num_classes), expected)


def test_places_without_a_class_hold_zeros_whatever_the_logits():
    logits = torch.tensor([[-torch.inf, 1.0, 3.0], [-1.0, 2.0, 5.0]])
    kept = Kept(
        torch.tensor([[1, 0], [0, 2]]),
        torch.tensor([[1.0, 0.0], [0.5, 0.5]]),
        torch.tensor([[True, False], [True, True]]),
        torch.zeros(2),
    )
    assert keep_logits(logits, kept).values_NK.tolist() == [[1.0, 0.0], [-1.0, 5.0]]
    assert str(keep_logits(logits, kept).values_NK[0, 1].item()) == "0.0", "not minus zero"


# --- student equal to the teachers: the discriminator must see nothing ----------------------------


def both_rows(probs: Tensor, label: Labels) -> tuple[Tensor, Tensor]:
    """Return the rows that DistillTask shows for a student that says what the teachers said."""
    rows: list[Tensor] = []
    discriminator = Discriminator(label.num_classes)
    discriminator.register_forward_pre_hook(lambda _, inputs: rows.extend(inputs))
    log_probs = probs.double().clamp_min(1e-30).log().float()
    DistillTask(nn.Identity(), discriminator)(log_probs, BatchTargets(label))
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
