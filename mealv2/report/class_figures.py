"""Figures of classes: accuracy before and after, gain against similarity, t-SNE of features."""

from typing import Any

import numpy as np

from mealv2.errors import ConfigError
from mealv2.report.style import (
    MUTED,
    SERIES,
    SMALL,
    Figure,
    add_names,
    drawing,
    new_figure,
    series_style,
    short_name,
)

MAX_SHOWN = 24  # classes with their names in one figure
MARKERS = "osD^"  # of classes in a t-SNE, in the order of their colours
_MIN_POINTS = 5  # of a t-SNE


def change_figure(rows: list[dict[str, Any]], *, before: str, after: str) -> Figure | None:
    """Return accuracy before and after of the classes with the biggest gains and losses.

    ``rows`` are those of ``class_changes``; None without one.
    """
    if not rows:
        return None
    shown = rows
    title = f"Accuracy by class: {before} and {after}"
    if len(rows) > MAX_SHOWN:
        shown = [*rows[: MAX_SHOWN // 2], *rows[-MAX_SHOWN // 2 :]]
        title += f", the {MAX_SHOWN // 2} biggest gains and losses"
    at = np.arange(len(shown))[::-1]
    canvas, (axes,) = new_figure(size=(SMALL[0], 1.1 + 0.27 * len(shown)))
    first, last = ([row[which] for row in shown] for which in ("before", "after"))
    with drawing():
        axes.hlines(at, first, last, color=MUTED, linewidth=1.5)
        points = [
            axes.plot(first, at, "o", color=SERIES[0], markerfacecolor="none")[0],
            axes.plot(last, at, "D", color=SERIES[1])[0],
        ]
        axes.set_yticks(at, [short_name(row["class"], most=22) for row in shown])
        axes.set_xlabel("top-1, %   circle: before, diamond: after")
        axes.set_ylim(-0.8, len(shown) - 0.2)
    add_names(canvas, points, [before, after])
    best, worst = rows[0], rows[-1]
    alt = (
        f"{title}. Of {len(rows)} classes {sum(row['gain'] > 0 for row in rows)} gain and "
        f"{sum(row['gain'] < 0 for row in rows)} lose. Biggest gain: {short_name(best['class'])}, "
        f"{best['before']:.1f} to {best['after']:.1f} %; last: {short_name(worst['class'])}, "
        f"{worst['before']:.1f} to {worst['after']:.1f} %."
    )
    return Figure("class-changes", title, alt, canvas, rows)


def similarity_figure(rows: list[dict[str, Any]], similarity_CC: np.ndarray) -> Figure | None:
    """Return the gain of each class against its similarity to the most similar other class."""
    if len(rows) < 3:
        return None
    nearest = np.array([float(similarity_CC[row["class_id"]].max()) for row in rows])
    gains = np.array([row["gain"] for row in rows])
    title = "Gain of a class and its similarity to another class"
    canvas, (axes,) = new_figure(size=SMALL)
    with drawing():
        axes.axhline(0, color=MUTED, linewidth=1)
        axes.scatter(nearest, gains, s=14, color=SERIES[0])
        axes.set_xlabel("mean mass on the most similar class")
        axes.set_ylabel("gain, points")
    correlation = "not defined"
    if nearest.std() > 0 and gains.std() > 0:
        correlation = f"{np.corrcoef(nearest, gains)[0, 1]:.2f}"
    alt = f"Scatter plot of {len(rows)} classes: {title}. Their correlation is {correlation}."
    data = [
        {"class": row["class"], "similarity": float(x), "gain": row["gain"]}
        for row, x in zip(rows, nearest, strict=True)
    ]
    return Figure("class-similarity", title, alt, canvas, data)


def tsne_figures(
    features: dict[str, np.ndarray], hard_N: np.ndarray, names: dict[int, str], *, seed: int = 0
) -> list[Figure]:
    """Return a t-SNE map of the features of each model, on the same N images of some classes.

    ``features`` are N x D by the name of the model (paper figure 2, part 2). No map for fewer than
    five images. Raises ConfigError without scikit-learn.
    """
    if len(hard_N) < _MIN_POINTS:
        return []
    return [
        _tsne_figure(f"class-tsne-{number}", model, tsne(values, seed=seed), hard_N, names)
        for number, (model, values) in enumerate(features.items(), start=1)
    ]


def _tsne_figure(
    name: str, model: str, map_N2: np.ndarray, hard_N: np.ndarray, names: dict[int, str]
) -> Figure:
    title = f"t-SNE of features: {short_name(model)}"
    canvas, (axes,) = new_figure(size=SMALL)
    points = []
    data: list[dict[str, Any]] = []
    with drawing():
        for number, (class_id, class_name) in enumerate(names.items()):
            inside_M2 = map_N2[hard_N == class_id]
            marker, colour = MARKERS[number % len(MARKERS)], series_style(number)["color"]
            points.append(
                axes.scatter(inside_M2[:, 0], inside_M2[:, 1], s=18, marker=marker, color=colour)
            )
            data += [{"class": class_name, "x": float(x), "y": float(y)} for x, y in inside_M2]
        axes.set_xticks([])
        axes.set_yticks([])
    add_names(canvas, points, [short_name(class_name) for class_name in names.values()])
    listed = ", ".join(short_name(class_name) for class_name in names.values())
    alt = f"{title}. One point for each of {len(hard_N)} images of {len(names)} classes: {listed}."
    return Figure(name, title, alt, canvas, data)


def tsne(features_ND: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Return a t-SNE map of N features, N x 2; raises ConfigError without scikit-learn."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise ConfigError("t-SNE needs scikit-learn: pip install 'mealv2[report]'") from None
    perplexity = min(30.0, (len(features_ND) - 1) / 3)
    map_N2: np.ndarray = TSNE(
        perplexity=perplexity, init="random", random_state=seed
    ).fit_transform(features_ND.astype(np.float64))
    return map_N2
