"""What messages call copies of remote files: what the user calls them, and not where they lie.

It imports nothing heavy, so that the command line can ask it.
"""

import re
from pathlib import Path

_display_names: dict[str, str] = {}  # what the user calls it that a folder is a copy of


def set_display_name(folder: Path, display_name: str) -> None:
    """Call a folder of copies, and the files in it, by the place that they are copies of."""
    _display_names[str(folder)] = display_name


def use_display_names(text: str) -> str:
    """Return a message with copies called by what they are copies of."""
    for folder, display_name in _display_names.items():
        copy = rf"{re.escape(folder)}(?![\w=@+-]|[.,][\w=@+-])"  # not the start of a longer name
        text = re.sub(copy, display_name.replace("\\", r"\\"), text)
    return text
