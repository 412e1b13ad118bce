"""Make the missing shards of a label set: read views, run the teachers, encode, write."""

import errno
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from types import MappingProxyType
from typing import Protocol

import numpy as np

from mealv2 import label_set
from mealv2.data.content_hash import hash_text
from mealv2.data.loader import read_views
from mealv2.data.requests import Batch, BatchRequest
from mealv2.errors import DataError, RemoteError, StopRequested
from mealv2.label_set import Encoding, Images, Shard, ShardFile, bound_to_first, stored_class
from mealv2.labelling.annotator import Annotations, Annotator
from mealv2.labelling.compare import compare_images, require_same
from mealv2.labelling.manifest import is_complete
from mealv2.labelling.plan import LabelSplit, batch_requests
from mealv2.labelling.store import Store
from mealv2.messages import info, progress
from mealv2.runtime import LocalRuntime
from mealv2.storage.atomic import DISK_FULL, Stamp, file_stamp
from mealv2.text import count, use_display_names

# Errors of one shard that the next shard may not have: of its images, the device, the file system,
# the object store.
_SHARD_ERRORS = (DataError, RemoteError, OSError, RuntimeError)
_BUGS = (NotImplementedError, RecursionError)  # RuntimeErrors that would fail every shard
_NO_SPACE = DISK_FULL | {errno.EROFS}


CompleteCheck = Callable[[LabelSplit, Sequence[int]], None]  # of shards of a split, by number


class Stop(Protocol):
    """Asked before every batch whether to go no further; a StopFlag."""

    def check(self) -> None:
        """Raise StopRequested to stop."""


def find_missing(
    split: LabelSplit,
    store: Store,
    *,
    numbers: Sequence[int] | None = None,
    listed: Mapping[str, str] = MappingProxyType({}),
) -> dict[int, Stamp | None]:
    """Return the missing or damaged shards of ``numbers``, by default of all, and their stamps.

    ``listed`` are the SHA-256 of some files in a manifest, by name. write_shard replaces a damaged
    file only if it still has the returned stamp.
    """
    numbers = range(len(split.shards)) if numbers is None else numbers
    missing = {}
    for number in numbers:
        planned = split.planned[number]
        name, path = planned.name, store.folder / planned.name
        check = partial(is_complete, store.folder, planned, split.plan_sha256, listed.get(name))
        store.fetch(name)
        stamp, complete = file_stamp(path), check()
        if not complete and store.refetch(name):  # only the local copy may be damaged
            stamp, complete = file_stamp(path), check()
        if not complete:
            missing[number] = stamp
        elif store.is_missing(name):  # a run ended before the upload
            store.upload(name)
    if len(missing) < len(numbers):
        num_complete = len(numbers) - len(missing)
        info(f"{split.name}: {num_complete} of {count(len(numbers), 'shard')} complete")
    return missing


def check_complete(
    split: LabelSplit,
    numbers: Sequence[int],
    *,
    store: Store,
    workers: int,
    skip_unreadable: bool,
) -> None:
    """Compare the images of complete shards with those that were labelled, before others are made.

    Names and sizes are in the plan, so images of the same names and sizes could be mixed. Raises
    LabelSetError.
    """
    source = split.source
    files = (
        (ShardFile(store.folder / split.planned[number].name), split.shards[number])
        for number in numbers
    )
    found = compare_images(
        source,
        label_set.shard_hashes(files, source.keys),
        [position for number in numbers for position in split.shards[number]],
        workers=workers,
        what=f"images of complete shards of {split.name}",
    )
    if found.images:
        info(f"{split.name}: {found.summary()} compared with the labelled ones")
    advice = "give the data that was labelled, or a new --output"
    require_same(found, source, store.location, advice=advice, skip_unreadable=skip_unreadable)


def label_shards(
    split: LabelSplit,
    missing: Mapping[int, Stamp | None],
    annotator: Annotator,
    store: Store,
    *,
    workers: int,
    stop: Stop | None = None,
    failed: dict[str, str] | None = None,
) -> None:
    """Label and write the shards that ``find_missing`` returned.

    Checks ``stop`` before every batch. Raises the first error; or, with ``failed``, records an
    error of one shard there by name and labels the other shards, unless the disk is full.
    """
    requests = {
        number: batch_requests(split.shards[number], split.views, annotator.batch_size)
        for number in missing
    }
    names = {number: split.planned[number].name for number in missing}
    read = partial(_read_views, split, annotator.runtime, workers=workers, stop=stop)

    def write(number: int, annotations: Annotations) -> None:
        try:
            shard = make_shard(split, number, annotations, annotator.encoding)
            if annotator.first is not None:
                first = annotator.first.blocks[0][1][number]
                shard = bound_to_first(shard, annotator.encoding, first.head_sha256)
            # The first complete shard wins, even one that another job wrote in the meantime. Only
            # the damaged file (or a dead link) is replaced.
            damaged = missing[number]
            label_set.write_shard(store.folder / names[number], shard, damaged=damaged)
            store.upload(names[number], damaged=damaged is not None)
        except _SHARD_ERRORS as error:
            _record_failure(failed, names[number], error)

    # All shards are one stream of batches: while the teachers run, threads read the next views and
    # the writer encodes and writes the previous shard. The device waits for neither.
    batches = read(requests)
    with BackgroundWriter() as writer:
        for number in missing:
            of_shard = islice(batches, len(requests.pop(number)))
            try:
                annotations = annotator.annotate(
                    split.source,
                    of_shard,
                    num_views=len(split.views),
                    count_correct=split.name == "val",
                )
            except _SHARD_ERRORS as error:
                _record_failure(failed, names[number], error)
                batches = read(requests)  # a stream that raised has ended: read what remains
            else:
                writer.submit(partial(write, number, annotations))


