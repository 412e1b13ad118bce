"""Label sets of ImageNet's size: opening, memory, random lookups, reading all, verifying.

    python benchmarks/label_set_scale.py --rows real_rows_180views.npz --views 180 300
    python benchmarks/label_set_scale.py --quick

The blocks repeat a pool of real ones: softmax rows (an array ``probs``, images x views x classes)
at rate 0.001; views beyond those of the file are powers of them. Without --rows the pool is the
base population of label_codec.py. Each set is written, measured and deleted: 180 views need 5 GB of
disk. Each set is opened in processes of its own. Needs Linux. Prints Markdown tables.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import torch
from label_codec import NUM_CLASSES, population, table
from label_set_speed import BATCH_SIZE, finish, picture, plan_of, put_shard

from mealv2.codec import EncodedLabels
from mealv2.data.pixels import decode
from mealv2.label_set import Encoding, Images, LabelSet, Shard, boxes_of, claim, shard_ranges
from mealv2.views import DrawnViews
from pipeline.config import LabelsVerifyConfig
from pipeline.label_sets import verify

NUM_IMAGES, SHARD_SIZE, RATE = 1_281_167, 2048, 0.001
NUM_LOOKUPS = 100 * BATCH_SIZE  # of each process that opens a set
NUM_PROCESSES = 3  # that open a set, each for the first time
NUM_ROUNDS, NUM_JPEGS = 40, 16
MB = 1e6


def key_of(number: int) -> str:
    """Return a key as ImageNet's images have them."""
    folder = f"n{1440764 + number // 1300:08d}"
    return f"{folder}/{folder}_{number:08d}.JPEG"


def pool_of(rows: Path | None, num_views: int, num_simulated: int) -> list[bytes]:
    """Return blocks of so many views, real ones if ``rows`` is given."""
    if rows is None:
        probs_NC, _ = population("base", num_simulated, num_views)
    else:
        probs_IVC = torch.from_numpy(np.load(rows, allow_pickle=False)["probs"])
        rng = torch.Generator().manual_seed(0)
        while probs_IVC.shape[1] < num_views:
            power_IV1 = 0.8 + 0.45 * torch.rand(*probs_IVC.shape[:2], 1, generator=rng)
            more_IVC = probs_IVC**power_IV1
            more_IVC /= more_IVC.sum(2, keepdim=True)
            probs_IVC = torch.cat([probs_IVC, more_IVC], 1)
        probs_NC = probs_IVC[:, :num_views].flatten(0, 1)
    encoding = Encoding(NUM_CLASSES, rate=RATE)
    return encoding.blocks(encoding.encode(probs_NC, num_views=num_views), num_views)


def write_set(folder: Path, num_images: int, num_views: int, pool: list[bytes]) -> None:
    """Write a set whose images have blocks from a pool, in random order."""
    plan = plan_of(Encoding(NUM_CLASSES, rate=RATE), num_views)
    claim(folder, plan)
    rng, shards = np.random.default_rng(0), []
    for number, images in enumerate(shard_ranges(num_images, SHARD_SIZE)):
        blocks = [pool[n] for n in rng.integers(0, len(pool), len(images)).tolist()]
        shards.append(put_shard(folder, plan, number, [key_of(n) for n in images], blocks))
    finish(folder, plan, shards)


def batches(
    labels: LabelSet, num_lookups: int, seed: int = 0
) -> Iterator[tuple[list[str], list[int]]]:
    """Yield keys and views of batches, all at random."""
    rng = np.random.default_rng(seed)
    for _ in range(0, num_lookups, BATCH_SIZE):
        keys = [key_of(n) for n in rng.integers(0, len(labels), BATCH_SIZE).tolist()]
        yield keys, rng.integers(0, labels.num_views, BATCH_SIZE).tolist()


