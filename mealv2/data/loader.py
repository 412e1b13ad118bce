"""Load batches of views: one path for stage one, stage two and validation.

A request lists images and the views of each; threads decode every image once and write its views
into their rows of the batch, uint8. Decoders and resizes release the GIL.
"""

import threading
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Generic, TypeVar

import numpy as np
import torch

from mealv2.data.buffers import BufferPool
from mealv2.data.content_hash import ImageCheck
from mealv2.data.pixels import DecodedImage, Resize, ViewsOf, centre_crop, decode_for
from mealv2.data.requests import CENTRE, Batch, BatchRequest, announce
from mealv2.data.source import ImageSource
from mealv2.errors import DataError
from mealv2.views import View, Views

T = TypeVar("T")
Box = tuple[int, int, int, int, int]  # top, left, height, width, flip

_TASK_VIEWS = 8  # views in a thread's task
_BATCHES_AHEAD = 2


@dataclass(frozen=True)
class ViewReader:
    """How to load views of a source's images; ``views`` are not needed for centre crops.

    ``other_sizes`` are sizes beside ``img_size`` to resize each view to. ``check`` compares images
    with those that were labelled; batches get ``hashes`` if kept.
    """

    source: ImageSource
    _: KW_ONLY
    img_size: int
    views: Views | None = None
    resize: Resize = "torch"
    check: ImageCheck | None = None
    keeps_hashes: bool = False
    other_sizes: tuple[int, ...] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """All sizes of the views, that of ``img_size`` first."""
        return (self.img_size, *self.other_sizes)

    def hash_of(self, position: int, data: bytes) -> int | None:
        """Return the content hash of an image, None if it is not needed; raises as ``check``."""
        if not (self.keeps_hashes or (self.check is not None and self.check.is_due(position))):
            return None
        found = self.source.original_hash(position, data)
        if self.check is not None:
            self.check(position, found)
        return found

    def read(self, request: BatchRequest) -> Batch:
        """Return the batch of one request, read by this thread."""
        return _BatchReader(self, request, memory=BufferPool(pin_memory=False)).read()

    def views_of(
        self, position: int, indices: Iterable[int], width: int, height: int
    ) -> list[View]:
        """Return the boxes and flips of some views of an image."""
        assert self.views is not None, "only centre crops can be cut without views"
        key = self.source.keys[position]
        return [self.views.view(key, index, width=width, height=height) for index in indices]

    def cut(
        self, decoded_image: DecodedImage, position: int, index: int
    ) -> tuple[list[np.ndarray], Box]:
        """Return the pixels of a view of a decoded image in each of ``sizes``, and its box."""
        resize = self.resize
        if index == CENTRE:
            pixels_HWC = decoded_image.pixels_HWC
            return [centre_crop(pixels_HWC, s, resize=resize) for s in self.sizes], (0, 0, 0, 0, 0)
        (view,) = self.views_of(position, (index,), decoded_image.width, decoded_image.height)
        return [decoded_image.cut(view, s, resize=resize) for s in self.sizes], view.box()


class _Image:
    """An image, decoded by the first thread that needs it, released by the last."""

    def __init__(self, reader: ViewReader, position: int) -> None:
        self.position = position
        self.failure: str | None = None
        self.content_hash: int | None = None
        self._reader = reader
        self._lock = threading.Lock()
        self._uses = 0
        self._is_shared = False
        self._decoded: DecodedImage | None = None

    def keep(self) -> None:
        """Keep the pixels for one more use."""
        with self._lock:
            self._uses += 1
            self._is_shared = self._uses > 1

    def release(self) -> None:
        """End one use."""
        with self._lock:
            self._uses -= 1
            if self._uses == 0:
                self._decoded = None

    def decoded(self, views_of: ViewsOf | None) -> DecodedImage | None:
        """Return the part that ``views_of`` needs, or all of an image that other tasks need too.

        None for an image that cannot be read; ``failure`` has the reason.
        """
        with self._lock:
            if self._decoded is None and self.failure is None:
                try:
                    data = self._reader.source.read(self.position)
                    self.content_hash = self._reader.hash_of(self.position, data)
                    self._decoded = decode_for(data, None if self._is_shared else views_of)
                except (DataError, OSError) as error:
                    self.failure = getattr(error, "strerror", None) or str(error)
            return self._decoded


# Some views of an image, and the row of the first.
_ViewTask = tuple[_Image, tuple[int, ...], int]


