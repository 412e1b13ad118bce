"""Time stage one with one process and with two, and the check of the shards of a large set.

    python benchmarks/jobs.py
    python benchmarks/jobs.py --quick

Synthetic images; the teacher is resnet18 with random weights. Each arm is a complete command, from
the start of Python to the manifest; the arms run in alternation. Needs two idle cores. Prints
Markdown tables.
"""

import argparse
import datetime
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from label_codec import NUM_CLASSES, table
from label_set_scale import key_of
from label_set_speed import plan_of, put_shard

from mealv2.label_set import Encoding, claim, planned_shards
from mealv2.models import create_classifier, save_classifier
from pipeline.bench import hardware
from pipeline.bench.context import simulated_rows
from pipeline.bench.synthetic_images import write_image_folder
from pipeline.config import LabelsFinishConfig, LabelsStatusConfig
from pipeline.label_sets import finish, status

TEACHER, CLASSES, SHARD_SIZE, BATCH_SIZE = "resnet18", 10, 16, 16
STATUS_IMAGES, STATUS_VIEWS = 2048, 30  # of a shard


class Arm(NamedTuple):
    """A way to run stage one: the number of processes, and of torch's threads in each."""

    num_procs: int
    threads: int


ARMS = {
    "1 process, 1 thread": Arm(1, 1),
    "2 processes, 1 thread each": Arm(2, 1),
    "1 process, 2 threads": Arm(1, 2),
}


def label(folder: Path, out: Path, arm: Arm, *, num_views: int) -> float:
    """Run the command; return its seconds."""
    arguments = ["precompute", "--data-dir", folder / "data", "--output", out, "--workers", 0]
    arguments += ["--teacher", f"{TEACHER}={folder / 'teacher'}", "--val-split", "none"]
    arguments += ["--num-views", num_views, "--shard-size", SHARD_SIZE, "--batch-size", BATCH_SIZE]
    arguments += ["--num-procs", arm.num_procs]
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "mealv2", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": str(arm.threads)},
        capture_output=True,
        check=True,
    )
    return time.perf_counter() - began


def measure(folder: Path, *, num_images: int, num_views: int, repetitions: int) -> None:
    """Run the arms in alternation and print their times."""
    write_image_folder(folder / "data" / "train", num_images=num_images, num_classes=CLASSES)
    classes = sorted(path.name for path in (folder / "data" / "train").iterdir())
    torch.manual_seed(0)
    teacher = create_classifier(TEACHER, num_classes=len(classes), img_size=224)
    save_classifier(folder / "teacher", teacher, classes=classes, img_size=224)
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    starts: dict[str, list[float]] = {name: [] for name in ARMS}
    for number in range(repetitions):
        turn = list(ARMS)[number % len(ARMS) :] + list(ARMS)[: number % len(ARMS)]
        for name in turn:
            out = folder / "labels"
            seconds[name].append(label(folder, out, ARMS[name], num_views=num_views))
            # a second run has nothing to label: the time to start, check and end
            starts[name].append(label(folder, out, ARMS[name], num_views=num_views))
            shutil.rmtree(out)
    one, two, _ = ARMS
    pairs = zip(seconds[one], starts[one], seconds[two], starts[two], strict=True)
    total, labelling = [], []
    for s1, start1, s2, start2 in pairs:
        total.append(s1 / (2 * s2))
        labelling.append((s1 - start1) / (2 * (s2 - start2)))
    rows = [[name, spread(seconds[name]), spread(starts[name])] for name in ARMS]
    print(f"{num_images} pictures x {num_views} views, {-(-num_images // SHARD_SIZE)} shards.\n")
    print(table(["stage one", "s", "s, start-up only"], rows))
    figures = [
        ["complete command", spread(total)],
        ["without start-up", spread(labelling)],
    ]
    print(table(["efficiency of two processes, t1 / (2 t2)", ""], figures))


def measure_status(folder: Path, *, num_shards: int, repetitions: int) -> None:
    """Write a set of many shards; print the time to check all of them."""
    encoding = Encoding(NUM_CLASSES, rate=0.001)
    num_images = num_shards * STATUS_IMAGES
    plan = plan_of(encoding, STATUS_VIEWS) | {"shard_size": STATUS_IMAGES, "teachers": []}
    plan["roles"]["train"]["num_images"] = num_images
    claim(folder, plan)
    one = encoding.blocks(simulated_rows(encoding, 64, STATUS_VIEWS), STATUS_VIEWS)
    blocks = one * (STATUS_IMAGES // len(one))
    for shard in planned_shards(plan):
        keys = [key_of(n) for n in shard.images or ()]
        put_shard(folder, plan, shard.number, keys, blocks)
    seconds: dict[str, list[float]] = {"finish": [], "status": []}
    for _ in range(repetitions):
        began = time.perf_counter()
        finish.run(LabelsFinishConfig(labels=folder))
        seconds["finish"].append(time.perf_counter() - began)
        began = time.perf_counter()
        report = status.run(LabelsStatusConfig(labels=folder))
        seconds["status"].append(time.perf_counter() - began)
    rows = [[f"`labels {name}`", spread(found)] for name, found in seconds.items()]
    size = f"{report['bytes'] / 1e9:.2f} GB"
    print(
        f"{num_shards} shards of {STATUS_IMAGES} images x {STATUS_VIEWS} views, {size}, cached.\n"
    )
    print(table(["every shard read and checked", "s"], rows))


def spread(values: list[float]) -> str:
    """Return median and range."""
    return f"{median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="a run of one minute, to try the script"
    )
    quick = parser.parse_args().quick
    with tempfile.TemporaryDirectory() as folder:
        sizes = (32, 1, 1) if quick else (96, 4, 5)
        measure(Path(folder), num_images=sizes[0], num_views=sizes[1], repetitions=sizes[2])
        measure_status(
            Path(folder) / "set", num_shards=3 if quick else 1000, repetitions=1 if quick else 5
        )
    info = hardware.describe(torch.device("cpu"))
    print(
        f"{datetime.date.today()}, {info['cpu']}, {info['cores']} cores, no GPU used, "
        f"torch {torch.__version__}, python {platform.python_version()}; median, min and max."
    )


if __name__ == "__main__":
    main()
