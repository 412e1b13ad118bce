"""Device and precision of the networks of this process; the versions of its libraries."""

import platform
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from mealv2.version import __version__

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class LocalRuntime:
    """The device, and the precision of its networks: None for float32."""

    device: torch.device
    amp_dtype: torch.dtype | None

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
    def device_name(self) -> str:
        """The name of the GPU as its driver knows it, else the type of the device: cpu, mps."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return str(self.device.type)

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


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that can change a result."""
    libraries = ("torch", "torchvision", "timm", "pillow", "numpy", "h5py")
    found = {name: metadata.version(name) for name in libraries}
    return {"mealv2": __version__, "python": platform.python_version(), **found}
