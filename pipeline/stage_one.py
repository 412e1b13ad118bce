"""Making shards: the ensemble's answers about views of images, in the folder of one plan.

What is there whole is kept; the manifest is written from the files as they are. Used by precompute
and by `labels add-views`.
"""

import re
import signal
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mealv2 import label_set
from mealv2.errors import LabelSetError, StoppedError
from mealv2.files import TEMPORARY_PREFIX, file_sha256, json_sha256
from mealv2.images import ImageSource
from mealv2.label_set import Images, Shard, ShardFile
from mealv2.pixels import Resize
from mealv2.views import Views
from pipeline import logs, runtime
from pipeline.labelling import Answers, Labeller
from pipeline.loaders import Pixels, Request, ViewReader, read_views

Stamp = tuple[int, int, int]  # inode, size and time of a file


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

    def path(self, folder: Path, number: int) -> Path:
        """Return where a shard of it lies in the folder of a set."""
        was_added = self.first_view > 0
        views = range(self.views[0], self.views[-1] + 1) if was_added else None
        return folder / label_set.shard_name(self.name, number, views)


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

    def pixels(self, role: Role, requests: list[Request]) -> Iterator[Pixels]:
        """Return the views of requests, in order."""
        reader = ViewReader(
            role.source, img_size=self.img_size, views=self.views, resize=self.resize
        )
        workers = self.workers if requests else 0
        return iter(read_views(reader, requests, workers=workers, pin_memory=self.pin_memory))


class StageOne:
    """Fills the folder of one plan: makes the shards that are not there whole."""

    def __init__(
        self, folder: Path, plan: dict[str, Any], labeller: Labeller, reading: ReadSettings
    ) -> None:
        self.folder = folder
        self.plan = plan
        self.labeller = labeller
        self.reading = reading
        self.plan_sha256 = json_sha256(plan)
        # by name, of shards that were not looked at yet: a manifest knows every byte of them
        self._listed = label_set.listed_sha256(folder, self.plan_sha256)
        # what the manifest will say of it: who makes no shard changes nothing
        self._batch_size = _batch_size_of(folder) or labeller.batch_size

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
        numbers = range(len(role.shards))
        there_was = {n: _stamp(role.path(self.folder, n)) for n in numbers}
        missing = [n for n in numbers if self._whole_shard(role, n) is None]
        if len(missing) < len(role.shards):
            there = len(role.shards) - len(missing)
            logs.say(f"{role.name}: {there} of {len(role.shards)} shards are there")
        requests = {n: requests_of(role, role.shards[n], self.labeller.batch_size) for n in missing}
        num_views = len(role.views)
        pixels = logs.progress(
            _until_stopped(
                self.reading.pixels(role, [r for part in requests.values() for r in part]), stop
            ),
            total=sum(len(role.shards[n]) for n in missing) * num_views,
            what=f"labelling {role.name}",
            unit="views",
            size=_counter(num_views),
        )
        if missing:
            self._batch_size = self.labeller.batch_size
        with _Behind() as behind:
            for number in missing:
                share = islice(pixels, len(requests[number]))
                answers = self.labeller.label(role.source, share, score=role.name == "val")
                behind.do(partial(self._write, role, number, answers, there_was[number]))
        return len(missing)

    def _write(self, role: Role, number: int, answers: Answers, there_was: Stamp | None) -> None:
        path = role.path(self.folder, number)
        shard = self._shard(role, number, answers)
        # the first whole shard wins, also one that another job made while this one was at it;
        # what was there at the beginning is damaged, or a dead link, and is replaced
        broken = there_was is not None and _stamp(path) == there_was
        label_set.write_shard(path, shard, replace=broken)

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

    def _whole_shard(self, role: Role, number: int) -> ShardFile | None:
        """Return a shard of this plan that is there and checks, or None and say why."""
        path = role.path(self.folder, number)
        expected = (self.plan_sha256, role.name, number, role.first_view)
        # asked once: one that is made anew elsewhere may differ from what was listed
        file = whole_shard(path, expected, self._listed.pop(path.name, None))
        if file is not None and file.num_views != len(role.views):
            logs.say(f"shard {path} holds other views; making it anew")
            return None
        return file

    def shards(self, role: Role) -> list[ShardFile]:
        """Return every shard of a role; raises LabelSetError for one that is not whole."""
        found = []
        for number in range(len(role.shards)):
            file = self._whole_shard(role, number)
            if file is None:
                raise LabelSetError(
                    f"shard {role.path(self.folder, number)} vanished or broke after it was "
                    "written; run the same command again"
                )
            found.append(file)
        return found

    def finish(self, roles: Sequence[Role]) -> dict[str, Any]:
        """Write and return the manifest, from the files as they are; say what is left over.

        Blocks of added views that are there whole are listed too.
        """
        entries = {role.name: self._entry(role) for role in roles}
        manifest = label_set.write_manifest(
            self.folder,
            self.plan,
            roles=entries,
            versions=runtime.versions(),
            batch_size=self._batch_size,
        )
        leftover = list(self.folder.glob(f"{TEMPORARY_PREFIX}*"))
        if leftover:
            logs.say(
                f"{self.folder} holds {len(leftover)} temporary files of jobs that were killed "
                f"or still run ({TEMPORARY_PREFIX}*); remove them when none runs"
            )
        return manifest

    def _entry(self, role: Role) -> dict[str, Any]:
        """Return what the manifest says of a role."""
        files = self.shards(role)
        skipped = {
            key: missing["reason"]
            for file in files
            for key, missing in file.header["skipped"].items()
        }
        if skipped:
            logs.say(f"{role.name}: {len(skipped)} images skipped, listed in manifest.json")
        blocks = [describe_block(range(len(role.views)), files)]
        blocks += added_blocks(
            self.folder, role.name, blocks[0], self.plan_sha256, listed=self._listed
        )
        return {
            "blocks": blocks,
            "num_images": sum(file.num_images for file in files),
            "skipped": skipped,
            **({"accuracy": accuracy_of(self.plan, files)} if role.name == "val" else {}),
        }


