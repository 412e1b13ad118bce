"""pipeline.training.run_lock: one training at a time writes to a run folder."""

import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import Result, Spawned
from mealv2.errors import ConfigError, MealError
from pipeline.training import run_lock
from pipeline.training.run_lock import LOCK_NAME, STALE_S, require_unlocked

Run = Callable[..., Result]
Weights = Callable[[Path], dict[str, bytes]]


@pytest.fixture
def lock_of(run: Path) -> Callable[..., Path]:
    """A function: write a lock of this process, but for the given parts; return its path."""

    def write(**parts: Any) -> Path:
        run.mkdir(exist_ok=True)
        with run_lock.run_lock(run):
            kept = json.loads((run / LOCK_NAME).read_text())
        process = kept["process"]
        kept |= {"token": "another"}
        for name, value in parts.items():
            (process if name in process else kept)[name] = value
        path = run / LOCK_NAME
        path.write_text(json.dumps(kept))
        return path

    return write


def make_old(path: Path) -> None:
    """Let a lock look as if nobody had touched it for long."""
    before = time.time() - STALE_S - 1
    os.utime(path, (before, before))


# --- the lock -----------------------------------------------------------------------------------


def test_a_lock_names_its_holder_and_goes_at_the_end(run: Path) -> None:
    run.mkdir()
    with run_lock.run_lock(run):
        kept = json.loads((run / LOCK_NAME).read_text())
        assert (kept["process"]["host"], kept["process"]["pid"]) == (
            socket.gethostname(),
            os.getpid(),
        )
        with pytest.raises(ConfigError, match=rf"process {os.getpid()} on {socket.gethostname()}"):
            require_unlocked(run)
        with pytest.raises(ConfigError, match="is locked by"), run_lock.run_lock(run):
            pass
    assert list(run.iterdir()) == []
    require_unlocked(run)


@pytest.mark.parametrize(
    "parts",
    [
        {"pid": 2**22 + 1},  # no such process
        {"start": "1"},  # its pid was given to another process
    ],
    ids=["pid", "start"],
)
def test_the_lock_of_a_dead_process_of_this_machine_is_taken_over_at_once(
    run: Path, lock_of: Callable[..., Path], parts: dict[str, Any]
) -> None:
    lock_of(**parts)
    require_unlocked(run)
    with run_lock.run_lock(run):
        assert json.loads((run / LOCK_NAME).read_text())["process"]["pid"] == os.getpid()
    assert list(run.iterdir()) == []


def test_the_lock_of_another_machine_is_held_while_it_is_touched(
    run: Path, lock_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = lock_of(host="n1", job="7", restarts=0)
    monkeypatch.setattr(run_lock, "_LOOK_EVERY_S", 0.01)
    stop = threading.Event()

    def touch() -> None:
        while not stop.wait(0.01):
            os.utime(path)

    thread = threading.Thread(target=touch)
    thread.start()
    messages: list[str] = []
    try:
        with (
            pytest.raises(ConfigError, match=r"locked by process .* of job 7 on n1, since"),
            run_lock.run_lock(run, log=messages.append),
        ):
            pass
    finally:
        stop.set()
        thread.join()
    (message,) = messages
    assert re.search(r"job 7 on n1, since .*: waiting up to (119|120) s for a sign of li", message)


@pytest.mark.parametrize("parts", [{"host": "n1"}, {"boot": "earlier"}, None], ids=str)
def test_the_lock_of_another_machine_without_a_heartbeat_is_taken_over(
    run: Path, lock_of: Callable[..., Path], parts: dict[str, Any] | None
) -> None:
    path = lock_of(**(parts or {}))
    if parts is None:
        path.write_bytes(b"\xff damaged")
    make_old(path)
    with run_lock.run_lock(run) as lock:
        lock.require_held()


def test_a_restarted_batch_job_takes_over_its_own_lock_at_once(
    run: Path, lock_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm: the node was lost, and the same job starts on another one."""
    lock_of(host="n1", job="7", restarts=0)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with run_lock.run_lock(run) as lock:
        lock.require_held()


def test_who_lost_the_lock_is_refused_to_write_and_leaves_the_new_one(
    run: Path, lock_of: Callable[..., Path]
) -> None:
    """As after a network partition: both copies of a job run."""
    run.mkdir()
    with run_lock.run_lock(run) as lock:
        taken = lock_of_other(run)
        with pytest.raises(MealError, match=r"taken over by process 1 on n2, .* without saving"):
            lock.require_held()
    assert taken.exists()


def lock_of_other(run: Path) -> Path:
    """Replace a lock by one of another machine."""
    path = run / LOCK_NAME
    kept = json.loads(path.read_text())
    kept["process"] |= {"host": "n2", "pid": 1}
    path.write_text(json.dumps(kept | {"token": "new"}))
    return path


def make_link(path: Path) -> None:
    path.symlink_to("nothing")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, make_link])
def test_a_lock_that_is_no_file_is_refused_at_once(run: Path, make: Callable[[Path], None]) -> None:
    run.mkdir()
    make(run / LOCK_NAME)
    problem = r"a named pipe|Is a directory|run\.lock is a link"
    with pytest.raises((OSError, ConfigError), match=problem), run_lock.run_lock(run):
        pass


def test_of_two_that_take_over_a_stale_lock_one_gets_it(
    run: Path, lock_of: Callable[..., Path]
) -> None:
    lock_of(pid=2**22 + 1)
    barrier, held, refused = threading.Barrier(8, timeout=60), list[int](), list[int]()

    def take(number: int) -> None:
        barrier.wait()
        try:
            with run_lock.run_lock(run) as lock:
                lock.require_held()
                held.append(number)
                barrier.wait()  # all have tried
        except ConfigError:
            refused.append(number)
            barrier.wait()

    threads = [threading.Thread(target=take, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 7)
    assert list(run.iterdir()) == []


# --- trainings ----------------------------------------------------------------------------------


def test_a_second_training_of_a_run_is_refused_and_after_a_kill_the_next_one_continues(
    spawn: Callable[..., Spawned],
    run_cli: Run,
    done: Run,
    finetune_flags: list[str],
    run: Path,
    tmp_path: Path,
    weights: Weights,
) -> None:
    flags = ["--epochs", 6, "--val-split", "none", "--recovery-interval", 1]
    command = [*finetune_flags, *flags, "--output", run]
    first = spawn(*command)
    checkpoints = run / "checkpoints"
    first.until(lambda: checkpoints.exists() and list(checkpoints.glob("step-*.pt")))
    first.process.send_signal(signal.SIGSTOP)  # alive, and it stays in its run

    for again in (command, [*command, "--auto-resume"], ["finetune", "--resume", run]):
        second = run_cli(*again)
        assert (second.code, len(second.stderr.splitlines())) == (2, 1), second.stderr
        assert f"is locked by process {first.process.pid} on " in second.stderr

    first.process.send_signal(signal.SIGKILL)
    first.process.wait()
    (checkpoints / ".tmp-step-00000009.pt-host-1-abcd").write_bytes(b"half")
    (checkpoints / "mine.pt").write_bytes(b"kept")
    resumed = done("finetune", "--resume", run, "--checkpoint-hist", 1)
    assert resumed.report["epochs"] == 6
    assert {path.name for path in checkpoints.iterdir()} == {"mine.pt", "step-00000018.pt"}
    assert not (run / LOCK_NAME).exists()
    alone = tmp_path / "alone"
    done(*finetune_flags, *flags, "--output", alone)
    assert weights(run) == weights(alone)
