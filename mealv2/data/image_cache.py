"""Decoded images in memory, for a source whose images all fit."""

import threading

import numpy as np

_NUM_SAMPLED = 32  # images whose mean size decides


class ImageCache:
    """Keeps the pixels of images, by position, if ``num_images`` of them fit in ``max_bytes``.

    The first images decide: if ``num_images`` of their mean size do not fit, none is kept. Threads
    may share it.
    """

    def __init__(self, num_images: int, max_bytes: int) -> None:
        self._num_images = num_images
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._pixels: dict[int, np.ndarray] = {}
        self._num_bytes = 0
        self.is_open = num_images > 0 and max_bytes > 0

    def __len__(self) -> int:
        return len(self._pixels)

    def get(self, position: int) -> np.ndarray | None:
        """Return the pixels of an image, uint8 H x W x 3; None if they are not kept."""
        return self._pixels.get(position)

    def add(self, position: int, pixels_HWC: np.ndarray) -> None:
        """Keep the pixels of an image, if there is room."""
        with self._lock:
            if not self.is_open or position in self._pixels:
                return
            if self._num_bytes + pixels_HWC.nbytes > self._max_bytes:
                return
            self._pixels[position] = pixels_HWC
            self._num_bytes += pixels_HWC.nbytes
            num = len(self._pixels)
            if num == min(_NUM_SAMPLED, self._num_images):
                self.is_open = self._num_bytes / num * self._num_images <= self._max_bytes
                if not self.is_open:
                    self._pixels = {}
