"""The interval of a mean over seeds."""

import math
from collections.abc import Sequence
from statistics import mean, stdev


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean (Student's t); None with fewer than two values."""
    from scipy.special import stdtrit  # comes with mlxtend; scipy.stats takes a second to import

    n = len(values)
    if n < 2:
        return None
    half = float(stdtrit(n - 1, 0.975)) * stdev(values) / math.sqrt(n)
    return mean(values) - half, mean(values) + half
