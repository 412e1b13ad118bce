"""From requests to batches of pixels: one path for stage one, stage two and validation.

A request names images and which views of each to cut; threads decode every image once and write its
views into their rows of the batch, uint8. Decoders and resizes release the GIL.
"""

import math
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import numpy as np
import torch

from mealv2.data.pixels import DecodedImage, Resize, ViewsOf, centre_crop, decode_for
from mealv2.data.source import ImageSource
from mealv2.errors import DataError
from mealv2.views import View, Views
from pipeline.loading.requests import CENTRE, BatchRequest, announce

T = TypeVar("T")
Box = tuple[int, int, int, int, int]  # top, left, height, width, flip

_TASK_VIEWS = 8  # cut by a thread before it takes up the next task
_BATCHES_AHEAD = 2


@dataclass(frozen=True)
class Batch:
    """The views of one request: ``images_BCHW`` uint8 (channels-last in memory), row by row.

    ``positions`` and ``views`` name each row; ``sizes_B2`` are the width and height of its image,
    ``boxes_B5`` top, left, height, width and flip of what was cut (0 of a centre crop). ``failed``
    are the images that could not be read, with the reason: they have no rows.
    """

    images_BCHW: torch.Tensor
    sizes_B2: np.ndarray
    boxes_B5: np.ndarray
    positions: list[int] = field(default_factory=list)
    views: list[int] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)


