"""The data of the zoomed curves: the rows of the figures, a line for each run."""

import math
from collections.abc import Sequence
from typing import Any

from mealv2.report.curves import CURVES, levels_of
from mealv2.report.methods import Method
from mealv2.report.style import Figure

SCRIPTS = ("assets/vendor/uPlot.iife.min.js", "assets/zoom.js")


def zoom_data(figures: Sequence[Figure], methods: Sequence[Method]) -> dict[str, Any]:
    """Return what assets/zoom.js draws, by the name of the figure.

    ``x`` are the epochs of all runs, ``unit`` the label of the other axis, ``levels`` the values to
    mark; each of ``lines`` has the number of its method, the ``name`` of its run, and for each
    epoch a value or null.
    """
    curves = {curve.name: curve for curve in CURVES}
    numbers = {method.name: number for number, method in enumerate(methods)}
    found = {}
    for figure in figures:
        if (curve := curves.get(figure.name)) is None:
            continue
        levels = {name: _rounded(value) for name, value in levels_of(curve, methods).items()}
        found[figure.name] = {
            "unit": curve.unit,
            "levels": levels,
            **_lines(figure.data, curve.column, numbers),
        }
    return found


def _lines(
    rows: Sequence[dict[str, Any]], column: str, numbers: dict[str, int]
) -> dict[str, list[Any]]:
    """Return the epochs, and a line per run, of the rows of a figure."""
    xs = sorted({row["epoch"] for row in rows})
    index_of = {x: index for index, x in enumerate(xs)}
    lines: dict[str, dict[str, Any]] = {}
    for row in rows:
        empty = {
            "method": numbers[row["method"]],
            "name": row["run"],
            "values": [None] * len(xs),
        }
        values = lines.setdefault(row["run"], empty)["values"]
        values[index_of[row["epoch"]]] = _rounded(row[column])
    return {"x": xs, "lines": list(lines.values())}


def _rounded(value: float) -> float | None:
    """Return a value with six digits: enough for a page; null for one that is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
