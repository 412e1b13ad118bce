"""Messages and progress of long calls: the library prints nothing, a program may show them."""

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
_logger = logging.getLogger("mealv2")


class Progress(Protocol):
    """Yields items while it shows how far a loop is."""

    def __call__(
        self, items: Iterable[T], *, total: int, what: str, unit: str, size: Any = None
    ) -> Iterator[T]: ...


def _silent(
    items: Iterable[T], *, total: int, what: str, unit: str, size: Any = None
) -> Iterator[T]:
    yield from items


_info: Callable[[str], None] = _logger.info
_progress: Progress = _silent


def show_with(info: Callable[[str], None], progress: Progress) -> None:
    """Show messages and progress with these functions, in this process.

    Without them messages go to the logger ``mealv2``, and progress is not shown.
    """
    global _info, _progress
    _info, _progress = info, progress


def info(text: str) -> None:
    """Pass a message on."""
    _info(text)


def progress(
    items: Iterable[T], *, total: int, what: str, unit: str, size: Any = None
) -> Iterator[T]:
    """Yield ``items``; ``size(item)`` is the units of an item, 1 by default, ``total`` of all."""
    return _progress(items, total=total, what=what, unit=unit, size=size)
