"""Cells of the tables of the page (templates/_macros.html)."""

from typing import Any


def number(value: float, places: int = 0, *, signed: bool = False) -> dict[str, Any]:
    """Return the cell of a number, with so many decimal places."""
    text = f"{value:+,.{places}f}" if signed else f"{value:,.{places}f}"
    return {"value": value, "text": text, "note": None}