def _read_views(
    split: LabelSplit,
    runtime: LocalRuntime,
    requests: Mapping[int, list[BatchRequest]],
    *,
    workers: int,
    stop: Stop | None,
) -> Iterator[Batch]:
    """Return an iterator over the views of some shards, batch by batch, with a progress bar."""
    in_order = [request for of_shard in requests.values() for request in of_shard]
    pin_memory = runtime.should_pin_memory
    views = read_views(split.reader, in_order, workers=workers, pin_memory=pin_memory)
    return progress(
        views if stop is None else _until_stopped(views, stop),
        total=sum(len(split.shards[number]) for number in requests) * len(split.views),
        what=f"labelling {split.name}",
        unit="views",
        size=view_counter(len(split.views)),
    )


def _until_stopped(views: Iterable[Batch], stop: Stop) -> Iterator[Batch]:
    for batch in views:
        stop.check()
        yield batch


def view_counter(num_views: int) -> Callable[[Batch], int]:
    """Return a function that counts the views of a batch, with all views of a failed image once."""
    failed: set[int] = set()

    def count(batch: Batch) -> int:
        new = batch.failed.keys() - failed
        failed.update(new)
        return len(batch.positions) + len(new) * num_views

    return count


def make_shard(
    split: LabelSplit, number: int, annotations: Annotations, encoding: Encoding
) -> Shard:
    """Return the content of a shard: labels, and the images without labels."""
    num_views = len(split.views)
    positions = annotations.positions[::num_views]
    source, hashes = split.source, annotations.hashes
    top1, top5 = annotations.correct.tolist()
    is_train = split.name == "train"
    return Shard(
        plan_sha256=split.plan_sha256,
        split=split.name,
        number=number,
        first_view=split.planned[number].views.start,
        num_views=num_views,
        keys=[source.keys[p] for p in positions],
        blocks=encoding.blocks(annotations.rows, num_views),
        images=Images(
            annotations.sizes_N2[::num_views],
            np.array([source.sizes[p] for p in positions], dtype=np.uint64),
            np.array([stored_class(source.labels[p]) for p in positions], dtype=np.uint32),
            np.array([hashes[p] for p in positions], dtype=np.uint64) if hashes else None,
        ),
        boxes_sha256=label_set.boxes_sha256(annotations.boxes_N5) if is_train else None,
        skipped={
            source.keys[p]: {
                "position": split.shards[number].index(p),
                "reason": reason,
                "bytes": source.sizes[p],
                "class": stored_class(source.labels[p]),
                **({"content_hash": hash_text(hashes[p])} if p in hashes else {}),
            }
            for p, reason in annotations.failed.items()
        },
        counts={} if is_train else {"top1": top1, "top5": top5},
        loss=annotations.loss,
    )


def _record_failure(failed: dict[str, str] | None, name: str, error: Exception) -> None:
    """Record why a shard failed; raises the error if it would fail the other shards too."""
    codes = {getattr(e, "errno", None) for e in (error, error.__cause__)}
    if failed is None or isinstance(error, _BUGS) or codes & _NO_SPACE:
        raise error
    failed[name] = _reason(error)
    info(f"shard {name} failed: {failed[name]}; continuing with the other shards")


def _reason(error: Exception) -> str:
    """Return the cause of an error in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return use_display_names((str(error).strip().splitlines() or [type(error).__name__])[0])


class BackgroundWriter:
    """Runs tasks in order in a thread, while the caller prepares the next one.

    The next ``submit`` or the end of the block raises the error of a task; later tasks do not run.
    The block waits for all submitted tasks, also after an exception.
    """

    def __enter__(self) -> "BackgroundWriter":
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writing")
        self._pending: deque[Future[None]] = deque()
        self._has_failed = False
        return self

    def submit(self, task: Callable[[], None]) -> None:
        """Run a task after the previous ones; waits while two are unfinished."""
        while self._pending and (len(self._pending) > 1 or self._pending[0].done()):
            self._pending.popleft().result()
        self._pending.append(self._thread.submit(self._run, task))

    def _run(self, task: Callable[[], None]) -> None:
        if not self._has_failed:
            self._has_failed = True  # unless the task returns
            task()
            self._has_failed = False

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        if kind is None or issubclass(kind, StopRequested):
            for future in self._pending:
                future.result()
