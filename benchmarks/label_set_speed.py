"""Whole label sets on disk: ours beside TinyViT's and FKD's layouts, written, looked up and read.

    python benchmarks/label_set_speed.py
    python benchmarks/label_set_speed.py --quick
    python benchmarks/label_set_speed.py --step real_rows_180views.npz

All hold the same softmax rows, the base population of label_codec.py. The peers' layouts are
rebuilt here from descriptions of their code, with their way of working: one view at a time. Prints
Markdown tables; every figure is from one run in which all take turns.
"""

import argparse
import datetime
import io
import multiprocessing
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from label_codec import NUM_CLASSES, population, table
from PIL import Image, ImageDraw
from torch import Tensor

from mealv2.data.pixels import decode
from mealv2.label_set import (
    FORMAT,
    FORMAT_VERSION,
    Encoding,
    LabelSet,
    Rows,
    Shard,
    claim,
    describe_file,
    shard_name,
    write_manifest,
    write_shard,
)
from mealv2.losses import similarity_loss
from mealv2.storage.json_format import json_sha256
from mealv2.views import RECIPE

BATCH_SIZE = 512  # of a training step
READ_SIZE = 4096  # labels decoded at once where all are read
NUM_PICTURES = 32  # different ones of the JPEGs decoded
_STOP = None  # ends TinyViT's writer


class Sample(NamedTuple):
    """What is written: probabilities image by image, and the same view by view."""

    keys: list[str]
    probs_NVC: Tensor
    probs_VNC: Tensor

    @property
    def num_views(self) -> int:
        return self.probs_NVC.shape[1]

    @property
    def num_labels(self) -> int:
        return len(self.keys) * self.num_views


def sample(num_images: int, num_views: int) -> Sample:
    probs_NC, _ = population("base", num_images, num_views)
    probs_NVC = probs_NC.view(num_images, num_views, NUM_CLASSES)
    keys = [f"n{n // 1300:08d}/n{n // 1300:08d}_{n:08d}.JPEG" for n in range(num_images)]
    return Sample(keys, probs_NVC, probs_NVC.transpose(0, 1).contiguous())


def sample_of(path: Path) -> Sample:
    """Return the rows of a file: an array ``probs``, images x views x classes."""
    probs_NVC = torch.from_numpy(np.load(path, allow_pickle=False)["probs"])
    keys = [f"image-{n:04d}.JPEG" for n in range(len(probs_NVC))]
    return Sample(keys, probs_NVC, probs_NVC.transpose(0, 1).contiguous())


class Layout(Protocol):
    """A way to keep labels: into a folder, and back as class ids and float32 probabilities."""

    def write(self, folder: Path, sample: Sample) -> None: ...

    def random(self, folder: Path, sample: Sample) -> Callable[[list[str], list[int]], Any]:
        """Open the folder; return what looks labels up, and gives those of the last place last."""

    def everything(self, folder: Path, sample: Sample) -> int:
        """Open the folder and read all in the order of the files; return how many there were."""


# --- TinyViT: a folder per epoch, in it lines of keys, and records one after another --------------


