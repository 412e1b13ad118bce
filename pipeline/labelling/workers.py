"""Run a command in several processes on this computer, each one as a job."""

import json
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import IO

from mealv2.errors import ConfigError, LabelSetError, MealError, StoppedError
from mealv2.storage.urls import PIPE, is_url, without_secrets
from pipeline import console
from pipeline.config import JobsConfig, flag
from pipeline.labelling.jobs import Job
from pipeline.labelling.stopping import STOPPED
from pipeline.runtime import env
from pipeline.runtime.device import gpu_of
from pipeline.runtime.signals import StopFlag, stop_on_signal

_POLL_INTERVAL_S = 0.1


def run_workers(command: list[str], config: JobsConfig, job: Job) -> int:
    """Run `mealv2 COMMAND` in --num-procs processes; return how many shards they made.

    Their messages get the number of the process as a prefix. Ctrl-C and SIGTERM are passed on to
    them; then this process ends as they do, by StoppedError or by the signal. If this process is
    killed, they end too, and nothing is left in a temporary folder. Raises MealError after all
    have ended, if one failed.
    """
    for name, value in vars(config).items():
        if str(value).startswith(PIPE) and without_secrets(value) != value:
            raise ConfigError(
                f"{flag(name)}: with --num-procs, write passwords and tokens of a pipe: command as "
                "variables of the environment, such as $TOKEN"
            )
    with ExitStack() as files:
        workers = [
            files.enter_context(_Worker(command, config, job, number))
            for number in range(config.num_procs)
        ]
        with stop_on_signal(signal.SIGINT, signal.SIGTERM) as stop, ExitStack() as stack:
            for worker in workers:
                stack.enter_context(worker.running())
            _wait(workers, stop)
        if stop.signal_name == "SIGTERM":
            console.info(f"mealv2: {len(workers)} processes {STOPPED}")
            signal.raise_signal(signal.SIGTERM)  # schedulers requeue jobs that a signal killed
        if stop.signal_name is not None:
            raise StoppedError(f"{len(workers)} processes {STOPPED}")
        _check_exit_codes(workers)
        return sum(worker.num_shards_made() for worker in workers)


def _wait(workers: "list[_Worker]", stop: StopFlag) -> None:
    """Wait until all processes have ended; pass a signal on to each."""
    is_signalled = False
    logged: set[int] = set()
    for worker in workers:
        while worker.process.poll() is None:
            for other in workers:
                if other.process.poll() and other.number not in logged:
                    logged.add(other.number)
                    console.info(f"{other.exit_text()}; the others continue")
            if stop.signal_name is not None and not is_signalled:
                is_signalled = True
                for other in workers:
                    other.process.send_signal(signal.Signals[stop.signal_name])
            try:
                worker.process.wait(_POLL_INTERVAL_S)
            except subprocess.TimeoutExpired:
                continue


def _check_exit_codes(workers: "list[_Worker]") -> None:
    """Raise MealError if a process failed, of the matching kind if all have one exit code."""
    failed = [worker for worker in workers if worker.process.returncode]
    if not failed:
        return
    codes = {worker.process.returncode for worker in workers}
    kinds: dict[int, type[MealError]] = {2: ConfigError, 3: LabelSetError}
    kind = kinds.get(codes.pop(), MealError) if len(codes) == 1 else MealError
    raise kind(
        f"{len(failed)} of {len(workers)} processes failed "
        f"({', '.join(worker.exit_text() for worker in failed)}); complete shards are kept: run "
        "the same command again to continue"
    )


class _Worker:
    """A process of its own, its settings and its report, in files that have no name.

    A context manager that closes the files.
    """

    def __init__(self, command: list[str], config: JobsConfig, job: Job, number: int) -> None:
        self.number = number
        self._command = command
        settings = config.as_json() | {
            # part `number` of the shards of this job
            "job_index": job.index + number * job.count,
            "num_jobs": job.count * config.num_procs,
            "num_procs": 1,
        }
        if config.device == "auto":
            settings["device"] = gpu_of(number) or "auto"
        urls = [value for value in vars(config).values() if is_url(value)]
        self._environment = env.child_environment(config.num_procs, urls=urls)
        self._settings = tempfile.TemporaryFile()  # noqa: SIM115  # closed by __exit__
        self._report = tempfile.TemporaryFile()  # noqa: SIM115
        self._settings.write(json.dumps(settings).encode())
        self._settings.seek(0)

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._settings.close()
        self._report.close()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the process while the block runs; it has ended after it."""
        settings = self._settings.fileno()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mealv2", *self._command, "--config", f"/dev/fd/{settings}"],
            stdin=subprocess.PIPE,  # it closes when this process ends, and so does the other then
            stdout=self._report,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=self._environment,
            pass_fds=[settings],
            process_group=0,  # so that only this process passes on Ctrl-C
        )
        assert self.process.stdin is not None
        assert self.process.stderr is not None
        relay = threading.Thread(target=_relay, args=(self.process.stderr, self.number))
        relay.start()
        try:
            yield
        finally:
            if self.process.poll() is None:  # the block ended by an error
                self.process.terminate()
                self.process.wait()
            relay.join()
            self.process.stdin.close()

    def num_shards_made(self) -> int:
        """Return the number of shards it made, from its report."""
        self._report.seek(0)
        last = self._report.read().decode().strip().rpartition("\n")[2]
        return int(json.loads(last)["shards_made"])

    def exit_text(self) -> str:
        """Return its number and its exit code or signal as text."""
        code = self.process.returncode
        status = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        return f"process {self.number}: {status}"


def _relay(stream: IO[str], number: int) -> None:
    with stream:
        for line in filter(str.strip, stream):
            console.info(f"[{number}] {line.rstrip()}")
