"""Several processes of one command on this machine, each a job of its own."""

import json
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from mealv2.errors import ConfigError, LabelSetError, MealError, StoppedError
from pipeline import environment, logs, runtime
from pipeline.config import Jobs
from pipeline.jobs import Job

_LOOK_EVERY_S = 0.1
_STOPPED = "stopped; what was finished is kept: run the same command again to go on"


def run(command: list[str], config: Jobs, job: Job) -> int:
    """Run `mealv2 COMMAND` in --num-procs processes; return how many shards they made.

    Their talk comes with their number before it. Ctrl-C and SIGTERM are handed on, and end this
    process as they do one: by StoppedError, by the signal. Raises MealError where one failed, after
    all have ended: nothing that they made is lost.
    """
    with tempfile.TemporaryDirectory(prefix="mealv2-") as folder:
        children = [
            _Child(command, config, job, number, Path(folder)) for number in range(config.num_procs)
        ]
        with runtime.stop_on_signal(signal.SIGINT, signal.SIGTERM) as stop, ExitStack() as stack:
            for child in children:
                stack.enter_context(child)
            _wait(children, stop)
        if stop.signal_name == "SIGTERM":
            logs.say(f"mealv2: {len(children)} processes {_STOPPED}")
            signal.raise_signal(signal.SIGTERM)  # and end by it: schedulers requeue what it killed
        if stop.signal_name is not None:
            raise StoppedError(f"{len(children)} processes {_STOPPED}")
        _refuse_failures(children)
        return sum(child.made() for child in children)


def _wait(children: "list[_Child]", stop: runtime.StopFlag) -> None:
    """Wait until all have ended, and hand a signal on to each."""
    is_told = False
    said: set[int] = set()
    for child in children:
        while child.process.poll() is None:
            for other in children:
                if other.process.poll() and other.number not in said:
                    said.add(other.number)
                    logs.say(f"{other.end()}; the others go on")
            if stop.signal_name is not None and not is_told:
                is_told = True
                for other in children:
                    other.process.send_signal(signal.Signals[stop.signal_name])
            try:
                child.process.wait(_LOOK_EVERY_S)
            except subprocess.TimeoutExpired:
                continue


def _refuse_failures(children: "list[_Child]") -> None:
    """Raise MealError, saying how each ended that failed; of a kind if all failed alike."""
    failed = [child for child in children if child.process.returncode]
    if not failed:
        return
    codes = {child.process.returncode for child in children}
    kinds: dict[int, type[MealError]] = {2: ConfigError, 3: LabelSetError}
    kind = kinds.get(codes.pop(), MealError) if len(codes) == 1 else MealError
    raise kind(
        f"{len(failed)} of {len(children)} processes failed "
        f"({', '.join(child.end() for child in failed)}); what was finished is kept: run the same "
        "command again to go on"
    )


class _Child:
    """One process: started at the beginning of a block, gone at its end."""

    def __init__(
        self, command: list[str], config: Jobs, job: Job, number: int, folder: Path
    ) -> None:
        self.number = number
        self._report = folder / f"{number}.report"
        settings = config.as_json() | {
            # of the shards that are this job's, whatever other jobs make of theirs
            "job_index": job.index + number * job.count,
            "num_jobs": job.count * config.num_procs,
            "num_procs": 1,
        }
        if config.device == "auto":
            settings["device"] = runtime.gpu_of(number) or "auto"
        path = folder / f"{number}.json"
        path.write_text(json.dumps(settings), encoding="utf-8")
        self._words = [sys.executable, "-m", "mealv2", *command, "--config", str(path)]
        self._environment = environment.of_processes(config.num_procs)

    def __enter__(self) -> "_Child":
        with self._report.open("wb") as report:
            self.process = subprocess.Popen(
                self._words,
                stdin=subprocess.DEVNULL,
                stdout=report,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                errors="replace",
                env=self._environment,
                process_group=0,  # a terminal's Ctrl-C comes through us alone, and once
            )
        assert self.process.stderr is not None
        self._relay = threading.Thread(target=_relay, args=(self.process.stderr, self.number))
        self._relay.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:  # we were ended by an error
            self.process.terminate()
            self.process.wait()
        self._relay.join()

    def made(self) -> int:
        """Return how many shards it made, by its report."""
        last = self._report.read_text(encoding="utf-8").strip().rpartition("\n")[2]
        return int(json.loads(last)["shards_made"])

    def end(self) -> str:
        """Return how it ended, in words."""
        code = self.process.returncode
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        return f"process {self.number}: {how}"


def _relay(talk: IO[str], number: int) -> None:
    with talk:
        for line in filter(str.strip, talk):
            logs.say(f"[{number}] {line.rstrip()}")
