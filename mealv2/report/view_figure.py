"""A drawing of one image: the boxes of its views, and each view with its soft label."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mealv2.report.style import MUTED, SERIES, drawing, new_figure, series_style, short_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

_COLUMNS = 3
_COLUMN, _ROW = 4.6, 2.0  # inches


def view_figure(
    record: dict[str, Any],
    classes: Sequence[str],
    pixels_HWC: np.ndarray,
    crops: Sequence[np.ndarray],
) -> "Canvas":
    """Return a matplotlib figure of a record of ``mealv2.report.browser.image_records``.

    ``pixels_HWC`` is the decoded image, ``crops`` the pixels of its views as the teachers saw them.
    Raises ConfigError without matplotlib.
    """
    number = 1 + len(record["views"])
    rows = -(-number // _COLUMNS)
    canvas, grid = new_figure(
        size=(_COLUMN * _COLUMNS, _ROW * rows), rows=rows, columns=2 * _COLUMNS
    )
    canvas.patch.set_visible(True)
    pairs = list(zip(grid[::2], grid[1::2], strict=True))
    hard = record["hard"]
    with drawing():
        for axes in grid:
            axes.set_axis_off()
        image_axes, mean_axes = pairs[0]
        image_axes.set_title(short_name(record["key"]))
        image_axes.imshow(pixels_HWC)
        for at, view in enumerate(record["views"]):
            _add_box(image_axes, view, at)
        _add_bars(mean_axes, "mean of the views", record["mean"], classes, hard)
        for at, (view, crop) in enumerate(zip(record["views"], crops, strict=True)):
            axes, bar_axes = pairs[at + 1]
            axes.imshow(crop)
            axes.set_title(f"view {view['view']}", color=series_style(at)["color"])
            title = "contradicts the hard label" if view["contradicts"] else ""
            _add_bars(bar_axes, title, view["top"], classes, hard)
    return canvas


def figure_bytes(canvas: "Canvas", kind: str) -> bytes:
    """Return a figure as a file: png, svg or pdf."""
    data = io.BytesIO()
    with drawing():
        canvas.savefig(data, format=kind, dpi=120)
    return data.getvalue()


def _add_box(axes: "Axes", view: dict[str, Any], at: int) -> None:
    """Draw the box of a view, with its number."""
    if view["box"] is None:
        return
    top, left, height, width = view["box"]
    style = series_style(at)
    right, low = left + width - 0.5, top + height - 0.5
    x, y = left - 0.5, top - 0.5
    axes.plot([x, right, right, x, x], [y, y, low, low, y], linewidth=1.5, **style)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.7}
    axes.text(x, y, str(view["view"]), color=style["color"], va="top", fontsize=8, bbox=box)


def _add_bars(
    axes: "Axes",
    title: str,
    top: Sequence[tuple[int, float]],
    classes: Sequence[str],
    hard: int | None,
) -> None:
    """Draw classes and their probabilities as bars, the hard label in another colour."""
    axes.set_title(title, color=MUTED)
    at = np.arange(len(top))
    colours = [SERIES[2] if class_id == hard else SERIES[0] for class_id, _ in top]
    axes.barh(at, [prob for _, prob in top], 0.3, color=colours)
    for row, (class_id, prob) in enumerate(top):
        mark = " = hard label" if class_id == hard else ""
        text = f"{100 * prob:.0f} % {short_name(classes[class_id], most=24)}{mark}"
        axes.text(0.0, row - 0.2, text, fontsize=8, va="bottom")
    axes.set_xlim(0, 1)
    axes.set_ylim(len(top) - 0.4, -0.9)
