"""Measurements: interleaved turns on a clock, time spent waiting, memory, multiplications."""

import math
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline import console

_PROC = Path("/proc")
SAMPLE_SECONDS = 5.0  # about how long --dry-run measures
_WAITS = 0.1  # share of the time spent waiting for images above which these are what limits


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all that it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


# --- turns ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """What was done in one go, the seconds it took, and those of all cores together."""

    units: int
    seconds: float
    cpu_seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Units a second."""
        return self.units / self.seconds


def timed(work: Callable[[], int], device: torch.device) -> Turn:
    """Do work once, from an idle device to an idle device; ``work`` returns how many units."""
    synchronize(device)
    cpu_began, began = cpu_seconds(), time.perf_counter()
    units = work()
    synchronize(device)
    seconds = time.perf_counter() - began
    return Turn(units, seconds, cpu_seconds() - cpu_began)


def cpu_seconds() -> float:
    """Return what this process and all below it have computed so far, on all cores together.

    Steadier than the clock where other work shares the cores; without /proc, of this process only.
    """
    if not (_PROC / "self" / "stat").exists():
        return time.process_time()
    return sum(map(_ticks, processes(os.getpid()))) / os.sysconf("SC_CLK_TCK")


def processes(pid: int) -> list[int]:
    """Return a process and all below it, as /proc has them."""
    try:
        tasks = list((_PROC / str(pid) / "task").iterdir())
        children = [int(c) for t in tasks for c in (t / "children").read_text().split()]
    except OSError:
        return []  # it has just ended
    return [pid, *(below for child in children for below in processes(child))]


def _ticks(pid: int) -> int:
    """Return the clock ticks of a process and of its children that have ended."""
    try:
        text = (_PROC / str(pid) / "stat").read_text()
    except OSError:
        return 0
    # behind the name, which may have blanks: state is field 3, utime to cstime are 14 to 17
    return sum(map(int, text.rpartition(")")[2].split()[11:15]))


def take_turns(
    workloads: Mapping[str, Callable[[], int]], *, rounds: int, device: torch.device
) -> dict[str, list[Turn]]:
    """Do every work once a round, one after another: A B C A B C …; a first round does not count.

    What else the machine does weighs on all of a round alike, so compare within a round.
    """
    turns: dict[str, list[Turn]] = {name: [] for name in workloads}
    for number in range(rounds + 1):
        for name, work in workloads.items():
            turn = timed(work, device)
            if number:
                turns[name].append(turn)
    return turns


def times_for(work: Callable[[], int], device: torch.device, *, seconds: float) -> int:
    """Return how often to do work for it to take about ``seconds``; does it twice to find out."""
    timed(work, device)
    return max(1, math.ceil(seconds / max(timed(work, device).seconds, 1e-6)))


def repeated(work: Callable[[], int], times: int) -> Callable[[], int]:
    """Return work that is done so many times in a turn."""
    return lambda: sum(work() for _ in range(times))


# --- a short sample of a long job -----------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """Units done in some seconds, and how many of these went by waiting for images."""

    units: int
    seconds: float
    waited_s: float

    @property
    def rate(self) -> float:
        """Units a second."""
        return self.units / self.seconds

    @property
    def waiting_share(self) -> float:
        """The share of the time that the networks waited for images."""
        return self.waited_s / self.seconds

    @property
    def limit(self) -> str:
        """What limits the rate."""
        return "reading images" if self.waiting_share > _WAITS else "the networks"


def sample(measure: Callable[[int], Sample], *, min_size: int) -> Sample:
    """Measure ``min_size`` units to warm up, then as many as take a few seconds."""
    units = min_size
    for _ in range(2):
        found = measure(units)
        units = max(min_size, int(found.rate * SAMPLE_SECONDS))
    return found


def print_limit(found: Sample) -> None:
    """Say what limits the rate."""
    console.info(
        f"{found.limit} limits it: the networks waited for images {found.waiting_share:.0%} of "
        "the time"
    )


# --- memory ---------------------------------------------------------------------------------------


def reset_peak_memory(device: torch.device) -> None:
    """Begin anew with the peak of a GPU's memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Return the most memory in use: of a GPU since reset_peak_memory, else of this process
    ever.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# --- multiplications ------------------------------------------------------------------------------


def count_macs(call: Callable[[], Any]) -> int:
    """Return how many multiply-accumulates of convolutions and matrix products a call does.

    Tensors on the meta device are enough: nothing is computed then.
    """
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops()) // 2


def forward_macs(model: nn.Module, img_size: int) -> int:
    """Return the multiply-accumulates of a forward pass of one view; ``model`` is on meta."""
    return count_macs(lambda: model.eval()(torch.empty(1, 3, img_size, img_size, device="meta")))


def step_macs(model: nn.Module, img_size: int) -> int:
    """Return those of a training step, per view: forward and backward; ``model`` is on meta."""

    def step() -> None:
        images = torch.empty(2, 3, img_size, img_size, device="meta")
        model.train()(images).sum().backward()

    return count_macs(step) // 2
