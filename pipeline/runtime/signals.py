"""Stop a run at the next safe point after Ctrl-C, SIGTERM or SIGHUP."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from mealv2.errors import StopRequested as StopRequested  # a public name of this module

_AGAIN_S = 0.01


@contextmanager
def interrupts_kept() -> Iterator[None]:
    """Raise a KeyboardInterrupt again that Python lost while the block runs.

    Ctrl-C during a weakref's callback or ``__del__``, which also run while modules are imported,
    would be a traceback on stderr, and the command would go on.
    """
    before = sys.unraisablehook

    def raise_again(lost: Any) -> None:
        if lost.exc_type is not KeyboardInterrupt:
            before(lost)
            return
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)  # after the callback

    sys.unraisablehook = raise_again
    try:
        yield
    finally:
        sys.unraisablehook = before


class StopFlag:
    """Set by the first signal; the run saves and stops at the next ``check``."""

    def __init__(self, *, is_alone: bool = True) -> None:
        self.signal_name: str | None = None
        self._is_alone = is_alone

    def check(self) -> None:
        """Raise StopRequested if a signal arrived."""
        if self.signal_name is not None:
            raise StopRequested(self.signal_name)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._is_alone:
            # srun signals every process, and torchrun then signals its ranks again
            self.signal_name = self.signal_name or signal.Signals(number).name
            return
        if self.signal_name is not None:
            os._exit(128 + number)  # the second signal quits at once
        self.signal_name = signal.Signals(number).name
        os.write(2, b"\nsaving and stopping; a second signal quits at once\n")


@contextmanager
def stop_on_signal(*numbers: signal.Signals, is_alone: bool = True) -> Iterator[StopFlag]:
    """Turn signals into a flag while the block runs; only the main thread can.

    A second signal quits at once, unless this process is one of several ranks. SIGHUP stays
    ignored where nohup ignores it.
    """
    stop = StopFlag(is_alone=is_alone)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    if signal.SIGHUP in numbers and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        numbers = tuple(number for number in numbers if number != signal.SIGHUP)
    before = [signal.signal(number, stop._handle) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
