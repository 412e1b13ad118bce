"""Curves of the runs over epochs, with one list of names for all figures."""

from mealv2.report.curves import curve_figures, missing_curves
from mealv2.report.methods import methods_of
from mealv2.report.style import series_style
from pipeline.report.cells import key_line
from pipeline.report.sections import Inputs, Section

TITLE = "Curves"


def section(inputs: Inputs) -> Section:
    """Return the section."""
    methods = methods_of([*inputs.runs, *inputs.control])
    figures = curve_figures(methods)
    lines = [
        key_line(method.name, series_style(at), runs=len(method.runs))
        for at, method in enumerate(methods)
    ]
    missing = None
    if absent := missing_curves(methods):
        missing = f"Not logged by any of these runs: {'; '.join(absent)}."
    if not figures:
        missing = "No epoch is complete yet, so there are no curves."
    context = {"lines": lines, "has_bands": any(line["runs"] > 1 for line in lines)}
    return Section("curves", TITLE, "curves.html", context, figures, missing)
