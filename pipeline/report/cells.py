"""Cells of the tables of the page (templates/_macros.html)."""

from typing import Any


def number(value: float, digits: int = 0, *, signed: bool = False) -> dict[str, Any]:
    """Return the cell of a number, with so many digits after the point."""
    text = f"{value:+,.{digits}f}" if signed else f"{value:,.{digits}f}"
    return {"value": value, "text": text, "note": None}
