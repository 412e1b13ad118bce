"""How figures look: colours that colour-blind people tell apart, sizes, SVG, PDF and CSV."""

import csv
import html
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mealv2.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

# Okabe and Ito 2008, without its yellow, which a white page hides; weak ones last
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#e69f00", "#56b4e9")
DASHES = ("-", "--", "-.", ":")  # the second round of the colours, the third, …
INK, MUTED, GRID = "#1b1f23", "#5a636d", "#d4d9de"
# of each colour: the CSS variable in a page, and its value on a dark background
_VARIABLES = {
    "#0072b2": ("--series-0", "#56b4e9"),
    "#d55e00": ("--series-1", "#f0792a"),
    "#009e73": ("--series-2", "#1fbf92"),
    "#cc79a7": ("--series-3", "#dd92bb"),
    "#000000": ("--series-4", "#f2f2f2"),
    "#e69f00": ("--series-5", "#e6b13c"),
    "#56b4e9": ("--series-6", "#3487c4"),
    INK: ("--ink", "#e8eaed"),
    MUTED: ("--muted", "#a6afb8"),
    GRID: ("--grid", "#3a4148"),
}
SMALL, WIDE = (4.6, 3.0), (9.4, 3.6)  # inches; a small one is readable on a phone
MAX_NAME = 40  # characters of a name in a figure
_RC: dict[Any, Any] = {
    "font.size": 10.0,
    "axes.titlesize": 10.0,
    "axes.labelsize": 10.0,
    "legend.fontsize": 9.0,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.8,
    "text.parse_math": False,  # names with a dollar sign are names
    "axes.formatter.useoffset": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "mealv2",
    "pdf.fonttype": 42,
}
_COLOUR = re.compile("|".join(_VARIABLES), re.IGNORECASE)
# what would act on the whole page, or is the page's to say
_NOT_INLINE = re.compile(
    r"<metadata>.*?</metadata>|<style type=.*?</style>| font-family: [^;\"]*;", re.DOTALL
)
_ID = re.compile(r'((?:\s|^)id="|xlink:href="#|url\(#)')


@dataclass
class Figure:
    """A matplotlib figure with what a page or a paper needs beside it.

    ``name`` is the stem of its files, ``title`` one line above it, ``alt`` what it shows in words,
    ``data`` the plotted numbers as rows for a CSV file.
    """

    name: str
    title: str
    alt: str
    figure: "Canvas"
    data: list[dict[str, Any]] = field(default_factory=list)

    def svg(self) -> str:
        """Return the figure as an SVG file, in the colours of a light page."""
        return _written(self.figure, "svg", is_tight=True).decode()

    def pdf(self) -> bytes:
        """Return the figure as a PDF file."""
        return _written(self.figure, "pdf", is_tight=True)

    def csv(self) -> str:
        """Return the plotted numbers as CSV."""
        text = io.StringIO()
        names = list(dict.fromkeys(name for row in self.data for name in row))
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.data)
        return text.getvalue()

    def inline_svg(self) -> str:
        """Return an SVG element for a page whose style sheet has ``css_variables()``.

        Its ids are unique among figures of different names.
        """
        svg = _written(self.figure, "svg", is_tight=False).decode()
        svg = svg[svg.index("<svg") :]
        svg = _NOT_INLINE.sub("", svg)
        svg = _ID.sub(rf"\g<1>{re.sub('[^A-Za-z0-9_-]', '-', self.name)}-", svg)
        svg = _COLOUR.sub(lambda found: f"var({_VARIABLES[found[0].lower()][0]})", svg)
        label = html.escape(self.alt, quote=True)
        return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).strip()

    def _repr_html_(self) -> str:
        """Show the figure in a notebook."""
        light = "; ".join(f"{name}: {colour}" for colour, (name, _) in _VARIABLES.items())
        return f'<div style="{light}; background: #fff; max-width: 45em">{self.inline_svg()}</div>'


def css_variables(*, dark: bool = False) -> str:
    """Return the declarations of the colours that ``inline_svg`` uses."""
    colours = {name: other if dark else own for own, (name, other) in _VARIABLES.items()}
    return " ".join(f"{name}: {colour};" for name, colour in colours.items())


def new_figure(
    *, size: tuple[float, float] = SMALL, rows: int = 1, columns: int = 1
) -> "tuple[Canvas, list[Axes]]":
    """Return an empty figure with its axes, row by row; draw in a ``with drawing():`` block.

    Raises ConfigError without matplotlib.
    """
    require_matplotlib()
    from matplotlib.figure import Figure as Canvas

    with drawing():
        canvas = Canvas(figsize=size, layout="constrained")
        canvas.patch.set_visible(False)  # the page shows through
        grid = canvas.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.patch.set_visible(False)
    return canvas, list(grid.flat)


@contextmanager
def drawing() -> Iterator[None]:
    """Use the look of this module, and no warnings of letters that the font lacks."""
    from matplotlib import rc_context

    with rc_context(_RC), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        yield


def require_matplotlib() -> None:
    """Raise ConfigError if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("figures need matplotlib: pip install 'mealv2[report]'") from None


def series_style(number: int) -> dict[str, Any]:
    """Return colour and dashes of the line with this number, as arguments of ``Axes.plot``."""
    dashes = DASHES[number // len(SERIES) % len(DASHES)]
    return {"color": SERIES[number % len(SERIES)], "linestyle": dashes}


def short_name(name: str, *, most: int = MAX_NAME) -> str:
    """Return a name for a figure: one line, its middle left out if it is long."""
    name = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[:half]}…{name[-half:]}"


def add_names(figure: "Canvas", lines: Sequence[Any], names: Sequence[str]) -> None:
    """Name the lines below a figure, outside of its area: files show it, a page does not."""
    columns = 1 if max(map(len, names), default=0) > MAX_NAME // 2 else 2
    with drawing():
        figure.legend(
            list(lines),
            # matplotlib leaves out names that begin with an underscore
            [f"\u200b{name}" if name.startswith("_") else name for name in names],
            loc="upper center",
            bbox_to_anchor=(0.5, 0.0),
            ncols=columns,
            frameon=False,
        ).set_in_layout(False)


def _written(figure: "Canvas", kind: str, *, is_tight: bool) -> bytes:
    """Return a figure as a file; a tight one includes what is outside of its area."""
    data = io.BytesIO()
    date = {"Date": None} if kind == "svg" else {"CreationDate": None}
    with drawing():
        for box in figure.legends:
            box.set_visible(is_tight)
            box.set_in_layout(is_tight)
        figure.savefig(data, format=kind, metadata=date, bbox_inches="tight" if is_tight else None)
    return data.getvalue()
