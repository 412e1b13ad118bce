"""Measure the loading of small images against torchvision, and against a training step.

    python benchmarks/small_images.py cifar10

The folder has a split of class folders, like CIFAR-10 as JPEGs of 32 x 32 pixels. Every round reads
all images once with each loader: ours with 0, 1 and 2 threads, images from files and from memory;
torchvision's ImageFolder and CIFAR10 with 2 processes. The last lines compare a training step of
test_resnet with and without loading. Prints Markdown tables: medians of the rounds, and ranges.

`--quick` reads few images in two rounds, for the tests.
"""

import argparse
import datetime
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import CIFAR10, ImageFolder

from mealv2.batches import split_batches
from mealv2.data.image_cache import ImageCache
from mealv2.data.loader import read_views
from mealv2.data.open import open_source
from mealv2.data.pixels import decode
from mealv2.data.requests import Batch
from mealv2.data.source import ImageSource
from mealv2.data.view_reader import ViewReader
from mealv2.runtime import library_versions
from mealv2.targets import HardLabels
from mealv2.task import HardLabelTask
from mealv2.view_recipe import Crop, ViewRecipe
from mealv2.views import DrawnViews
from pipeline import console
from pipeline.config import FinetuneConfig
from pipeline.runtime.device import distributed_runtime, use_one_thread
from pipeline.timing import take_turns
from pipeline.training.spec import TrainingSpec, create_student
from pipeline.training.step import TrainStep

IMG_SIZE = 32
BATCH_SIZE = 64
ROUNDS = 5
THREADS = (0, 1, 2)
PROCESSES = 2
STEP_MODEL = "test_resnet"
STEPS = 30
CPU = torch.device("cpu")

