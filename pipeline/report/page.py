"""Render the sections as one page, and write the figures and assets beside it."""

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mealv2.errors import ConfigError
from mealv2.report.style import Figure, css_variables
from pipeline.report.sections import Section

if TYPE_CHECKING:
    from jinja2 import Environment

PAGE_NAME = "index.html"
FIGURE_FOLDER, ASSET_FOLDER = "figures", "assets"
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class ShownFigure:
    """A figure as the templates see it: ``svg`` is markup, ``files`` are paths by format.

    ``aspect`` is its shape for a style sheet: a figure that is not in sight is not laid out.
    """

    name: str
    title: str
    svg: Any
    aspect: str
    files: dict[str, str]


def write_page(output: Path, sections: Sequence[Section], **about: Any) -> None:
    """Write the page and all that it loads into a folder; ``about`` goes to ``page.html``.

    Raises ConfigError without Jinja2, OSError.
    """
    environment = load_environment()
    shutil.copytree(_HERE / "assets", output / ASSET_FOLDER)
    with (output / ASSET_FOLDER / "report.css").open("a", encoding="utf-8") as file:
        file.write(
            f"\n:root {{ {css_variables()} }}\n"
            f"@media (prefers-color-scheme: dark) {{ :root {{ {css_variables(dark=True)} }} }}\n"
        )
    (output / FIGURE_FOLDER).mkdir()
    bodies = [(section, _body(environment, output, section)) for section in sections]
    scripts = dict.fromkeys(script for section in sections for script in section.scripts)
    page = environment.get_template("page.html")
    # of others first: the page's own come later and win
    found = sorted((output / ASSET_FOLDER).rglob("*.css"), key=lambda path: -len(path.parts))
    styles = [path.relative_to(output).as_posix() for path in found]
    text = page.render(bodies=bodies, scripts=list(scripts), styles=styles, **about)
    (output / PAGE_NAME).write_text(text, encoding="utf-8", errors="backslashreplace")


def _body(environment: "Environment", output: Path, section: Section) -> Any:
    """Return a section as markup, after its figures were written."""
    from markupsafe import Markup

    figures = {f"{figure.name}": _shown(output, figure) for figure in section.figures}
    if section.template is None:
        return Markup()
    template = environment.get_template(section.template)
    text = template.render(
        {"missing": section.missing, **section.context, "figures": figures, "section": section}
    )
    return Markup(text)  # rendered with autoescape


def _shown(output: Path, figure: Figure) -> ShownFigure:
    """Write a figure as SVG, PDF and CSV; return what the page shows."""
    from markupsafe import Markup

    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", figure.name):
        raise ValueError(f"a figure's name is the name of its files: {figure.name!r}")
    files = {
        kind: f"{FIGURE_FOLDER}/{figure.name}.{kind.lower()}" for kind in ("SVG", "PDF", "CSV")
    }
    (output / files["SVG"]).write_text(figure.svg(), encoding="utf-8", errors="replace")
    (output / files["PDF"]).write_bytes(figure.pdf())
    (output / files["CSV"]).write_text(figure.csv(), encoding="utf-8", errors="replace")
    svg = Markup(figure.inline_svg())  # matplotlib escapes text
    width, height = figure.figure.get_size_inches()
    return ShownFigure(figure.name, figure.title, svg, f"{width:g} / {height:g}", files)


def load_environment() -> "Environment":
    """Return what renders the templates; raises ConfigError without Jinja2."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError:
        raise ConfigError("the report needs Jinja2: pip install 'mealv2[report]'") from None
    return Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
