"""Run the parts of the demo in processes that are started once, and stop all of them together."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from mealv2.errors import MealError, StoppedError, out_of_memory
from pipeline import distill, finetune, precompute
from pipeline.config import DistillConfig, FinetuneConfig
from pipeline.demo.parts import Part, PartConfig, resumed
from pipeline.runtime.device import use_one_thread
from pipeline.runtime.processes import end_with_parent
from pipeline.runtime.signals import StopFlag, StopRequested, interrupts_kept, stop_on_signal

_POLL_INTERVAL_S = 0.2
_END_S = 60.0  # a part that is stopped saves first
_AGAIN = "run the same command again to continue, with fewer --num-procs if memory was short"

# called with each finished part, its report and its seconds; and at every look for one
OnDone = Callable[[Part, dict[str, Any], float], None]


def run_parts(
    parts: list[Part],
    *,
    kept: set[str],
    num_procs: int,
    logs: Path,
    on_done: OnDone,
    on_poll: Callable[[], None],
) -> None:
    """Run parts in ``num_procs`` processes, each as soon as those that it needs are finished.

    ``kept`` are the names of the parts that are finished already. What the commands print is in
    ``logs``. After a signal, or if a part fails, the other parts stop as by Ctrl-C: training runs
    save. Raises StoppedError, and what the part raised; MealError if a process was killed.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting, finished = list(parts), set(kept)
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    with stop_on_signal(*signals) as stop, _started(min(num_procs, len(parts)), logs) as workers:
        while waiting or any(worker.part for worker in workers):
            for worker in workers:
                ready = next((p for p in waiting if finished.issuperset(p.needs)), None)
                if ready is not None and worker.is_idle:
                    waiting.remove(ready)
                    worker.run(ready)
            for worker in _with_news(workers, stop):
                if (result := worker.receive()) is not None:
                    finished.add(result[0].name)
                    on_done(*result)
            on_poll()


def _with_news(workers: "list[_Worker]", stop: StopFlag) -> "list[_Worker]":
    """Wait a moment; return the workers that sent something or ended. Raises StoppedError."""
    news = wait([worker.connection for worker in workers], timeout=_POLL_INTERVAL_S)
    try:
        stop.check()
    except StopRequested as signal_name:
        raise StoppedError(
            f"stopped by {signal_name}; finished parts are kept, and those that were running are "
            "saved: run the same command again to continue"
        ) from None
    return [worker for worker in workers if worker.connection in news]


@contextmanager
def _started(count: int, logs: Path) -> Iterator[list["_Worker"]]:
    """Start processes; at the end of the block stop them, and wait until they have ended."""
    # They inherit a mask without Ctrl-C, until they can handle it: see _work. This process gets
    # one that arrives meanwhile after the block. The tracker's start would remove the mask
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        workers = [_Worker(logs) for _ in range(count)]
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        yield workers
    finally:
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.join()


class _Worker:
    """A process that runs one part after another, and what it is doing."""

    def __init__(self, logs: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.part: Part | None = None
        self.is_idle = False  # it has imported torch, and has no part
        self._logs = logs
        self._start_s = 0.0
        self.connection, other = context.Pipe()
        self._process = context.Process(target=_work, args=(other,), daemon=True)
        self._process.start()
        other.close()  # so that the end of the process is the end of the connection

    def run(self, part: Part) -> None:
        """Let the process run a part."""
        self.part, self.is_idle, self._start_s = part, False, time.monotonic()
        self.connection.send((part.config, self._log))

    @property
    def _log(self) -> Path:
        assert self.part is not None
        return self._logs / f"{self.part.name.replace('/', '-')}.log"

    def receive(self) -> tuple[Part, dict[str, Any], float] | None:
        """Return the finished part, its report and its seconds; None from a process that began.

        Raises what the part raised; MealError if the process ended.
        """
        try:
            message = self.connection.recv()
        except EOFError:
            self._process.join()
            raise MealError(self._death()) from None
        part, self.part, self.is_idle = self.part, None, True
        if isinstance(message, MealError):
            assert part is not None
            raise type(message)(f"{part.title}: {message}")
        if isinstance(message, Exception):
            raise message
        return None if part is None else (part, message, time.monotonic() - self._start_s)

    def _death(self) -> str:
        code = self._process.exitcode or 0
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        if self.part is None:
            return f"a process of the demo ended while it started ({how}); {_AGAIN}"
        return f"{self.part.title}: its process ended ({how}); see {self._log}; {_AGAIN}"

    def stop(self) -> None:
        """Let the process end: after it saved, if it runs a part."""
        pid = self._process.pid
        if self.part is not None and pid is not None and self._process.is_alive():
            os.kill(pid, signal.SIGINT)
        elif not self.is_idle:
            self._process.terminate()
        self.connection.close()

    def join(self) -> None:
        """Wait until the process has ended; kill it if that takes too long."""
        self._process.join(_END_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


# --- in the process -----------------------------------------------------------------------------


def _work(connection: Connection) -> None:
    """Run the parts that arrive, until the connection or this process is closed."""
    end_with_parent()
    os.setpgid(0, 0)  # Ctrl-C of a terminal arrives at the parent alone, which passes it on once
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # removes one that waits
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGINT, signal.default_int_handler)
    use_one_thread()
    ends = suppress(KeyboardInterrupt, EOFError, BrokenPipeError, ConnectionResetError)
    with ends, interrupts_kept():
        connection.send(None)
        while True:
            config, log = connection.recv()
            _write_to(log)
            connection.send(_result(config))


def _write_to(log: Path) -> None:
    """Append what this process prints to a file."""
    with log.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())


def _result(config: PartConfig) -> dict[str, Any] | Exception:
    """Run a part; return its report, or the error that the parent shows."""
    config = resumed(config)
    try:
        if isinstance(config, FinetuneConfig):
            return finetune.run(config)
        if isinstance(config, DistillConfig):
            return distill.run(config)
        return precompute.run(config)
    except (MealError, OSError) as error:
        return error
    except (MemoryError, RuntimeError) as error:
        if (reason := out_of_memory(error)) is None:
            raise
        return MealError(reason)
