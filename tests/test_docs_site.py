"""The site's own extensions: docstrings as plain text, a page for each command."""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import click
import pytest

import cli

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import an extension of docs/conf.py by name."""
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "_extensions"))
    return importlib.import_module


def test_a_docstring_reads_as_it_is_written(extension: Callable[[str], ModuleType]) -> None:
    plain = extension("plain_docstrings").plain
    assert plain(["Return x.", "", "    y = 2 * x", "", "A 3 * 4 grid, ``a*b`` and loss_."]) == [
        "Return x.",
        "",
        "::",
        "",
        "    y = 2 * x",
        "",
        "A 3 \\* 4 grid, ``a*b`` and loss\\_.",
    ]
    assert plain(["Either:", "", "- one thing", "  on two lines"])[2:] == [
        "- one thing",
        "  on two lines",
    ]


def test_every_command_has_a_page(extension: Callable[[str], ModuleType], tmp_path: Path) -> None:
    pages = extension("command_pages")
    pages.write_pages(SimpleNamespace(srcdir=tmp_path))
    written = {path.stem for path in (tmp_path / "reference" / "cli").glob("*.rst")}
    groups = {n: c for n, c in cli.cli.commands.items() if isinstance(c, click.Group)}
    below = {f"{name}-{sub}" for name, group in groups.items() for sub in group.commands}
    assert written == {"index", *cli.cli.commands, *below}
    assert pages.distill is cli.cli.commands["distill"]
    assert pages.labels_add_views is groups["labels"].commands["add-views"]


def test_options_are_grouped_under_the_headings_of_their_help(
    extension: Callable[[str], ModuleType],
) -> None:
    class Renamed(click.Option):
        def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
            return "--labels PATH", ""

    class Grouped(click.Command):
        def get_help(self, ctx: click.Context) -> str:
            return "Usage\n\nLabels:\n\nOptimisation:\n"

    options = [click.Option(["--lr"]), Renamed(["--labels", "--set"]), click.Option(["--momentum"])]
    for option, group in zip(options, ("Optimisation", "Labels", "Optimisation"), strict=True):
        option.group = group  # type: ignore[attr-defined]
    names = ["--lr <lr>", "--labels, --set <labels>", "--momentum <momentum>"]
    lines = [line for name in names for line in (f".. option:: {name}", "", "   :default: ``'a'``")]
    extension("command_pages").group_options(
        None, click.Context(Grouped("distill", params=options)), lines
    )
    assert [line for line in lines if line.startswith("..")] == [
        ".. rubric:: Labels",
        ".. option:: --labels <labels>",
        ".. rubric:: Optimisation",
        ".. option:: --lr <lr>",
        ".. option:: --momentum <momentum>",
    ]
    assert "   :default: ``a``" in lines


def test_a_command_without_options_keeps_its_lines(extension: Callable[[str], ModuleType]) -> None:
    lines = [""]
    context = click.Context(click.Command("labels"))
    extension("command_pages").group_options(None, context, lines)
    assert lines == [""]
