"""mealv2.metrics: every figure against its definition in NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from mealv2.metrics import Evaluation, Predictions, num_correct
from mealv2.soft_labels import SoftLabels, encode, top_k


def random_batch(num_rows: int, num_classes: int, seed: int) -> tuple[Tensor, Tensor, SoftLabels]:
    """Return (logits, class ids, the top-k of an ensemble's answer)."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num_rows, num_classes, generator=generator)
    labels = torch.randint(0, num_classes, (num_rows,), generator=generator)
    probs = torch.softmax(2 * torch.randn(num_rows, num_classes, generator=generator), 1)
    return logits, labels, top_k(probs, min(3, num_classes))


def expected_figures(logits: Tensor, labels: Tensor, soft_labels: SoftLabels) -> dict[str, float]:
    log_probs = reference.log_softmax(logits.numpy())
    order = np.argsort(-log_probs, axis=1)
    truth = labels.numpy()[:, None]
    probs = reference.dense(
        soft_labels.indices_NK.numpy(),
        soft_labels.probs_NK.numpy(),
        soft_labels.rest_N.numpy(),
        soft_labels.num_classes,
    )
    ratio = np.log(np.where(probs > 0, probs, 1.0)) - np.where(probs > 0, log_probs, 0.0)
    ece, _ = reference.calibration_error(np.exp(log_probs), labels.numpy())
    return {
        "num_images": len(labels),
        "ece": 100 * ece,
        "top1": 100 * (order[:, :1] == truth).any(1).mean(),
        "top5": 100 * (order[:, :5] == truth).any(1).mean(),
        "cross_entropy": -np.take_along_axis(log_probs, truth, 1).mean(),
        "agreement": 100 * (order[:, 0] == probs.argmax(1)).mean(),
        "kl": (probs * ratio).sum(1).mean(),
    }


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 40), st.integers(2, 300), st.integers(1, 7), st.integers(0, 999))
def test_every_figure_agrees_with_numpy_however_the_images_are_batched(rows, classes, step, seed):
    logits, labels, soft_labels = random_batch(rows, classes, seed)
    evaluation = Evaluation(classes)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        batch = SoftLabels(
            soft_labels.indices_NK[part],
            soft_labels.probs_NK[part],
            soft_labels.rest_N[part],
            classes,
        )
        evaluation.add(logits[part], labels[part], batch)
    # float32 tails of the labels
    assert evaluation.summary() == pytest.approx(
        expected_figures(logits, labels, soft_labels), rel=1e-5, abs=1e-5
    )


def test_figures_of_four_images_by_hand():
    logits = torch.tensor([[4.0, 0, 0], [0, 4.0, 0], [0, 0, 4.0], [4.0, 0, 0]])
    probs = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.2, 0.7], [0.1, 0.1, 0.8], [0.3, 0.6, 0.1]])
    evaluation = Evaluation(3)
    evaluation.add(logits, torch.tensor([0, 1, 2, 2]), top_k(probs, 3))
    assert evaluation.top1 == 75.0
    assert evaluation.top5 == 100.0
    assert evaluation.agreement == 50.0
    assert evaluation.per_class() == [(1, 1), (1, 1), (2, 1)]


def test_agreement_asks_the_ensemble_and_not_the_label():
    evaluation = Evaluation(2)
    says_1 = SoftLabels(torch.tensor([[1]]), torch.tensor([[0.9]]), torch.tensor([0.1]), 2)
    evaluation.add(torch.tensor([[0.0, 3.0]]), torch.tensor([0]), says_1)
    assert (evaluation.top1, evaluation.agreement) == (0.0, 100.0)


@pytest.mark.parametrize("how", [{"rate": 1e-2}, {"topk": 3}])
def test_encoded_labels_count_as_what_they_recover_to(how):
    logits, labels, _ = random_batch(40, 30, 3)
    probs = torch.softmax(3 * torch.randn(40, 30, generator=torch.Generator().manual_seed(4)), 1)
    soft_labels = encode(probs, **how)
    encoded, dense = Evaluation(30), Evaluation(30)
    encoded.add(logits, labels, soft_labels)
    dense.add(logits, labels, SoftLabels.from_dense(soft_labels.to_dense()))
    assert encoded.kl == pytest.approx(dense.kl, rel=1e-6)
    best = soft_labels.argmax()
    assert torch.equal(best, probs.argmax(1))
    assert encoded.agreement == pytest.approx(
        100 * float((best == logits.argmax(1)).float().mean())
    )


def test_kl_is_that_of_the_ensemble_from_the_student_and_0_when_they_are_equal():
    probs = torch.tensor([[0.7, 0.2, 0.1]])
    soft_labels = top_k(probs, 3)
    equal, other = Evaluation(3), Evaluation(3)
    equal.add(probs.log() + 5.0, torch.tensor([0]), soft_labels)
    other.add(torch.zeros(1, 3), torch.tensor([0]), soft_labels)
    assert equal.kl == pytest.approx(0.0, abs=1e-6)
    # KL(q || uniform) = log 3 - H(q), and not KL(uniform || q)
    entropy = -float((probs.double() * probs.double().log()).sum())
    assert other.kl == pytest.approx(np.log(3) - entropy, abs=1e-6)


