"""Write the shards of a label set: read views, run the teachers, encode, write, shard by shard.

Complete shards in the folder of the set are kept.
"""

import errno
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from types import MappingProxyType

import numpy as np

from mealv2 import label_set
from mealv2.errors import DataError, LabelSetError, RemoteError, StoppedError
from mealv2.label_set import Encoding, Images, PlannedShard, Shard, ShardFile
from mealv2.storage.atomic import DISK_FULL, Stamp, file_stamp
from pipeline import console, display_names
from pipeline.labelling.annotate import Annotations, Annotator
from pipeline.labelling.manifest import load_complete_shard
from pipeline.labelling.plan import LabelSplit, batch_requests
from pipeline.labelling.store import Store
from pipeline.loading.loader import Batch, read_views
from pipeline.loading.requests import BatchRequest
from pipeline.runtime.signals import StopFlag, StopRequested, stop_on_signal

# Errors that concern one shard and may not concern the next: its images, the device, the file
# system, its file in the object store.
_SHARD_ERRORS = (DataError, RemoteError, OSError, RuntimeError)
_BUGS = (NotImplementedError, RecursionError)  # RuntimeErrors that would fail every shard
_NO_SPACE = DISK_FULL | {errno.EROFS}


def find_missing(
    split: LabelSplit,
    store: Store,
    *,
    numbers: Sequence[int] | None = None,
    listed: Mapping[str, str] = MappingProxyType({}),
) -> dict[int, Stamp | None]:
    """Return the shards that are missing or damaged, with the stamp of a damaged file.

    Looks at the shards of ``numbers``, by default at all. ``listed`` are the SHA-256 that a
    manifest gives for some files, by name. write_shard replaces a file only if it has this stamp.
    """
    numbers = range(len(split.shards)) if numbers is None else numbers
    missing = {}
    for number in numbers:
        planned = split.planned(number)
        stamp, file = _load(planned, store, split.plan_sha256, listed.get(planned.name))
        if file is None:
            missing[number] = stamp
    if len(missing) < len(numbers):
        num_complete = len(numbers) - len(missing)
        console.info(
            f"{split.name}: {num_complete} of {console.count(len(numbers), 'shard')} complete"
        )
    return missing


def label_shards(
    split: LabelSplit,
    missing: Mapping[int, Stamp | None],
    annotator: Annotator,
    store: Store,
    *,
    workers: int,
    stop: StopFlag | None = None,
    failed: dict[str, str] | None = None,
) -> None:
    """Label the shards that ``find_missing`` returned, and write each one when it is labelled.

    ``stop`` is checked before every batch. Without ``failed`` the first error is raised. With it,
    an error that concerns one shard is recorded there by the name of the shard, and the other
    shards are labelled; OSError is still raised if the disk is full.
    """
    requests = {
        number: batch_requests(split.shards[number], split.views, annotator.batch_size)
        for number in missing
    }
    names = {number: split.planned(number).name for number in missing}
    read = partial(
        _read_views,
        split,
        workers=workers,
        pin_memory=annotator.runtime.should_pin_memory,
        stop=stop,
    )

    def write(number: int, annotations: Annotations) -> None:
        try:
            shard = make_shard(split, number, annotations, annotator.encoding)
            # The first complete shard wins, also if another job wrote it in the meantime. Only the
            # file that was damaged before (or a dead link) is replaced.
            damaged = missing[number]
            label_set.write_shard(store.folder / names[number], shard, damaged=damaged)
            store.upload(names[number], damaged=damaged is not None)
        except _SHARD_ERRORS as error:
            _record_failure(failed, names[number], error)

    # All shards are one stream of batches: while the teachers run, threads read the views that
    # come next and the writer encodes and writes the shard before. The device waits for neither.
    batches = read(requests)
    with BackgroundWriter() as writer:
        for number in missing:
            of_shard = islice(batches, len(requests.pop(number)))
            try:
                annotations = annotator.annotate(
                    split.source, of_shard, count_correct=split.name == "val"
                )
            except _SHARD_ERRORS as error:
                _record_failure(failed, names[number], error)
                batches = read(requests)  # a stream that raised has ended: read what remains
            else:
                writer.submit(partial(write, number, annotations))


def _read_views(
    split: LabelSplit,
    requests: Mapping[int, list[BatchRequest]],
    *,
    workers: int,
    pin_memory: bool,
    stop: StopFlag | None,
) -> Iterator[Batch]:
    """Return an iterator over the views of some shards, batch by batch, with a progress bar."""
    in_order = [request for of_shard in requests.values() for request in of_shard]
    views = read_views(split.reader, in_order, workers=workers, pin_memory=pin_memory)
    return console.progress(
        views if stop is None else _until_stopped(views, stop),
        total=sum(len(split.shards[number]) for number in requests) * len(split.views),
        what=f"labelling {split.name}",
        unit="views",
        size=view_counter(len(split.views)),
    )


def _until_stopped(views: Iterable[Batch], stop: StopFlag) -> Iterator[Batch]:
    for batch in views:
        stop.check()
        yield batch


