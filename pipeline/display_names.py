"""Text as a terminal may show it: names of cached copies, and no control characters.

A message names the URL that the user gave, not the path of its copy. It imports
nothing slow, because the command line needs it.
"""

import re
from pathlib import Path

from mealv2.text import printable as printable  # a public name of this module

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


def shortened(text: str) -> str:
    """Return a message that can be read: of a very long one, such as a value, begin and end."""
    half = _MAX_MESSAGE // 2 - 1
    return text if len(text) <= _MAX_MESSAGE else f"{text[:half]} … {text[-half:]}"
