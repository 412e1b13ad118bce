"""Text in messages: names of cached copies, no control characters, counts, first names.

A message names the URL that the user gave, not the path of its copy. It imports nothing slow,
because the command line needs it.
"""

import re
from collections.abc import Iterable
from pathlib import Path

# What a terminal acts on, or that changes the order of text: C0 but tab and line feed, DEL, C1,
# line separators, marks and overrides of the direction; surrogates, which have no encoding.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_MAX_MESSAGE = 2000  # characters; a path of Linux can have 4096 bytes, but hardly one does
_display_names: dict[str, str] = {}  # by the folder of copies


def set_display_name(folder: Path, display_name: str) -> None:
    """Set the name of a folder of copies, and of the files in it."""
    _display_names[str(folder)] = display_name


def use_display_names(text: str) -> str:
    """Return a message with display names instead of the paths of copies."""
    for folder, display_name in _display_names.items():
        copy = rf"{re.escape(folder)}(?![\w=@+-]|[.,][\w=@+-])"  # not the start of a longer name
        text = re.sub(copy, display_name.replace("\\", r"\\"), text)
    return text


def printable(text: str, *, is_line: bool = False) -> str:
    """Return text with control characters as escapes such as ``\\x1b``.

    Tab and line feed stay, unless it is one line: a name, a cell of a table.
    """
    text = _CONTROL.sub(_escape, text)
    return text.replace("\n", "\\n").replace("\t", "\\t") if is_line else text


def shortened(text: str) -> str:
    """Return a message that can be read: of a very long one, such as a value, begin and end."""
    half = _MAX_MESSAGE // 2 - 1
    return text if len(text) <= _MAX_MESSAGE else f"{text[:half]} … {text[-half:]}"


def size_of(num_bytes: float) -> str:
    """Return a byte count as text, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:  # 999.5 rounds to 1000, which is 1 of the next unit
            return f"{num_bytes:.3g} {unit}" if unit != "B" else f"{num_bytes:.0f} B"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def count(number: int, unit: str) -> str:
    """Return a number with its unit: 1 shard, 2 shards, 2 shards of labels."""
    first, space, rest = unit.partition(" of ")
    return f"{number} {first}{'' if number == 1 else 's'}{space}{rest}"


def first_names(names: Iterable[str]) -> str:
    """Return the first names, with an ellipsis for the rest."""
    names = [printable(name, is_line=True) for name in names]
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def table(rows: list[list[str]]) -> str:
    """Return rows in aligned columns: the first row is the head, the first column text."""
    rows = [[printable(cell, is_line=True) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]])


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
