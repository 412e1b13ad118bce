"""Making shards: the ensemble's answers about views of images, in the folder of one plan.

What is there whole is kept; the manifest is written from the files as they are. Used by precompute
and by `labels add-views`.
"""

import errno
import signal
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mealv2 import label_set
from mealv2.errors import DataError, LabelSetError, RemoteError, StoppedError
from mealv2.files import FULL, Stamp, json_sha256, stamp_of
from mealv2.images import ImageSource
from mealv2.label_set import Images, PlannedShard, Shard, ShardFile
from mealv2.pixels import Resize
from mealv2.views import Views
from pipeline import copies, logs, runtime
from pipeline.finishing import batch_size_of, finish, whole_shard
from pipeline.labelling import Answers, Labeller
from pipeline.loading.loader import Batch, ViewReader, read_views
from pipeline.loading.requests import BatchRequest
from pipeline.mirror import Store

# What can be wrong with one shard and not with the next: its images, the device, the file system,
# its files in a store.
_FAILURES = (DataError, RemoteError, OSError, RuntimeError)
_NO_FAILURES = (NotImplementedError, RecursionError)  # of those: errors of the program
_NO_ROOM = FULL | {errno.EROFS}


@dataclass(frozen=True)
class Role:
    """Views of a split to label: ``train`` random ones, ``val`` the centre crop.

    ``shards`` are the positions in the source of each shard's images.
    """

    name: str
    source: ImageSource
    views: tuple[int, ...]
    shards: list[Sequence[int]]

    @property
    def num_labels(self) -> int:
        """How many views are labelled."""
        return len(self.source) * len(self.views)

    @property
    def first_view(self) -> int:
        """The number of its first view; a centre crop is view 0 of an image."""
        return self.views[0] if self.name == "train" else 0

    def planned(self, number: int) -> PlannedShard:
        """Return one of its shards."""
        views = range(self.first_view, self.first_view + len(self.views))
        return PlannedShard(self.name, number, views, self.shards[number])

    def path(self, folder: Path, number: int) -> Path:
        """Return where a shard of it lies in the folder of a set."""
        return folder / self.planned(number).name


@dataclass(frozen=True)
class ReadSettings:
    """How the images of a role are read: threads, the size, boxes and resize of views, and where
    pixels lie.
    """

    workers: int
    img_size: int
    views: Views
    resize: Resize
    pin_memory: bool = False

    def pixels(self, role: Role, requests: list[BatchRequest]) -> Iterator[Batch]:
        """Return the views of requests, in order."""
        reader = ViewReader(
            role.source, img_size=self.img_size, views=self.views, resize=self.resize
        )
        workers = self.workers if requests else 0
        return iter(read_views(reader, requests, workers=workers, pin_memory=self.pin_memory))


