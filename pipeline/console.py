"""Output for the user: messages, progress bars, tables, units."""

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

from mealv2 import messages
from mealv2.text import count as count  # public names of this module
from mealv2.text import first_names as first_names
from mealv2.text import printable, use_display_names
from mealv2.text import size_of as size_of
from mealv2.text import table as table
from pipeline.runtime.distributed import is_main_process
from pipeline.runtime.env import on_terminal

T = TypeVar("T")
_LINE_EVERY_S = 10.0

# tqdm's own lock is shared with forked processes, and one that is killed while it writes would
# block the others for ever; here only one process writes
tqdm.set_lock(threading.RLock())


def info(text: str) -> None:
    """Print a message to stderr, above a progress bar if there is one; rank 0 only."""
    if is_main_process():
        tqdm.write(printable(use_display_names(text)), file=sys.stderr)


class ProgressBar:
    """Shows the progress of a loop: a bar with rate and ETA on a terminal, else a line every 10 s.

    A context manager; ``total`` is in units. Only rank 0 shows it.
    """

    def __init__(self, total: int, *, what: str, unit: str) -> None:
        self._total = total
        self._what = what
        self._unit = unit
        self._done = 0
        self._bar: tqdm | None = None
        self._start_s = self._last_s = time.monotonic()
        self._is_shown = is_main_process()
        if self._is_shown and on_terminal():
            self._bar = tqdm(
                total=total,
                desc=printable(what, is_line=True),
                unit=f" {unit}",
                file=sys.stderr,
                leave=False,
            )

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, units: int) -> None:
        """Count ``units`` more."""
        self._done += units
        if self._bar is not None:
            self._bar.update(units)
            return
        now = time.monotonic()
        if self._is_shown and now - self._last_s >= _LINE_EVERY_S and self._done < self._total:
            self._last_s = now
            rate = self._done / (now - self._start_s)
            left = duration((self._total - self._done) / rate)
            info(
                f"{self._what}: {self._done}/{self._total} {self._unit}, {rate:.0f}/s, {left} left"
            )


def progress(
    items: Iterable[T], *, total: int, what: str, unit: str, size: Any = None
) -> Iterator[T]:
    """Yield ``items`` with a ProgressBar; ``size(item)`` is the units of an item, 1 by default."""
    with ProgressBar(total, what=what, unit=unit) as bar:
        for item in items:
            yield item
            bar.update(size(item) if size else 1)


def duration(seconds: float) -> str:
    """Return seconds as text: 48 s, 3 min 05 s, 2 h 10 min, 3 d 4 h."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


messages.show_with(info, progress)
