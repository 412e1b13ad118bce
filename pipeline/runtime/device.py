"""Device, precision and ranks of this process."""

import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib import metadata
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

import mealv2
from mealv2.errors import ConfigError
from pipeline.config import RuntimeConfig
from pipeline.runtime import env
from pipeline.runtime.distributed import Ranks, process_group

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Runtime:
    """The device, the precision of its networks, and the ranks of the run."""

    device: torch.device
    amp_dtype: torch.dtype | None
    ranks: Ranks = Ranks()

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context for forward passes: autocast with --amp, else a null context."""
        if self.amp_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.amp_dtype)

    @property
    def precision(self) -> str:
        """The name of the dtype that networks compute in."""
        return str(self.amp_dtype or torch.float32).removeprefix("torch.")

    def to_device(self, network: M) -> M:
        """Return a network on the device, channels-last like the images."""
        # tensor cores prefer channels-last; on a CPU (AVX-512, float32, one thread) resnet18 takes
        # 0.72 and resnet50 0.83 of the time that it takes with timm's layout
        network.to(self.device)
        kept = _plain_layout(network) if self.device.type == "cpu" else set()
        for tensor in (*network.parameters(), *network.buffers()):
            # Module.to fails at tensors of five dimensions, such as timm's lambda layers
            if tensor.ndim == 4 and tensor not in kept:
                # not contiguous(), which leaves strides of 1 x 1 kernels as they are: other kernels
                tensor.data = tensor.data.to(memory_format=torch.channels_last)
        return network

    @property
    def should_pin_memory(self) -> bool:
        """Whether to read pixels into page-locked memory."""
        return self.device.type == "cuda"


def _plain_layout(network: nn.Module) -> set[Tensor]:
    """Let some convolutions compute in timm's layout; return their kernels, which must keep it.

    In channels-last, the backward pass of a 1 x 1 convolution with a stride and fewer than 8 input
    channels writes outside its memory in oneDNN (torch 2.14): timm's fastvit. Images or kernels in
    channels-last are enough for that.
    """
    kernels = set()
    for module in network.modules():
        is_concerned = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)
        if is_concerned and module.stride != (1, 1) and module.in_channels < 8:  # type: ignore[operator]
            module.register_forward_pre_hook(_in_plain_layout)
            kernels.add(cast(Tensor, module.weight))
    return kernels


def _in_plain_layout(_: nn.Module, images: tuple[Tensor, ...]) -> Tensor:
    # not contiguous(), which keeps the strides of images of one channel
    return images[0].clone(memory_format=torch.contiguous_format)


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


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that can change a result."""
    libraries = ("torch", "torchvision", "timm", "pillow", "numpy", "h5py")
    found = {name: metadata.version(name) for name in libraries}
    return {"mealv2": mealv2.__version__, "python": platform.python_version(), **found}
