"""Cells of the tables of the page, and lines of its lists of names (templates/_macros.html)."""

from typing import Any

from mealv2.report.style import SERIES

# dashes of matplotlib's line styles
_DASHES = {"-": "none", "--": "6 3", "-.": "6 2 1 2", ":": "1 2"}


def number(value: float, digits: int = 0, *, signed: bool = False) -> dict[str, Any]:
    """Return the cell of a number, with so many digits after the point."""
    text = f"{value:+,.{digits}f}" if signed else f"{value:,.{digits}f}"
    return {"value": value, "text": text, "note": None}


def key_line(name: str, style: dict[str, Any], *, runs: int = 1) -> dict[str, Any]:
    """Return an entry of a list of names: that of a line with this matplotlib style."""
    colour = style["color"]
    variable = f"--series-{SERIES.index(colour)}" if colour in SERIES else "--muted"
    return {"name": name, "colour": variable, "dashes": _DASHES[style["linestyle"]], "runs": runs}
