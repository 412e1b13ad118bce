"""The line on memory: whether the peak of stage one grows with the number of images or views.

Stage one runs in a new process, because memory that was freed before would hide a growth.
"""

import multiprocessing
import os
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mealv2.data.open import open_source
from mealv2.label_set import Encoding
from mealv2.labelling.annotator import Annotator
from mealv2.labelling.store import Store
from mealv2.models.ensemble import TeacherEnsemble
from pipeline import console
from pipeline.bench.context import BenchContext
from pipeline.bench.labelling import label_images
from pipeline.bench.lines import Line, NotMeasuredError
from pipeline.bench.synthetic_images import write_image_folder
from pipeline.config import DEFAULT_RATE
from pipeline.runtime.device import Runtime
from pipeline.timing import Turn, processes

FEW_VIEWS, MANY_VIEWS = 30, 180
_NUM_CLASSES = 10
_NUM_FILES, _SIZE, _IMG_SIZE = 50, (80, 60), 32  # all images are links to these files
_SHARD_SIZE = 2048  # the default
_BATCH_SIZE = 256
_MAX_S = 60.0
_WARM_UP = (8, 72)  # images of two short runs, which show how many there is time for
_SAMPLE_S = 0.05
_PROC = Path("/proc")


class FreeTeacher(nn.Module):
    """Returns the same logits for every view, at no cost."""

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


def measure(bench: BenchContext) -> list[Line]:
    """Return the line on how much the peak grows with more images, and with more views of each."""
    if not (_PROC / "self" / "statm").exists():
        raise NotMeasuredError("needs /proc to read the memory of processes")
    write_image_folder(bench.folder / "small" / "once", num_images=_NUM_FILES, size=_SIZE)
    console.info(f"memory of stage one, {MANY_VIEWS} views per image: up to a minute")
    many = in_new_process(bench, bench.config.memory_images, MANY_VIEWS)
    few = in_new_process(bench, many.num_images, FEW_VIEWS)
    by_images = 100.0 * (many.at_end / many.at_quarter - 1.0)
    by_views = 100.0 * (many.at_end / few.at_end - 1.0)
    notes = {
        "images": many.num_images,
        "growth_by_images_percent": round(by_images, 2),
        "growth_by_views_percent": round(by_views, 2),
        "peak_mb": {
            f"{use.num_views} views, {when}": round(value / 1e6, 1)
            for use in (few, many)
            for when, value in (("a quarter", use.at_quarter), ("the end", use.at_end))
        },
    }
    turns = {
        f"{use.num_views} views": [Turn(use.num_images * use.num_views, use.seconds)]
        for use in (few, many)
    }
    return [Line("memory", [max(by_images, by_views)], turns, notes)]


def in_new_process(bench: BenchContext, num_images: int, num_views: int) -> MemoryUse:
    """Run stage one in a new interpreter; return the memory it used."""
    context = multiprocessing.get_context("spawn")
    folder = bench.folder / f"memory-{num_views}"
    arguments = (bench.folder / "small" / "once", folder, num_images, num_views)
    with ProcessPoolExecutor(1, mp_context=context) as process:
        try:
            return process.submit(_measure, *arguments, bench.config.workers).result()
        except BrokenProcessPool:
            raise NotMeasuredError("the measured process ended early") from None


def _measure(
    image_files: Path, folder: Path, num_images: int, num_views: int, workers: int
) -> MemoryUse:
    torch.set_num_threads(1)
    taken: list[float] = []
    # warm up: what is loaded only once is not growth
    for warm_up in (min(number, num_images) for number in _WARM_UP):
        start_s = time.monotonic()
        _label(image_files, folder / f"warm-up-{len(taken)}", warm_up, num_views, workers)
        taken.append(time.monotonic() - start_s)
    if num_views == MANY_VIEWS:
        # the difference, because each run takes seconds to start and to end
        image_s = max(taken[1] - taken[0], 1e-3) / (_WARM_UP[1] - _WARM_UP[0])
        num_images = max(min(_WARM_UP[1], num_images), min(num_images, int(_MAX_S / image_s)))
    start_s = time.monotonic()
    peaks = _label(image_files, folder / "all", num_images, num_views, workers)
    return MemoryUse(num_images, num_views, time.monotonic() - start_s, *peaks)


def _label(
    image_files: Path, folder: Path, num_images: int, num_views: int, workers: int
) -> tuple[int, int]:
    """Label images, links to a few files; return the peaks at a quarter and at the end."""
    images = folder / "images" / "train" / "all"
    images.mkdir(parents=True)
    files = sorted(image_files.rglob("*.JPEG"))
    for number in range(num_images):
        (images / f"{number:06d}.JPEG").hardlink_to(files[number % len(files)])
    annotator = Annotator(
        TeacherEnsemble([FreeTeacher()]),
        Runtime(torch.device("cpu"), None),
        Encoding(_NUM_CLASSES, rate=DEFAULT_RATE),
        _BATCH_SIZE,
        "fail",
    )
    shard_size = min(_SHARD_SIZE, -(-num_images // 4))
    num_shards = -(-num_images // shard_size)
    with Peak(folder / "labels", quarter=-(-num_shards // 4)) as peak:
        label_images(
            annotator,
            open_source(folder / "images", "train"),
            Store(folder / "labels"),
            positions=range(num_images),
            num_views=num_views,
            shard_size=shard_size,
            img_size=_IMG_SIZE,
            workers=workers,
        )
    return peak.at_quarter or peak.at_end, peak.at_end


class Peak:
    """Samples the memory of this process and its children while the block runs."""

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
            num_pages = sum(map(_resident_pages, processes(os.getpid())))
            self.at_end = max(self.at_end, num_pages * os.sysconf("SC_PAGE_SIZE"))
            if len(list(self._folder.glob("train-*.h5"))) < self._quarter or not self.at_quarter:
                self.at_quarter = self.at_end
            if self._stop.wait(_SAMPLE_S):
                return


def _resident_pages(pid: int) -> int:
    try:
        return int((_PROC / str(pid) / "statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0  # the process has ended
