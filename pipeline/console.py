"""Output for the user: messages, progress bars, tables, units."""

import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
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
_NOTE_EVERY_S = 1.0
_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{rate_fmt}{postfix}]"  # with a note instead of the times

# tqdm's own lock is shared with forked processes, and one that is killed while it writes would
# block the others for ever; here only one process writes
tqdm.set_lock(threading.RLock())


def info(text: str) -> None:
    """Print a message to stderr, above a progress bar if there is one; rank 0 only."""
    if is_main_process():
        tqdm.write(printable(use_display_names(text)), file=sys.stderr)


def result(text: str) -> None:
    """Print a result to stdout, above a progress bar if there is one; rank 0 only."""
    if is_main_process():
        tqdm.write(printable(use_display_names(text)), file=sys.stdout)


class ProgressBar:
    """Shows the progress of a loop: a bar with rate and ETA on a terminal, else a line every 10 s.

    A context manager; ``total`` is in units. ``note`` returns text to show at the end instead of
    the ETA of this loop; it is called at most once a second. Only rank 0 shows anything.
    """

    def __init__(
        self, total: int, *, what: str, unit: str, note: Callable[[], str] | None = None
    ) -> None:
        self._total = total
        self._what = what
        self._unit = unit
        self._note = note
        self._done = 0
        self._bar: tqdm | None = None
        self._start_s = self._last_s = time.monotonic()
        self._note_s = -math.inf
        self._is_shown = is_main_process()
        if self._is_shown and on_terminal():
            self._bar = tqdm(
                total=total,
                desc=printable(what, is_line=True),
                unit=f" {unit}",
                file=sys.stderr,
                leave=False,
                bar_format=_BAR if note else None,
            )

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    @property
    def rate(self) -> float:
        """Units a second so far."""
        return self._done / max(time.monotonic() - self._start_s, 1e-9)

    def update(self, units: int) -> None:
        """Count ``units`` more."""
        self._done += units
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(units)
            if self._note is not None and now - self._note_s >= _NOTE_EVERY_S:
                self._note_s = now
                self._bar.set_postfix_str(self._note())
        elif self._is_shown and now - self._last_s >= _LINE_EVERY_S and self._done < self._total:
            self._last_s = now
            seconds_left = (self._total - self._done) / self.rate
            end = self._note() if self._note else f"{duration(seconds_left)} left"
            info(f"{self._what}: {self._done}/{self._total} {self._unit}, {self.rate:.0f}/s, {end}")


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


def clock(seconds: float) -> str:
    """Return an estimate of seconds as [H:]MM:SS, as tqdm shows it."""
    return str(tqdm.format_interval(seconds))


messages.show_with(info, progress)
