"""Text in messages: without control characters, and the first of many names."""

import re
from collections.abc import Iterable

# What a terminal acts on, or that changes the order of text: C0 but tab and line feed, DEL, C1,
# line separators, marks and overrides of the direction; surrogates, which have no encoding.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str, *, is_line: bool = False) -> str:
    """Return text with control characters as escapes such as ``\\x1b``.

    Tab and line feed stay, unless it is one line: a name, a cell of a table.
    """
    text = _CONTROL.sub(_escape, text)
    return text.replace("\n", "\\n").replace("\t", "\\t") if is_line else text


def first_names(names: Iterable[str]) -> str:
    """Return the first names, with an ellipsis for the rest."""
    names = [printable(name, is_line=True) for name in names]
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