class TinyViT:
    """int32 seed, K int16 ids, K float16 probabilities; through a queue to a process that writes"""

    def __init__(self, k: int) -> None:
        self.k, self.size = k, 4 + 4 * k

    def write(self, folder: Path, sample: Sample) -> None:
        rng = np.random.default_rng(0)
        for epoch, probs_NC in enumerate(sample.probs_VNC):
            context = multiprocessing.get_context("fork")
            queue: Any = context.Queue()
            writer = context.Process(target=_write_epoch, args=(queue, folder / str(epoch)))
            writer.start()
            for n in range(0, len(probs_NC), 256):
                values, ids = probs_NC[n : n + 256].topk(self.k, dim=1, sorted=True)
                values_NK, ids_NK = values.to(torch.float16).numpy(), ids.to(torch.int16).numpy()
                seeds = rng.integers(0, 1 << 31, len(ids_NK)).astype(np.int32)
                keys = sample.keys[n : n + 256]
                for key, seed, row, kept in zip(keys, seeds, ids_NK, values_NK, strict=True):
                    queue.put((key, seed.tobytes() + row.tobytes() + kept.tobytes()))
            queue.put(_STOP)
            writer.join()

    def random(self, folder: Path, sample: Sample) -> Callable[[list[str], list[int]], Any]:
        epochs = [self._open(folder / str(epoch)) for epoch in range(sample.num_views)]

        def look_up(keys: list[str], views: list[int]) -> Any:
            for key, view in zip(keys, views, strict=True):
                places, values = epochs[view]
                last = self._read(values, places[key])
            return last

        return look_up

    def everything(self, folder: Path, sample: Sample) -> int:
        num_read = 0
        for epoch in range(sample.num_views):
            places, values = self._open(folder / str(epoch))
            for key in sample.keys:
                ids_K, _ = self._read(values, places[key])
                num_read += len(ids_K) == self.k
        return num_read

    def _open(self, folder: Path) -> tuple[dict[str, int], io.BufferedReader]:
        with (folder / "rank0-keys.txt").open() as lines:
            places = {line.strip(): place for place, line in enumerate(lines)}
        return places, (folder / "rank0-values.bin").open("rb")

    def _read(self, values: io.BufferedReader, place: int) -> tuple[np.ndarray, np.ndarray]:
        values.seek(place * self.size)
        record = values.read(self.size)
        np.frombuffer(record[:4], np.int32).item()  # the seed of the augmentation
        ids_K = np.frombuffer(record, np.int16, self.k, 4).astype(np.int32)
        return ids_K, np.frombuffer(record, np.float16, self.k, 4 + 2 * self.k).astype(np.float32)


def _write_epoch(queue: Any, folder: Path) -> None:
    """Write what comes until the end, each key once; then move the files to their place."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        seen: dict[str, int] = {}
        with (
            Path(temporary, "rank0-keys.txt").open("w") as keys,
            Path(temporary, "rank0-values.bin").open("wb") as values,
        ):
            while (item := queue.get()) is not _STOP:
                key, record = item
                if key not in seen:
                    seen[key] = len(seen)
                    keys.write(key + "\n")
                    values.write(record)
        folder.mkdir(parents=True)
        for path in Path(temporary).iterdir():
            path.rename(folder / path.name)


# --- FKD: a file per image, by torch.save ---------------------------------------------------------


class FKD:
    """[boxes, flips, labels M x 2 x 5 of ids over probabilities] of an image, each crop sorted"""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype

    def write(self, folder: Path, sample: Sample) -> None:
        rng = np.random.default_rng(0)
        for key, probs_VC in zip(sample.keys, sample.probs_NVC.numpy(), strict=True):
            labels = np.empty((len(probs_VC), 2, 5), self.dtype)
            for view, probs_C in enumerate(probs_VC):
                ids_K = np.argsort(-probs_C)[:5]
                labels[view, 0], labels[view, 1] = ids_K, probs_C[ids_K]
            boxes = rng.random((len(probs_VC), 4)).astype(self.dtype)
            flips = rng.random(len(probs_VC)) < 0.5
            path = self._path(folder, key)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save([boxes, flips, labels], path)

    def random(self, folder: Path, sample: Sample) -> Callable[[list[str], list[int]], Any]:
        def look_up(keys: list[str], views: list[int]) -> Any:
            for key, view in zip(keys, views, strict=True):
                label = self._load(folder, key)[view]
                last = label[0].astype(np.int32), label[1].astype(np.float32)
            return last

        return look_up

    def everything(self, folder: Path, sample: Sample) -> int:
        num_read = 0
        for key in sample.keys:
            labels = self._load(folder, key)
            ids_VK, probs_VK = labels[:, 0].astype(np.int32), labels[:, 1].astype(np.float32)
            num_read += len(ids_VK) if ids_VK.shape == probs_VK.shape else 0
        return num_read

    def _path(self, folder: Path, key: str) -> Path:
        return folder / Path(key).with_suffix(".tar")

    def _load(self, folder: Path, key: str) -> np.ndarray:
        labels: np.ndarray = torch.load(self._path(folder, key), weights_only=False)[2]
        return labels


# --- ours -----------------------------------------------------------------------------------------


class Ours:
    """A label set; so many rows are encoded in one go, and looked up by one call"""

    def __init__(self, encode_size: int = 4096, batch_size: int = BATCH_SIZE) -> None:
        self.encode_size, self.batch_size = encode_size, batch_size
        self.encoding = Encoding(NUM_CLASSES, rate=0.001)

    def write(self, folder: Path, sample: Sample) -> None:
        plan = plan_of(self.encoding, sample.num_views)
        claim(folder, plan)
        probs_NC = sample.probs_NVC.flatten(0, 1)
        step = max(1, self.encode_size // sample.num_views) * sample.num_views
        rows = [
            self.encoding.encode(probs_NC[n : n + step], num_views=sample.num_views)
            for n in range(0, len(probs_NC), step)
        ]
        blocks = self.encoding.blocks(Rows.concat(rows), sample.num_views)
        shards = [put_shard(folder, plan, 0, sample.keys, blocks)]
        finish(folder, plan, shards)

    def random(self, folder: Path, sample: Sample) -> Callable[[list[str], list[int]], Any]:
        labels = LabelSet.open(folder)

        def look_up(keys: list[str], views: list[int]) -> Any:
            for n in range(0, len(keys), self.batch_size):
                batch = slice(n, n + self.batch_size)
                found = labels.lookup(keys[batch], views[batch])
            return found.indices_NK[-1], found.probs_NK[-1]

        return look_up

    def everything(self, folder: Path, sample: Sample) -> int:
        labels, num_read = LabelSet.open(folder), 0
        for views, files in labels.blocks:
            for file in files:
                for key, _, whole in file.blocks():
                    if not whole:
                        raise SystemExit(f"{key.decode()} is damaged")
                data = np.frombuffer(file.labels, np.uint8)
                rows = labels.encoding.all_rows_of(data, file.column("label_ends"), len(views))
                for n in range(0, len(rows.labels), READ_SIZE):
                    num_read += len(rows.labels[n : n + READ_SIZE].kept().tail_N)
        return num_read


def plan_of(encoding: Encoding, num_views: int) -> dict[str, Any]:
    """Return a plan with what a reader asks it for."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "classes": [f"class {c}" for c in range(encoding.num_classes)],
        "img_size": 224,
        "labels": encoding.plan(),
        "roles": {"train": {"num_views": num_views, "views": {**RECIPE, "seed": 0}}},
    }


