"""Running means for the training log, kept on the device so that no step waits for it."""

import time
from typing import Any

import torch
from torch import Tensor

from pipeline.runtime.distributed import Ranks


class Meter:
    """Image-weighted means of named scalars, and how fast images are processed.

    ``waited_s`` are the seconds of it spent waiting for images; the caller measures them.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Start again from nothing."""
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._images = 0
        self.waited_s = 0.0
        self._start_s = time.perf_counter()

    def add(self, num_images: int, parts: dict[str, Tensor]) -> None:
        """Count a batch; ``parts`` are means over its images, on any device."""
        self._images += num_images
        for name, value in parts.items():
            value = value.detach().float() * num_images
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def count(self, counts: dict[str, int]) -> None:
        """Add to named counts."""
        for name, number in counts.items():
            self._counts[name] = self._counts.get(name, 0) + number

    @property
    def counts(self) -> dict[str, int]:
        """The sums of the named counts."""
        return dict(self._counts)

    def collect(self, ranks: Ranks) -> None:
        """Move the sums of all ranks to the main one; the others start again from nothing.

        All ranks have to call this. Waits for the device.
        """
        if not ranks.is_distributed:
            return
        sums = ranks.all_reduce_counts({name: float(value) for name, value in self._sums.items()})
        counts = ranks.all_reduce_counts(self._counts)
        own = ranks.all_reduce_counts({"images": self._images, "waited_s": self.waited_s})
        self._sums, self._counts, self._images = {}, {}, 0
        self.waited_s = own["waited_s"] / ranks.size
        if ranks.is_main_process:
            self._sums = {name: torch.tensor(value) for name, value in sums.items()}
            self._counts = {name: int(number) for name, number in counts.items()}
            self._images = int(own["images"])

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps; the clock is no part of it."""
        return {"sums": dict(self._sums), "counts": self.counts, "images": self._images}

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        """Continue from a checkpoint's state."""
        self._sums = {name: value.to(device) for name, value in state["sums"].items()}
        self._counts = dict(state["counts"])
        self._images = state["images"]

    @property
    def num_images(self) -> int:
        """How many images were counted."""
        return self._images

    def means(self) -> dict[str, float]:
        """Return the means; this waits for the device."""
        return {name: float(value) / max(1, self._images) for name, value in self._sums.items()}

    def speed(self) -> dict[str, float]:
        """Return images per second and the share of the time spent waiting for images."""
        seconds = max(time.perf_counter() - self._start_s, 1e-9)
        return {
            "images_per_second": self._images / seconds,
            "data_wait_share": self.waited_s / seconds,
        }
