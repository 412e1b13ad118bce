"""Load batches of views: one path for stage one, stage two and validation.

A request lists images and the views of each; threads decode every image once and write its views
into their rows of the batch, uint8. Decoders and resizes release the GIL.
"""

import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import torch

from mealv2.data.buffers import BufferPool
from mealv2.data.requests import Batch, BatchRequest, announce
from mealv2.data.view_reader import BatchReader, LoadedImage, ViewReader

T = TypeVar("T")

_BATCHES_AHEAD = 2
_TASK_S = 0.01  # a thread's task takes about so long
_MIN_TASK_VIEWS = 8
# A thread waits for files if so many batches in a row take so many times their CPU time.
_WAITING_BATCHES, _WAITING_RATIO = 3, 3.0


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
        with ExitStack() as stack:
            yield from self._read_ahead(stack)

    def _readers(self) -> Iterator[BatchReader]:
        last: LoadedImage | None = None
        memory = BufferPool(pin_memory=self.pin_memory)
        for request in self.requests:
            batch = BatchReader(self.reader, request, memory=memory, before=last)
            last = batch.last
            yield batch
            del batch  # its memory may be the next one's

    def _read_ahead(self, stack: ExitStack) -> Iterator[Batch]:
        """Yield batches in order while threads read the next ones."""
        one_thread, all_threads = (_threads(num, stack) for num in (1, self.workers))
        readers, pace = self._readers(), _Pace()
        many = 2 * self.workers  # tasks
        reading: deque[tuple[int, _Wait]] = deque()
        while True:
            if pace.is_cheap:
                reading.append((many, one_thread.submit(pace.read_next, readers).result))
            else:  # its images are listed in the same thread: after the batches that it reads
                started = _start(one_thread.submit(next, readers, None), all_threads, pace)
                if started is None:
                    break
                reading.append(started)
            if len(reading) > _BATCHES_AHEAD and sum(num for num, _ in reading) > many:
                if (batch := reading.popleft()[1]()) is None:
                    return
                yield batch
                del batch
        while reading:
            if (batch := reading.popleft()[1]()) is not None:
                yield batch


_Wait = Callable[[], Batch | None]  # returns a batch once it is read


def _start(
    listed: "Future[BatchReader | None]", threads: ThreadPoolExecutor, pace: "_Pace"
) -> tuple[int, _Wait] | None:
    """Let threads read a batch, task by task; None if there is none."""
    reader = listed.result()
    if reader is None:
        return None
    tasks = [
        threads.submit(pace.run, reader, num_views, run)
        for num_views, run in reader.tasks(pace.task_views)
    ]
    return len(tasks), partial(reader.finish, tasks)


def _threads(num: int, stack: ExitStack) -> ThreadPoolExecutor:
    """Return threads that end with the stack; tasks that have not begun are dropped."""
    # one torch thread each: more would slow down the other workers
    pool = ThreadPoolExecutor(num, "mealv2-read", initializer=torch.set_num_threads, initargs=(1,))
    stack.callback(pool.shutdown, cancel_futures=True)
    return pool


class _Pace:
    """Measures what a view costs: how many make a task, and whether several threads help.

    They do not for small images: the interpreter's lock passes between threads at a higher cost
    than that of a view. They do where a thread waits for files.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._view_s: float | None = None  # CPU time of a thread, half of it the last task's
        self._is_small = False
        self._num_waiting = 0  # batches in a row

    @property
    def task_views(self) -> int:
        """How many views a task should have."""
        return max(_MIN_TASK_VIEWS, int(_TASK_S / self._view_s) if self._view_s else 0)

    @property
    def is_cheap(self) -> bool:
        """Whether one thread reads faster than several."""
        return self._is_small and self._num_waiting < _WAITING_BATCHES

    def read_next(self, readers: Iterator[BatchReader]) -> Batch | None:
        """Read the next batch in this thread and measure it; None if there is none."""
        reader = next(readers, None)
        if reader is None:
            return None
        start_s, start_cpu_s = time.perf_counter(), time.thread_time()
        for num_views, run in reader.tasks(sys.maxsize):
            self.run(reader, num_views, run)
        cpu_s = time.thread_time() - start_cpu_s
        is_waiting = time.perf_counter() - start_s > _WAITING_RATIO * cpu_s
        self._num_waiting = self._num_waiting + 1 if reader.reads_files and is_waiting else 0
        return reader.finish()

    def run(self, reader: BatchReader, num_views: int, run: Callable[[], None]) -> None:
        """Run a task and measure it."""
        start_s = time.thread_time()
        run()
        view_s = (time.thread_time() - start_s) / max(1, num_views)
        with self._lock:
            self._view_s = view_s if self._view_s is None else (self._view_s + view_s) / 2
            self._is_small = not reader.has_large_images


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