def memory() -> dict[str, float]:
    """Return MB of this process: peak, now, and of that its own and pages of files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"peak": "VmHWM", "now": "VmRSS", "own": "RssAnon", "files": "RssFile"}
    return {name: int(lines[field].split()[0]) * 1024 / 1e6 for name, field in names.items()}


def open_and_look_up(folder: Path, num_lookups: int) -> None:
    """Be the process that is measured; print what it took as JSON."""
    torch.set_num_threads(1)
    imported = memory()
    opening: list[LabelSet] = []
    seconds, cpu = timed(lambda: opening.append(LabelSet.open(folder)))
    (labels,) = opening
    opened = memory()
    for keys, views in batches(labels, num_lookups):
        labels.soft_labels(keys, views)
    print(
        json.dumps(
            {"s": seconds, "cpu": cpu, "imported": imported, "opened": opened, "end": memory()}
        )
    )


def opening_row(name: str, folder: Path, num_lookups: int, num_processes: int) -> list[str]:
    """Return cells: seconds to open, MB after importing, at most, and after the lookups."""
    command = [sys.executable, __file__, "--measure", str(folder), "--lookups", str(num_lookups)]
    found = []
    for _ in range(num_processes):
        run = subprocess.run(command, check=True, capture_output=True, text=True)
        found.append(json.loads(run.stdout))

    def added(when: str, what: str) -> list[float]:
        return [f[when][what] - f["imported"]["peak" if what == "peak" else what] for f in found]

    return [
        name,
        cell([f["s"] for f in found], 2),
        cell([f["cpu"] for f in found], 2),
        cell([f["imported"]["peak"] for f in found]),
        cell(added("opened", "peak")),
        cell(added("opened", "own")),
        cell(added("end", "own")),
        cell(added("end", "files")),
    ]


def cell(values: list[float], digits: int = 0) -> str:
    spread = f"{min(values):.{digits}f} to {max(values):.{digits}f}"
    return f"{median(values):.{digits}f} ({spread})"


def forget(folder: Path) -> None:
    """Ask the kernel to drop the pages of a set's files."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def lookup_rows(name: str, folder: Path, num_rounds: int) -> list[list[str]]:
    """Return cells: milliseconds of a batch's labels, by wall clock and CPU, beside its JPEGs."""
    labels, rng = LabelSet.open(folder), np.random.default_rng(0)
    pictures = [picture(rng) for _ in range(NUM_JPEGS)]
    forget(folder)
    cold = [timed(partial(labels.soft_labels, *batch))[0] for batch in batches(labels, 4096, 1)]
    for file in labels.blocks[0][1]:  # into the page cache
        file.path.read_bytes()
    taken: dict[str, list[tuple[float, float]]] = {"read": [], "read and decoded": [], "JPEGs": []}
    for keys, views in batches(labels, num_rounds * BATCH_SIZE, 2):
        taken["read"].append(timed(partial(read_only, labels, keys, views)))
        taken["read and decoded"].append(timed(partial(labels.soft_labels, keys, views)))
        seconds, cpu = timed(lambda: [decode(jpeg) for jpeg in pictures])
        scale = BATCH_SIZE / NUM_JPEGS
        taken["JPEGs"].append((scale * seconds, scale * cpu))
    rows = [[f"{name}, read and decoded, cold", cell([1e3 * s for s in cold], 1), "", ""]]
    for what, both in taken.items():
        shares = [100 * t[1] / j[1] for t, j in zip(both, taken["JPEGs"], strict=True)]
        cells = [cell([1e3 * t[kind] for t in both], 1) for kind in (0, 1)]
        title = "512 JPEGs decoded" if what == "JPEGs" else f"{name}, {what}"
        rows.append([title, *cells, cell(shares, 2)])
    return rows