class _BatchReader:
    """A batch while threads fill its rows.

    ``before`` is the last image of the previous request: its views may continue in this one.
    """

    def __init__(
        self,
        reader: ViewReader,
        request: BatchRequest,
        *,
        memory: BufferPool,
        before: _Image | None = None,
    ) -> None:
        self._reader = reader
        self._cuts: list[_ViewTask] = []
        self._positions = [position for position, views in request for _ in views]
        self._indices = [index for _, views in request for index in views]
        num_rows, row, image = len(self._positions), 0, before
        for position, views in request:
            if image is None or image.position != position:
                image = _Image(reader, position)
            for start in range(0, len(views), _TASK_VIEWS):
                image.keep()
                self._cuts.append((image, views[start : start + _TASK_VIEWS], row + start))
            row += len(views)
        if image is not None:
            image.keep()  # for the next request
        if before is not None:
            before.release()
        self.last = image
        self._images = [memory.take(num_rows, size) for size in reader.sizes]  # B x S x S x 3
        self._rows = [images_BHWC.numpy() for images_BHWC in self._images]
        self._sizes_B2 = np.zeros((num_rows, 2), dtype=np.uint32)
        self._boxes_B5 = np.zeros((num_rows, 5), dtype=np.uint32)

    def tasks(self) -> Iterator[list[_ViewTask]]:
        """Yield tasks of about _TASK_VIEWS views."""
        task: list[_ViewTask] = []
        for cut in self._cuts:
            task.append(cut)
            if sum(len(views) for _, views, _ in task) >= _TASK_VIEWS:
                yield task
                task = []
        if task:
            yield task

    def read(self) -> Batch:
        """Fill all rows in this thread; return the batch."""
        for task in self.tasks():
            self.run(task)
        return self.finish()

    def run(self, task: list[_ViewTask]) -> None:
        """Decode the images of a task if necessary and cut their views."""
        for image, indices, row in task:
            views_of = partial(self._reader.views_of, image.position, indices)
            decoded_image = image.decoded(None if CENTRE in indices else views_of)
            if decoded_image is not None:
                self._sizes_B2[row : row + len(indices)] = decoded_image.width, decoded_image.height
                for at, index in enumerate(indices, start=row):
                    cut, self._boxes_B5[at] = self._reader.cut(decoded_image, image.position, index)
                    for rows, pixels_HWC in zip(self._rows, cut, strict=True):
                        rows[at] = pixels_HWC
            image.release()

    def finish(self, tasks: Iterable[Future[None]] = ()) -> Batch:
        """Return the batch once its tasks are done."""
        for task in tasks:
            task.result()
        failed = {i.position: i.failure for i, _, _ in self._cuts if i.failure is not None}
        images = (image for image, _, _ in self._cuts)
        hashes = {i.position: i.content_hash for i in images if i.content_hash is not None}
        all_images, sizes_B2, boxes_B5 = self._images, self._sizes_B2, self._boxes_B5
        positions, indices = self._positions, self._indices
        if failed:
            kept = [row for row, position in enumerate(positions) if position not in failed]
            all_images = [images_BHWC[kept] for images_BHWC in all_images]
            sizes_B2, boxes_B5 = sizes_B2[kept], boxes_B5[kept]
            positions = [positions[row] for row in kept]
            indices = [indices[row] for row in kept]
        images_BCHW, *others = (images_BHWC.permute(0, 3, 1, 2) for images_BHWC in all_images)
        other_sizes = dict(zip(self._reader.other_sizes, others, strict=True))
        return Batch(
            images_BCHW, sizes_B2, boxes_B5, positions, indices, failed, hashes, other_sizes
        )


@dataclass(frozen=True)
class ViewLoader(Iterable[Batch]):
    """See ``read_views``."""

    reader: ViewReader
    requests: Iterable[BatchRequest]
    workers: int
    pin_memory: bool

    def __iter__(self) -> Iterator[Batch]:
        if isinstance(self.requests, list):
            announce(self.reader.source, self.requests)
        # about unusual palettes and EXIF blocks; all threads share the filters
        warnings.filterwarnings("ignore", module=r"PIL\.")
        if self.workers == 0:
            yield from (batch.read() for batch in self._readers())
            return
        # one torch thread each: more would slow down the other workers
        pool = ThreadPoolExecutor(
            self.workers, "mealv2-read", initializer=torch.set_num_threads, initargs=(1,)
        )
        try:
            yield from self._read_ahead(pool)
        finally:
            pool.shutdown(cancel_futures=True)

    def _readers(self) -> Iterator[_BatchReader]:
        last: _Image | None = None
        memory = BufferPool(pin_memory=self.pin_memory)
        for request in self.requests:
            batch = _BatchReader(self.reader, request, memory=memory, before=last)
            last = batch.last
            yield batch

    def _read_ahead(self, pool: ThreadPoolExecutor) -> Iterator[Batch]:
        """Yield batches in order while threads read the next ones."""
        reading: deque[tuple[_BatchReader, list[Future[None]]]] = deque()
        for batch in self._readers():
            reading.append((batch, [pool.submit(batch.run, task) for task in batch.tasks()]))
            num_tasks = sum(len(tasks) for _, tasks in reading)
            if len(reading) > _BATCHES_AHEAD and num_tasks > 2 * self.workers:
                yield _BatchReader.finish(*reading.popleft())
        while reading:
            yield _BatchReader.finish(*reading.popleft())


def read_views(
    reader: ViewReader,
    requests: Iterable[BatchRequest],
    *,
    workers: int = 0,
    pin_memory: bool = False,
) -> ViewLoader:
    """Return an iterable over the batch of each request, in order, read ahead by threads.

    A list of requests is announced to the source, other iterables by the caller. An image is
    decoded once, even if its views continue in the next request. With 0 ``workers`` the calling
    thread reads. ``pin_memory`` allocates batches in page-locked memory.
    """
    return ViewLoader(reader, requests, workers, pin_memory)


class WaitTimer(Generic[T]):
    """An iterator that measures the seconds spent waiting for the next item.

    ``start_s`` is the wait for the first item, which nothing has read ahead.
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

    def take_after_start(self) -> float:
        """Return all seconds waited, without the wait for the first item."""
        return self.take() - (self.start_s or 0.0)


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield batches with their images on a device, in the same memory layout.

    Copies to a GPU use a separate stream and pinned memory. Nothing is read ahead: the host runs
    ahead anyway.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch.with_images(lambda images_BCHW: images_BCHW.to(device))
        return
    copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    for batch in batches:
        with torch.cuda.stream(copies):
            copy = batch.with_images(lambda images: images.to(device, non_blocking=True))
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(copies)
        # otherwise the next copy may reuse this memory while the model still reads it
        for images_BCHW in (copy.images_BCHW, *copy.other_sizes.values()):
            images_BCHW.record_stream(computing)
        yield copy