def view_counter(num_views: int) -> Callable[[Batch], int]:
    """Return a function that counts the views a batch completes, those of failed images included.

    An image can fail in several batches; its views count once.
    """
    failed: set[int] = set()

    def count(batch: Batch) -> int:
        new = batch.failed.keys() - failed
        failed.update(new)
        return len(batch.positions) + len(new) * num_views

    return count


def make_shard(
    split: LabelSplit, number: int, annotations: Annotations, encoding: Encoding
) -> Shard:
    """Return the content of a shard: the labels of its images, and which images have none."""
    num_views = len(split.views)
    positions = annotations.positions[::num_views]
    source = split.source
    top1, top5 = annotations.correct.tolist()
    is_train = split.name == "train"
    return Shard(
        plan_sha256=split.plan_sha256,
        split=split.name,
        number=number,
        first_view=split.planned(number).views.start,
        num_views=num_views,
        keys=[source.keys[p] for p in positions],
        blocks=encoding.blocks(annotations.rows, num_views),
        images=Images(
            annotations.sizes_N2[::num_views],
            np.array([source.sizes[p] for p in positions], dtype=np.uint64),
            np.array([source.labels[p] for p in positions], dtype=np.uint32),
        ),
        boxes_sha256=label_set.boxes_sha256(annotations.boxes_N5) if is_train else None,
        skipped={
            source.keys[p]: {
                "position": split.shards[number].index(p),
                "reason": reason,
                "bytes": source.sizes[p],
                "class": source.labels[p],
            }
            for p, reason in annotations.failed.items()
        },
        counts={} if is_train else {"top1": top1, "top5": top5},
    )


def complete_shards(split: LabelSplit, store: Store) -> list[ShardFile]:
    """Return every shard of a split; raises LabelSetError if one is missing or damaged."""
    files = []
    for number in range(len(split.shards)):
        planned = split.planned(number)
        _, file = _load(planned, store, split.plan_sha256)
        if file is None:
            raise LabelSetError(
                f"shard {store.folder / planned.name} was removed or damaged after it was written; "
                "run the same command again"
            )
        files.append(file)
    return files


def _load(
    planned: PlannedShard, store: Store, plan_sha256: str, listed_sha256: str | None = None
) -> tuple[Stamp | None, ShardFile | None]:
    """Return the stamp of a shard's file, and the shard if it is complete."""
    path = store.folder / planned.name
    store.fetch(planned.name)
    stamp = file_stamp(path)
    file = load_complete_shard(store.folder, planned, plan_sha256, listed_sha256)
    if file is None and store.refetch(planned.name):  # only the local copy may be damaged
        stamp = file_stamp(path)
        file = load_complete_shard(store.folder, planned, plan_sha256, listed_sha256)
    if file is not None and store.is_missing(planned.name):  # a run ended before the upload
        store.upload(planned.name)
    return stamp, file


def _record_failure(failed: dict[str, str] | None, name: str, error: Exception) -> None:
    """Record why a shard failed; raises the error if others would fail of the same cause."""
    codes = {getattr(e, "errno", None) for e in (error, error.__cause__)}
    if failed is None or isinstance(error, _BUGS) or codes & _NO_SPACE:
        raise error
    failed[name] = _reason(error)
    console.info(f"shard {name} failed: {failed[name]}; continuing with the other shards")


def _reason(error: Exception) -> str:
    """Return the cause of an error in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return display_names.use_display_names(
        (str(error).strip().splitlines() or [type(error).__name__])[0]
    )


@contextmanager
def stop_between_batches() -> Iterator[StopFlag]:
    """Turn Ctrl-C into StoppedError between two batches, after the writer has finished.

    SIGTERM ends the process as it does any other: schedulers requeue jobs that a signal killed.
    """
    with stop_on_signal(signal.SIGINT) as stop:
        try:
            yield stop
        except StopRequested:
            raise StoppedError(
                "stopped; complete shards are kept: run the same command again to continue"
            ) from None


class BackgroundWriter:
    """Runs tasks one after another in a thread, while the caller prepares the next one.

    An error of a task is raised by the next ``submit`` or at the end of the block, and no later
    task runs. The block waits for all submitted tasks, also if it ends by an exception.
    """

    def __enter__(self) -> "BackgroundWriter":
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writing")
        self._pending: deque[Future[None]] = deque()
        return self

    def submit(self, task: Callable[[], None]) -> None:
        """Run a task after those before it; waits while two are unfinished."""
        while self._pending and (len(self._pending) > 1 or self._pending[0].done()):
            self._pending.popleft().result()
        previous = self._pending[-1] if self._pending else None
        self._pending.append(self._thread.submit(_run_after, previous, task))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        if kind is None or issubclass(kind, StopRequested):
            for future in self._pending:
                future.result()


def _run_after(previous: "Future[None] | None", task: Callable[[], None]) -> None:
    if previous is not None:
        previous.result()
    task()
