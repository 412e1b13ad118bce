"""Curves of runs over epochs: losses, accuracy, agreement, learning rate, discriminator."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any

from mealv2.models.discriminator import PLATEAUS
from mealv2.report.methods import Method
from mealv2.report.run import Run
from mealv2.report.style import (
    MUTED,
    Figure,
    add_names,
    drawing,
    new_figure,
    series_style,
    short_name,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = list[tuple[float, float]]
_MAX_IN_WORDS = 8  # methods that a text alternative describes


@dataclass(frozen=True)
class Curve:
    """A figure over epochs: ``column`` is that of summary.csv, ``unit`` the label of its axis."""

    name: str
    column: str
    title: str
    unit: str

    def points(self, run: Run, over: str = "epoch") -> Points:
        """Return the epochs that have the figure, with 0 for the start, and its values.

        ``over="step"``: the steps of a run that is in its first epoch.
        """
        if over == "step":
            name = self.column.removeprefix("train_")
            return [(row["step"], row[name]) for row in run.first_steps if name in row]
        if self.column.startswith("val_"):
            metric = self.column.removeprefix("val_")
            return [(e, row[metric]) for e, row in run.validations.items() if metric in row]
        return [(row["epoch"], row[self.column]) for row in run.epochs if self.column in row]


CURVES = (
    Curve("loss", "train_loss", "Training loss", "loss"),
    Curve(
        "similarity-loss",
        "train_similarity_loss",
        "Similarity loss in training: student against soft labels",
        "cross-entropy, nats",
    ),
    Curve(
        "hard-label-loss",
        "train_cross_entropy",
        "Cross-entropy to the hard labels in training",
        "cross-entropy, nats",
    ),
    Curve(
        "validation-loss",
        "val_cross_entropy",
        "Cross-entropy to the hard labels, validation",
        "cross-entropy, nats",
    ),
    Curve("training-top1", "train_top1", "Top-1 accuracy in training", "top-1, %"),
    Curve("top1", "val_top1", "Top-1 accuracy, validation", "top-1, %"),
    Curve("training-top5", "train_top5", "Top-5 accuracy in training", "top-5, %"),
    Curve("top5", "val_top5", "Top-5 accuracy, validation", "top-5, %"),
    Curve("map", "val_map", "Mean average precision, validation", "mAP, %"),
    Curve(
        "agreement",
        "val_agreement",
        "Agreement with the ensemble, validation",
        "images with the same top class, %",
    ),
    Curve("kl", "val_kl", "KL from the ensemble to the student, validation", "KL, nats"),
    Curve("ece", "val_ece", "Expected calibration error, validation", "ECE, %"),
    Curve("lr", "lr", "Learning rate", "learning rate"),
    Curve(
        "discriminator-loss",
        "train_discriminator_loss",
        "Loss of the discriminator, with its plateaus",
        "loss, nats",
    ),
    Curve(
        "discriminator-accuracy",
        "train_discriminator_accuracy",
        "Accuracy of the discriminator",
        "rows told apart, fraction",
    ),
    Curve(
        "gradient-ratio",
        "train_discriminator_gradient_ratio",
        "Gradient of the discriminator on the student, relative to that of the labels",
        "ratio of gradients",
    ),
)
# what a run of this kind could have: missing ones are named
_EXPECTED = ("loss", "top1", "top5", "agreement", "lr", "training-top1", "discriminator-loss")
# figures whose axis starts where nothing can be lower
_FROM_ZERO = {"gradient-ratio"}
_LEVELS = {"discriminator-accuracy": {"chance": 0.5}}


def curve_figures(methods: Sequence[Method]) -> list[Figure]:
    """Return a figure of each curve that a run has: a line for each method.

    Of several seeds the line is their mean, and a band reaches from the lowest to the highest.
    """
    return [figure for curve in CURVES if (figure := curve_figure(curve, methods)) is not None]


def step_figures(methods: Sequence[Method]) -> list[Figure]:
    """Return a figure over steps of each curve in training, of the runs in their first epoch."""
    curves = [curve for curve in CURVES if not curve.column.startswith("val_")]
    figures = (curve_figure(curve, methods, over="step") for curve in curves)
    return [figure for figure in figures if figure is not None]


def missing_curves(methods: Sequence[Method]) -> list[str]:
    """Return the titles of the usual curves that no run has."""
    runs = [run for method in methods for run in method.runs]
    curves = [curve for curve in CURVES if curve.name in _EXPECTED]
    return [curve.title for curve in curves if not any(map(curve.points, runs))]


def curve_figure(curve: Curve, methods: Sequence[Method], *, over: str = "epoch") -> Figure | None:
    """Return the figure of one curve; None where no run has it. Raises ConfigError."""
    found = {
        number: [points for run in method.runs if (points := _finite(curve.points(run, over)))]
        for number, method in enumerate(methods)
    }
    found = {number: lines for number, lines in found.items() if lines}
    if not found:
        return None
    canvas, (axes,) = new_figure()
    from matplotlib.ticker import MaxNLocator

    with drawing():
        drawn = [_draw(axes, lines, number) for number, lines in found.items()]
        _add_levels(axes, curve, [methods[number] for number in found])
        axes.set_xlabel(over)
        axes.set_ylabel(curve.unit)
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if curve.name in _FROM_ZERO:
            axes.set_ylim(bottom=0)
    add_names(canvas, drawn, [short_name(methods[number].name) for number in found])
    name = curve.name if over == "epoch" else f"{curve.name}-{over}s"
    alt, rows = _alt(curve, methods, over), _rows(curve, methods, over)
    return Figure(name, curve.title, alt, canvas, rows)


def _draw(axes: "Axes", lines: Sequence[Points], number: int) -> Any:
    """Draw the mean of the lines and the band between them; return the line."""
    xs, means, lows, highs = _bands(lines)
    style = series_style(number)
    if len(xs) < 3:
        style |= {"marker": "o", "markersize": 4.0}
    if len(lines) > 1:
        axes.fill_between(xs, lows, highs, color=style["color"], alpha=0.18, linewidth=0)
    (line,) = axes.plot(xs, means, **style)
    return line


def _bands(lines: Sequence[Points]) -> tuple[list[float], list[float], list[float], list[float]]:
    """Return epochs with mean, least and greatest value of the lines that have the epoch."""
    at: dict[float, list[float]] = {}
    for line in lines:
        for x, y in line:
            at.setdefault(x, []).append(y)
    # where only some seeds have got so far, the mean would jump
    most = max(map(len, at.values()))
    xs = sorted(x for x, values in at.items() if len(values) == most)
    return xs, [mean(at[x]) for x in xs], [min(at[x]) for x in xs], [max(at[x]) for x in xs]


def _add_levels(axes: "Axes", curve: Curve, methods: Sequence[Method]) -> None:
    """Mark characteristic values: the plateaus of the discriminator's loss, and chance."""
    levels = levels_of(curve, methods)
    for name, value in levels.items():
        axes.axhline(value, color=MUTED, linestyle=(0, (1, 2)), linewidth=1.2)
        axes.annotate(
            f"{name} {value:.3f}",
            (1.0, value),
            (-2, 2),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            fontsize=8.5,
            color=MUTED,
        )


