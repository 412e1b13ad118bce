"""The ranks of a training run: collectives, and how a failed rank ends the others.

Texts, counts and random states are CPU tensors (gloo), so that no collective waits for a GPU.
DistributedDataParallel averages the gradients (pipeline.training.parallel).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mealv2.errors import ConfigError, MealError
from pipeline.runtime.env import Rank

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
_CLAIM_TIMEOUT = timedelta(seconds=10)
_LOST_MESSAGE = (
    "another rank ended without a message (killed, or its machine failed); start the run again "
    "with --resume or --auto-resume to continue from its newest checkpoint"
)
# messages of torch's back ends when a connection breaks: gloo has no error class
_CONNECTION_ERRORS = (
    "gloo",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
)


class ReportedElsewhereError(MealError):
    """An error that another rank has reported; this rank ends silently, with the same code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__()
        self.exit_code = exit_code


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run, seen from one of them; every collective is free with one rank.

    All ranks must call every method, in the same order.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_distributed(self) -> bool:
        """Whether the run has several ranks."""
        return self.size > 1

    @property
    def is_main_process(self) -> bool:
        """Whether this rank writes files and messages."""
        return self.rank == 0

    def sync_step(self, num_views: int, signal_name: str | None) -> tuple[int, str | None]:
        """Return the number of views of all ranks, and a signal that one of them received."""
        if not self.is_distributed:
            return num_views, signal_name
        counts = torch.tensor([num_views, *(signal_name == name for name in _SIGNALS)])
        dist.all_reduce(counts)
        total, *signals = counts.tolist()
        return total, next((n for n, got in zip(_SIGNALS, signals, strict=True) if got), None)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sync_step(0, None)

    def all_reduce(self, sums: Tensor) -> Tensor:
        """Return the sum of a CPU tensor over the ranks."""
        if self.is_distributed:
            sums = sums.clone()
            dist.all_reduce(sums)
        return sums

    def all_gather_text(self, text: str) -> list[str]:
        """Return the text of every rank."""
        row = torch.tensor(list(text.encode()), dtype=torch.uint8)
        return [bytes(other.tolist()).decode() for other in self.all_gather(row)]

    def broadcast_text(self, text: str) -> str:
        """Return the text of rank 0."""
        return self.all_gather_text(text if self.is_main_process else "")[0]

    def all_reduce_counts(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Return the sums of named numbers; the names may differ between ranks."""
        if not self.is_distributed:
            return dict(numbers)
        sums: dict[str, float] = {}
        for text in self.all_gather_text(json.dumps(dict(numbers))):
            for name, number in json.loads(text).items():
                sums[name] = sums.get(name, 0) + number
        return sums

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensor of every rank, on the CPU; the first dimension may differ."""
        tensor = tensor.detach().cpu()
        if not self.is_distributed:
            return [tensor]
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(tensor)]))
        sizes = [int(length) for length in lengths]
        padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        found = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(found, padded)
        return [rows[:size] for rows, size in zip(found, sizes, strict=True)]

    def gather_rows(self, rows_BC: Tensor) -> Tensor:
        """Return the rows of all ranks in order, on the device of ``rows_BC``."""
        if not self.is_distributed:
            return rows_BC
        return torch.cat(self.all_gather(rows_BC)).to(rows_BC.device)

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors, weights or buffers of a module, with those of rank 0."""
        if not self.is_distributed:
            return
        with torch.no_grad():
            for tensor in tensors:
                contiguous = tensor.contiguous()  # NCCL takes no channels-last tensors
                dist.broadcast(contiguous, 0)
                tensor.copy_(contiguous)

    def require_equal(self, text: str, *, what: str) -> None:
        """Raise ConfigError if the texts of the ranks differ; ``what`` names their subject."""
        if len(set(self.all_gather_text(text))) > 1:
            raise ConfigError(
                f"the ranks do not have the same {what}; start all of them with the same command, "
                "and keep data, labels and run folder on a file system that all machines share"
            )


def is_main_process() -> bool:
    """Return whether this process is rank 0, or the only one."""
    return not (dist.is_available() and dist.is_initialized() and dist.get_rank() > 0)


@contextmanager
def process_group(rank: Rank, *, backend: str) -> Iterator[Ranks]:
    """Join the process group that the environment describes (env://) while the block runs.

    Raises ConfigError if the environment describes none, MealError if the other ranks cannot be
    reached or one was lost, ReportedElsewhereError if the lost rank has reported its error.
    """
    try:
        store = _store(rank)
        dist.init_process_group(backend, store=store, rank=rank.number, world_size=rank.size)
    except ValueError as error:
        raise ConfigError(
            f"the ranks cannot connect ({_first_line(error)}); start them with torchrun"
        ) from error
    except RuntimeError as error:  # a machine is not ready: a retry may succeed
        raise MealError(
            f"the ranks cannot connect ({_first_line(error)}); start them again"
        ) from error
    try:
        yield Ranks(rank.number, rank.size)
    except BaseException as error:
        # the group is not destroyed: that could wait for a rank that has ended
        raised = _error_to_raise(error, store)
        if raised is error:
            raise
        raise raised from error
    dist.destroy_process_group()


def _error_to_raise(error: BaseException, store: Any) -> BaseException:
    """Return the exception of a rank that ends with ``error``."""
    if isinstance(error, RuntimeError) and _is_connection_error(error):
        # a rank that fails counts itself before its connections close
        if _count(store, "ended", 0) > 0:
            return ReportedElsewhereError(MealError.exit_code)
        return MealError(_LOST_MESSAGE)
    _count(store, "ended", 1)
    return error


def claim_message(text: str, rank: Rank) -> bool:
    """Return whether this is the first of torchrun's ranks with this message.

    The ranks need not be connected. All of them get true if torchrun's store cannot be reached.
    """
    try:
        store = _store(rank, timeout=_CLAIM_TIMEOUT)
    except (ValueError, RuntimeError):
        return True
    return _count(store, f"said {text}", 1) <= 1


def _store(rank: Rank, **settings: timedelta) -> Any:
    """Return the store that the ranks of an attempt share; raises ValueError or RuntimeError."""
    from torch.distributed.rendezvous import rendezvous  # not in every build of torch

    store, _, _ = next(rendezvous("env://", rank.number, rank.size, **settings))
    # torchrun has one store for all attempts: without a prefix, ranks would connect to the
    # addresses of an earlier attempt
    return dist.PrefixStore(f"attempt-{rank.attempt}", store)  # type: ignore[attr-defined]


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _is_connection_error(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(
        text in str(error) for text in _CONNECTION_ERRORS
    )


def _count(store: Any, key: str, number: int) -> int:
    """Add to a counter that all ranks share and return it; 0 if the store is not reachable."""
    with suppress(RuntimeError):
        return int(store.add(key, number))
    return 0