def put_shard(
    folder: Path, plan: dict[str, Any], number: int, keys: list[str], blocks: list[bytes]
) -> dict[str, Any]:
    """Write a shard of the training images; return what the manifest says of it."""
    path = folder / shard_name("train", number)
    num_views = plan["roles"]["train"]["num_views"]
    write_shard(path, Shard(json_sha256(plan), "train", number, 0, num_views, keys, blocks))
    return describe_file(path, num_images=len(keys))


def finish(folder: Path, plan: dict[str, Any], shards: list[dict[str, Any]]) -> None:
    block = {"views": [0, plan["roles"]["train"]["num_views"]], "shards": shards}
    write_manifest(folder, plan, roles={"train": {"skipped": {}, "blocks": [block]}})


# --- taking turns ---------------------------------------------------------------------------------


class Task(NamedTuple):
    """What is timed: how many labels it deals with, and what must be done before."""

    num_labels: int
    work: Callable[[], object]
    before: Callable[[], object] = lambda: None


def take_turns(
    tasks: dict[str, Task], repetitions: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Return the seconds of each task in each repetition, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for repetition in range(repetitions + 1):
        for name, task in tasks.items():
            task.before()
            start = clock()
            task.work()
            if repetition:
                seconds[name].append(clock() - start)
    return seconds


def speeds(tasks: dict[str, Task], repetitions: int, *, beside: str) -> list[list[str]]:
    """Return cells: labels a second, and how many times those of ``beside`` in the same turn."""
    seconds = take_turns(tasks, repetitions)
    rows = []
    for name, taken in seconds.items():
        rates = [tasks[name].num_labels / s for s in taken]
        others = [tasks[beside].num_labels / s for s in seconds[beside]]
        times = [rate / other for rate, other in zip(rates, others, strict=True)]
        cells = [f"{median(rates):,.0f}", f"{min(rates):,.0f} to {max(rates):,.0f}"]
        rows.append([name, *cells, f"{median(times):.2f}", f"{min(times):.2f} to {max(times):.2f}"])
    return rows


def compare(
    sample: Sample, folder: Path, *, num_random: int, repetitions: int, only_read: bool
) -> None:
    """Print the tables of a sample: writing, looking up, reading all."""
    layouts: dict[str, Layout] = {
        "TinyViT K=100": TinyViT(100),
        "TinyViT K=10": TinyViT(10),
        "FKD k5, float32": FKD(np.float32),
        "FKD k5, float16": FKD(np.float16),
        "ours": Ours(),
    }
    beside = "TinyViT K=100"
    head = ["views/s", "range", f"times {beside}", "range"]
    title = f"{len(sample.keys)} images × {sample.num_views} views"
    places = {name: folder / name for name in layouts}
    places["ours, 256 rows encoded at once"] = folder / "ours, 256"

    def task(layout: Layout, place: Path) -> Task:
        def clear() -> None:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            os.sync()  # what the one before left to be written is not for this one to wait for

        return Task(sample.num_labels, partial(layout.write, place, sample), clear)

    writers = {**layouts, "ours, 256 rows encoded at once": Ours(encode_size=256)}
    tasks = {name: task(layout, places[name]) for name, layout in writers.items()}
    if only_read:
        take_turns(tasks, 0)
    else:
        print(table([f"write, {title}", *head], speeds(tasks, repetitions, beside=beside)))

    rng = np.random.default_rng(0)
    keys = [sample.keys[n] for n in rng.integers(0, len(sample.keys), num_random)]
    views = rng.integers(0, sample.num_views, num_random).tolist()
    few = min(num_random, BATCH_SIZE)  # for what is slow
    tasks = {}
    for name, layout in layouts.items():
        look_up = layout.random(places[name], sample)
        check(look_up, sample)
        num = few if isinstance(layout, FKD) else num_random
        tasks[name] = Task(num, partial(look_up, keys[:num], views[:num]))
    labels, one = LabelSet.open(places["ours"]), Ours(batch_size=1)
    tasks["ours, records only"] = Task(num_random, partial(records, labels, keys, views))
    look_up = one.random(places["ours"], sample)
    tasks["ours, one row a call"] = Task(few, partial(look_up, keys[:few], views[:few]))
    print(table([f"look up, {title}", *head], speeds(tasks, repetitions, beside=beside)))

    tasks = {}
    for name, layout in layouts.items():
        read = partial(layout.everything, places[name], sample)
        if read() != sample.num_labels:
            raise SystemExit(f"{name} does not give back what was written")
        tasks[name] = Task(sample.num_labels, read)
    print(table([f"read all, {title}", *head], speeds(tasks, repetitions, beside=beside)))


def check(look_up: Callable[[list[str], list[int]], Any], sample: Sample) -> None:
    """Stop where the likeliest class of some place is not the one that was written."""
    for n in range(0, len(sample.keys), max(1, len(sample.keys) // 16)):
        view = n % sample.num_views
        ids_K, probs_K = look_up([sample.keys[n]], [view])
        row_C = sample.probs_NVC[n, view]
        first = int(np.argmax(probs_K))
        if ids_K[first] != int(row_C.argmax()) or abs(probs_K[first] - float(row_C.max())) > 0.1:
            raise SystemExit(f"view {view} of {sample.keys[n]} is not what was written")


def records(labels: LabelSet, keys: Sequence[str], views: Sequence[int]) -> None:
    """Look records up as stage two does: the loss decodes them where the student is."""
    for n in range(0, len(keys), BATCH_SIZE):
        labels.rows(keys[n : n + BATCH_SIZE], views[n : n + BATCH_SIZE])


# --- a training step's labels against its pictures ------------------------------------------------


def picture(rng: np.random.Generator, width: int = 500, height: int = 375) -> bytes:
    """Return a JPEG of about 110 kB: clouds of every size, shapes with edges, text, grain."""
    pixels = np.full((height, width, 3), 128.0)
    size = 3
    while size < min(width, height):  # noise of every scale, the finer the weaker
        noise = rng.normal(0, 90.0 / size**0.5, (size, size, 3)).clip(-127, 127) + 128
        blurred = Image.fromarray(noise.astype(np.uint8)).resize((width, height), Image.BICUBIC)
        pixels += np.asarray(blurred, np.float64) - 128
        size *= 2
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y, w, h = rng.integers(0, [width, height, 120, 120])
        colour = tuple(rng.integers(0, 256, 3).tolist())
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((int(x), int(y), int(x + w), int(y + h)), fill=colour)
        draw.text((int(y), int(x) % height), "".join(map(chr, rng.integers(65, 91, 24))))
    grain = rng.normal(0, 4, (height, width, 3))
    image = Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))
    for quality in range(96, 89, -1):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality, subsampling="4:4:4")
        if file.tell() <= 115_000:
            break
    return file.getvalue()


