"""Suspected label errors: planted ones are found, and the rule is that of the paper."""

import numpy as np

from mealv2.data.source import UNLABELLED
from mealv2.report.label_errors import find_label_errors
from mealv2.report.sample import LabelSample


def sample_of(mean_NC: np.ndarray, hard_N: np.ndarray) -> LabelSample:
    """A sample with these mean labels; one view each."""
    num_images, num_classes = mean_NC.shape
    ones_N1 = np.ones((num_images, 1))
    return LabelSample(
        classes=[f"class {c}" for c in range(num_classes)],
        keys=[f"{n}.jpg" for n in range(num_images)],
        hard_N=hard_N,
        sizes_N2=None,
        bytes_N=np.ones(num_images),
        views_V=np.zeros(1, dtype=np.int64),
        has_NV=ones_N1 > 0,
        best_NV=mean_NC.argmax(1)[:, None],
        top1_NV=mean_NC.max(1)[:, None],
        hard_prob_NV=ones_N1,
        entropy_NV=ones_N1,
        mass_k=(1,),
        mass_NVK=ones_N1[..., None],
        mean_NC=mean_NC.astype(np.float32),
        num_images=num_images,
        num_views=1,
        seed=0,
    )


def suspects_by_loops(probs_NC: np.ndarray, hard_N: np.ndarray) -> dict[int, int]:
    """The rule image by image, with float64 and no vectors."""
    num_images, num_classes = probs_NC.shape
    thresholds = {
        j: float(np.mean([probs_NC[n, j] for n in range(num_images) if hard_N[n] == j]))
        for j in range(num_classes)
        if (hard_N == j).any()
    }
    suspects = {}
    for n in range(num_images):
        if hard_N[n] == UNLABELLED:
            continue
        confident = [j for j, t in thresholds.items() if probs_NC[n, j] >= t - 1e-6]
        counted = max(confident, key=lambda j: probs_NC[n, j], default=hard_N[n])
        if counted != hard_N[n] and probs_NC[n, hard_N[n]] < max(probs_NC[n]):
            suspects[n] = int(counted)
    return suspects


def random_case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    hard_N = rng.integers(0, 7, 300)
    hard_N[hard_N == 5] = 4  # a class without images
    logits_NC = rng.normal(size=(300, 7)) * 1.5
    logits_NC[np.arange(300), rng.permutation(hard_N)] += 0.5
    logits_NC[np.arange(300), hard_N] += 1.5
    probs_NC = np.exp(logits_NC) / np.exp(logits_NC).sum(1, keepdims=True)
    hard_N[:9] = UNLABELLED
    return probs_NC.astype(np.float32).astype(np.float64), hard_N


def test_the_rule_is_that_of_confident_learning() -> None:
    for seed in range(5):
        probs_NC, hard_N = random_case(seed)
        found = find_label_errors(sample_of(probs_NC, hard_N))
        expected = suspects_by_loops(probs_NC, hard_N)
        assert dict(zip(found.rows.tolist(), found.suggested.tolist(), strict=True)) == expected
        assert len(expected) > 10
        assert (np.diff(found.given_prob) >= 0).all()
        assert found.num_labelled == 291


def test_a_table_names_both_classes() -> None:
    mean_NC = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.95, 0.05]])
    sample = sample_of(mean_NC, np.array([0, 0, 1, 1]))
    (row,) = find_label_errors(sample).table(sample)
    assert (row["key"], row["given"], row["suggested"]) == ("3.jpg", "class 1", "class 0")
    assert abs(row["given_probability"] - 0.05) < 1e-6


def test_without_hard_labels_nothing_is_suspected() -> None:
    found = find_label_errors(sample_of(np.eye(3), np.full(3, UNLABELLED)))
    assert (len(found), found.num_labelled) == (0, 0)


def test_the_list_is_that_of_cleanlab() -> None:
    """cleanlab 2.9.0: find_label_issues(filter_by="confident_learning", by self-confidence).

    It is AGPL-3.0, so nothing uses it; the rows below are what it returned, in its order.
    """
    rows_N, classes_C = np.arange(40), np.arange(4)
    weights_NC = 1.0 + (5 * rows_N[:, None] ** 2 + classes_C * (3 * rows_N[:, None] + 7)) % 13
    weights_NC[rows_N, rows_N % 4] += 6
    probs_NC = weights_NC / weights_NC.sum(axis=1, keepdims=True)
    found = find_label_errors(sample_of(probs_NC, (rows_N + (rows_N % 5 == 0)) % 4))
    assert found.rows.tolist() == [5, 25, 20, 10, 35, 15, 3, 1, 38, 33, 7]
