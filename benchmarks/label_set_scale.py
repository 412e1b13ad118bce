"""A label set of a million images beside one of ten thousand: opening, memory, random lookups.

    python benchmarks/label_set_scale.py
    python benchmarks/label_set_scale.py --quick

The blocks are put together from a pool of encoded views, the base population of label_codec.py.
Each set is opened in processes of its own; the lookups take turns in one. Needs Linux, 1 GB of disk
and the page cache to hold it. Prints Markdown tables.
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
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles

import numpy as np
import torch
from label_codec import NUM_CLASSES, population, table
from label_set_speed import BATCH_SIZE, finish, plan_of, put_shard

from mealv2.label_set import Encoding, LabelSet, Rows, claim, shard_ranges

NUM_VIEWS, SHARD_SIZE = 16, 2048
NUM_LOOKUPS = 100_000
NUM_PROCESSES = 5  # that open a set, each for the first time


def key_of(number: int) -> str:
    """Return a key as ImageNet's images have them."""
    folder = f"n{1440764 + number // 1300:08d}"
    return f"{folder}/{folder}_{number:08d}.JPEG"


def write_set(folder: Path, num_images: int, pool_size: int) -> None:
    """Write a set whose images have views from a pool, each image others."""
    encoding = Encoding(NUM_CLASSES, rate=0.001)
    plan = plan_of(encoding, NUM_VIEWS)
    claim(folder, plan)
    pool = encoding.encode(population("base", pool_size // 50, 50)[0])
    rng, shards = np.random.default_rng(0), []
    for number, images in enumerate(shard_ranges(num_images, SHARD_SIZE)):
        picked = torch.from_numpy(rng.integers(0, pool_size, len(images) * NUM_VIEWS))
        rows = Rows(pool.labels.rows(picked))
        blocks = encoding.blocks(rows, NUM_VIEWS)
        shards.append(put_shard(folder, plan, number, [key_of(n) for n in images], blocks))
    finish(folder, plan, shards)


def batches(num_images: int, num_lookups: int, seed: int = 0) -> Iterator[tuple[list[str], list]]:
    """Yield keys and views of batches, all at random."""
    rng = np.random.default_rng(seed)
    for _ in range(0, num_lookups, BATCH_SIZE):
        keys = [key_of(n) for n in rng.integers(0, num_images, BATCH_SIZE).tolist()]
        yield keys, rng.integers(0, NUM_VIEWS, BATCH_SIZE).tolist()


def memory() -> dict[str, float]:
    """Return MB of this process: peak, now, and of that its own and pages of files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"peak": "VmHWM", "now": "VmRSS", "own": "RssAnon", "files": "RssFile"}
    return {name: int(lines[field].split()[0]) * 1024 / 1e6 for name, field in names.items()}


def open_and_look_up(folder: Path, num_lookups: int) -> None:
    """Be the process that is measured; print what it took as JSON."""
    torch.set_num_threads(1)
    imported = memory()
    start = time.perf_counter()
    labels = LabelSet.open(folder)
    seconds = time.perf_counter() - start
    opened = memory()
    for keys, views in batches(len(labels), num_lookups):
        labels.lookup(keys, views)
    print(json.dumps({"s": seconds, "imported": imported, "opened": opened, "end": memory()}))


def opening_row(name: str, folder: Path, num_lookups: int, num_processes: int) -> list[str]:
    """Return cells: seconds to open, MB after importing, at most, and after the lookups."""
    command = [sys.executable, __file__, "--measure", str(folder), "--lookups", str(num_lookups)]
    found = []
    for _ in range(num_processes):
        run = subprocess.run(command, check=True, capture_output=True, text=True)
        found.append(json.loads(run.stdout))

    def cell(values: list[float], digits: int = 0) -> str:
        spread = f"{min(values):.{digits}f} to {max(values):.{digits}f}"
        return f"{median(values):.{digits}f} ({spread})"

    def added(when: str, what: str) -> list[float]:
        return [f[when][what] - f["imported"]["peak" if what == "peak" else what] for f in found]

    return [
        name,
        cell([f["s"] for f in found], 3),
        cell([f["imported"]["peak"] for f in found]),
        cell([f["end"]["peak"] for f in found]),
        cell(added("end", "peak")),
        cell(added("end", "own")),
        cell(added("end", "files")),
    ]


def lookup_rows(folders: dict[str, Path], num_lookups: int, num_rounds: int) -> list[list[str]]:
    """Return cells: microseconds a label in sets that take turns, and times those of the first."""
    sets = {name: LabelSet.open(folder) for name, folder in folders.items()}
    for labels in sets.values():
        for keys, views in batches(len(labels), num_lookups, seed=1):  # files, caches
            labels.lookup(keys, views)
    turns = [batches(len(labels), num_rounds * BATCH_SIZE, seed=2) for labels in sets.values()]
    taken: dict[str, list[float]] = {name: [] for name in sets}
    for batch_of_each in zip(*turns, strict=True):
        for (name, labels), (keys, views) in zip(sets.items(), batch_of_each, strict=True):
            start = time.perf_counter()
            labels.lookup(keys, views)
            taken[name].append(1e6 * (time.perf_counter() - start) / BATCH_SIZE)
    first = next(iter(taken.values()))
    rows = []
    for name, values in taken.items():
        ratios = [value / other for value, other in zip(values, first, strict=True)]
        rows.append([name])
        for numbers in (values, ratios):
            tenths = quantiles(numbers, n=10, method="inclusive")
            rows[-1] += [f"{median(numbers):.2f}", f"{tenths[0]:.2f} to {tenths[-1]:.2f}"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sets, to see that it runs")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--lookups", type=int, default=NUM_LOOKUPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return open_and_look_up(options.measure, options.lookups)

    torch.set_num_threads(1)
    sizes = (100, 5000) if options.quick else (10_000, 1_000_000)
    pool_size, num_rounds = (1000, 5) if options.quick else (50_000, 1000)
    num_lookups, num_processes = (1024, 1) if options.quick else (NUM_LOOKUPS, NUM_PROCESSES)
    with tempfile.TemporaryDirectory() as temporary:
        folders = {f"{n:,} images": Path(temporary, str(n)) for n in sizes}
        for num_images, folder in zip(sizes, folders.values(), strict=True):
            write_set(folder, num_images, pool_size)
            size = sum(path.stat().st_size for path in folder.iterdir())
            print(f"{num_images:,} images × {NUM_VIEWS} views: {size / 1e6:,.0f} MB\n")
        rows = [
            opening_row(name, folder, num_lookups, num_processes)
            for name, folder in folders.items()
        ]
        head = ["a fresh process", "open, s", "MB after imports", "peak MB", "above imports"]
        print(table([*head, "own pages, at the end", "pages of files"], rows))
        rows = lookup_rows(folders, num_lookups, num_rounds)
        print(table(["512 random labels a call", "µs/label", "10-90 %", "times", "10-90 %"], rows))
    print(
        f"{datetime.date.today()}, {os.cpu_count()} cores, {platform.machine()}, "
        f"torch {torch.__version__}, numpy {np.__version__}, one thread"
    )
    return None


if __name__ == "__main__":
    main()
