"""Parameters of tests: which cases the fast suite runs."""

from collections.abc import Iterable

import pytest


def mostly_slow(cases: Iterable[object], *, fast: int = 1) -> list[object]:
    """Mark all cases but the first ``fast`` as slow; .ci/run executes both kinds."""
    cases = list(cases)
    return [*cases[:fast], *(_slow(case) for case in cases[fast:])]


def _slow(case: object) -> object:
    if isinstance(case, tuple) and hasattr(case, "marks"):  # a pytest.param
        return pytest.param(*case.values, marks=(*case.marks, pytest.mark.slow), id=case.id)
    values = case if type(case) is tuple else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)