def levels_of(curve: Curve, methods: Iterable[Method]) -> dict[str, float]:
    """Return the values to mark in a figure, by name."""
    if curve.name != "discriminator-loss":
        return _LEVELS.get(curve.name, {})
    kinds = {str(method.runs[0].config.get("discriminator")) for method in methods}
    levels: dict[str, float] = {}
    for kind in sorted(kinds & PLATEAUS.keys()):
        for name, value in PLATEAUS[kind].items():
            levels[name if len(kinds) == 1 else f"{kind}: {name}"] = value
    return levels


def _finite(points: Points) -> Points:
    return [(x, y) for x, y in points if math.isfinite(y)]


def _rows(curve: Curve, methods: Sequence[Method], over: str) -> list[dict[str, Any]]:
    return [
        {"method": m.name, "run": str(run.path), "seed": run.seed, over: x, curve.column: y}
        for m in methods
        for run in m.runs
        for x, y in curve.points(run, over)
    ]


def _alt(curve: Curve, methods: Sequence[Method], over: str) -> str:
    """Return what a figure shows, in words."""
    texts = []
    for method in methods:
        lines = [points for run in method.runs if (points := _finite(curve.points(run, over)))]
        if not lines:
            continue
        xs, means, _, _ = _bands(lines)
        seeds = f", mean of {len(lines)} runs" if len(lines) > 1 else ""
        texts.append(
            f"{method.name}{seeds}: {means[0]:.4g} at {over} {xs[0]:g}, {means[-1]:.4g} at "
            f"{over} {xs[-1]:g}, lowest {min(means):.4g}, highest {max(means):.4g}"
        )
    rest = f"; and {len(texts) - _MAX_IN_WORDS} more" if len(texts) > _MAX_IN_WORDS else ""
    return f"{curve.title} over {over}s. {'; '.join(texts[:_MAX_IN_WORDS])}{rest}."
