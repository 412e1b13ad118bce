"""Time an epoch of linear evaluation with cached features against one without.

    python benchmarks/frozen_features.py --data-dir flowers --model resnet18 --start weights

Both trainings are the same but for --cache-features: same images, views, order and initial weights.
An epoch includes its validation and checkpoint. Without --data-dir, images are drawn; without
--start, the backbone has random weights. Prints a Markdown table: seconds per epoch (the median
over the epochs), the ratio, seconds before the first epoch (model, features, first validation),
and loss and top-1 after the last epoch.
`--quick` is for the tests.
"""

import argparse
import datetime
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image

from mealv2.models import create_classifier, save_classifier
from mealv2.runtime import library_versions
from pipeline import console, transfer
from pipeline.config import TransferConfig
from pipeline.training.run_folder import parse_event

CLASSES = ("a", "b", "c", "d")


class Timing(NamedTuple):
    """One training: seconds per epoch, seconds before the first, top-1, and the last loss."""

    epoch_s: float
    start_s: float
    top1: float
    loss: float


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="ROOT/{train,val}/CLASS/IMAGE")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--start", type=Path, help="weights of the model")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--num-images", type=int, default=400, help="drawn per split and class")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--num-views", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args(words)
    if given.quick:
        given.model, given.img_size, given.num_images = "test_resnet", 32, 6
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        data_dir = given.data_dir or draw(out / "images", given.num_images, 2 * given.img_size)
        start = given.start or random_weights(out / "start", given.model, given.img_size)
        timings = {}
        for cache in ("auto", "off"):
            config = TransferConfig(
                data_dir=data_dir,
                model=given.model,
                initial_checkpoint=start,
                mode="frozen",
                cache_features=cache,
                img_size=given.img_size,
                epochs=given.epochs,
                num_views=given.num_views,
                workers=given.workers,
                batch_size=128 if not given.quick else 8,
                output=out / cache,
                log_interval=10_000,
                checkpoint_hist=1,
            )
            timings[cache] = timed(config)
    print(table(timings, given))


def timed(config: TransferConfig) -> Timing:
    """Train and read the times of the epochs from the log of the run."""
    began = time.time()
    report = transfer.run(config)
    assert config.output is not None
    with (config.output / "metrics.jsonl").open("rb") as file:
        events = [event for line in file if (event := parse_event(line)) is not None]
    ends = [float(e["time"]) for e in events if e["event"] == "epoch"]
    first = next(float(e["time"]) for e in events if e["event"] == "validation")
    losses = [float(e["train_loss"]) for e in events if e["event"] == "epoch"]
    times = np.diff([first, *ends])
    return Timing(float(median(times)), first - began, float(report["top1"]), losses[-1])


def draw(folder: Path, num_images: int, size: int) -> Path:
    """Write JPEGs of noise with a stripe at the height of the class."""
    rng = np.random.default_rng(0)
    for split, count in (("train", num_images), ("val", num_images // 4 + 1)):
        for kind, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.normal(90, 40, (size, size, 3))
                pixels[kind * size // 5 : (kind + 1) * size // 5] += 60
                image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
                image.save(folder / split / name / f"{number}.jpg")
    return folder


def random_weights(folder: Path, model: str, img_size: int) -> Path:
    """Write a model folder with random weights."""
    torch.manual_seed(0)
    made = create_classifier(model, num_classes=len(CLASSES), img_size=img_size)
    save_classifier(folder, made, classes=CLASSES, img_size=img_size)
    return folder


def table(timings: dict[str, Timing], given: Any) -> str:
    """Return the figures as Markdown."""
    cached, slow = timings["auto"], timings["off"]
    rows = [
        "| features | seconds per epoch | before the first epoch | last loss | top-1 |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, t in (("cached", cached), ("computed in every epoch", slow)):
        cells = [name, f"{t.epoch_s:.2f}", f"{t.start_s:.1f}", repr(t.loss), f"{t.top1:.2f}"]
        rows.append(f"| {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {version}" for name, version in library_versions().items())
    today = datetime.datetime.now(tz=datetime.UTC).date()
    return "\n".join(
        [
            *rows,
            "",
            f"ratio {slow.epoch_s / cached.epoch_s:.0f}; {given.model}, {given.img_size} pixels, "
            f"{given.num_views} views, {given.epochs} epochs, {torch.get_num_threads()} thread(s), "
            f"{today}, {versions}",
        ]
    )


if __name__ == "__main__":
    console.info("two trainings, with cached features and without")
    main()