def read_only(labels: LabelSet, keys: list[str], views: list[int]) -> None:
    """Look blocks up, read them and compare their CRC; decode nothing."""
    with mock.patch.object(EncodedLabels, "kept"):
        labels.rows(keys, views)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Return seconds by the clock, and of this process's CPU time."""
    start = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def reading_rows(name: str, folder: Path) -> list[list[str]]:
    """Return cells: seconds and MB a second of reading everything, with CRC, and of verifying."""
    size = sum(path.stat().st_size for path in folder.iterdir()) / MB
    labels = LabelSet.open(folder)

    def read() -> None:
        for file in labels.blocks[0][1]:
            if not all(is_intact for _, _, is_intact in file.blocks()):
                raise SystemExit(f"{file.path.name} is damaged")
            file.unmap()

    rows = []
    config = LabelsVerifyConfig(labels=folder)
    for what, work in (
        ("all blocks read, CRC compared", read),
        (f"labels verify, {config.workers} threads", lambda: verify.run(config)),
    ):
        seconds, cpu = timed(work)
        cells = [f"{seconds:.1f}", f"{size / seconds:,.0f}", f"{size / cpu:,.0f}"]
        rows.append([f"{name}, {what}", *cells])
    return rows


def microseconds_of_a_box(num_views: int) -> float:
    """Return the CPU time of drawing a view's box again, as `labels verify` does for real sets."""
    sizes = np.full((SHARD_SIZE, 2), (500, 375), "<u4")
    zeros = np.zeros(SHARD_SIZE, np.int64)
    keys = [key_of(n) for n in range(SHARD_SIZE)]
    images = Images(sizes, zeros, zeros)
    shard = Shard("", "train", 0, 0, num_views, keys, [], images)
    _, cpu = timed(lambda: boxes_of(shard, DrawnViews(0)))
    return 1e6 * cpu / (SHARD_SIZE * num_views)


def main(words: Sequence[str] | None = None) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--rows", type=Path, help=".npz with probs, images x views x C")
    parser.add_argument("--views", type=int, nargs="+", default=[180, 300])
    parser.add_argument("--images", type=int, default=NUM_IMAGES)
    parser.add_argument("--quick", action="store_true", help="a small set, to see that it runs")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--lookups", type=int, default=NUM_LOOKUPS, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.measure:
        return open_and_look_up(options.measure, options.lookups)

    torch.set_num_threads(1)
    num_images, views = (3000, [8]) if options.quick else (options.images, options.views)
    num_processes, num_rounds = (1, 2) if options.quick else (NUM_PROCESSES, NUM_ROUNDS)
    opening, looking, reading = [], [], []
    for num_views in views:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary, "labels")
            pool = pool_of(options.rows, num_views, 50)
            write_set(folder, num_images, num_views, pool)
            name, size = f"{num_views} views", sum(p.stat().st_size for p in folder.iterdir())
            per_view = np.mean([len(block) for block in pool]) / num_views
            print(
                f"{num_images:,} images × {num_views} views: {size / MB:,.0f} MB, "
                f"{per_view:.1f} bytes a view; {microseconds_of_a_box(num_views):.2f} us of CPU "
                "time draw the box of a view\n",
                flush=True,
            )
            opening.append(opening_row(name, folder, options.lookups, num_processes))
            looking += lookup_rows(name, folder, num_rounds)
            reading += reading_rows(name, folder)
    head = [
        "a fresh process",
        "open, s",
        "CPU s",
        "MB after imports",
        "peak while opening, above imports",
    ]
    print(table([*head, "own pages, opened", "own pages, at the end", "pages of files"], opening))
    head = ["512 random labels", "ms", "CPU ms", "% of the JPEGs' CPU time"]
    print(table(head, looking))
    print(table(["the whole set", "s", "MB/s", "MB/s of CPU time"], reading))
    print(
        f"{datetime.date.today()}, {os.cpu_count()} cores, {platform.machine()}, "
        f"torch {torch.__version__}, numpy {np.__version__}, one thread but for verify"
    )
    return None


if __name__ == "__main__":
    main()
