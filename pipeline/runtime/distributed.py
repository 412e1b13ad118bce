"""The ranks of a training run, its processes: who does which share, and what they tell each other.

Words, counts and random states go through CPU tensors (gloo), so that no device is waited for;
gradients are averaged by DistributedDataParallel (pipeline.training.parallel).
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

_SIGNALS = ("SIGINT", "SIGTERM")
_CLAIM_TIMEOUT = timedelta(seconds=10)
_LOST_MESSAGE = (
    "another rank ended without a word (killed, or its machine is gone); start the run again with "
    "--resume or --auto-resume, it goes on from its newest checkpoint"
)
# what torch's back ends say when a connection breaks: gloo has no error class of its own
_CONNECTION_ERRORS = (
    "gloo",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
)


class ReportedElsewhereError(MealError):  # the error is the other rank's
    """An error that another rank has told the user of; this one ends with its code, silently."""

    def __init__(self, exit_code: int) -> None:
        super().__init__()
        self.exit_code = exit_code


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run as one of them sees it; a run of one process has one, which tells nobody.

    All ranks have to call every method, in the same order.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_distributed(self) -> bool:
        """Whether there are others."""
        return self.size > 1

    @property
    def is_main_process(self) -> bool:
        """Whether this is the one that writes and talks."""
        return self.rank == 0

    def sync_step(self, num_views: int, signal_name: str | None) -> tuple[int, str | None]:
        """Return how many views all ranks have together, and a signal that one of them got."""
        if not self.is_distributed:
            return num_views, signal_name
        counts = torch.tensor([num_views, *(signal_name == name for name in _SIGNALS)])
        dist.all_reduce(counts)
        total, *signals = counts.tolist()
        return total, next((n for n, got in zip(_SIGNALS, signals, strict=True) if got), None)

    def barrier(self) -> None:
        """Wait until all ranks are here."""
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
        """Return the first rank's text."""
        return self.all_gather_text(text if self.is_main_process else "")[0]

    def all_reduce_counts(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Return the sums of named numbers; a rank may lack names that others have."""
        if not self.is_distributed:
            return dict(numbers)
        sums: dict[str, float] = {}
        for text in self.all_gather_text(json.dumps(dict(numbers))):
            for name, number in json.loads(text).items():
                sums[name] = sums.get(name, 0) + number
        return sums

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Return a tensor of every rank, on the CPU; they may differ in their first size."""
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
        """Return the rows of all ranks in their order, on the device of this one's."""
        if not self.is_distributed:
            return rows_BC
        return torch.cat(self.all_gather(rows_BC)).to(rows_BC.device)

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors, weights or buffers of a module, with the first rank's."""
        if not self.is_distributed:
            return
        with torch.no_grad():
            for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
                of_type = [tensor for tensor in tensors if tensor.dtype == dtype]
                flat = torch.cat([tensor.reshape(-1) for tensor in of_type])
                dist.broadcast(flat, 0)
                parts = torch.split(flat, [tensor.numel() for tensor in of_type])
                for tensor, part in zip(of_type, parts, strict=True):
                    tensor.copy_(part.view_as(tensor))

    def require_equal(self, text: str, *, what: str) -> None:
        """Raise ConfigError where the ranks' texts differ; ``what`` they describe."""
        if len(set(self.all_gather_text(text))) > 1:
            raise ConfigError(
                f"the ranks do not have the same {what}; start all of them with the same command, "
                "with data, labels and run folder where every machine sees them"
            )


def is_main_process() -> bool:
    """Return whether this process is to talk: the first rank of a run, or a process alone."""
    return not (dist.is_available() and dist.is_initialized() and dist.get_rank() > 0)


@contextmanager
def process_group(rank: Rank, *, backend: str) -> Iterator[Ranks]:
    """Meet the other ranks where the environment says (env://), for as long as the block lasts.

    Who lost a rank that ended for a reason of its own raises ReportedElsewhereError. Raises
    ConfigError where nothing says whom to meet, MealError where they cannot be met, or one was lost
    without a word.
    """
    try:
        store = _store(rank)
        dist.init_process_group(backend, store=store, rank=rank.number, world_size=rank.size)
    except ValueError as error:
        raise ConfigError(
            f"the ranks cannot meet ({_first_line(error)}); start them with torchrun"
        ) from error
    except RuntimeError as error:  # a machine that is not there (yet): no fault of the command
        raise MealError(
            f"the ranks cannot meet ({_first_line(error)}); start them again"
        ) from error
    try:
        yield Ranks(rank.number, rank.size)
    except BaseException as error:
        # the group is left to the end of the process: to close it might wait for who is gone
        counts = _error_to_raise(error, store)
        if counts is error:
            raise
        raise counts from error
    dist.destroy_process_group()


def _error_to_raise(error: BaseException, store: Any) -> BaseException:
    """Return what a rank that ends with ``error`` is to raise."""
    if isinstance(error, RuntimeError) and _is_connection_error(error):
        # who ends for a reason of its own has said so before its connections closed
        if _count(store, "ended", 0) > 0:
            return ReportedElsewhereError(MealError.exit_code)
        return MealError(_LOST_MESSAGE)
    _count(store, "ended", 1)
    return error


def claim_message(text: str, rank: Rank) -> bool:
    """Return whether this is the first of torchrun's ranks that wants to say something.

    They need not have met. Where torchrun's store cannot be reached all of them may.
    """
    try:
        store = _store(rank, timeout=_CLAIM_TIMEOUT)
    except (ValueError, RuntimeError):
        return True
    return _count(store, f"said {text}", 1) <= 1


def _store(rank: Rank, **settings: timedelta) -> Any:
    """Return where the ranks of an attempt find each other; raises ValueError or RuntimeError."""
    from torch.distributed.rendezvous import rendezvous  # not in every build of torch

    store, _, _ = next(rendezvous("env://", rank.number, rank.size, **settings))
    # torchrun keeps one store for all its attempts: without a prefix these ranks would look
    # for each other where those before them listened
    return dist.PrefixStore(f"attempt-{rank.attempt}", store)  # type: ignore[attr-defined]


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _is_connection_error(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(
        text in str(error) for text in _CONNECTION_ERRORS
    )


def _count(store: Any, key: str, number: int) -> int:
    """Add to a counter that all ranks see; 0 where it cannot be reached."""
    with suppress(RuntimeError):
        return int(store.add(key, number))
    return 0
