"""Figures of a label set: certainty, entropy, mass in the top-k, bytes, average soft labels."""

from typing import TYPE_CHECKING, Any

import numpy as np

from mealv2.report.labels import LabelStatistics, TeacherComparison
from mealv2.report.sample import LabelSample
from mealv2.report.style import (
    GRID,
    INK,
    SERIES,
    SMALL,
    Figure,
    drawing,
    new_figure,
    short_name,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_NAMED = 16  # classes with their names in one figure
_BINS = 40
# the ends of the colours of a heat map: the page shows through 0
_NONE, _MOST = "#08519c00", "#08519cff"
_FROM_WHITE = 0.72  # of the highest value: from here white is readable on the colour, ink is not


def certainty_figures(sample: LabelSample, statistics: LabelStatistics) -> list[Figure]:
    """Return histograms over views: top-1 probability, entropy, and bytes; mass in the top-k."""
    top1_M = sample.top1_NV[sample.has_NV]
    entropy_M = sample.entropy_NV[sample.has_NV]
    highest = float(np.log(len(sample.classes)))
    return [
        _histogram(
            "label-top1",
            "Probability of the likeliest class",
            "probability",
            "views",
            top1_M,
            (0.0, 1.0),
            f"mean {statistics.top1:.3f}",
        ),
        _histogram(
            "label-entropy",
            "Entropy of a view's label",
            f"nats (an even label has {highest:.2f})",
            "views",
            entropy_M,
            (0.0, max(float(entropy_M.max()), 1e-3)),
            f"mean {statistics.entropy:.3f} nats",
        ),
        _mass(statistics),
        _histogram(
            "label-bytes",
            "Stored bytes per view",
            "bytes, mean of an image's views",
            "images",
            sample.bytes_N,
            (0.0, float(sample.bytes_N.max()) * 1.05),
            f"mean {statistics.bytes:.1f} bytes",
        ),
    ]


def _histogram(
    name: str,
    title: str,
    xlabel: str,
    of: str,
    values: np.ndarray,
    limits: tuple[float, float],
    mean: str,
) -> Figure:
    counts, edges = np.histogram(values, bins=_BINS, range=limits)
    percent = 100 * counts / max(1, counts.sum())
    canvas, (axes,) = new_figure(size=SMALL)
    with drawing():
        axes.stairs(percent, edges, fill=True, color=SERIES[0])
        axes.axvline(float(values.mean()), color=SERIES[1], linestyle="--")
        axes.set_xlabel(f"{xlabel}\ndashed: {mean}")
        axes.set_ylabel(f"% of {of}")
        axes.set_xlim(*limits)
    quartiles = ", ".join(f"{value:.3g}" for value in np.quantile(values, [0.25, 0.5, 0.75]))
    rows: list[dict[str, Any]] = [
        {"from": float(a), "to": float(b), of: int(n)}
        for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
    alt = f"Histogram over {len(values):,} {of}: {title}. {mean}; quartiles {quartiles}."
    return Figure(name, title, alt, canvas, rows)


def _mass(statistics: LabelStatistics) -> Figure:
    title = "Mass in the k likeliest classes"
    ks, masses = list(statistics.mass), list(statistics.mass.values())
    canvas, (axes,) = new_figure(size=SMALL)
    with drawing():
        axes.plot(ks, masses, marker="o", color=SERIES[0], clip_on=False)
        axes.set_xscale("log")
        axes.set_xticks(ks, [str(k) for k in ks])
        axes.minorticks_off()
        axes.set_xlabel("k")
        axes.set_ylabel("mean mass")
        axes.set_ylim(min(0.5, *masses), 1.005)
    listed = ", ".join(f"top-{k} {mass:.3f}" for k, mass in statistics.mass.items())
    rows = [{"k": k, "mass": mass} for k, mass in statistics.mass.items()]
    return Figure("label-mass", title, f"{title}, mean of the views: {listed}.", canvas, rows)


def class_figure(statistics: LabelStatistics) -> Figure | None:
    """Return the certainty of the labels by class; None without hard labels."""
    rows = [row for row in statistics.classes if row["images"]]
    if not rows:
        return None
    rows.sort(key=lambda row: float(row["hard_label_probability"]))
    probs = [row["hard_label_probability"] for row in rows]
    contradicting = [row["contradicting_percent"] / 100 for row in rows]
    title = "Hard label and soft label, by class"
    is_named = len(rows) <= MAX_NAMED
    canvas, (axes,) = new_figure(size=(SMALL[0], 1.1 + 0.32 * len(rows)) if is_named else SMALL)
    with drawing():
        if is_named:
            at = np.arange(len(rows))
            axes.barh(at + 0.2, probs, 0.38, color=SERIES[0])
            axes.barh(at - 0.2, contradicting, 0.38, color=SERIES[1], hatch="//", edgecolor=GRID)
            axes.set_yticks(at, [short_name(row["class"], most=22) for row in rows])
            axes.grid(visible=False, axis="y")
            axes.set_xlim(0, 1)
            axes.set_xlabel(
                "solid: probability of the hard label\nhatched: fraction of views against it"
            )
        else:
            axes.plot(probs, color=SERIES[0])
            axes.scatter(range(len(rows)), contradicting, s=4, color=SERIES[1])
            axes.set_ylim(0, 1)
            axes.set_xlabel("classes\nline: probability of the hard label; dots: views against it")
    low, high = rows[0], rows[-1]
    alt = (
        f"{title}, {len(rows)} classes: the mean probability of the hard label lies between "
        f"{low['hard_label_probability']:.2f} ({short_name(low['class'])}) and "
        f"{high['hard_label_probability']:.2f} ({short_name(high['class'])})."
    )
    return Figure("label-classes", title, alt, canvas, rows)


def mean_label_figure(statistics: LabelStatistics, chosen: list[int]) -> Figure | None:
    """Return the average soft labels of some classes as a heat map (paper figure 2, part 3).

    A row is the mean label of the images of a class; None where no class has images.
    """
    means_CC = statistics.mean_label_CC
    if means_CC is None:
        return None
    chosen = [c for c in chosen if not np.isnan(means_CC[c]).any()]
    if not chosen:
        return None
    names = [statistics.classes[c]["class"] for c in chosen]
    title = "Average soft label of each class"
    if len(chosen) < len(statistics.classes):
        title += f", {len(chosen)} classes that are taken for each other"
    values = means_CC[np.ix_(chosen, chosen)]
    figure = heat_map("label-means", title, names, values, text="{:.2f}", most=1.0)
    diagonal = values.diagonal()
    figure.alt = (
        f"Heat map: {title}. The hard class has between {diagonal.min():.2f} and "
        f"{diagonal.max():.2f} of the mass; the rest lies on other classes."
    )
    return figure


def teacher_figure(comparison: TeacherComparison) -> Figure:
    """Return how often each pair of teachers has the same likeliest class."""
    title = "Views with the same likeliest class, percent"
    agreement_TT = comparison.agreement_TT
    figure = heat_map(
        "label-teachers", title, comparison.names, agreement_TT, text="{:.1f}", most=100.0
    )
    pairs = agreement_TT[~np.eye(len(agreement_TT), dtype=bool)]
    figure.alt = (
        f"Heat map of {len(agreement_TT)} teachers: two of them have the same likeliest class on "
        f"{pairs.min():.1f} to {pairs.max():.1f} % of {comparison.num_views:,} views."
    )
    return figure


def heat_map(
    name: str, title: str, names: list[str], values: np.ndarray, *, text: str, most: float
) -> Figure:
    """Return a square matrix as a heat map with its values, rows and columns by name."""
    from matplotlib.colors import LinearSegmentedColormap

    number = len(names)
    side = 1.6 + 0.52 * number
    canvas, (axes,) = new_figure(size=(max(4.6, side + 1.4), max(2.6, side)))
    colours = LinearSegmentedColormap.from_list("mealv2", [_NONE, _MOST])
    with drawing():
        axes.pcolormesh(values, cmap=colours, vmin=0, vmax=most, edgecolors=GRID, linewidth=0.5)
        short = [short_name(each, most=22) for each in names]
        at = np.arange(number) + 0.5
        axes.set_yticks(at, short)
        axes.set_xticks(at, short, rotation=55, ha="right", rotation_mode="anchor")
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.invert_yaxis()
        _add_values(axes, values, text, most)
    rows = [
        {"class": name, **dict(zip(_unique(names), row.tolist(), strict=True))}
        for name, row in zip(names, values, strict=True)
    ]
    return Figure(name, title, title, canvas, rows)


def _add_values(axes: "Axes", values: np.ndarray, text: str, most: float) -> None:
    """Write the values that are not nearly 0 into their cells."""
    size = 8.0 if len(values) > 8 else 9.0
    for (row, column), value in np.ndenumerate(values):
        if value >= most / 200 or row == column:
            colour = "#fefefe" if value > most * _FROM_WHITE else INK
            middle = column + 0.5, row + 0.5
            axes.text(
                *middle, text.format(value), ha="center", va="center", color=colour, fontsize=size
            )


def _unique(names: list[str]) -> list[str]:
    """Return column names of a table: those that occur twice get a number."""
    return [f"{name} ({at})" if names.count(name) > 1 else name for at, name in enumerate(names)]
