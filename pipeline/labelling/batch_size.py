"""Measure the batch size with the highest throughput on a device."""

import time
from collections.abc import Callable

import torch

from mealv2.errors import ConfigError
from mealv2.models.ensemble import BySize
from pipeline import console

_MIN_SIZE = 8
_MAX_SIZE, _MAX_SIZE_CPU = 4096, 256
_MIN_GAIN = 1.03  # of doubling the batch
_MAX_MEMORY_SHARE = 0.8  # of the free memory; the encoder and other processes need the rest
_MIN_SECONDS = 0.3  # of measurement per batch size

Forward = Callable[[torch.Tensor, BySize], object]


def find_batch_size(
    forward: Forward,
    *,
    img_size: int,
    other_sizes: tuple[int, ...] = (),
    device: torch.device,
    max_size: int,
) -> int:
    """Return the power of two up to ``max_size`` at which ``forward`` is fastest per image.

    This is the first one whose double does not fit into memory or gains less than 3 %. ``forward``
    receives uint8 images on the device, and those of ``other_sizes`` by size. Raises ConfigError if
    the smallest batch does not fit.
    """
    largest = min(_MAX_SIZE_CPU if device.type == "cpu" else _MAX_SIZE, max_size)
    rates: dict[int, float] = {}
    size = best = min(_MIN_SIZE, max_size)
    while size <= largest:
        rate = _images_per_second(forward, size, (img_size, *other_sizes), device)
        if rate is None or rate < _MIN_GAIN * rates.get(best, 0.0):
            break
        rates[size] = rate
        best, size = size, 2 * size
    if not rates:
        raise ConfigError(
            f"--batch-size auto: {best} views of {img_size} pixels do not fit into the memory of "
            f"{device}; give a smaller --batch-size, or fewer teachers"
        )
    tried = ", ".join(f"{size}: {rate:.3g}" for size, rate in rates.items())
    console.info(f"--batch-size auto: {best} views a forward pass (views/s of {tried})")
    return best


def _images_per_second(
    forward: Forward, size: int, img_sizes: tuple[int, ...], device: torch.device
) -> float | None:
    """Return the throughput with batches of a size, None if they do not fit into memory."""
    on_cuda = device.type == "cuda"
    try:
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(device)
        grey = {
            img_size: torch.empty(
                (size, 3, img_size, img_size),
                dtype=torch.uint8,
                device=device,
                memory_format=torch.channels_last,
            ).fill_(128)
            for img_size in img_sizes
        }
        _seconds(forward, grey)  # the first call selects kernels and allocates memory
        if on_cuda:
            free, _ = torch.cuda.mem_get_info(device)
            available = free + torch.cuda.memory_reserved(device)
            if torch.cuda.max_memory_allocated(device) > _MAX_MEMORY_SHARE * available:
                return None
        seconds = [_seconds(forward, grey)]
        while sum(seconds) < _MIN_SECONDS:
            seconds.append(_seconds(forward, grey))
        return size / min(seconds)
    except torch.OutOfMemoryError:
        return None
    finally:
        if on_cuda:
            torch.cuda.empty_cache()


def _seconds(forward: Forward, images: dict[int, torch.Tensor]) -> float:
    """Return how long a call takes; the first of the images are of the size of the batch."""
    images_BCHW = next(iter(images.values()))
    began = time.perf_counter()
    forward(images_BCHW, images)
    if images_BCHW.device.type == "cuda":
        torch.cuda.synchronize(images_BCHW.device)
    return time.perf_counter() - began
