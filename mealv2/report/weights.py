"""Weights of layers: histograms against the start, percentiles over training (figures 7 and 8)."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from mealv2.errors import ConfigError
from mealv2.models.classifier import read_metadata
from mealv2.models.cost import parameter_names
from mealv2.models.layers import first_middle_last, tensor_of
from mealv2.models.pretrained import cached_file
from mealv2.models.timm_models import LOCAL_DIR
from mealv2.models.weights import read_state
from mealv2.report.run import Run
from mealv2.report.style import (
    MUTED,
    SMALL,
    Figure,
    add_names,
    drawing,
    new_figure,
    series_style,
    short_name,
)
from mealv2.storage.regular_files import read_regular
from mealv2.storage.run_files import METRICS_NAME, WEIGHTS, parse_event
from mealv2.storage.weight_files import find_checkpoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NUM_BINS = (15, 80)  # at least and at most; about the square root of the weights
DRAWN = (10, 25, 50, 75, 90)  # percentiles in a figure (paper figure 8)
_CUT = 0.1  # percent of the weights beyond each end of a histogram's axis
_NEAR_ZERO = 0.1  # of a standard deviation
_START_DASHES = (":", "-.", "--")
_MAX_IN_WORDS = 8  # lines that a text alternative describes

# values of the percentiles by percentile, by epoch
Evolution = dict[int, dict[float, float]]


@dataclass(frozen=True)
class Line:
    """A line of a figure: of a run, with the number of its colour, or of a start."""

    name: str
    number: int
    is_start: bool = False

    @property
    def style(self) -> dict[str, Any]:
        """The arguments of ``Axes.plot``."""
        if not self.is_start:
            return series_style(self.number)
        return {"color": MUTED, "linestyle": _START_DASHES[self.number % len(_START_DASHES)]}


# --- what a run saved ---------------------------------------------------------------------------


def read_layers(path: Path, layers: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Return weights in a file or in the folder of a run or model, by layer, in float64.

    Of the layers that it has; by default the first, the middle and the last one, in the order of
    the architecture that the file names. Without one that can be built, such as of own code, in the
    file's order, which in safetensors is that of the names. Raises ConfigError for a path without
    weights that can be read.
    """
    values = read_state(find_checkpoint(path))
    state = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    if layers is None:
        names = [name for name in _model_order(path) or state if name in state]
        layers = first_middle_last({name: state[name].shape for name in names})
    found = {layer: tensor_of(state, layer) for layer in layers}
    return {layer: value.double().numpy() for layer, value in found.items() if value is not None}


def _model_order(path: Path) -> tuple[str, ...] | None:
    """Return the names of parameters in their model's order; None where it is not known."""
    about = read_metadata(find_checkpoint(path))
    try:
        name, num_classes, img_size = (
            about["architecture"],
            len(about["classes"]),
            about["img_size"],
        )
    except (KeyError, TypeError):
        return None
    return parameter_names(str(name), num_classes=num_classes, img_size=int(img_size))


def start_file(run: Run) -> Path:
    """Return the file with the weights that a run started from.

    Raises ConfigError, with the reason, where there is none on this machine. Asks no server.
    """
    name, checkpoint = str(run.config.get("model")), run.config.get("initial_checkpoint")
    _, _, path = name.partition("=")
    if checkpoint or path:
        return find_checkpoint(Path(checkpoint or path))
    if run.config.get("pretrained") is False or run.config.get("mode") == "scratch":
        raise ConfigError("it started from random weights")
    folder = name.removeprefix(LOCAL_DIR)
    if os.path.isdir(folder):  # noqa: PTH112  # a name may be too long
        return find_checkpoint(Path(folder))
    found = cached_file(name)
    if found is None:
        raise ConfigError(f"its weights, {name}, are not in a cache of this machine")
    return found


def logged_percentiles(run: Run) -> dict[str, Evolution]:
    """Return the percentiles that --log-weights logged, by layer, epoch and percentile."""
    found: dict[str, Evolution] = {}
    for line in read_regular(run.path / METRICS_NAME).splitlines():
        event = parse_event(line) if f'"{WEIGHTS}"'.encode() in line else None
        if event is None or event.get("event") != WEIGHTS:
            continue
        values = dict(zip(event["percentiles"], event["values"], strict=True))
        found.setdefault(str(event["layer"]), {})[event["epoch"]] = values
    return {layer: dict(sorted(epochs.items())) for layer, epochs in found.items()}


# --- figures from arrays ------------------------------------------------------------------------


def bin_edges(values: Sequence[np.ndarray]) -> np.ndarray:
    """Return the edges of bins for several histograms; 0.1 % of all values lie beyond each end."""
    joint = np.concatenate([value.ravel() for value in values])
    low, high = np.percentile(joint, [_CUT, 100 - _CUT])
    if low == high:
        low, high = low - 0.5, high + 0.5
    num_bins = np.clip(round(min(value.size for value in values) ** 0.5), *NUM_BINS)
    return np.linspace(low, high, int(num_bins) + 1)


