"""Means over seeds: the interval of a mean, and a paired test."""

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


def paired_p(differences: Sequence[float]) -> float | None:
    """Return the two-sided p of a paired t-test: of the mean difference being 0.

    None with fewer than two differences, or where all are equal: they have no spread to compare
    their mean with.
    """
    from scipy.special import stdtr

    n = len(differences)
    if n < 2 or (spread := stdev(differences)) == 0:
        return None
    t = mean(differences) / (spread / math.sqrt(n))
    return 2 * float(stdtr(n - 1, -abs(t)))
