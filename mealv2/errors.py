"""The errors a user can act on, each with the exit code that the command line ends with."""

from typing import Any


class MealError(Exception):
    """Say in one line what is wrong, where, and what to do next."""

    exit_code = 1


class ConfigError(MealError):
    """A flag, a folder or a model that cannot be used as asked (exit 2)."""

    exit_code = 2


class DataError(MealError):
    """An image or a data set that cannot be read (exit 1)."""


class IncompleteError(MealError):
    """Work of which some is lacking, while the rest is done (exit 1); ``report`` says which."""

    def __init__(self, message: str, report: dict[str, Any]) -> None:
        super().__init__(message)
        self.report = report


class LabelSetError(MealError):
    """A label set that is damaged, incomplete, or made from something else (exit 3)."""

    exit_code = 3


class StoppedError(MealError):
    """Stopped by a signal after everything done so far was saved (exit 4)."""

    exit_code = 4
