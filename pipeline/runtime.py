"""The machine under a stage: device, ranks, precision, seeds, signals.

The only reader of os.environ.
"""

import os
import platform
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import TypeVar

import torch
from torch import nn

import mealv2
from mealv2.errors import ConfigError
from pipeline.config import Machine
from pipeline.ranks import AlreadySaid, Ranks, together

M = TypeVar("M", bound=nn.Module)
_SPOKEN_FOR = "MEALV2_SPOKEN_FOR"
_GIVE_BOTH = "give --job-index and --num-jobs"


@dataclass(frozen=True)
class Runtime:
    """A device, the precision that networks compute in on it, and who trains along."""

    device: torch.device
    amp_dtype: torch.dtype | None
    ranks: Ranks = Ranks()

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context for forward passes: autocast with --amp, else nothing."""
        if self.amp_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.amp_dtype)

    @property
    def precision(self) -> str:
        """The name of the type that networks compute in."""
        return str(self.amp_dtype or torch.float32).removeprefix("torch.")

    def place(self, network: M) -> M:
        """Return a network on the device, with its weights laid out as images are."""
        # tensor cores want channels-last; on a CPU (AVX-512, float32, one thread) resnet18 takes
        # 0.72 and resnet50 0.83 of its time with weights and images as timm lays them out
        return network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    @property
    def pins(self) -> bool:
        """Whether pixels are to be read into page-locked memory, for this device."""
        return self.device.type == "cuda"


def start(config: Machine) -> Runtime:
    """Choose device and precision; raises ConfigError for a device this machine does not have."""
    if config.device == "auto":
        device = torch.device(_gpu() or "cpu")
    else:
        try:
            device = torch.device(config.device)
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).strip().split("\n")[0].split(". ")[0]
            reason = reason if len(reason) < 100 else "unknown, or not built into this torch"
            raise ConfigError(
                f"--device {config.device}: not on this machine ({reason}); use auto, cpu, cuda, "
                "cuda:N or mps"
            ) from None
    amp_dtype = getattr(torch, config.amp_dtype or "bfloat16") if config.amp else None
    if amp_dtype is torch.float16 and device.type == "cpu":
        raise ConfigError("--amp-dtype float16 needs a GPU; use bfloat16 on the CPU")
    return Runtime(device, amp_dtype)


def _gpu() -> str | None:
    """Return the GPU to use, of several the one of this rank; None where there is none."""
    if not torch.cuda.is_available():
        return None
    rank = os.environ.get("LOCAL_RANK", "")
    return gpu_of(int(rank)) if rank.isdecimal() else "cuda"


def gpu_of(number: int) -> str | None:
    """Return the GPU for the process of a number on this machine; None where there is none."""
    count = torch.cuda.device_count()
    return f"cuda:{number % count}" if count else None


def job_of_environment() -> tuple[int, int, str]:
    """Return which of how many jobs this is, and the variable that says so; (0, 1, "") for none.

    Raises ConfigError for variables that do not fit each other.
    """
    in_array = "SLURM_ARRAY_TASK_ID" in os.environ
    rank, size = 0, 1
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        rank, size = _numbers("RANK", "WORLD_SIZE")
        if not 0 <= rank < size or (in_array and size > 1):
            raise ConfigError(
                f"RANK is {rank} of WORLD_SIZE {size}{' in a Slurm array' if in_array else ''}: "
                f"{_GIVE_BOTH}"
            )
    if not in_array:
        return rank, size, "RANK" if size > 1 else ""
    index, first, last, step, count = _numbers(
        *(f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "MIN", "MAX", "STEP", "COUNT"))
    )
    number, rest = divmod(index - first, max(1, step))
    if rest or first + max(1, step) * (count - 1) != last or not 0 <= number < count:
        raise ConfigError(
            f"this Slurm array has {count} tasks from {first} to {last} in steps of {step}: not "
            f"evenly spaced, so that nothing says which {index} is; {_GIVE_BOTH}"
        )
    return number, count, "SLURM_ARRAY_TASK_ID"


def _numbers(*names: str) -> list[int]:
    """Return the whole numbers that variables hold."""
    values = [os.environ.get(name, "") for name in names]
    for name, value in zip(names, values, strict=True):
        if not value.isdecimal():
            raise ConfigError(f"{name} is {value or 'not set'!r}, and no number: {_GIVE_BOTH}")
    return list(map(int, values))


def environment_of_processes(count: int) -> dict[str, str]:
    """Return the environment of one of several processes that share this machine's cores.

    It says that another process speaks to the user for it.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"OMP_NUM_THREADS": str(max(1, (cores or 1) // count)), **os.environ, _SPOKEN_FOR: "1"}


def is_spoken_for() -> bool:
    """Return whether this is one of the processes of --num-procs: what to do next is not its."""
    return _SPOKEN_FOR in os.environ


@contextmanager
def joined(config: Machine) -> Iterator[Runtime]:
    """Start a training run's part of the machine: all of it, or that of one of torchrun's ranks.

    Raises ConfigError as ``start`` does, and where ranks cannot meet; see ranks.together.
    """
    rank, size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    if size == 1:
        yield start(config)
        return
    machine = start(_with_own_device(config, _number("LOCAL_RANK", rank)))
    backend = "gloo"
    if machine.device.type == "cuda":
        torch.cuda.set_device(machine.device)
        backend = "cpu:gloo,cuda:nccl"
    attempt = _number("TORCHELASTIC_RESTART_COUNT", 0)
    with together(rank, size, attempt=attempt, backend=backend) as ranks:
        yield replace(machine, ranks=ranks)


def refuse_ranks(command: str) -> None:
    """Raise ConfigError where torchrun started several processes of a command that is for one."""
    if _number("WORLD_SIZE", 1) == 1:
        return
    if _number("RANK", 0) > 0:
        raise AlreadySaid(ConfigError.exit_code)
    raise ConfigError(
        f"mealv2 {command} runs in one process, and WORLD_SIZE says there are several; torchrun is "
        "for distill, finetune and precompute"
    )


def _number(name: str, default: int) -> int:
    """Return a number that torchrun puts into the environment; raises ConfigError for no number."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ConfigError(f"the environment has {name}={text}: no number; start it with torchrun")
    return int(text)


def _with_own_device(config: Machine, local_rank: int) -> Machine:
    """Return the settings with the device of one of several ranks: the CPU, or a GPU of its own."""
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return replace(config, device="cpu")
    if config.device not in ("auto", "cuda"):
        raise ConfigError(
            f"--device {config.device} is one device, and there are several ranks; use auto, cuda "
            "or cpu"
        )
    num_gpus = torch.cuda.device_count()
    if local_rank >= num_gpus > 0:
        raise ConfigError(
            f"rank {local_rank} of this machine has no GPU: there are {num_gpus}; use "
            f"--nproc-per-node {num_gpus}, or --device cpu"
        )
    return replace(config, device=f"cuda:{local_rank}")


def seed_everything(seed: int) -> None:
    """Seed torch's generators: new weights and dropout. Views and order have seeds of their own."""
    torch.manual_seed(seed)


def seed_rank(seed: int, *, rank: int, step: int) -> None:
    """Seed torch's generators for what a rank draws from a step on, such as dropout."""
    torch.manual_seed(int(sha256(f"{seed}/{rank}/{step}".encode()).hexdigest()[:15], 16))


def use_one_thread() -> None:
    """Compute in one thread: networks of the demo's size only lose by more (docs/demo.md)."""
    torch.set_num_threads(1)


def versions() -> dict[str, str]:
    """Return the versions that can change a number."""
    libraries = ("torch", "torchvision", "timm", "pillow", "numpy", "h5py")
    found = {name: metadata.version(name) for name in libraries}
    return {"mealv2": mealv2.__version__, "python": platform.python_version(), **found}


def cache_folder() -> Path:
    """Return the folder for copies of remote files that nobody named."""
    if named := os.environ.get("MEALV2_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mealv2"


def on_terminal() -> bool:
    """Return whether a moving progress bar has somewhere to move."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


class StopRequested(Exception):  # noqa: N818  # no error: the user asked for it
    """A signal asked the run to save and stop."""


class StopFlag:
    """Set by the first Ctrl-C or SIGTERM; the run saves and stops at the next ``check``."""

    def __init__(self, *, is_alone: bool = True) -> None:
        self.signal_name: str | None = None
        self._is_alone = is_alone

    def check(self) -> None:
        """Raise StopRequested if a signal came."""
        if self.signal_name is not None:
            raise StopRequested(self.signal_name)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._is_alone:
            # srun signals every process, and torchrun its ranks once more
            self.signal_name = self.signal_name or signal.Signals(number).name
            return
        if self.signal_name is not None:
            os._exit(128 + number)  # the second one quits at once
        self.signal_name = signal.Signals(number).name
        os.write(2, b"\nstopping in good order; once more quits at once\n")


@contextmanager
def stop_on_signal(*numbers: signal.Signals, is_alone: bool = True) -> Iterator[StopFlag]:
    """Turn signals into a flag while the block runs (in the main thread only).

    A second one quits at once, unless this process is one of several ranks.
    """
    stop = StopFlag(is_alone=is_alone)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = [signal.signal(number, stop._handle) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
