"""What the environment says of this process: which rank or job it is, where its files are to go.

The only reader of os.environ. It imports nothing heavy, so that the command line can ask it.
"""

import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mealv2.errors import ConfigError, LabelSetError
from mealv2.storage.atomic import write_atomic

_BY_TORCHRUN = "start it with torchrun"
_GIVE_BOTH = "give --job-index and --num-jobs"

# A command that is wrong, or its label set, is so too when it is tried again.
_FINAL_EXIT_CODES = (ConfigError.exit_code, LabelSetError.exit_code)
_CHILD_PROCESS = "MEALV2_SPOKEN_FOR"
_EXIT_CODE_FILE = "MEALV2_REFUSED"  # a file of the job: torchrun hands on no exit code of its ranks


@dataclass(frozen=True)
class Rank:
    """Which of the processes that torchrun started this is; alone it is the only one.

    ``local`` counts those of a machine, ``attempt`` how often torchrun started them before.
    """

    number: int
    size: int
    local: int
    attempt: int


def rank() -> Rank:
    """Return which rank this process is; raises ConfigError for variables that are no numbers."""
    number = _number("RANK", 0, advice=_BY_TORCHRUN)
    return Rank(
        number,
        size=_number("WORLD_SIZE", 1, advice=_BY_TORCHRUN),
        local=_number("LOCAL_RANK", number, advice=_BY_TORCHRUN),
        attempt=_number("TORCHELASTIC_RESTART_COUNT", 0, advice=_BY_TORCHRUN),
    )


def local_rank() -> int | None:
    """Return which process of this machine this is; None where nobody counts them."""
    return rank().local if "LOCAL_RANK" in os.environ else None


def require_single_process(command: str) -> None:
    """Raise ConfigError where torchrun started several processes of a command that is for one."""
    if rank().size > 1:
        raise ConfigError(
            f"mealv2 {command} runs in one process, and WORLD_SIZE says there are several; "
            "torchrun is for distill, finetune and precompute"
        )


def has_torchrun_store() -> bool:
    """Return whether torchrun keeps a store for this process and others."""
    with suppress(ConfigError):
        return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and rank().size > 1
    return False


def saved_exit_code() -> int | None:
    """Return the exit code with which this job refused to run before; None where it did not."""
    with suppress(OSError, ValueError):
        return int(Path(os.environ.get(_EXIT_CODE_FILE, "")).read_text(encoding="ascii"))
    return None


def save_exit_code(exit_code: int) -> None:
    """Leave an exit code for who would try the job again, where that would be in vain."""
    if exit_code in _FINAL_EXIT_CODES and (path := os.environ.get(_EXIT_CODE_FILE)):
        with suppress(OSError):
            write_atomic(Path(path), f"{exit_code}\n".encode())


def job() -> tuple[int, int, str]:
    """Return which of how many jobs this is, and the variable that says so; (0, 1, "") for none.

    Raises ConfigError for variables that do not fit each other.
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
            f"evenly spaced, so that nothing says which {index} is; {_GIVE_BOTH}"
        )
    return number, count, "SLURM_ARRAY_TASK_ID"


def _number(name: str, default: int | None = None, *, advice: str) -> int:
    """Return the whole number that a variable holds; raises ConfigError, also without a default."""
    value = os.environ.get(name, "" if default is None else str(default))
    if not value.isdecimal():
        raise ConfigError(f"{name} is {value or 'not set'!r}, and no number: {advice}")
    return int(value)


def child_environment(count: int) -> dict[str, str]:
    """Return the environment of one of several processes that share this machine's cores.

    It says that another process speaks to the user for it.
    """
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "OMP_NUM_THREADS": str(max(1, (num_cores or 1) // count)),
        **os.environ,
        _CHILD_PROCESS: "1",
    }


def is_child_process() -> bool:
    """Return whether this is one of the processes of --num-procs: what to do next is not its."""
    return _CHILD_PROCESS in os.environ


def cache_folder() -> Path:
    """Return the folder for copies of remote files that nobody named."""
    if named := os.environ.get("MEALV2_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mealv2"


def on_terminal() -> bool:
    """Return whether a moving progress bar has somewhere to move."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
