"""Read batches of whole images: decode, resize, flip, pad to the largest of the batch."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from mealv2.data.coco import CocoSource
from mealv2.data.pixels import decode, resized
from mealv2.data.requests import Batch, BatchRequest
from mealv2.detection.views import WholeViews
from mealv2.errors import DataError

_BATCHES_AHEAD = 2
_Read = tuple[np.ndarray | None, str]  # the pixels, or why there are none


class WholeImageReader:
    """Reads batches of whole images of a source, ahead in ``workers`` threads.

    A batch has its images in the upper left corner of B x 3 x H x W, black beside them.
    """

    def __init__(
        self, source: CocoSource, views: WholeViews, *, workers: int = 0, pin_memory: bool = False
    ) -> None:
        self.source = source
        self.views = views
        self._workers = workers
        self._pin_memory = pin_memory

    def batches(self, requests: Iterable[BatchRequest]) -> Iterator[Batch]:
        """Yield the batch of each request, in order."""
        if not self._workers:
            for request in requests:
                rows = [(p, v) for p, views in request for v in views]
                yield self._batch(rows, [self._read(p, v) for p, v in rows])
            return
        with ThreadPoolExecutor(self._workers, "mealv2-read", torch.set_num_threads, (1,)) as pool:
            reading: deque[tuple[list[tuple[int, int]], list[Future[_Read]]]] = deque()
            try:
                for request in requests:
                    rows = [(p, v) for p, views in request for v in views]
                    reading.append((rows, [pool.submit(self._read, p, v) for p, v in rows]))
                    if len(reading) > _BATCHES_AHEAD:
                        yield self._finished(*reading.popleft())
                while reading:
                    yield self._finished(*reading.popleft())
            finally:
                for _, tasks in reading:
                    for task in tasks:
                        task.cancel()

    def _finished(self, rows: list[tuple[int, int]], tasks: list[Future[_Read]]) -> Batch:
        return self._batch(rows, [task.result() for task in tasks])

    def _read(self, position: int, index: int) -> _Read:
        """Return the pixels of a view, H x W x 3, or the reason why the image cannot be read."""
        image = self.source.images[position]
        try:
            pixels_HWC = decode(self.source.read(position))
        except (DataError, OSError) as error:
            return None, getattr(error, "strerror", None) or str(error)
        height, width, _ = pixels_HWC.shape
        if (width, height) != (image.width, image.height):
            listed = f"{image.width} x {image.height}"
            return None, f"it has {width} x {height} pixels, its annotations are of {listed}"
        view = self.views.view(self.source.keys[position], index, width=width, height=height)
        pixels_HWC = resized(pixels_HWC, view.height, view.width, "torch")
        return pixels_HWC[:, ::-1] if view.is_flipped else pixels_HWC, ""

    def _batch(self, rows: list[tuple[int, int]], read: list[_Read]) -> Batch:
        """Return a batch of images of any size; those that cannot be read are left out."""
        failed = {p: why for (p, _), (image, why) in zip(rows, read, strict=True) if image is None}
        kept = [row for row, (image, _) in zip(rows, read, strict=True) if image is not None]
        images = [image for image, _ in read if image is not None]
        height = max((image.shape[0] for image in images), default=1)
        width = max((image.shape[1] for image in images), default=1)
        padded_BHWC = torch.zeros(
            (len(images), height, width, 3), dtype=torch.uint8, pin_memory=self._pin_memory
        )
        array_BHWC = padded_BHWC.numpy()
        for row, image in zip(array_BHWC, images, strict=True):
            row[: image.shape[0], : image.shape[1]] = image
        listed = [self.source.images[position] for position, _ in kept]
        sizes = [(image.width, image.height) for image in listed]
        boxes = [(0, 0, image.height, image.width, 0) for image in listed]
        return Batch(
            padded_BHWC.permute(0, 3, 1, 2),
            np.array(sizes, dtype=np.uint32).reshape(-1, 2),
            np.array(boxes, dtype=np.uint32).reshape(-1, 5),
            [position for position, _ in kept],
            [view for _, view in kept],
            failed,
        )