class ViewReader:
    """Cuts views of a source's images; an image that cannot be read is reported, not raised.

    ``views`` defines the views; centre crops need none.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        img_size: int,
        views: Views | None = None,
        resize: Resize = "torch",
    ) -> None:
        self.source = source
        self.img_size = img_size
        self._views = views
        self._resize = resize

    def read(self, request: BatchRequest) -> Batch:
        """Return the pixels of one request, read by this thread."""
        batch = _BatchReader(self, request, memory=_BufferPool(pin_memory=False))
        for task in batch.tasks():
            batch.run(task)
        return batch.batch()

    def view(self, position: int, index: int, *, width: int, height: int) -> View:
        """Return the box and flip of a view of an image."""
        assert self._views is not None, "only centre crops can be cut without views"
        return self._views.view(self.source.keys[position], index, width=width, height=height)

    def cut(self, decoded_image: DecodedImage, position: int, index: int) -> tuple[np.ndarray, Box]:
        """Return the pixels and the box of a view of a decoded image."""
        size, resize = self.img_size, self._resize
        if index == CENTRE:
            return centre_crop(decoded_image.pixels_HWC, size, resize=resize), (0, 0, 0, 0, 0)
        view = self.view(position, index, width=decoded_image.width, height=decoded_image.height)
        return decoded_image.cut(view, size, resize=resize), view.box()


class _Image:
    """An image, decoded once by the thread that needs it first, and released by the last."""

    def __init__(self, source: ImageSource, position: int) -> None:
        self.position = position
        self.failure: str | None = None
        self._source = source
        self._lock = threading.Lock()
        self._uses = 0
        self._is_shared = False
        self._decoded: DecodedImage | None = None

    def keep(self, uses: int) -> None:
        """Keep the pixels for so many more uses."""
        with self._lock:
            self._uses += uses
            self._is_shared = self._uses > 1

    def release(self) -> None:
        """End one use."""
        with self._lock:
            self._uses -= 1
            if self._uses == 0:
                self._decoded = None

    def decoded(self, views_of: ViewsOf | None) -> DecodedImage | None:
        """Return the part that ``views_of`` needs, or all if other tasks need the image too.

        None where it cannot be read; ``failure`` has the reason.
        """
        with self._lock:
            if self._decoded is None and self.failure is None:
                try:
                    data = self._source.read(self.position)
                    self._decoded = decode_for(data, None if self._is_shared else views_of)
                except (DataError, OSError) as error:
                    self.failure = getattr(error, "strerror", None) or str(error)
            return self._decoded


class _BufferPool:
    """Memory of batches, reused as soon as nothing holds a batch any more.

    New memory costs a page fault every 4 kB: writing a view takes five times as long with them.
    """

    def __init__(self, *, pin_memory: bool) -> None:
        self._pin_memory = pin_memory
        self._free: deque[np.ndarray] = deque()

    def take(self, num_rows: int, img_size: int) -> torch.Tensor:
        """Return uninitialised rows of uint8 pixels, B x S x S x 3."""
        shape = (num_rows, img_size, img_size, 3)
        if self._pin_memory:  # torch caches such memory, and knows when a GPU has read it
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        needed = math.prod(shape)
        block = self._free.popleft() if self._free else np.empty(0, dtype=np.uint8)
        if block.size < needed:
            block = np.empty(needed, dtype=np.uint8)
        rows = block[:needed].reshape(shape)
        # tensors of the batch hold this array: it is finalized with the last of them
        weakref.finalize(rows, self._free.append, block)
        return torch.from_numpy(rows)


# Some views of an image, and the row of the first.
_ViewTask = tuple[_Image, tuple[int, ...], int]


class _BatchReader:
    """A batch while threads fill its rows.

    ``before`` is the last image of the request before: its views may continue here.
    """

    def __init__(
        self,
        reader: ViewReader,
        request: BatchRequest,
        *,
        memory: _BufferPool,
        before: _Image | None = None,
    ) -> None:
        self._reader = reader
        self._cuts: list[_ViewTask] = []
        self._positions: list[int] = []
        self._indices: list[int] = []
        image = before
        for position, views in request:
            if image is None or image.position != position:
                image = _Image(reader.source, position)
            starts = range(0, len(views), _TASK_VIEWS)
            image.keep(len(starts))
            for start in starts:
                task_views = views[start : start + _TASK_VIEWS]
                self._cuts.append((image, task_views, len(self._positions) + start))
            self._positions.extend([position] * len(views))
            self._indices.extend(views)
        if image is not None:
            image.keep(1)  # until the next request starts
        if before is not None:
            before.release()
        self.last = image
        num_rows = len(self._positions)
        self._images_BHWC = memory.take(num_rows, reader.img_size)
        self._rows = self._images_BHWC.numpy()
        self._sizes_B2 = np.zeros((num_rows, 2), dtype=np.uint32)
        self._boxes_B5 = np.zeros((num_rows, 5), dtype=np.uint32)

    def tasks(self) -> Iterator[list[_ViewTask]]:
        """Yield tasks of about _TASK_VIEWS views."""
        task: list[_ViewTask] = []
        num_views = 0
        for cut in self._cuts:
            task.append(cut)
            num_views += len(cut[1])
            if num_views >= _TASK_VIEWS:
                yield task
                task, num_views = [], 0
        if task:
            yield task

    def run(self, task: list[_ViewTask]) -> None:
        """Decode the images that are not decoded yet and cut their views."""
        for image, views, row in task:
            cut = self._reader.cut
            decoded_image = image.decoded(None if CENTRE in views else self._views_of(image, views))
            if decoded_image is not None:
                self._sizes_B2[row : row + len(views)] = decoded_image.width, decoded_image.height
                for at, index in enumerate(views, start=row):
                    self._rows[at], self._boxes_B5[at] = cut(decoded_image, image.position, index)
            image.release()

    def _views_of(self, image: _Image, indices: tuple[int, ...]) -> ViewsOf:
        """Return a function of the image's size: some of its views."""
        view, position = self._reader.view, image.position
        return lambda width, height: [
            view(position, i, width=width, height=height) for i in indices
        ]

    def batch(self) -> Batch:
        """Return the batch; all tasks must be done."""
        failed = {i.position: i.failure for i, _, _ in self._cuts if i.failure is not None}
        images_BHWC, sizes_B2, boxes_B5 = self._images_BHWC, self._sizes_B2, self._boxes_B5
        positions, indices = self._positions, self._indices
        if failed:
            kept = [row for row, position in enumerate(positions) if position not in failed]
            images_BHWC = images_BHWC[kept]
            sizes_B2, boxes_B5 = sizes_B2[kept], boxes_B5[kept]
            positions = [positions[row] for row in kept]
            indices = [indices[row] for row in kept]
        images_BCHW = images_BHWC.permute(0, 3, 1, 2)
        return Batch(images_BCHW, sizes_B2, boxes_B5, positions, indices, failed)