class StageOne:
    """Fills the folder of one plan: makes the shards that are not there whole."""

    def __init__(
        self, store: Store, plan: dict[str, Any], labeller: Labeller, reading: ReadSettings
    ) -> None:
        self.store = store
        self.folder = folder = store.folder
        self.plan = plan
        self.labeller = labeller
        self.reading = reading
        self.plan_sha256 = json_sha256(plan)
        # by name, of shards that were not looked at yet: a manifest knows every byte of them
        self._listed = label_set.listed_sha256(folder, self.plan_sha256)
        # what the manifest will say of it: who makes no shard changes nothing
        self._batch_size = batch_size_of(folder) or labeller.batch_size

    def label(self, roles: Sequence[Role]) -> int:
        """Make what is missing; return how many shards. Raises StoppedError on Ctrl-C.

        Ctrl-C stops between two batches; SIGTERM ends the process as it does any other: schedulers
        requeue what a signal killed.
        """
        with runtime.stop_on_signal(signal.SIGINT) as stop:
            try:
                return sum(self._label(role, stop) for role in roles)
            except runtime.StopRequested:
                raise StoppedError(
                    "stopped; what was finished is kept: run the same command again to go on"
                ) from None

    def _label(self, role: Role, stop: runtime.StopFlag) -> int:
        """Make the missing shards of a role; return how many there were."""
        lacking = self._lacking(role, range(len(role.shards)))
        if lacking:
            self._batch_size = self.labeller.batch_size
        with _Behind() as behind:
            answers = self._answers(role, list(lacking), stop)
            for (number, there_was), answer in zip(lacking.items(), answers, strict=True):
                behind.do(partial(self._write, role, number, answer, there_was))
        return len(lacking)

    def label_some(
        self, roles: Sequence[Role], names: Collection[str]
    ) -> tuple[int, dict[str, str]]:
        """Make what is missing of some shards; return how many, and why others failed, by name.

        One that fails is said, and the rest go on. No signal is handled: jobs are requeued when a
        signal killed them. Raises OSError where there is no room for any.
        """
        # other jobs make shards anew, of which a manifest of before knows nothing
        self._listed.clear()
        failed: dict[str, str] = {}
        num_lacking = 0
        for role in roles:
            numbers = [n for n in range(len(role.shards)) if role.planned(n).name in names]
            lacking = self._lacking(role, numbers)
            num_lacking += len(lacking)
            self._label_each(role, lacking, failed)
        return num_lacking - len(failed), failed

    def _label_each(
        self, role: Role, lacking: dict[int, Stamp | None], failed: dict[str, str]
    ) -> None:
        """Make shards, each whatever becomes of the others."""
        left = deque(lacking)

        def note(number: int, error: Exception) -> None:
            codes = {getattr(e, "errno", None) for e in (error, error.__cause__)}
            if isinstance(error, _NO_FAILURES) or codes & _NO_ROOM:
                raise error
            name = role.planned(number).name
            failed[name] = _reason(error)
            logs.say(f"shard {name} failed: {failed[name]}; going on without it")

        def write(number: int, answers: Answers) -> None:
            try:
                self._write(role, number, answers, lacking[number])
            except _FAILURES as error:
                note(number, error)

        with _Behind() as behind:
            answers = self._answers(role, list(left))
            while left:
                try:
                    answer = next(answers)
                except _FAILURES as error:
                    note(left.popleft(), error)
                    answers = self._answers(role, list(left))  # a stream that failed has ended
                else:
                    behind.do(partial(write, left.popleft(), answer))

    def _lacking(self, role: Role, numbers: Sequence[int]) -> dict[int, Stamp | None]:
        """Return which shards are not there whole, with the stamp of what is in their place."""
        lacking = {}
        for number in numbers:
            was, file = self._found(role, number)
            if file is None:
                lacking[number] = was
        if len(lacking) < len(numbers):
            there = len(numbers) - len(lacking)
            logs.say(f"{role.name}: {there} of {logs.count(len(numbers), 'shard')} there")
        return lacking

    def _answers(
        self, role: Role, numbers: Sequence[int], stop: runtime.StopFlag | None = None
    ) -> Iterator[Answers]:
        """Yield the answers for shards, read as one stream."""
        requests = {n: requests_of(role, role.shards[n], self.labeller.batch_size) for n in numbers}
        num_views = len(role.views)
        pixels = self.reading.pixels(role, [r for part in requests.values() for r in part])
        pixels = logs.progress(
            pixels if stop is None else _until_stopped(pixels, stop),
            total=sum(len(role.shards[n]) for n in numbers) * num_views,
            what=f"labelling {role.name}",
            unit="views",
            size=_counter(num_views),
        )
        for number in numbers:
            share = islice(pixels, len(requests[number]))
            yield self.labeller.label(role.source, share, score=role.name == "val")

    def _write(self, role: Role, number: int, answers: Answers, there_was: Stamp | None) -> None:
        path = role.path(self.folder, number)
        shard = self._shard(role, number, answers)
        # the first whole shard wins, also one that another job made while this one was at it;
        # what was there at the beginning is damaged, or a dead link, and gives way
        label_set.write_shard(path, shard, damaged=there_was)
        self.store.publish(path.name, damaged=there_was is not None)

    def _shard(self, role: Role, number: int, answers: Answers) -> Shard:
        num_views = len(role.views)
        images = answers.positions[::num_views]
        source = role.source
        top1, top5 = answers.correct.tolist()
        return Shard(
            plan_sha256=self.plan_sha256,
            role=role.name,
            number=number,
            first_view=role.first_view,
            num_views=num_views,
            keys=[source.keys[p] for p in images],
            blocks=self.labeller.encoding.blocks(answers.rows, num_views),
            images=Images(
                answers.sizes_N2[::num_views],
                np.array([source.sizes[p] for p in images], dtype=np.uint64),
                np.array([source.labels[p] for p in images], dtype=np.uint32),
            ),
            boxes_sha256=label_set.boxes_sha256(answers.boxes_N5) if role.name == "train" else None,
            skipped={
                source.keys[p]: {
                    "position": role.shards[number].index(p),
                    "reason": reason,
                    "bytes": source.sizes[p],
                    "class": source.labels[p],
                }
                for p, reason in answers.failed.items()
            },
            counts={"top1": top1, "top5": top5} if role.name == "val" else {},
        )

    def _found(self, role: Role, number: int) -> tuple[Stamp | None, ShardFile | None]:
        """Return a shard of this plan that is there and checks, or None and say why.

        Also the stamp of the file that was looked at, which gives way if it does not check.
        """
        planned = role.planned(number)
        # asked once: one that is made anew elsewhere may differ from what was listed
        listed = self._listed.pop(planned.name, None)
        self.store.bring(planned.name)
        was = stamp_of(role.path(self.folder, number))
        file = whole_shard(self.folder, planned, self.plan_sha256, listed)
        if file is None and self.store.renew(planned.name):  # it may be the copy that is damaged
            was = stamp_of(role.path(self.folder, number))
            file = whole_shard(self.folder, planned, self.plan_sha256, listed)
        if file is not None and self.store.lacks(planned.name):  # made, and not put there yet
            self.store.publish(planned.name)
        return was, file

    def shards(self, role: Role) -> list[ShardFile]:
        """Return every shard of a role; raises LabelSetError for one that is not whole."""
        found = []
        for number in range(len(role.shards)):
            _, file = self._found(role, number)
            if file is None:
                raise LabelSetError(
                    f"shard {self.folder / role.planned(number).name} vanished or broke after it "
                    "was written; run the same command again"
                )
            found.append(file)
        return found

    def finish(self) -> dict[str, Any]:
        """Write and return the manifest, from the files as they are; see ``finishing.finish``."""
        return finish(self.store, self.plan, batch_size=self._batch_size, listed=self._listed)