def test_a_class_the_ensemble_rules_out_adds_nothing_to_kl():
    evaluation = Evaluation(3)
    certain = SoftLabels(torch.tensor([[0]]), torch.tensor([[1.0]]), torch.tensor([0.0]), 3)
    evaluation.add(torch.zeros(1, 3), torch.tensor([0]), certain)
    assert evaluation.kl == pytest.approx(np.log(3))


def test_without_soft_labels_there_is_no_agreement_and_no_kl():
    evaluation = Evaluation(4)
    logits, labels, _ = random_batch(6, 4, 0)
    evaluation.add(logits, labels)
    assert evaluation.agreement is None
    assert evaluation.kl is None
    assert set(evaluation.summary()) == {"num_images", "top1", "top5", "cross_entropy", "ece"}


def test_soft_labels_of_some_batches_count_for_those_images_only():
    logits, labels, soft_labels = random_batch(6, 4, 0)
    mixed, alone = Evaluation(4), Evaluation(4)
    mixed.add(*random_batch(9, 4, 1)[:2])
    mixed.add(logits, labels, soft_labels)
    alone.add(logits, labels, soft_labels)
    assert mixed.num_images == 15
    assert (mixed.agreement, mixed.kl) == (alone.agreement, alone.kl)


def test_an_evaluation_of_nothing_has_figures():
    assert Evaluation(3).summary() == {
        "num_images": 0,
        "top1": 0.0,
        "top5": 0.0,
        "cross_entropy": 0.0,
        "ece": 0.0,
    }


@pytest.mark.parametrize("k", [1, 2, 5, 100])
def test_num_correct_counts_labels_among_the_k_highest(k):
    logits, labels, _ = random_batch(200, 20, 7)
    rank = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert int(num_correct(logits, labels, k)) == int((rank < k).sum())


# --- confusion and calibration ------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 60), st.integers(2, 30), st.integers(1, 20), st.integers(0, 999))
def test_calibration_error_and_confusion_agree_with_numpy(rows, classes, num_bins, seed):
    logits, labels, _ = random_batch(rows, classes, seed)
    evaluation, predictions = Evaluation(classes, num_bins=num_bins), Predictions(classes)
    for start in range(0, rows, 7):
        evaluation.add(logits[start : start + 7], labels[start : start + 7])
        predictions.add(logits[start : start + 7], labels[start : start + 7])
    probs = np.exp(reference.log_softmax(logits.numpy()))

    found = evaluation.calibration()
    error, sizes = reference.calibration_error(probs, labels.numpy(), num_bins)
    assert found.num_images == sizes
    assert found.ece == pytest.approx(error, rel=1e-12, abs=1e-15)
    assert evaluation.ece == 100 * found.ece

    matrix = np.zeros((classes, classes), dtype=int)
    np.add.at(matrix, (labels.numpy(), probs.argmax(1)), 1)
    pairs = predictions.confusion()
    assert pairs == sorted(pairs)
    assert {(a, b): n for a, b, n in pairs} == {
        (int(a), int(b)): matrix[a, b] for a, b in zip(*matrix.nonzero(), strict=True)
    }


def test_calibration_of_parts_adds_up_to_that_of_the_whole():
    logits, labels, _ = random_batch(50, 10, 2)
    whole, added = Evaluation(10), Evaluation(10)
    whole.add(logits, labels)
    sums = torch.zeros_like(added.sums())
    for rows in (slice(0, 13), slice(13, 13), slice(13, 50)):
        part = Evaluation(10)
        part.add(logits[rows], labels[rows])
        sums += part.sums()
    added.load_sums(sums)
    assert added.calibration().num_images == whole.calibration().num_images
    assert added.ece == pytest.approx(whole.ece, rel=1e-12)
    added.add(logits, labels)  # the sums that were loaded are not shared
    assert float(sums[0]) == float(sums[6:21].sum()) == 50
    assert added.ece == pytest.approx(whole.ece, rel=1e-12)


def test_calibration_of_known_confidences():
    """Two images of 2 classes at 0.75, one of them right; two at 1.0, both right."""
    evaluation = Evaluation(2)
    sure, certain = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[100.0, 0.0]])
    logits = torch.cat([sure, sure, certain, certain])
    evaluation.add(logits, torch.tensor([0, 1, 0, 0]))
    found = evaluation.calibration()
    assert len(found.num_images) == 15
    assert {b: n for b, n in enumerate(found.num_images) if n} == {11: 2, 14: 2}
    assert (found.confidence[11], found.accuracy[11]) == (pytest.approx(0.75), 0.5)
    assert evaluation.ece == pytest.approx(100 * (2 * 0.25 + 2 * 0.0) / 4)


def test_a_confidence_at_an_edge_is_in_the_lower_bin():
    evaluation = Evaluation(2, num_bins=2)
    evaluation.add(torch.zeros(1, 2), torch.tensor([0]))
    assert evaluation.calibration().num_images == [1, 0]