@dataclass(frozen=True)
class ViewLoader(Iterable[Batch]):
    """An iterable over the pixels of each request, in order; see read_views."""

    reader: ViewReader
    requests: Iterable[BatchRequest]
    workers: int
    pin_memory: bool

    def __iter__(self) -> Iterator[Batch]:
        if isinstance(self.requests, list):
            announce(self.reader.source, self.requests)
        # warnings of odd palettes and EXIF blocks; all threads share the filters
        warnings.filterwarnings("ignore", module=r"PIL\.")
        if self.workers == 0:
            for batch in self._batches():
                for task in batch.tasks():
                    batch.run(task)
                yield batch.batch()
            return
        # operations that start threads of their own would slow down the other workers
        pool = ThreadPoolExecutor(
            self.workers, "mealv2-read", initializer=torch.set_num_threads, initargs=(1,)
        )
        try:
            yield from self._read_ahead(pool)
        finally:
            pool.shutdown(cancel_futures=True)

    def _batches(self) -> Iterator[_BatchReader]:
        last: _Image | None = None
        memory = _BufferPool(pin_memory=self.pin_memory)
        for request in self.requests:
            batch = _BatchReader(self.reader, request, memory=memory, before=last)
            last = batch.last
            yield batch

    def _read_ahead(self, pool: ThreadPoolExecutor) -> Iterator[Batch]:
        """Yield batches in order, while the next ones are being read."""
        reading: deque[tuple[_BatchReader, list[Future[None]]]] = deque()
        for batch in self._batches():
            reading.append((batch, [pool.submit(batch.run, task) for task in batch.tasks()]))
            num_tasks = sum(len(tasks) for _, tasks in reading)
            if len(reading) > _BATCHES_AHEAD and num_tasks > 2 * self.workers:
                yield _finished(*reading.popleft())
        while reading:
            yield _finished(*reading.popleft())


def _finished(batch: _BatchReader, tasks: list[Future[None]]) -> Batch:
    for task in tasks:
        task.result()
    return batch.batch()


def read_views(
    reader: ViewReader,
    requests: Iterable[BatchRequest],
    *,
    workers: int = 0,
    pin_memory: bool = False,
) -> ViewLoader:
    """Return an iterable over the pixels of each request, in order, read ahead by threads.

    A list of requests is announced to the source; the caller announces other iterables. An image is
    decoded once for all its views, also where they continue in the next request. With 0 ``workers``
    the calling thread reads. ``pin_memory`` puts batches into page-locked memory.
    """
    return ViewLoader(reader, requests, workers, pin_memory)


class WaitTimer(Generic[T]):
    """An iterator that measures the seconds spent waiting for the next item.

    ``start_s`` is the wait for the first item, when nothing was read ahead.
    """

    def __init__(self, items: Iterable[T]) -> None:
        self._items = iter(items)
        self._waited_s = 0.0
        self.start_s: float | None = None

    def __iter__(self) -> "WaitTimer[T]":
        return self

    def __next__(self) -> T:
        asked_s = time.perf_counter()
        item = next(self._items)
        waited_s = time.perf_counter() - asked_s
        self._waited_s += waited_s
        if self.start_s is None:
            self.start_s = waited_s
        return item

    def take(self) -> float:
        """Return the seconds waited since the last call."""
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the same batches with their images on a device, in the same memory layout.

    On a GPU they are copied on a separate stream, from pinned memory. Nothing is read ahead: a host
    that never waits for the device is ahead of it, and so are its copies.
    """
    if device.type != "cuda":
        for batch in batches:
            yield replace(batch, images_BCHW=batch.images_BCHW.to(device))
        return
    copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    for batch in batches:
        with torch.cuda.stream(copies):
            images_BCHW = batch.images_BCHW.to(device, non_blocking=True)
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(copies)
        # else the next copy may take this memory while the model still reads it
        images_BCHW.record_stream(computing)
        yield replace(batch, images_BCHW=images_BCHW)
