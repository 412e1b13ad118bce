"""Threads that work ahead of whoever writes, a few items at a time."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from mealv2.data.source import ImageSource
from mealv2.errors import DataError

T = TypeVar("T")
R = TypeVar("R")


def read_image(source: ImageSource, position: int) -> bytes:
    """Return an encoded image; raises DataError where it cannot be read or is not as it was."""
    where = Path(source.name) / source.keys[position]
    try:
        return source.read(position)
    except OSError as error:
        raise DataError(f"cannot read {where}: {error.strerror}; replace it or remove it") from None


def in_threads(work: Callable[[T], R], items: Iterable[T], *, workers: int) -> Iterator[R]:
    """Yield what ``work`` makes of each item, in order; a few are always under way.

    What is under way is finished when an item raises or the reader stops, nothing else is begun.
    """
    pool = ThreadPoolExecutor(workers)
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
