"""Sphinx extension: a page for each command of `mealv2`, generated from click.

It writes the pages to reference/cli/ before Sphinx reads its sources; sphinx-click fills them. The
directive of sphinx-click imports a command as an attribute of this module, by `__getattr__`.
"""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from cli import cli

_FOLDER = Path("reference") / "cli"
_OPTION = ".. option:: "


def commands(group: click.Group = cli, above: str = "mealv2") -> Iterator[tuple[str, Any]]:
    """Yield each command below a group as (command line, command)."""
    for name, command in group.commands.items():
        if command.hidden:
            continue
        typed = f"{above} {name}"
        yield typed, command
        if isinstance(command, click.Group):
            yield from commands(command, typed)


def page_name(typed: str) -> str:
    """Return the file name of a command's page, without suffix."""
    return typed.partition(" ")[2].replace(" ", "-")


def __getattr__(name: str) -> Any:
    for typed, command in commands():
        if page_name(typed).replace("-", "_") == name:
            return command
    raise AttributeError(name)


def write_pages(app: Any) -> None:
    """Write the pages, and an index with the first sentence of each command."""
    folder = Path(app.srcdir) / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    known = dict(commands())
    pages = {page_name(typed): _page(typed, command) for typed, command in known.items()}
    for name, text in {**pages, "index": _index(known)}.items():
        path = folder / f"{name}.rst"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def _page(typed: str, command: click.Command) -> str:
    name = page_name(typed).replace("-", "_")
    nested = "short" if isinstance(command, click.Group) else "none"
    lines = [f".. click:: command_pages:{name}", f"   :prog: {typed}", f"   :nested: {nested}", ""]
    return "\n".join(lines)


def _index(known: dict[str, Any]) -> str:
    title = "Commands"
    lines = [title, "=" * len(title), "", "``mealv2 COMMAND --help`` prints the same.", ""]
    for typed, command in known.items():
        about = " ".join(itertools.takewhile(bool, (command.help or "").splitlines()))
        lines += [f":doc:`{typed} <{page_name(typed)}>`", f"   {about}", ""]
    lines += [".. toctree::", "   :hidden:", ""]
    return "\n".join([*lines, *(f"   {page_name(typed)}" for typed in known), ""])


def group_options(app: Any, context: click.Context, lines: list[str]) -> None:
    """Group the options of a command under the headings of its --help, if it has any.

    Hidden old names are removed. Defaults lose Python's quotes, because they are explanations or
    text to type.
    """
    lines[:] = [re.sub(r"^( +:default: ``)(['\"])(.*)\2``$", r"\1\3``", line) for line in lines]
    options = [
        option
        for option in context.command.params
        if isinstance(option, click.Option) and not option.hidden
    ]
    starts = [i for i, line in enumerate(lines) if line.startswith(_OPTION)]
    if not options or len(starts) != len(options):
        return
    other = "Other" if any(hasattr(option, "group") for option in options) else ""
    grouped: dict[str, list[str]] = {}
    for option, start, end in zip(options, starts, [*starts[1:], len(lines)], strict=True):
        text = [_shown_names(lines[start], option, context), *lines[start + 1 : end]]
        grouped.setdefault(getattr(option, "group", other), []).extend(text)
    help_text = context.command.get_help(context)
    lines.clear()
    for name in sorted(grouped, key=lambda name: help_text.find(f"\n{name}:")):
        lines += [*([f".. rubric:: {name}", ""] if name else []), *grouped[name]]


def _shown_names(line: str, option: click.Option, context: click.Context) -> str:
    record = option.get_help_record(context)
    shown = re.findall(r"--?\w[-\w]*", record[0] if record else line)
    names, _, metavar = line.removeprefix(_OPTION).partition(" <")
    kept = [name for name in names.split(", ") if name in shown] or [names]
    return _OPTION + ", ".join(kept) + (f" <{metavar}" if metavar else "")


def setup(app: Any) -> dict[str, Any]:
    """Connect to the start of a build and to sphinx-click."""
    app.connect("builder-inited", write_pages)
    app.connect("sphinx-click-process-options", group_options)
    return {"parallel_read_safe": True}