Workload = Callable[[], int]


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--split", default="train")
    parser.add_argument("--images", type=int, default=10_000, help="the most that are read")
    parser.add_argument("--crop", choices=("rrc", "pad"), action="append", help="of the views")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(words)
    use_one_thread()
    versions = library_versions()
    print(f"{datetime.date.today()}, torch {versions['torch']}, {torch.get_num_threads()} thread\n")
    rounds = 2 if options.quick else ROUNDS
    source = open_source(options.data_dir, options.split)
    stride = max(1, len(source) // (100 if options.quick else options.images))
    positions = list(range(0, len(source), stride))
    for crop in options.crop or ("rrc", "pad"):
        compare_loaders(options.data_dir, source, positions, crop, rounds)
    compare_step(options.data_dir, source, positions, rounds)


# --- loaders --------------------------------------------------------------------------------------


def compare_loaders(
    data_dir: Path, source: ImageSource, positions: list[int], crop: Crop, rounds: int
) -> None:
    """Print the images a second of every loader."""
    workloads: dict[str, Workload] = {}
    for threads in THREADS:
        workloads[f"ours, from files, {threads} threads"] = _own(source, positions, crop, threads)
        cache = ImageCache(len(source), 1 << 40)
        kept = _own(source, positions, crop, threads, cache)
        workloads[f"ours, from memory, {threads} threads"] = kept
    baseline = f"ImageFolder, {PROCESSES} processes"
    folder = ImageFolder(str(data_dir / source.split), transform=_transforms(crop))
    workloads[baseline] = _torchvision(torch.utils.data.Subset(folder, positions))
    arrays = _cifar10(source, positions, crop)
    workloads[f"CIFAR10 (arrays in memory), {PROCESSES} processes"] = _torchvision(arrays)
    turns = take_turns(workloads, rounds=rounds, device=CPU)
    rows = [["", "images/s", f"over {baseline}", "CPU ms a 1,000 images"]]
    for name, found in turns.items():
        ratios = [t.rate / b.rate for t, b in zip(found, turns[baseline], strict=True)]
        cpu_ms = [1e6 * t.cpu_seconds / t.units for t in found]
        rates = [turn.rate for turn in found]
        rows.append([name, _range(rates, ",.0f"), _range(ratios, ".2f"), _range(cpu_ms, ".0f")])
    print(f"\n{len(positions)} images, --crop {crop}, batches of {BATCH_SIZE}, {rounds} rounds:\n")
    print(console.table(rows))


def _range(values: list[float], form: str) -> str:
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def _own(
    source: ImageSource,
    positions: list[int],
    crop: Crop,
    threads: int,
    cache: ImageCache | None = None,
) -> Workload:
    views = DrawnViews(0, ViewRecipe(crop=crop))
    reader = ViewReader(source, img_size=IMG_SIZE, views=views, cache=cache)
    requests = split_batches([(position, (0,)) for position in positions], BATCH_SIZE)
    loader = read_views(reader, requests, workers=threads)
    return lambda: sum(len(batch.positions) for batch in loader)


def _transforms(crop: Crop) -> Any:
    """Return torchvision's transforms for training."""
    random_crop = (
        transforms.RandomResizedCrop(IMG_SIZE)
        if crop == "rrc"
        else transforms.RandomCrop(IMG_SIZE, padding=4)
    )
    normalise = transforms.Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    flip = transforms.RandomHorizontalFlip()
    return transforms.Compose([random_crop, flip, transforms.ToTensor(), normalise])


def _cifar10(source: ImageSource, positions: list[int], crop: Crop) -> Dataset[Any]:
    """Return torchvision's CIFAR10 of these images, without its archive."""
    dataset = CIFAR10.__new__(CIFAR10)
    dataset.data = np.stack([decode(source.read(position)) for position in positions])
    dataset.targets = [source.labels[position] for position in positions]
    dataset.transform, dataset.target_transform = _transforms(crop), None
    return dataset


def _torchvision(dataset: Dataset[Any]) -> Workload:
    loader = DataLoader(
        dataset,
        batch_size=BATCH_SIZE,
        shuffle=True,
        num_workers=PROCESSES,
        persistent_workers=True,
    )
    return lambda: sum(len(classes_B) for _, classes_B in loader)


# --- a training step ------------------------------------------------------------------------------


def compare_step(data_dir: Path, source: ImageSource, positions: list[int], rounds: int) -> None:
    """Print what loading adds to the steps of a training, with the default flags."""
    config = FinetuneConfig(
        data_dir=data_dir,
        model=STEP_MODEL,
        pretrained=False,
        img_size=IMG_SIZE,
        batch_size=BATCH_SIZE,
        device="cpu",
    )
    student = create_student(config, classes=list(source.classes), img_size=IMG_SIZE)
    spec = TrainingSpec(
        command="finetune",
        task=HardLabelTask(student),
        student=student,
        source=source,
        positions=positions,
        targets=HardLabels(source.labels),
        img_size=IMG_SIZE,
        views=DrawnViews(0),
        resize="torch",
        evaluator=None,
    )
    with distributed_runtime(config) as runtime:
        step = TrainStep(config, runtime, spec)
        spec.task.train()
        reader = spec.reader(ImageCache(len(source), 1 << 40))
        requests = split_batches([(p, (0,)) for p in positions], BATCH_SIZE)[:STEPS]
        kept = list(read_views(reader, requests))
        loaders = {"batches in memory": kept}
        for threads in THREADS:
            loaders[f"loaded by {threads} threads"] = read_views(reader, requests, workers=threads)
        turns = take_turns(
            {name: partial(_steps, step, batches) for name, batches in loaders.items()},
            rounds=rounds,
            device=CPU,
        )
    rows = [["", "ms a step", "over batches in memory"]]
    for name, found in turns.items():
        ratios = [
            t.seconds / b.seconds for t, b in zip(found, turns[next(iter(turns))], strict=True)
        ]
        times = [1e3 * t.seconds / len(requests) for t in found]
        rows.append([name, _range(times, ".1f"), _range(ratios, ".3f")])
    print(f"\nfinetune, {STEP_MODEL}, {IMG_SIZE} pixels, batches of {BATCH_SIZE}:\n")
    print(console.table(rows))


def _steps(step: TrainStep, batches: Iterable[Batch]) -> int:
    return sum(output.num_views for b in batches for output in step.update(b, len(b.positions)))


if __name__ == "__main__":
    main()
