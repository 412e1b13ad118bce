"""Memory of batches, used again."""

import math
import weakref
from collections import defaultdict, deque

import numpy as np
import torch


class BufferPool:
    """Memory of batches, reused when nothing references a batch any more.

    Page faults in new memory make writing a view five times as slow.
    """

    def __init__(self, *, pin_memory: bool) -> None:
        self._pin_memory = pin_memory
        self._free: defaultdict[int, deque[np.ndarray]] = defaultdict(deque)  # by size

    def take(self, num_rows: int, img_size: int) -> torch.Tensor:
        """Return uninitialised rows of uint8 pixels, B x S x S x 3."""
        shape = (num_rows, img_size, img_size, 3)
        if self._pin_memory:  # torch reuses it after the GPU has read it
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        needed, free = math.prod(shape), self._free[img_size]
        block = free.popleft() if free else np.empty(0, dtype=np.uint8)
        if block.size < needed:
            block = np.empty(needed, dtype=np.uint8)
        rows = block[:needed].reshape(shape)
        # the batch's tensors reference this array: it is finalized with the last of them
        weakref.finalize(rows, free.append, block)
        return torch.from_numpy(rows)
