"""Names of cached copies in messages: the URL that the user gave, not the path of the copy.

It imports nothing slow, because the command line needs it.
"""

import re
from pathlib import Path

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
