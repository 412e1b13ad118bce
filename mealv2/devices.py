"""Moving small tensors to where networks compute, without making the host wait."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; on the CPU it is there when this returns.

    To a GPU it goes through page-locked memory: from any other, the copy waits for what the device
    has still to do.
    """
    if device.type == "cpu":  # a copy to the CPU that nobody waits for is read too early
        return tensor.to(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # from a cache that keeps it until it is copied
    return tensor.to(device, non_blocking=True)
