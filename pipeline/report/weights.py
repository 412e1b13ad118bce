"""Weights of the students against their start; not drawn yet."""

from pipeline.report.sections import Inputs, Section


def section(inputs: Inputs) -> Section:
    """Return the section."""
    return Section(
        "weights", "Weights", missing="These runs saved no weights of their layers to draw."
    )
