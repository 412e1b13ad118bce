"""What messages call copies of remote files: what the user calls them, and not where they lie.

It imports nothing heavy, so that the command line can ask it.
"""

import re
from pathlib import Path

_copies: dict[str, str] = {}  # what the user calls it that a folder is a copy of


def name_copy(folder: Path, place: str) -> None:
    """Call a folder of copies, and the files in it, by the place that they are copies of."""
    _copies[str(folder)] = place


def told(text: str) -> str:
    """Return a message with copies called by what they are copies of."""
    for folder, place in _copies.items():
        copy = rf"{re.escape(folder)}(?![\w=@+-]|[.,][\w=@+-])"  # not the start of a longer name
        text = re.sub(copy, place.replace("\\", r"\\"), text)
    return text
