"""Functions of the user's own code by name, ``package.module:function``: models and data sets."""

import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from mealv2.errors import ConfigError

_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def is_function_name(name: str) -> bool:
    """Return whether a name is that of a function, ``package.module:function``."""
    return _FUNCTION.fullmatch(name) is not None


def import_function(name: str, what: str) -> Callable[..., Any]:
    """Import a function by its name; ``what`` begins the message of a ConfigError."""
    module_name, _, function_name = name.partition(":")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(f"{what} cannot be imported: {error}") from error
        raise ConfigError(
            f"{what}: no module {error.name} in {sys.path[0]} or the environment; the form is "
            "PACKAGE.MODULE:FUNCTION"
        ) from None
    except Exception as error:  # of the user's code: every kind
        raise ConfigError(f"{what} cannot be imported: {reason_of(error)}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(f"{what}: {module_name} has no function {function_name}")
    return function  # type: ignore[no-any-return]  # callable


@contextmanager
def folder_first(folder: Path) -> Iterator[None]:
    """Look up modules in a folder first while the block runs, and after all others from then on.

    Own code may import its neighbours later: when an item is read, or in a forward pass.
    """
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def reason_of(error: Exception) -> str:
    """Return an error of another library in one line."""
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    if lines:
        return lines[0]
    frames = traceback.extract_tb(error.__traceback__)  # an assertion without a message
    return f"{type(error).__name__} at {frames[-1].line}" if frames else type(error).__name__