def step_rows(sample: Sample, folder: Path, *, repetitions: int) -> list[list[str]]:
    """Return cells: CPU milliseconds of a batch's labels and of its pictures, and the share."""
    Ours().write(folder, sample)
    labels = LabelSet.open(folder)
    rng = np.random.default_rng(0)
    keys = [sample.keys[n] for n in rng.integers(0, len(sample.keys), BATCH_SIZE)]
    views = rng.integers(0, sample.num_views, BATCH_SIZE).tolist()
    logits_BC = torch.randn(BATCH_SIZE, NUM_CLASSES, requires_grad=True)
    dense_BC = labels.soft_labels(keys, views).to_dense()
    pictures = [picture(rng) for _ in range(NUM_PICTURES)]

    batch = range(BATCH_SIZE)

    def loss(found: Any) -> None:
        similarity_loss(logits_BC, found).backward()  # type: ignore[no-untyped-call]
        logits_BC.grad = None

    tasks = {
        "512 JPEGs decoded": lambda: [decode(pictures[n % NUM_PICTURES]) for n in batch],
        "512 labels looked up and decoded, forward and backward of the loss": lambda: loss(
            labels.soft_labels(keys, views)
        ),
        "of these, looked up": lambda: labels.soft_labels(keys, views),
        "512 dense rows in memory, forward and backward of the loss": lambda: loss(dense_BC),
    }
    seconds = take_turns(
        {name: Task(BATCH_SIZE, work) for name, work in tasks.items()},
        repetitions,
        time.process_time,  # all on one thread: other work on the machine does not count
    )
    rows = []
    for name, taken in seconds.items():
        share = [100 * s / d for s, d in zip(taken, seconds["512 JPEGs decoded"], strict=True)]
        spread = f"{1e3 * min(taken):.2f} to {1e3 * max(taken):.2f}"
        cells = [f"{1e3 * median(taken):.2f}", spread]
        rows.append(
            [name, *cells, f"{median(share):.3f} %", f"{min(share):.3f} to {max(share):.3f}"]
        )
    size = sum(map(len, pictures)) / len(pictures)
    print(f"JPEGs of 500 × 375 pixels, 4:4:4, {size / 1000:.0f} kB on average\n")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sets, to see that it runs")
    parser.add_argument("--only-read", action="store_true", help="do not time writing")
    parser.add_argument(
        "--step", type=Path, metavar="ROWS", help="only the training step, on rows of this .npz"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.step:
        with tempfile.TemporaryDirectory() as temporary:
            rows = step_rows(sample_of(options.step), Path(temporary, "step"), repetitions=9)
        print(table(["a training step", "CPU ms", "range", "of the JPEGs", "range"], rows))
        return
    shapes = [(50, 4)] if options.quick else [(2000, 16), (178, 180)]
    repetitions = 1 if options.quick else 5
    with tempfile.TemporaryDirectory() as temporary:
        for num_images, num_views in shapes:
            labels = sample(num_images, num_views)
            folder = Path(temporary, str(num_views))
            num_random = 512 if options.quick else 8192
            compare(
                labels,
                folder,
                num_random=num_random,
                repetitions=repetitions,
                only_read=options.only_read,
            )
            shutil.rmtree(folder)
        rows = step_rows(labels, Path(temporary, "step"), repetitions=repetitions)
        print(table(["a training step", "CPU ms", "range", "of the JPEGs", "range"], rows))
    print(
        f"{datetime.date.today()}, {os.cpu_count()} cores, {platform.machine()}, "
        f"torch {torch.__version__}, numpy {np.__version__}, one thread"
    )


if __name__ == "__main__":
    main()