def requests_of(role: Role, positions: Sequence[int], batch_size: int) -> list[BatchRequest]:
    """Cut the views of images into requests of exactly one batch, the last one fewer.

    The views of an image follow each other, and go on in the next request where one is full.
    """
    num_views = len(role.views)
    total = len(positions) * num_views
    requests = []
    for start in range(0, total, batch_size):
        stop = min(start + batch_size, total)
        requests.append(
            [
                (positions[image], role.views[max(0, start - first) : stop - first])
                for image in range(start // num_views, -(-stop // num_views))
                for first in (image * num_views,)
            ]
        )
    return requests


class _Behind:
    """Does one thing after another in a thread of its own, while the next is being prepared.

    What went wrong is raised by the next ``do`` or at the end, and nothing after it is done. At the
    end of the block, however it ends, all that was handed over is done.
    """

    def __enter__(self) -> "_Behind":
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writing")
        self._begun: deque[Future[None]] = deque()
        return self

    def do(self, task: Callable[[], None]) -> None:
        """Do a task after those before it; waits while two are unfinished."""
        while self._begun and (len(self._begun) > 1 or self._begun[0].done()):
            self._begun.popleft().result()
        before = self._begun[-1] if self._begun else None
        self._begun.append(self._thread.submit(_after, before, task))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        if kind is None or issubclass(kind, runtime.StopRequested):
            for done in self._begun:
                done.result()


def _after(before: "Future[None] | None", task: Callable[[], None]) -> None:
    if before is not None:
        before.result()
    task()


def _counter(num_views: int) -> Callable[[Batch], int]:
    """Return a function that says how many views a batch brings to an end, failed ones too."""
    failed: set[int] = set()

    def count(item: Batch) -> int:
        new = item.failed.keys() - failed  # an image can fail in several batches
        failed.update(new)
        return len(item.positions) + len(new) * num_views

    return count


def _reason(error: Exception) -> str:
    """Return what went wrong, in a line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return copies.told((str(error).strip().splitlines() or [type(error).__name__])[0])


def _until_stopped(pixels: Iterator[Batch], stop: runtime.StopFlag) -> Iterator[Batch]:
    for item in pixels:
        stop.check()
        yield item
