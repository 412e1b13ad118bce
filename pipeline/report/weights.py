"""Weights of the students: histograms against the start, percentiles over training."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mealv2.errors import MealError
from mealv2.report import weights
from mealv2.report.methods import Method, methods_of
from mealv2.report.run import Run
from mealv2.report.style import Figure, short_name
from mealv2.report.weights import Evolution, Line
from mealv2.storage.weight_files import EXPORT_FOLDER, WEIGHTS_NAME
from pipeline.report.cells import key_line, number
from pipeline.report.sections import Inputs, Section

TITLE = "Weights"
MAX_RUNS, MAX_CONTROL = 3, 2  # methods that are drawn
MAX_LAYERS = 6  # that have percentiles
_WHICH = {1: ("Only",), 2: ("First", "Last"), 3: ("First", "Middle", "Last")}

Values = dict[str, np.ndarray]


@dataclass(frozen=True)
class _Drawn:
    """A run that is drawn, with what it saved and logged by layer.

    ``start`` is the file of its start, with ``start_layers``, or text: why there is none.
    """

    line: Line
    run: Run
    layers: Values
    logged: dict[str, Evolution]
    start: Path | str
    start_layers: Values

    @property
    def architecture(self) -> str:
        """The name of the model without that of its first weights."""
        return self.run.model.split(".")[0]

    @property
    def shapes(self) -> tuple[Any, ...]:
        """What two models that are compared have in common."""
        return tuple((name, value.shape) for name, value in self.layers.items())


def section(inputs: Inputs) -> Section:
    """Return the section, of one run each of the first methods and controls that have weights."""
    methods = methods_of([*inputs.runs, *inputs.control])
    drawn, left_out = _choose(methods, set(inputs.control))
    starts = _starts(drawn)
    groups: list[dict[str, Any]] = []
    figures: list[Figure] = []
    for members in _groups(drawn):
        context, of_group = _layer_figures(members, starts, len(groups))
        groups.append(context)
        figures += of_group
    evolutions = _evolution_figures(drawn)
    lines = [one.line for one in drawn] + [line for line, _ in starts.values()]
    context = {
        "runs": [_row(one) for one in drawn],
        "left_out": left_out,
        "has_seeds": any(len(method.runs) > 1 for method in methods),
        "lines": [key_line(line.name, line.style) for line in lines],
        "groups": groups,
        "evolutions": [figure.name for figure in evolutions],
    }
    missing = _missing(drawn, has_control=bool(inputs.control))
    return Section("weights", TITLE, "weights.html", context, [*figures, *evolutions], missing)


# --- what is drawn ------------------------------------------------------------------------------


def _choose(methods: Sequence[Method], control: set[Run]) -> tuple[list[_Drawn], int]:
    """Return a run of each of the first methods that have weights, and how many others have."""
    found: list[_Drawn] = []
    left, left_out = {False: MAX_RUNS, True: MAX_CONTROL}, 0
    for at, method in enumerate(methods):
        is_control = method.runs[0] in control
        if left[is_control] == 0:
            left_out += any(_weights_file(run).is_file() for run in method.runs)
            continue
        candidates = (_open(run, Line(method.name, at)) for run in method.runs)
        one = next((one for one in candidates if one.layers or one.logged), None)
        if one is not None:
            found.append(one)
            left[is_control] -= 1
    return found, left_out


def _weights_file(run: Run) -> Path:
    return run.path / EXPORT_FOLDER / WEIGHTS_NAME


def _open(run: Run, line: Line) -> _Drawn:
    """Read the weights of a run; raises MealError if what it saved cannot be read."""
    path = _weights_file(run)
    layers = weights.read_layers(path) if path.is_file() else {}
    start: Path | str
    start_layers: Values = {}
    try:
        start = weights.start_file(run)
        start_layers = weights.read_layers(start, list(layers))
    except (MealError, OSError) as error:
        start = str(error)
    return _Drawn(line, run, layers, weights.logged_percentiles(run), start, start_layers)


def _starts(drawn: Sequence[_Drawn]) -> dict[Path, tuple[Line, Values]]:
    """Return the line and the layers of each start, by its file."""
    by_path: dict[Path, list[_Drawn]] = {}
    for one in drawn:
        if isinstance(one.start, Path) and one.layers:
            by_path.setdefault(one.start, []).append(one)
    found = {}
    for at, (path, runs) in enumerate(by_path.items()):
        names = ", ".join(one.line.name for one in runs)
        name = "start" if len(by_path) == 1 else f"start of {names}"
        layers = {layer: v for one in runs for layer, v in one.start_layers.items()}
        found[path] = Line(name, at, is_start=True), layers
    return found


def _groups(drawn: Sequence[_Drawn]) -> list[list[_Drawn]]:
    """Return the runs with saved weights, those with equal layers together."""
    found: dict[tuple[Any, ...], list[_Drawn]] = {}
    for one in drawn:
        if one.layers:
            found.setdefault(one.shapes, []).append(one)
    return list(found.values())


# --- figures and tables -------------------------------------------------------------------------


def _layer_figures(
    members: Sequence[_Drawn], starts: dict[Path, tuple[Line, Values]], at: int
) -> tuple[dict[str, Any], list[Figure]]:
    """Return what the page has of models with equal layers, and a figure of each layer."""
    model = short_name(members[0].architecture)
    layers = members[0].layers
    of_group = [
        starts[path] for path in dict.fromkeys(one.start for one in members) if path in starts
    ]
    figures: list[Figure] = []
    rows: list[list[Any]] = []
    for which, layer in zip(_WHICH[len(layers)], layers, strict=True):
        shape = layers[layer].shape
        lines = [(line, found[layer]) for line, found in of_group if layer in found]
        lines = [(line, values) for line, values in lines if values.shape == shape]
        lines += [(one.line, one.layers[layer]) for one in members]
        name = f"weights-{which.lower()}" + (f"-{at + 1}" if at else "")
        title = f"{which} layer of {model}: {short_name(layer)}"
        figures.append(weights.histogram_figure(name, title, lines))
        rows += [_spread_row(layer, row) for row in weights.spread_rows(lines)]
    context = {
        "model": model,
        "kind": "convolution" if next(iter(layers.values())).ndim > 2 else "linear layer",
        "figures": [figure.name for figure in figures],
        "rows": rows,
    }
    return context, figures


def _spread_row(layer: str, row: dict[str, Any]) -> list[Any]:
    cells = [number(row["std"], 4), number(row["p10"], 4), number(row["p90"], 4)]
    return [layer, row["model"], *cells, number(row["near_zero"], 2)]


def _evolution_figures(drawn: Sequence[_Drawn]) -> list[Figure]:
    """Return a figure of each logged layer, the runs of one architecture on one axis."""
    by_layer: dict[tuple[str, str], list[tuple[Line, Evolution]]] = {}
    for one in drawn:
        for layer, evolution in one.logged.items():
            by_layer.setdefault((one.architecture, layer), []).append((one.line, evolution))
    return [
        weights.percentile_figure(
            f"weight-percentiles-{at}",
            f"Weights of {short_name(layer)}, {short_name(model)}",
            lines,
        )
        for at, ((model, layer), lines) in enumerate(list(by_layer.items())[:MAX_LAYERS], start=1)
    ]


def _row(one: _Drawn) -> list[Any]:
    start = f"not drawn: {one.start}" if isinstance(one.start, str) else str(one.start)
    return [one.line.name, str(one.run.path), one.run.model, _saved(one), start]


def _saved(one: _Drawn) -> str | None:
    """Return which epoch the saved weights are of."""
    if not one.layers:
        return None
    report = one.run.report
    if report is None:
        return "of the unfinished run"
    return f"of epoch {report.get('selected_epoch', one.run.num_epochs)}"


def _missing(drawn: Sequence[_Drawn], *, has_control: bool) -> str | None:
    """Return what the section does not have, and how it would."""
    notes = []
    if not any(one.layers for one in drawn):
        notes.append(
            f"These runs have no saved weights: a training writes {EXPORT_FOLDER}/{WEIGHTS_NAME} "
            "after its first epoch."
        )
    elif not any(isinstance(one.start, Path) for one in drawn):
        notes.append("The weights of the start are not on this machine.")
    if not any(one.logged for one in drawn):
        notes.append("Weights over training were not logged: train with --log-weights auto.")
    if drawn and not has_control:
        notes.append("No control: give runs with hard labels with --control.")
    return " ".join(notes) or None
