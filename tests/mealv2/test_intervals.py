"""mealv2.intervals: Student's t."""

import math

import numpy as np
import pytest
from scipy import integrate

from mealv2.intervals import interval, paired_p


def test_interval_is_students_t() -> None:
    values = [0.4, 1.1, -0.2, 0.7, 0.9]
    # mean 0.58, sample sd 0.5070, t(0.975, 4) = 2.776445
    half = 2.776445 * np.std(values, ddof=1) / np.sqrt(5)
    between = interval(values)
    assert between == pytest.approx((0.58 - half, 0.58 + half), rel=1e-5)
    assert interval([1.0]) is None


def test_paired_test_is_the_tail_of_students_t() -> None:
    differences = np.array([0.4, 1.1, -0.2, 0.7, 0.9])
    n = len(differences) - 1
    t = differences.mean() / (differences.std(ddof=1) / np.sqrt(len(differences)))
    scale = math.gamma((n + 1) / 2) / (math.sqrt(n * math.pi) * math.gamma(n / 2))
    inside, _ = integrate.quad(lambda x: scale * (1 + x * x / n) ** (-(n + 1) / 2), -t, t)
    assert paired_p(differences.tolist()) == pytest.approx(1 - inside, rel=1e-9)
    assert paired_p((-differences).tolist()) == pytest.approx(1 - inside, rel=1e-9)


@pytest.mark.parametrize("differences", [[], [1.0], [2.0, 2.0, 2.0]])
def test_paired_test_needs_a_spread(differences: list[float]) -> None:
    assert paired_p(differences) is None
