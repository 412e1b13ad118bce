"""Decoded images in memory, for a source whose images all fit."""

import threading

import numpy as np

_NUM_SAMPLED = 32  # images whose mean size decides
_OVERHEAD = 256  # bytes of an array and its entry


class ImageCache:
    """Keeps the pixels of images, by position, if ``num_images`` of them fit in ``max_bytes``.

    It gives up, and frees all, once the first images or those kept so far show that they do not.
    Threads may share it.
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
        """Keep the pixels of an image, or no image any more if all of them cannot fit."""
        with self._lock:
            if not self.is_open or position in self._pixels:
                return
            self._pixels[position] = pixels_HWC
            self._num_bytes += pixels_HWC.nbytes + _OVERHEAD
            num = len(self._pixels)
            expected = self._num_bytes
            if num == _NUM_SAMPLED:
                expected = self._num_bytes * self._num_images // num
            if expected > self._max_bytes:
                self.is_open = False
                self._pixels = {}
