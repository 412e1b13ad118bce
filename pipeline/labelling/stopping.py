"""Stop labelling between two batches when Ctrl-C is pressed."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from mealv2.errors import StoppedError
from pipeline.runtime.signals import StopFlag, StopRequested, stop_on_signal

STOPPED = "stopped; complete shards are kept: run the same command again to continue"


@contextmanager
def stop_between_batches() -> Iterator[StopFlag]:
    """Turn Ctrl-C into StoppedError between two batches, after the writer has finished.

    SIGTERM kills the process, because schedulers requeue jobs that a signal killed.
    """
    with stop_on_signal(signal.SIGINT) as stop:
        try:
            yield stop
        except StopRequested:
            raise StoppedError(STOPPED) from None
