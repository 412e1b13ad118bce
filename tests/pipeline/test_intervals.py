"""pipeline.intervals: Student's t."""

import numpy as np
import pytest

from pipeline.intervals import interval


def test_interval_is_students_t() -> None:
    values = [0.4, 1.1, -0.2, 0.7, 0.9]
    # mean 0.58, sample sd 0.5070, t(0.975, 4) = 2.776445
    half = 2.776445 * np.std(values, ddof=1) / np.sqrt(5)
    between = interval(values)
    assert between == pytest.approx((0.58 - half, 0.58 + half), rel=1e-5)
    assert interval([1.0]) is None
