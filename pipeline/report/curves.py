"""Curves of the runs over epochs, with one list of names for all figures."""

from mealv2.report.curves import curve_figures, missing_curves, step_figures
from mealv2.report.methods import methods_of
from mealv2.report.style import series_style
from pipeline.report.cells import key_line
from pipeline.report.sections import Inputs, Section, write_data
from pipeline.report.zoom import SCRIPTS, zoom_data

TITLE = "Curves"


def section(inputs: Inputs) -> Section:
    """Return the section."""
    methods = methods_of([*inputs.runs, *inputs.control])
    figures, steps = curve_figures(methods), step_figures(methods)
    lines = [
        key_line(method.name, series_style(at), runs=len(method.runs))
        for at, method in enumerate(methods)
    ]
    missing = None
    if absent := missing_curves(methods):
        missing = f"Not logged by any of these runs: {'; '.join(absent)}."
    if not figures:
        missing = "No epoch is complete yet, so there are no curves over epochs."
    context = {
        "lines": lines,
        "has_bands": any(line["runs"] > 1 for line in lines),
        "over_epochs": [figure.name for figure in figures],
        "over_steps": [figure.name for figure in steps],
    }
    data = write_data(inputs.output, "curves", zoom_data(figures, methods))
    scripts = (data, *SCRIPTS) if figures else ()
    return Section("curves", TITLE, "curves.html", context, [*figures, *steps], missing, scripts)
