"""mealv2.average_precision: scikit-learn's area, VOC2007's 11 points, difficult objects ignored."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn import metrics

from mealv2.average_precision import average_precision, average_precision_11_points


def reference(scores: list[float], labels: list[int]) -> tuple[float, float]:
    """Both forms in float64 NumPy, from the definitions: a threshold at every different score."""
    kept = [(s, y) for s, y in zip(scores, labels, strict=True) if y != 0]
    num_positive = sum(y == 1 for _, y in kept)
    points = []
    for threshold in sorted({s for s, _ in kept}, reverse=True):
        found = [y for s, y in kept if s >= threshold]
        hits = sum(y == 1 for y in found)
        points.append((hits / num_positive, hits / len(found)))
    area, before = 0.0, 0.0
    for recall, precision in points:
        area += (recall - before) * precision
        before = recall
    eleven = [max((p for r, p in points if r >= t / 10 - 1e-12), default=0.0) for t in range(11)]
    return area, float(np.mean(eleven))


def test_the_11_points_of_an_example_by_hand() -> None:
    # rank:         1    2   3    4   5    6   7
    labels = torch.tensor([1, -1, 1, -1, -1, 1, -1])
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
    # recall 1/3, 2/3, 1 at precision 1, 2/3, 1/2: t = 0 to 0.3 -> 1, 0.4 to 0.6 -> 2/3, else 1/2
    expected = (4 * 1 + 3 * 2 / 3 + 4 * 1 / 2) / 11
    assert average_precision_11_points(scores, labels) == pytest.approx(expected, abs=1e-15)
    area = (1 + 2 / 3 + 1 / 2) / 3
    assert average_precision(scores, labels) == pytest.approx(area, abs=1e-15)


def test_difficult_objects_are_as_if_their_images_were_not_there() -> None:
    labels = torch.tensor([0, 1, 0, -1, 1, 0])
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    known = labels != 0
    for form in (average_precision, average_precision_11_points):
        assert form(scores, labels) == form(scores[known], labels[known])
    assert average_precision(scores, labels) == pytest.approx((1 + 2 / 3) / 2)


def test_a_class_without_a_positive_image_has_none() -> None:
    scores, labels = torch.tensor([0.5, 0.1]), torch.tensor([-1, 0])
    assert average_precision(scores, labels) is None
    assert average_precision_11_points(scores, labels) is None


CASES = st.lists(
    st.tuples(st.integers(-4, 4).map(lambda n: n / 4), st.sampled_from([1, 0, -1])),
    min_size=1,
    max_size=30,
).filter(lambda rows: any(label == 1 for _, label in rows))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(CASES)
def test_both_forms_are_those_of_the_reference(rows: list[tuple[float, int]]) -> None:
    scores, labels = [score for score, _ in rows], [label for _, label in rows]
    area, eleven = reference(scores, labels)
    given_scores, given_labels = torch.tensor(scores), torch.tensor(labels)
    assert average_precision(given_scores, given_labels) == pytest.approx(area, abs=1e-12)
    found = average_precision_11_points(given_scores, given_labels)
    assert found == pytest.approx(eleven, abs=1e-12)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(CASES)
def test_the_area_is_scikit_learns(rows: list[tuple[float, int]]) -> None:
    kept = [(score, label) for score, label in rows if label != 0]
    scores, labels = np.array([s for s, _ in kept]), np.array([y == 1 for _, y in kept])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = metrics.average_precision_score(labels, scores)
    found = average_precision(
        torch.tensor([s for s, _ in rows]), torch.tensor([y for _, y in rows])
    )
    assert found == pytest.approx(expected, abs=1e-12)


def test_the_order_of_images_with_equal_scores_has_no_effect() -> None:
    scores = torch.tensor([0.5, 0.5, 0.5, 0.1])
    first, second = torch.tensor([1, -1, -1, 1]), torch.tensor([-1, -1, 1, 1])
    for form in (average_precision, average_precision_11_points):
        assert form(scores, first) == form(scores, second)