def whole_shard(
    path: Path, expected: tuple[str, str, int, int], listed_sha256: str | None = None
) -> ShardFile | None:
    """Return a shard that is there and checks, or None and say why.

    ``expected`` are the SHA-256 of its plan, its role, number and first view; ``listed_sha256`` is
    what a manifest says of its bytes, those that only HDF5 reads included.
    """
    try:
        file = ShardFile(path)
        damaged = [key for key, _, whole in file.blocks() if not whole]
        is_listed = listed_sha256 in (None, file_sha256(path))
    except FileNotFoundError:
        return None
    except LabelSetError as error:
        logs.say(f"{error}; making it anew")
        return None
    if damaged:
        logs.say(f"shard {path} is damaged: the labels of {len(damaged)} images; making it anew")
        return None
    header = file.header
    if (header["plan_sha256"], header["role"], header["number"], file.first_view) != expected:
        logs.say(f"shard {path} is of another label set; making it anew")
        return None
    if not is_listed:
        logs.say(f"shard {path} is not the one in the manifest; making it anew")
        return None
    return file


def describe_block(views: range, files: Sequence[ShardFile]) -> dict[str, Any]:
    """Return what the manifest says of the shards of a block of views."""
    listed = [label_set.describe_file(f.path, num_images=f.num_images) for f in files]
    return {"views": [views.start, views.stop], "shards": listed}


def added_blocks(
    folder: Path,
    role: str,
    last: dict[str, Any],
    plan_sha256: str,
    *,
    listed: Mapping[str, str],
) -> list[dict[str, Any]]:
    """Return the blocks of views that were added after ``last`` and are there whole.

    ``listed`` are the SHA-256 of files that a manifest knows, by name.
    """
    stop = last["views"][1]
    blocks = []
    for views in block_views(folder, role):
        if views.start != stop:
            continue
        paths = [folder / label_set.shard_name(role, n, views) for n in range(len(last["shards"]))]
        files = [
            whole_shard(path, (plan_sha256, role, n, views.start), listed.get(path.name))
            for n, path in enumerate(paths)
        ]
        whole = [file for file in files if file is not None]
        if len(whole) == len(files):
            blocks.append(describe_block(views, whole))
            stop = views.stop
        else:
            logs.say(
                f"views {views.start} to {views.stop - 1} are not all there, and left out; "
                "`mealv2 labels add-views` goes on with them"
            )
    return blocks


def block_views(folder: Path, role: str) -> list[range]:
    """Return the ranges of views that added shards in a folder are named after, in order."""
    named = (re.fullmatch(rf"{role}-\d+-views-(\d+)-(\d+)\.h5", p.name) for p in folder.iterdir())
    found = {range(int(name[1]), int(name[2]) + 1) for name in named if name}
    return sorted(found, key=lambda views: (views.start, views.stop))


def accuracy_of(plan: dict[str, Any], files: Sequence[ShardFile]) -> dict[str, Any]:
    """Return top-1/top-5 in percent of every teacher and of the ensemble, from counts."""
    images = sum(file.num_images for file in files)
    top1, top5 = (
        np.sum([file.header["counts"][name] for file in files], axis=0) * 100.0 / max(1, images)
        for name in ("top1", "top5")
    )
    figures = [
        {"top1": round(float(a), 4), "top5": round(float(b), 4)}
        for a, b in zip(top1, top5, strict=True)
    ]
    named = zip(plan["teachers"], figures[:-1], strict=True)
    return {
        "num_images": images,
        "teachers": [{"model": teacher["model"], **figure} for teacher, figure in named],
        "ensemble": figures[-1],
    }


def requests_of(role: Role, positions: Sequence[int], batch_size: int) -> list[Request]:
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


def _counter(num_views: int) -> Callable[[Pixels], int]:
    """Return a function that says how many views a batch brings to an end, failed ones too."""
    failed: set[int] = set()

    def count(item: Pixels) -> int:
        new = item.failed.keys() - failed  # an image can fail in several batches
        failed.update(new)
        return len(item.positions) + len(new) * num_views

    return count


def _batch_size_of(folder: Path) -> int | None:
    """Return the batch size that the manifest in a folder says its labels were made with."""
    try:
        return label_set.read_manifest(folder).get("batch_size")
    except LabelSetError:
        return None


def _stamp(path: Path) -> Stamp | None:
    """Return what tells a file from one that takes its place; None where there is none."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _until_stopped(pixels: Iterator[Pixels], stop: runtime.StopFlag) -> Iterator[Pixels]:
    for item in pixels:
        stop.check()
        yield item
