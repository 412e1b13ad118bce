"""`mealv2 curves`: the curves of runs as lines of characters."""

import math
from collections.abc import Sequence
from typing import Any

from mealv2.report.curves import CURVES, Points
from mealv2.report.run import open_run
from pipeline import console
from pipeline.config import CurvesConfig

_BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH = 48  # characters


def run(config: CurvesConfig) -> dict[str, Any]:
    """Print a table of curves for each run without --json; return the report. Raises MealError."""
    runs = [open_run(path) for path in config.run]
    found: dict[str, dict[str, Points]] = {}
    for each in runs:
        curves = {curve.name: points for curve in CURVES if (points := curve.points(each))}
        found[str(each.path)] = curves
        if not config.json:
            titles = {curve.name: curve.title for curve in CURVES}
            rows = [
                [titles[name], sparkline([y for _, y in points]), *_ends(points)]
                for name, points in curves.items()
            ]
            head = [
                f"{each.path}: {each.model}, {each.state}",
                "over epochs",
                "first",
                "last",
                "range",
            ]
            shown = console.table([head, *rows]) if rows else f"{head[0]}; no epoch is complete"
            console.result(f"{shown}\n")
    return {
        "runs": {
            path: {
                name: [[x, y] for x, y in points if math.isfinite(y)]
                for name, points in curves.items()
            }
            for path, curves in found.items()
        }
    }


def sparkline(values: Sequence[float], *, width: int = WIDTH) -> str:
    """Return a line of blocks, the means of neighbours where there are more values than blocks.

    Values that are not finite are spaces.
    """
    num = min(width, len(values))
    cuts = [round(i * len(values) / num) for i in range(num + 1)] if num else [0]
    parts = [values[start:stop] for start, stop in zip(cuts, cuts[1:], strict=False)]
    finite = [[v for v in part if math.isfinite(v)] for part in parts]
    means = [sum(part) / len(part) if part else math.nan for part in finite]
    known = [value for value in means if math.isfinite(value)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(
        _BLOCKS[round((value - low) * scale)] if math.isfinite(value) else " " for value in means
    )


def _ends(points: Points) -> list[str]:
    """Return the first and the last value, and the range."""
    values = [y for _, y in points if math.isfinite(y)]
    if not values:
        return ["–", "–", "–"]
    return [f"{values[0]:.4g}", f"{values[-1]:.4g}", f"{min(values):.4g} to {max(values):.4g}"]