def percent_in_bins(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return the percent of the values in each bin, of all values: also those outside."""
    counts, _ = np.histogram(values, edges)
    percent: np.ndarray = 100.0 * counts / max(1, values.size)
    return percent


def histogram_figure(name: str, title: str, drawn: Sequence[tuple[Line, np.ndarray]]) -> Figure:
    """Return histograms of the weights of one layer in several models, on one axis."""
    edges = bin_edges([values for _, values in drawn])
    heights = [percent_in_bins(values, edges) for _, values in drawn]
    canvas, (axes,) = new_figure(size=SMALL)
    with drawing():
        lines = [
            axes.stairs(height, edges, linewidth=1.8, **line.style)
            for (line, _), height in zip(drawn, heights, strict=True)
        ]
        axes.set_xlabel("weight")
        axes.set_ylabel("weights in a bin, %")
        axes.set_ylim(bottom=0)
    add_names(canvas, lines, [short_name(line.name) for line, _ in drawn])
    data = [
        {"model": line.name, "low": float(low), "high": float(high), "percent": float(value)}
        for (line, _), height in zip(drawn, heights, strict=True)
        for low, high, value in zip(edges[:-1], edges[1:], height, strict=True)
    ]
    texts = [
        f"{line.name}: standard deviation {values.std():.4g}, a tenth of the weights below "
        f"{np.percentile(values, 10):.4g} and a tenth above {np.percentile(values, 90):.4g}, "
        f"{100 - height.sum():.2g} % outside of the axis"
        for (line, values), height in zip(drawn, heights, strict=True)
    ]
    alt = f"Histograms of weights. {title}. {_in_words(texts)}."
    return Figure(name, title, alt, canvas, data)


def spread_rows(drawn: Sequence[tuple[Line, np.ndarray]]) -> list[dict[str, Any]]:
    """Return a row per model: how wide its weights of a layer spread, how many are near zero.

    Near is by less than a tenth of the standard deviation of the first of them.
    """
    near = _NEAR_ZERO * float(drawn[0][1].std())
    return [
        {
            "model": line.name,
            "std": float(values.std()),
            "p10": float(np.percentile(values, 10)),
            "p90": float(np.percentile(values, 90)),
            "near_zero": 100.0 * float((np.abs(values) < near).mean()),
        }
        for line, values in drawn
    ]


def percentile_figure(name: str, title: str, drawn: Sequence[tuple[Line, Evolution]]) -> Figure:
    """Return percentiles of the weights of one layer over epochs, of several runs on one axis."""
    canvas, (axes,) = new_figure(size=SMALL)
    from matplotlib.ticker import MaxNLocator

    with drawing():
        lines = [_draw_evolution(axes, line, evolution) for line, evolution in drawn]
        axes.set_xlabel("epoch")
        axes.set_ylabel("weight")
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    add_names(canvas, lines, [short_name(line.name) for line, _ in drawn])
    data = [
        {"model": line.name, "epoch": epoch, **{f"p{p:g}": value for p, value in values.items()}}
        for line, evolution in drawn
        for epoch, values in evolution.items()
    ]
    texts = [_evolution_text(line, evolution) for line, evolution in drawn]
    alt = f"Percentiles of weights over epochs. {title}. {_in_words(texts)}."
    return Figure(name, title, alt, canvas, data)


def _draw_evolution(axes: "Axes", line: Line, evolution: Evolution) -> Any:
    """Draw a line for each of ``DRAWN``, the median thicker; return that of the median."""
    median: Any = None
    for percent in DRAWN:
        points = [(e, values[percent]) for e, values in evolution.items() if percent in values]
        if not points:
            continue
        width = 2.2 if percent == 50 else 1.2
        marker = {"marker": "o", "markersize": 3.0} if len(points) < 3 else {}
        (drawn,) = axes.plot(
            *zip(*points, strict=True), **{**line.style, "linewidth": width, **marker}
        )
        median = drawn if percent == 50 else median
    return median


def _evolution_text(line: Line, evolution: Evolution) -> str:
    first, last = min(evolution), max(evolution)
    ends = (
        f"{p}th from {evolution[first][p]:.4g} to {evolution[last][p]:.4g}"
        for p in (DRAWN[0], 50, DRAWN[-1])
        if p in evolution[first] and p in evolution[last]
    )
    return f"{line.name}, epoch {first} to {last}: percentiles {', '.join(ends)}"


def _in_words(texts: Sequence[str]) -> str:
    more = f"; and {len(texts) - _MAX_IN_WORDS} more" if len(texts) > _MAX_IN_WORDS else ""
    return "; ".join(texts[:_MAX_IN_WORDS]) + more
