"""The line on memory: what stage one holds as images and views grow, with teachers that are free.

It runs in a process of its own: in one that has done other things, what was freed before would
hide what is held now.
"""

import multiprocessing
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor, nn

from mealv2 import label_set
from mealv2.data.open import open_source
from mealv2.label_set import Encoding
from mealv2.models.ensemble import TeacherEnsemble
from mealv2.storage.json_format import json_sha256
from mealv2.views import DrawnViews
from pipeline import console
from pipeline.bench.lines import Line, NotMeasuredError
from pipeline.bench.room import BenchContext, plan_of
from pipeline.bench.synthetic_images import draw_tree
from pipeline.config import DEFAULT_RATE
from pipeline.labelling.annotate import Annotator
from pipeline.labelling.plan import LabelSplit
from pipeline.labelling.shards import find_missing, label_shards
from pipeline.labelling.store import Store
from pipeline.loading.loader import ViewReader
from pipeline.runtime.device import Runtime
from pipeline.timing import Turn, processes

FEW_VIEWS, MANY_VIEWS = 30, 180
_NUM_CLASSES = 10
_PICTURES, _SIZE, _IMG_SIZE = 50, (80, 60), 32  # different files, the rest are links to them
_SHARD_SIZE = 2048  # the default
_BATCH_SIZE = 256
_LONGEST_S = 60.0
_TRIED = (8, 72)  # images, to know how many there is time for
_EVERY_S = 0.05
_PROC = Path("/proc")


class FreeTeacher(nn.Module):
    """Answers every view alike, at once."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("logits_1C", torch.linspace(0, 5, _NUM_CLASSES)[None])
        self.logits_1C: Tensor

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.logits_1C.expand(len(images_BCHW), -1)


@dataclass(frozen=True)
class MemoryUse:
    """Peaks of memory in bytes, after a quarter of the images and at the end."""

    num_images: int
    num_views: int
    seconds: float
    at_quarter: int
    at_end: int


def measure(bench: BenchContext, wanted: Sequence[str]) -> list[Line]:
    """Return the line: how much the peak grows by more images, and by more views of each."""
    if not (_PROC / "self" / "statm").exists():
        raise NotMeasuredError("needs /proc, which says what a process holds")
    draw_tree(bench.folder / "small" / "once", num_images=_PICTURES, num_classes=1, size=_SIZE)
    console.info(f"memory of stage one, {MANY_VIEWS} views per image: up to a minute")
    many = in_own_process(bench, bench.config.memory_images, MANY_VIEWS)
    few = in_own_process(bench, many.num_images, FEW_VIEWS)
    by_images = 100.0 * (many.at_end / many.at_quarter - 1.0)
    by_views = 100.0 * (many.at_end / few.at_end - 1.0)
    notes = {
        "images": many.num_images,
        "growth_by_images_percent": round(by_images, 2),
        "growth_by_views_percent": round(by_views, 2),
        "peak_mb": {
            f"{memory_use.num_views} views, {when}": round(value / 1e6, 1)
            for memory_use in (few, many)
            for when, value in (
                ("a quarter", memory_use.at_quarter),
                ("the end", memory_use.at_end),
            )
        },
    }
    turns = {
        f"{memory_use.num_views} views": [
            Turn(memory_use.num_images * memory_use.num_views, memory_use.seconds)
        ]
        for memory_use in (few, many)
    }
    return [Line("memory", [max(by_images, by_views)], turns, notes)]


def in_own_process(bench: BenchContext, num_images: int, num_views: int) -> MemoryUse:
    """Run stage one in a new interpreter; return what it held."""
    context = multiprocessing.get_context("spawn")
    sender, receiver = context.Pipe(duplex=False)
    folder = bench.folder / f"memory-{num_views}"
    arguments = (receiver, bench.folder / "small" / "once", folder, num_images, num_views)
    process = context.Process(target=_child, args=(*arguments, bench.config.workers))
    process.start()
    receiver.close()
    try:
        memory_use = sender.recv()
    except EOFError:
        raise NotMeasuredError("the process that was to be measured ended early") from None
    finally:
        process.join()
    assert isinstance(memory_use, MemoryUse)
    return memory_use


def _child(
    out: Connection, pictures: Path, folder: Path, num_images: int, num_views: int, workers: int
) -> None:
    torch.set_num_threads(1)
    taken: list[float] = []
    for tried in (min(few, num_images) for few in _TRIED):  # what is loaded only once is no growth
        began = time.monotonic()
        _label(pictures, folder / f"tried-{len(taken)}", tried, num_views, workers)
        taken.append(time.monotonic() - began)
    if num_views == MANY_VIEWS:
        # starting and ending cost seconds of their own
        of_one = max(taken[1] - taken[0], 1e-3) / (_TRIED[1] - _TRIED[0])
        num_images = max(min(_TRIED[1], num_images), min(num_images, int(_LONGEST_S / of_one)))
    began = time.monotonic()
    memory_use = _label(pictures, folder / "all", num_images, num_views, workers)
    out.send(MemoryUse(num_images, num_views, time.monotonic() - began, *memory_use))


def _label(
    pictures: Path, folder: Path, num_images: int, num_views: int, workers: int
) -> tuple[int, int]:
    """Label images, links to a few files; return the peaks at a quarter and at the end."""
    _link(pictures, folder / "images" / "train" / "all", num_images)
    source = open_source(folder / "images", "train")
    shard_size = min(_SHARD_SIZE, -(-num_images // 4))
    encoding = Encoding(_NUM_CLASSES, rate=DEFAULT_RATE)
    shards: list[Sequence[int]] = list(label_set.shard_ranges(len(source), shard_size))
    reader = ViewReader(source, img_size=_IMG_SIZE, views=DrawnViews(0))
    plan = plan_of(encoding, num_views=num_views, img_size=_IMG_SIZE)
    views = tuple(range(num_views))
    split = LabelSplit("train", reader, views, shards, json_sha256(plan))
    store = Store(folder / "labels")
    store.claim(plan)
    annotator = Annotator(
        TeacherEnsemble([FreeTeacher()]),
        Runtime(torch.device("cpu"), None),
        encoding,
        batch_size=_BATCH_SIZE,
        on_bad_image="fail",
    )
    with Peak(folder / "labels", quarter=-(-len(shards) // 4)) as peak:
        missing = find_missing(split, store)
        label_shards(split, missing, annotator, store, workers=workers)
    return peak.at_quarter or peak.at_end, peak.at_end


def _link(pictures: Path, folder: Path, num_images: int) -> None:
    folder.mkdir(parents=True)
    files = sorted(pictures.rglob("*.JPEG"))
    for number in range(num_images):
        (folder / f"{number:06d}.JPEG").hardlink_to(files[number % len(files)])


class Peak:
    """Samples what this process and its children hold, while the block runs."""

    def __init__(self, folder: Path, *, quarter: int) -> None:
        self.at_quarter = self.at_end = 0
        self._folder = folder
        self._quarter = quarter
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.at_end = max(self.at_end, resident_bytes(os.getpid()))
            if len(list(self._folder.glob("train-*.h5"))) < self._quarter or not self.at_quarter:
                self.at_quarter = self.at_end
            if self._stop.wait(_EVERY_S):
                return


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process and all below it."""
    return sum(map(_pages, processes(pid))) * os.sysconf("SC_PAGE_SIZE")


def _pages(pid: int) -> int:
    try:
        return int((_PROC / str(pid) / "statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0  # it has just ended
