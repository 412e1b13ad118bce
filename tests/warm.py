"""Commands in forked children of one process that has imported everything: hundreds of real kills.

Run as a program it reads a JSON list of jobs a line, runs them at once and writes how they ended.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# What is done to files; each names the path it is about to touch.
_EVENTS = ("open", "os.link", "os.rename", "os.remove", "os.mkdir", "os.listdir", "os.scandir")


class Warm:
    """The process, seen from a test."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def run(self, *jobs: dict[str, Any]) -> list[dict[str, Any]]:
        """Run jobs at once; return of each its exit ``code``, its ``seconds`` and ``events``.

        A job has ``args``; ``kill_after_s`` or ``kill_at_event`` (of files in the folder ``out``)
        say when a SIGKILL hits it, or ``times`` times another ``signal``. ``env`` is set beside
        what there is.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        numbered = [{**job, "log": f"{self.log}-{n}"} for n, job in enumerate(jobs)]
        self.process.stdin.write(json.dumps(numbered) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the warm process ended"
        results: list[dict[str, Any]] = json.loads(line)
        return results

    def done(self, *args: object, out: Path) -> dict[str, Any]:
        """Run one command to its end and insist that it ends with 0."""
        result = self.run({"args": [*map(str, args)], "out": str(out)})[0]
        assert result["code"] == 0, Path(f"{self.log}-0").read_text()
        return result

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


@contextlib.contextmanager
def warm_process(folder: Path, args: Sequence[object]) -> Iterator[Warm]:
    """Start the process; it runs a command of ``args`` once itself, so that all is imported."""
    warm = Warm(folder / "log")
    try:
        warm.run({"args": [*map(str, args)], "here": True})
        yield warm
    finally:
        warm.close()


# --- the process itself ---------------------------------------------------------------------------


def _main() -> None:
    # imported here, so that a test imports nothing for it
    import torch

    import cli

    torch.set_num_threads(1)
    replies, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        jobs = json.loads(line)
        if jobs[0].get("here"):
            pid, log = os.getpid(), jobs[0]["log"]
            with Path(log).open("w") as file, contextlib.redirect_stderr(file):
                _command(cli.main, jobs[0]["args"])
            threads = os.listdir(f"/proc/{pid}/task")  # noqa: PTH208
            assert len(threads) == 1, "a fork would lose its threads"
            results: list[dict[str, Any]] = [{}]
        else:
            results = _run(jobs, cli.main)
        print(json.dumps(results), file=replies, flush=True)


def _run(jobs: list[dict[str, Any]], main: Callable[[], None]) -> list[dict[str, Any]]:
    began = time.monotonic()
    running = {_fork(job, main): job for job in jobs}
    results: dict[int, dict[str, Any]] = {}
    while running.keys() - results.keys():
        for pid in running.keys() - results.keys():
            ended, status = os.waitpid(pid, os.WNOHANG)
            seconds = time.monotonic() - began
            if ended:
                code = os.waitstatus_to_exitcode(status)
                results[pid] = {"code": code, "seconds": seconds}
            elif seconds >= running[pid].get("kill_after_s", 1e9):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.0002)
    for pid, job in running.items():
        path = Path(job["log"] + "-events")
        results[pid]["events"] = json.loads(path.read_text()) if path.exists() else []
    return [results[pid] for pid in running]


def _fork(job: dict[str, Any], main: Callable[[], None]) -> int:
    Path(job["log"] + "-events").unlink(missing_ok=True)
    pid = os.fork()
    if pid:
        return pid
    random.seed()
    os.environ.update(job.get("env", {}))
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    seen: list[str] = []

    def note(event: str, args: tuple[object, ...]) -> None:
        if event in _EVENTS and str(args[0]).startswith(job["out"]):
            if len(seen) == job.get("kill_at_event"):
                for _ in range(job.get("times", 1)):
                    os.kill(os.getpid(), job.get("signal", signal.SIGKILL))
            seen.append(f"{event} {str(args[0]).removeprefix(job['out'])}")

    sys.addaudithook(note)
    code = _command(main, job["args"])
    sys.stdout.flush()
    sys.stderr.flush()
    Path(job["log"] + "-events").write_text(json.dumps(seen))
    os._exit(code)


def _command(main: Callable[[], None], args: list[str]) -> int:
    sys.argv = ["mealv2", *args]
    try:
        main()
    except SystemExit as error:
        return int(error.code or 0)
    return 0


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
    _main()
