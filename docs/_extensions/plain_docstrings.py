"""Sphinx extension: reads docstrings as plain text with code marks.

Docstrings are written for readers of the source. reStructuredText reads an indented formula as a
quotation and `x*` as the start of an emphasis; this extension makes the first a literal block and
escapes the second.
"""

import re
from typing import Any

_CODE = re.compile(r"(``.+?``|`[^`]+`)")
_MARKUP = re.compile(r"([*|]|(?<=\w)_(?=\W|$))")
_LIST = re.compile(r"[-*+] |\d+\. ")


def plain(lines: list[str]) -> list[str]:
    """Return the lines of a docstring as reStructuredText that shows the same text."""
    found: list[str] = []
    in_literal = in_table = in_list = False
    for line in lines:
        if in_table or re.fullmatch(r"=+( +=+)+", line.strip()):
            in_table = bool(line.strip())
            found.append(line)
            continue
        indented = line.startswith(" ")
        if line.strip() and not indented:
            in_literal, in_list = False, bool(_LIST.match(line))
        if indented and not in_literal and not in_list and line.strip():
            in_literal = True
            found += [*([] if found and not found[-1].strip() else [""]), "::", ""]
        found.append(line if in_literal else _escaped(line))
    return found


def _escaped(line: str) -> str:
    mark = _LIST.match(line.lstrip())
    start = len(line) - len(line.lstrip()) + (mark.end() if mark else 0)
    parts = _CODE.split(line[start:])
    parts[::2] = [_MARKUP.sub(r"\\\1", text) for text in parts[::2]]
    return line[:start] + "".join(parts)


def _process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = plain(lines)


def setup(app: Any) -> dict[str, Any]:
    """Connect to autodoc."""
    app.connect("autodoc-process-docstring", _process)
    return {"parallel_read_safe": True}
