"""The batch size at which networks answer fastest on this machine, found by trying."""

import time
from collections.abc import Callable

import torch

from mealv2.errors import ConfigError
from pipeline import logs

_SMALLEST = 8
_LARGEST, _LARGEST_ON_CPU = 4096, 256
_WORTH = 1.03  # what twice the batch must gain
_MEMORY = 0.8  # of what is free: the rest is for labels being encoded, and for others
_SECONDS = 0.3  # that a batch size is measured for, at least


def fastest(
    ask: Callable[[torch.Tensor], object], *, img_size: int, device: torch.device, most: int
) -> int:
    """Return the power of two, up to ``most``, where ``ask`` answers most images per second.

    The first one whose double does not fit into memory, or gains less than 3 %. ``ask`` is given
    uint8 images on the device. Raises ConfigError where not even the smallest fits.
    """
    largest = min(_LARGEST_ON_CPU if device.type == "cpu" else _LARGEST, most)
    rates: dict[int, float] = {}
    size = best = min(_SMALLEST, most)
    while size <= largest:
        rate = _rate(ask, size, img_size, device)
        if rate is None or rate < _WORTH * rates.get(best, 0.0):
            break
        rates[size] = rate
        best, size = size, 2 * size
    if not rates:
        raise ConfigError(
            f"--batch-size auto: {best} views of {img_size} pixels do not fit into the memory of "
            f"{device}; give a smaller --batch-size, or fewer teachers"
        )
    tried = ", ".join(f"{size}: {rate:.3g}" for size, rate in rates.items())
    logs.say(f"--batch-size auto: {best} views a forward pass (views/s of {tried})")
    return best


def _rate(
    ask: Callable[[torch.Tensor], object], size: int, img_size: int, device: torch.device
) -> float | None:
    """Return images per second of batches of a size, None where they do not fit into memory."""
    shape = (size, 3, img_size, img_size)
    on_cuda = device.type == "cuda"
    try:
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(device)
        grey_BCHW = torch.empty(
            shape, dtype=torch.uint8, device=device, memory_format=torch.channels_last
        ).fill_(128)
        _seconds(ask, grey_BCHW)  # the first one looks for kernels, and makes room
        if on_cuda and torch.cuda.max_memory_allocated(device) > _MEMORY * _room(device):
            return None
        seconds = [_seconds(ask, grey_BCHW)]
        while sum(seconds) < _SECONDS:
            seconds.append(_seconds(ask, grey_BCHW))
        return size / min(seconds)
    except torch.OutOfMemoryError:
        return None
    finally:
        if on_cuda:
            torch.cuda.empty_cache()


def _seconds(ask: Callable[[torch.Tensor], object], images_BCHW: torch.Tensor) -> float:
    began = time.perf_counter()
    ask(images_BCHW)
    if images_BCHW.device.type == "cuda":
        torch.cuda.synchronize(images_BCHW.device)
    return time.perf_counter() - began


def _room(device: torch.device) -> int:
    """Return the bytes on a GPU that are free, or this process's own."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)
