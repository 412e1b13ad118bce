"""Compare the pixels of the default resize with those of Pillow, and the labels of both.

    python benchmarks/pixels.py
    mealv2 demo --output demo
    python benchmarks/pixels.py --demo demo

Draws 495 images like those of ImageNet and cuts two views of each, 224 pixels, with both. With a
folder of the demo it also labels the images of the demo with both, by the teachers of the demo and
as dense float32 labels. Prints Markdown tables; equal versions give equal figures.

`--quick` draws a few images, for the tests.
"""

import argparse
import datetime
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from mealv2.data.pixels import RESIZES, centre_crop, cut, decode
from mealv2.label_set import LabelSet
from mealv2.runtime import library_versions
from mealv2.views import view_of
from pipeline import console, precompute
from pipeline.bench.synthetic_images import draw_jpeg
from pipeline.config import PrecomputeConfig
from pipeline.demo.parts import IMG_SIZE, TEACHERS, VIEWS
from pipeline.runtime.device import use_one_thread

NUM_PICTURES, VIEWS_OF_EACH = 495, 2
NUM_VIEWS = 4  # labelled of each image of the demo
SIZE = 224


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(words)
    versions = library_versions()
    print(f"{datetime.date.today()}, torch {versions['torch']}, Pillow {versions['pillow']}\n")
    compare_pixels(5 if options.quick else NUM_PICTURES)
    if options.demo is not None:
        with tempfile.TemporaryDirectory() as folder:
            compare_labels(options.demo, Path(folder))


def compare_pixels(num_pictures: int) -> None:
    """Print the differences of views and centre crops, in 255ths."""
    found: dict[str, list[np.ndarray]] = {"views": [], "centre crops": []}
    for number in range(num_pictures):
        pixels_HWC = decode(draw_jpeg(number))
        height, width, _ = pixels_HWC.shape
        for index in range(VIEWS_OF_EACH):
            view = view_of(f"{number}", index, seed=0, width=width, height=height)
            pil, fast = (
                cut(pixels_HWC, view, SIZE, resize=r).astype(int) for r in ("pil", "torch")
            )
            found["views"].append(np.abs(pil - fast))
        pil, fast = (centre_crop(pixels_HWC, SIZE, resize=r).astype(int) for r in ("pil", "torch"))
        found["centre crops"].append(np.abs(pil - fast))
    rows = [
        [
            f"{len(differences)} {name}",
            f"{np.mean([d.mean() for d in differences]):.4f}",
            str(max(d.max() for d in differences)),
            f"{100 * np.mean([(d > 0).mean() for d in differences]):.2f}",
            f"{100 * np.mean([(d > 1).mean() for d in differences]):.4f}",
        ]
        for name, differences in found.items()
    ]
    _print_table(["torch and Pillow", "mean", "maximum", "% that differ", "% by more than 1"], rows)


def compare_labels(demo: Path, folder: Path) -> None:
    """Print the differences of the labels between the two resizes."""
    use_one_thread()
    config = PrecomputeConfig(
        data_dir=demo / "data",
        output=folder / "torch",
        teacher=tuple(f"{name}={demo / f'teacher-{name}'}" for name in TEACHERS),
        img_size=IMG_SIZE,
        num_views=NUM_VIEWS,
        topk="all",
        label_dtype="float32",
        workers=0,
        **VIEWS,
    )
    for resize in RESIZES:
        precompute.run(replace(config, output=folder / resize, exact_pil=resize == "pil"))
    rows = []
    for split in ("train", "val"):
        sets = {resize: LabelSet.open(folder / resize, split=split) for resize in RESIZES}
        keys = list(sets["torch"].keys())
        addresses = [(key, view) for key in keys for view in range(sets["torch"].num_views)]
        pil_NC, fast_NC = (
            sets[resize].soft_labels(*map(list, zip(*addresses, strict=True))).to_dense().double()
            for resize in ("pil", "torch")
        )
        # KL(pil || torch), with the smallest number of float32 instead of 0
        kl_NC = torch.xlogy(pil_NC, pil_NC) - torch.xlogy(pil_NC, fast_NC.clamp_min(1e-45))
        agree = (pil_NC.argmax(1) == fast_NC.argmax(1)).double().mean()
        rows.append(
            [
                f"{len(addresses)} of {split}",
                f"{float(kl_NC.sum(1).mean()):.2e}",
                f"{float(kl_NC.sum(1).max()):.2e}",
                f"{100 * float(agree):.3f}",
            ]
        )
    _print_table(["labels of the demo", "mean KL, nats", "maximum", "top-1 agrees, %"], rows)


def _print_table(head: list[str], rows: list[list[str]]) -> None:
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(row)} |")
    print()


if __name__ == "__main__":
    console.info("drawing and cutting")
    main()
