"""The environment of this process: its rank or job, and where its files go.

The only module that reads os.environ. It imports nothing slow, because the command line needs it.
"""

import os
import shlex
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mealv2.errors import ConfigError, LabelSetError
from mealv2.storage.atomic import write_atomic
from mealv2.storage.urls import CREDENTIALS_VARIABLE, word_without_secrets

_BY_TORCHRUN = "start it with torchrun"
_GIVE_BOTH = "give --job-index and --num-jobs"

# A retry cannot repair a wrong command or label set.
_FINAL_EXIT_CODES = (ConfigError.exit_code, LabelSetError.exit_code)
_CHILD_PROCESS = "MEALV2_SPOKEN_FOR"
_EXIT_CODE_FILE = "MEALV2_REFUSED"  # a file of the job: torchrun drops the exit codes of its ranks


@dataclass(frozen=True)
class Rank:
    """The rank of this process among those that torchrun started; 0 of 1 without torchrun.

    ``local`` is the rank on this machine, ``attempt`` the number of restarts.
    """

    number: int
    size: int
    local: int
    attempt: int


def rank() -> Rank:
    """Return the rank of this process; raises ConfigError for a variable that is not a number."""
    number = _number("RANK", 0, advice=_BY_TORCHRUN)
    return Rank(
        number,
        size=_number("WORLD_SIZE", 1, advice=_BY_TORCHRUN),
        local=_number("LOCAL_RANK", number, advice=_BY_TORCHRUN),
        attempt=_number("TORCHELASTIC_RESTART_COUNT", 0, advice=_BY_TORCHRUN),
    )


def local_rank() -> int | None:
    """Return the rank on this machine; None without torchrun."""
    return rank().local if "LOCAL_RANK" in os.environ else None


def ranks_on_this_machine() -> int:
    """Return how many ranks share this machine's memory; all of them if nothing says."""
    return max(1, _number("LOCAL_WORLD_SIZE", rank().size, advice=_BY_TORCHRUN))


def require_single_process(command: str) -> None:
    """Raise ConfigError if torchrun started several processes."""
    if rank().size > 1:
        raise ConfigError(
            f"mealv2 {command} runs in one process, and WORLD_SIZE is larger than 1; "
            "torchrun is for distill, finetune, transfer and precompute"
        )


def has_torchrun_store() -> bool:
    """Return whether torchrun has a store for several ranks."""
    with suppress(ConfigError):
        return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and rank().size > 1
    return False


def typed_command(name: str) -> str | None:
    """Return the command line of this process as a shell reads it, without secrets of URLs.

    None where the process runs another command than ``name``, such as a script of the user.
    """
    words = [word_without_secrets(word) for word in sys.argv[1:]]
    return shlex.join(["mealv2", *words]) if words[:1] == [name] else None


def saved_exit_code() -> int | None:
    """Return the final exit code of an earlier attempt at this job; None if there is none."""
    with suppress(OSError, ValueError):
        return int(Path(os.environ.get(_EXIT_CODE_FILE, "")).read_text(encoding="ascii"))
    return None


def save_exit_code(exit_code: int) -> None:
    """Save an exit code for later attempts at the job, if they cannot succeed."""
    if exit_code in _FINAL_EXIT_CODES and (path := os.environ.get(_EXIT_CODE_FILE)):
        with suppress(OSError):
            write_atomic(Path(path), f"{exit_code}\n".encode())


def job() -> tuple[int, int, str]:
    """Return index, number of jobs, and the variable they come from; (0, 1, "") without one.

    Raises ConfigError for variables that contradict each other.
    """
    in_array = "SLURM_ARRAY_TASK_ID" in os.environ
    index, size = 0, 1
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        index, size = (_number(name, advice=_GIVE_BOTH) for name in ("RANK", "WORLD_SIZE"))
        if not 0 <= index < size or (in_array and size > 1):
            raise ConfigError(
                f"RANK is {index} of WORLD_SIZE {size}{' in a Slurm array' if in_array else ''}: "
                f"{_GIVE_BOTH}"
            )
    if not in_array:
        return index, size, "RANK" if size > 1 else ""
    index, first, last, step, count = (
        _number(f"SLURM_ARRAY_TASK_{name}", advice=_GIVE_BOTH)
        for name in ("ID", "MIN", "MAX", "STEP", "COUNT")
    )
    number, rest = divmod(index - first, max(1, step))
    if rest or first + max(1, step) * (count - 1) != last or not 0 <= number < count:
        raise ConfigError(
            f"this Slurm array has {count} tasks from {first} to {last} in steps of {step}: not "
            f"evenly spaced, so the number of task {index} is unknown; {_GIVE_BOTH}"
        )
    return number, count, "SLURM_ARRAY_TASK_ID"


def slurm_job() -> tuple[str | None, int]:
    """Return the id of this Slurm job, None without one, and how often Slurm has restarted it."""
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    return os.environ.get("SLURM_JOB_ID"), int(restarts) if restarts.isdecimal() else 0


def _number(name: str, default: int | None = None, *, advice: str) -> int:
    """Return the number in a variable; raises ConfigError if it is missing without a default."""
    value = os.environ.get(name, "" if default is None else str(default))
    if not value.isdecimal():
        raise ConfigError(f"{name} is {value or 'not set'!r}, not a number: {advice}")
    return int(value)


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def url_credentials() -> list[str]:
    """Return URLs with the passwords and signatures that other URLs are given without."""
    return os.environ.get(CREDENTIALS_VARIABLE, "").split()


def child_environment(count: int, *, urls: Iterable[str] = ()) -> dict[str, str]:
    """Return the environment for one of ``count`` child processes, which share the cores.

    ``urls`` may have secrets, which no file of settings has.
    """
    threads = str(max(1, num_cores() // count))
    known = " ".join([*urls, *url_credentials()])
    secrets = {CREDENTIALS_VARIABLE: known} if known else {}
    return {"OMP_NUM_THREADS": threads, **os.environ, **secrets, _CHILD_PROCESS: str(os.getpid())}


def is_child_process() -> bool:
    """Return whether --num-procs started this process; the parent writes to the user."""
    return _CHILD_PROCESS in os.environ


def has_parent() -> bool:
    """Return whether this process has to end with the one that started it by --num-procs."""
    return os.environ.get(_CHILD_PROCESS, str(os.getpid())) != str(os.getpid())


def cache_folder() -> Path:
    """Return the default folder for copies of remote files."""
    if named := os.environ.get("MEALV2_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mealv2"


def on_terminal() -> bool:
    """Return whether stderr can show a progress bar that moves."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
