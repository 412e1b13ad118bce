"""Device, precision and ranks of this process."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from mealv2.errors import ConfigError
from mealv2.runtime import LocalRuntime
from pipeline.config import RuntimeConfig
from pipeline.runtime import env
from pipeline.runtime.distributed import Ranks, process_group


@dataclass(frozen=True)
class Runtime(LocalRuntime):
    """The device, the precision of its networks, and the ranks of the run."""

    ranks: Ranks = Ranks()


def create_runtime(config: RuntimeConfig) -> Runtime:
    """Choose device and precision; raises ConfigError for a device that is not available."""
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
    """Return the GPU of this rank; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    number = env.local_rank()
    return "cuda" if number is None else gpu_of(number)


def gpu_of(number: int) -> str | None:
    """Return the GPU for a process by its number on this machine; None without a GPU."""
    count = torch.cuda.device_count()
    return f"cuda:{number % count}" if count else None


@contextmanager
def distributed_runtime(config: RuntimeConfig) -> Iterator[Runtime]:
    """Open the runtime of a training run: one process, or one of torchrun's ranks.

    Raises as ``create_runtime`` and ``distributed.process_group`` do.
    """
    rank = env.rank()
    if rank.size == 1:
        yield create_runtime(config)
        return
    runtime = create_runtime(_with_own_device(config, rank.local))
    backend = "gloo"
    if runtime.device.type == "cuda":
        torch.cuda.set_device(runtime.device)
        backend = "cpu:gloo,cuda:nccl"
    with process_group(rank, backend=backend) as ranks:
        yield replace(runtime, ranks=ranks)


def _with_own_device(config: RuntimeConfig, local_rank: int) -> RuntimeConfig:
    """Return the settings with the device of one of several ranks: the CPU, or its own GPU."""
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return replace(config, device="cpu")
    if config.device not in ("auto", "cuda"):
        raise ConfigError(
            f"--device {config.device} is one device for several ranks; use auto, cuda or cpu"
        )
    num_gpus = torch.cuda.device_count()
    if local_rank >= num_gpus > 0:
        raise ConfigError(
            f"this machine has {num_gpus} GPUs and more ranks; use --nproc-per-node {num_gpus}, or "
            "--device cpu"
        )
    return replace(config, device=f"cuda:{local_rank}")


def use_one_thread() -> None:
    """Compute in one thread: more slow the small networks of the demo (docs/tutorial/demo.md)."""
    torch.set_num_threads(1)
