"""Measurements: workloads in alternation, waiting time, memory, multiply-accumulates."""

import math
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mealv2.models.cost import count_macs
from pipeline import console

_PROC = Path("/proc")
SAMPLE_SECONDS = 5.0  # about how long --dry-run measures
_MAX_WAITING = 0.1  # fraction of the time; above it, reading images limits the rate


def synchronize(device: torch.device) -> None:
    """Wait until a device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


# --- turns ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """The units of one turn, its duration, and its CPU time over all cores."""

    units: int
    seconds: float
    cpu_seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Units per second."""
        return self.units / self.seconds


def timed(work: Callable[[], int], device: torch.device) -> Turn:
    """Time one call of ``work``, which returns its number of units, until the device is idle."""
    synchronize(device)
    start_cpu_s, start_s = cpu_seconds(), time.perf_counter()
    units = work()
    synchronize(device)
    seconds = time.perf_counter() - start_s
    return Turn(units, seconds, cpu_seconds() - start_cpu_s)


def cpu_seconds() -> float:
    """Return the CPU time so far of this process and its descendants.

    It is steadier than the clock if other programs share the cores. Without /proc, descendants are
    not counted.
    """
    if not (_PROC / "self" / "stat").exists():
        return time.process_time()
    return sum(map(_ticks, processes(os.getpid()))) / os.sysconf("SC_CLK_TCK")


def processes(pid: int) -> list[int]:
    """Return the ids of a process and its descendants, from /proc."""
    children: list[int] = []
    with suppress(OSError):  # the process has ended
        for task in (_PROC / str(pid) / "task").iterdir():
            with suppress(OSError):  # the thread has ended
                children += map(int, (task / "children").read_text().split())
    return [pid, *(below for child in children for below in processes(child))]


def _ticks(pid: int) -> int:
    """Return the clock ticks of a process and of its children that have ended."""
    try:
        text = (_PROC / str(pid) / "stat").read_text()
    except OSError:
        return 0
    # after the name, which may have spaces: state is field 3, utime to cstime are 14 to 17
    return sum(map(int, text.rpartition(")")[2].split()[11:15]))


def take_turns(
    workloads: Mapping[str, Callable[[], int]], *, rounds: int, device: torch.device
) -> dict[str, list[Turn]]:
    """Run every workload once per round, A B C A B C …, after one round to warm up.

    Compare turns of the same round: other load on the machine affects them alike.
    """
    turns: dict[str, list[Turn]] = {name: [] for name in workloads}
    for number in range(rounds + 1):
        for name, work in workloads.items():
            turn = timed(work, device)
            if number:
                turns[name].append(turn)
    return turns


def times_for(work: Callable[[], int], device: torch.device, *, seconds: float) -> int:
    """Return how many calls of ``work`` take about ``seconds``, from two calls."""
    timed(work, device)
    return max(1, math.ceil(seconds / max(timed(work, device).seconds, 1e-6)))


def repeated(work: Callable[[], int], times: int) -> Callable[[], int]:
    """Return a workload that calls ``work`` several times."""
    return lambda: sum(work() for _ in range(times))


# --- a short sample of a long job -----------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """Units, their duration, and the part of it that was spent waiting for images."""

    units: int
    seconds: float
    waited_s: float

    @property
    def rate(self) -> float:
        """Units per second."""
        return self.units / self.seconds

    @property
    def waiting_share(self) -> float:
        """The fraction of the time that the networks waited for images."""
        return self.waited_s / self.seconds

    @property
    def limit(self) -> str:
        """What limits the rate."""
        return "reading images" if self.waiting_share > _MAX_WAITING else "the networks"


def sample(measure: Callable[[int], Sample], *, min_size: int) -> Sample:
    """Measure ``min_size`` units to warm up, then those of a few seconds."""
    units = min_size
    for _ in range(2):
        found = measure(units)
        units = max(min_size, int(found.rate * SAMPLE_SECONDS))
    return found


def print_limit(found: Sample) -> None:
    """Print what limits the rate."""
    console.info(
        f"limit: {found.limit} (the networks waited for images {found.waiting_share:.0%} of the "
        "time)"
    )


# --- memory ---------------------------------------------------------------------------------------


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak of a GPU's memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory: of a GPU since reset_peak_memory, else of this process ever."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# --- multiply-accumulates -------------------------------------------------------------------------


def step_macs(model: nn.Module, img_size: int) -> int:
    """Return the multiply-accumulates of a training step, per view; ``model`` is on meta."""

    def step() -> None:
        images = torch.empty(2, 3, img_size, img_size, device="meta")
        model.train()(images).sum().backward()

    return count_macs(step) // 2
