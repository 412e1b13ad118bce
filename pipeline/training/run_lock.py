"""The lock of a run folder: one training at a time writes to it.

RUN/run.lock names the process that holds it. A process of the same machine is looked up; one of
another machine is alive as long as it touches the file.
"""

import fcntl
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from mealv2.errors import ConfigError, MealError
from mealv2.storage.atomic import TEMPORARY_PREFIX, write_atomic
from mealv2.storage.json_format import canonical_json, read_json
from mealv2.storage.regular_files import open_regular
from mealv2.storage.run_files import LOCK_NAME as LOCK_NAME
from pipeline.runtime import env
from pipeline.runtime.processes import ProcessId, is_running, this_process

HEARTBEAT_S = 10.0
STALE_S = 120.0  # network file systems show a new time up to 60 s late
_LOOK_EVERY_S = 1.0


@dataclass(frozen=True)
class Holder:
    """Who holds a lock: a process, the batch job it belongs to, and a token of its own."""

    process: ProcessId
    job: str | None
    restarts: int
    since: str
    token: str

    def __str__(self) -> str:
        job = f" of job {self.job}" if self.job else ""
        return f"process {self.process.pid}{job} on {self.process.host}, since {self.since}"

    @classmethod
    def read(cls, path: Path) -> "Holder | None":
        """Return the holder in a lock file; None if the file is damaged.

        Raises FileNotFoundError where nothing is locked.
        """
        try:
            kept = read_json(path)
            process = ProcessId(**kept.pop("process"))
            holder = cls(process=process, **kept)
        except FileNotFoundError:
            raise
        except (OSError, ValueError, TypeError, AttributeError, KeyError):
            return None
        known = (process.pid, holder.restarts)
        return holder if all(isinstance(number, int) for number in known) else None


class RunLock:
    """A lock that this process holds; a thread touches its file every HEARTBEAT_S."""

    def __init__(self, run: Path, token: str) -> None:
        self._path = run / LOCK_NAME
        self._token = token
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._touch, name="run lock", daemon=True)
        self._thread.start()

    def require_held(self) -> None:
        """Raise MealError if another process took the lock over: this one must not write."""
        if (holder := _holder(self._path)) is None or holder.token != self._token:
            by = f" by {holder}" if holder else ""
            raise MealError(
                f"the lock of {self._path.parent} was taken over{by}, because this process showed "
                f"no sign of life for {STALE_S:.0f} s; it stops without saving"
            )

    def release(self) -> None:
        """Remove the lock, unless another process took it over."""
        self._stop.set()
        self._thread.join()
        if (holder := _holder(self._path)) is not None and holder.token == self._token:
            self._path.unlink(missing_ok=True)

    def _touch(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            with suppress(OSError):
                os.utime(self._path)


@contextmanager
def run_lock(run: Path, *, log: Callable[[str], None] | None = None) -> Iterator[RunLock]:
    """Hold the lock of a run folder while the block runs.

    Takes over the lock of a process that ended, and of an earlier start of the same batch job;
    before it waits for a sign of life of another machine, ``log`` gets a message. Raises
    ConfigError that names the holder, OSError.
    """
    job, restarts = env.slurm_job()
    own = Holder(
        this_process(), job, restarts, time.strftime("%Y-%m-%d %H:%M:%S"), secrets.token_hex(8)
    )
    path, data = run / LOCK_NAME, canonical_json(asdict(own)).encode()
    if path.is_symlink():  # a link to nothing would never be free
        raise ConfigError(f"{path} is a link, not a lock; remove it")
    # a file system without links would replace an existing lock, so look first
    while path.exists() or not write_atomic(path, data, replace=False):
        with suppress(FileNotFoundError):  # released just now
            stale = Holder.read(path)
            _require_stale(run, stale, own, log)
            _remove(path, stale)
    lock = RunLock(run, own.token)
    try:
        if not _is_held_by(path, own.token):
            raise _locked(run, _holder(path))
        yield lock
    finally:
        lock.release()


def require_unlocked(run: Path) -> None:
    """Raise ConfigError if a process of this machine trains in a run folder.

    It does not wait, and leaves locks of other machines to ``run_lock``.
    """
    with suppress(OSError):
        holder = Holder.read(run / LOCK_NAME)
        if holder is not None and is_running(holder.process):
            raise _locked(run, holder)


def _require_stale(
    run: Path, holder: Holder | None, own: Holder, log: Callable[[str], None] | None
) -> None:
    """Return if a lock may be taken over, perhaps after a wait; raises ConfigError if not."""
    if holder is not None:
        if holder.job is not None and holder.job == own.job and holder.restarts < own.restarts:
            return  # Slurm started this job again
        if (runs := is_running(holder.process)) is not None:
            if runs:
                raise _locked(run, holder)
            return
    path = run / LOCK_NAME
    first = _time_of(path)
    ahead_s = _clock_of(run) - time.time()
    if log is not None and (left_s := first + STALE_S - time.time() - ahead_s) > 0:
        name = holder or "another process"
        log(f"{run} is locked by {name}: waiting up to {left_s:.0f} s for a sign of life")
    if _is_touched(path, first, ahead_s=ahead_s):
        raise _locked(run, holder)


def _locked(run: Path, holder: Holder | None) -> ConfigError:
    return ConfigError(
        f"{run} is locked by {holder or 'another process'}: one training at a time writes to a run "
        "folder; wait until it ends, or give another --output"
    )


def _is_touched(path: Path, first: float, *, ahead_s: float) -> bool:
    """Return whether someone touches a file after ``first``, which can take STALE_S to find out.

    Compares times of the file system alone, which is ``ahead_s`` ahead: the clocks of machines
    differ.
    """
    while time.time() + ahead_s - first < STALE_S:
        time.sleep(_LOOK_EVERY_S)
        if _time_of(path) != first:
            return True
    return False


def _time_of(path: Path) -> float:
    """Return when a file was changed; raises OSError for what is no file."""
    handle = open_regular(path)  # on network file systems, opening asks for the time again
    try:
        return os.fstat(handle).st_mtime
    finally:
        os.close(handle)


def _clock_of(folder: Path) -> float:
    """Return the time of the file system."""
    path = folder / f"{TEMPORARY_PREFIX}clock-{secrets.token_hex(4)}"
    path.touch(exist_ok=False)
    try:
        return path.stat().st_mtime
    finally:
        path.unlink()


def _remove(path: Path, stale: Holder | None) -> None:
    """Remove a stale lock, but not the one of another process that was faster."""
    with _one_remover(path.parent):
        if Holder.read(path) != stale:
            return
        # where only one process of each machine removes locks, another machine may be faster
        aside = path.with_name(f"{TEMPORARY_PREFIX}{LOCK_NAME}-{secrets.token_hex(4)}")
        path.rename(aside)
        found = Holder.read(aside)
        if found != stale:
            with suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink()


@contextmanager
def _one_remover(folder: Path) -> Iterator[None]:
    """Let one process at a time remove a lock; without effect where folders cannot be locked."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # NFS
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _is_held_by(path: Path, token: str) -> bool:
    """Return whether a new lock is held; another start may have moved it aside for a moment."""
    for _ in range(40):
        if (holder := _holder(path)) is not None:
            return holder.token == token
        time.sleep(0.05)
    return False


def _holder(path: Path) -> Holder | None:
    try:
        return Holder.read(path)
    except FileNotFoundError:
        return None
