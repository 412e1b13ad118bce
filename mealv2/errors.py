"""Errors that a user can fix, each with the exit code of the command line."""

from typing import Any, Literal

# What to do with an image that cannot be read.
OnBadImage = Literal["fail", "skip"]

# of torch's allocators; CUDA's has a class of its own, a RuntimeError, whose text has the first
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "Storage size calculation overflowed")


class MealError(Exception):
    """State in one line what is wrong, where, and how to fix it."""

    exit_code = 1


class ConfigError(MealError):
    """An invalid flag, folder or model (exit 2)."""

    exit_code = 2


class DataError(MealError):
    """An image or a data set that cannot be read (exit 1)."""


class RemoteError(MealError):
    """A server or store that cannot be reached, or that returns an error (exit 1).

    Not a DataError: the image itself is intact, so ``--on-bad-image`` must not skip it.
    """


class IncompleteError(MealError):
    """A part of the work is missing, the rest is done (exit 1); ``report`` lists which part."""

    def __init__(self, message: str, report: dict[str, Any]) -> None:
        super().__init__(message)
        self.report = report


class LabelSetError(MealError):
    """A label set that is damaged, incomplete, or does not match (exit 3)."""

    exit_code = 3


class StoppedError(MealError):
    """A signal stopped the run after it saved all work (exit 4)."""

    exit_code = 4


class StopRequested(Exception):  # noqa: N818  # the user asked for it: not an error
    """A signal asked the run to save and stop."""


def out_of_memory(error: BaseException) -> str | None:
    """Return the message for an allocation that failed; None for another error."""
    text = str(error)
    if not isinstance(error, MemoryError) and not any(part in text for part in _OUT_OF_MEMORY):
        return None
    first = text.strip().split("\n")[0]
    return (
        f"out of memory{f' ({first[:200]})' if first else ''}; use a smaller --batch-size or "
        "--img-size, more --grad-accum-steps, fewer --workers, or --amp"
    )
