"""Distil the student of the demo with label sets of several rates, and compare the results.

    mealv2 demo --seeds 3 --output demo
    python -m benchmarks.rates --demo demo --output rates --seeds 3

Uses the data, teachers and starts in the folder of the demo. The dense set is created once, the
others are converted from it. The arms are interleaved seed by seed, with the same start and the
same images in the same batches. All students are compared with the dense labels of the validation
split. Prints Markdown tables; runs on one machine give equal figures.

`--quick` takes seconds, with two epochs and one seed, only to try the script.
"""

import argparse
import datetime
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from benchmarks.experiment_tables import compare_with_labels, table
from mealv2.label_set import LabelSet
from mealv2.soft_labels import Labels, concat
from pipeline import distill, precompute
from pipeline.config import (
    DistillConfig,
    LabelsConvertConfig,
    LabelsInfoConfig,
    PrecomputeConfig,
)
from pipeline.demo.parts import (
    BATCH_SIZE,
    DISCRIMINATOR_LR,
    EPOCHS,
    IMG_SIZE,
    LR,
    STUDENT,
    TEACHERS,
    VIEWS,
)
from pipeline.label_sets import convert, info
from pipeline.label_sets.writing import all_rows
from pipeline.runtime.device import use_one_thread
from pipeline.training.run_folder import REPORT_NAME, has_checkpoint

QUICK_EPOCHS = 2
MIN_PROB = 1e-30  # instead of the 0 of float16

# Label sets by folder name: the set to convert from (None: the teachers), and the settings.
SETS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "dense": (None, {"topk": "all", "label_dtype": "float32"}),
    "rate-0.0003": ("dense", {"rate": 0.0003}),
    "rate-0.001": ("dense", {"rate": 0.001}),
    "rate-0.005": ("dense", {"rate": 0.005}),
    "dense-float16": ("dense", {"topk": "all", "label_dtype": "float16"}),
    "top-3": ("dense", {"topk": "3"}),
    "top-3-float16": ("dense", {"topk": "3", "label_dtype": "float16"}),
    "top-1": ("dense", {"topk": "1"}),
    "dense-logits": (None, {"topk": "all", "label_dtype": "float32", "store_logits": True}),
    "rate-0.001-logits": ("dense-logits", {"rate": 0.001, "store_logits": True}),
}
ALONE = ("dense", "rate-0.0003", "rate-0.001", "rate-0.005", "top-3", "top-1")


@dataclass(frozen=True)
class Arm:
    """A student: its label set, and whether it has a discriminator."""

    labels: str
    has_discriminator: bool = True

    @property
    def name(self) -> str:
        """The folder of its runs."""
        return self.labels + ("" if self.has_discriminator else "-d-off")

    @property
    def dense(self) -> "Arm":
        """The arm to compare with."""
        return Arm(SETS[self.labels][0] or self.labels, self.has_discriminator)

    def settings(self) -> dict[str, Any]:
        """Return the settings that differ between arms."""
        if self.has_discriminator:
            return {"discriminator_lr": DISCRIMINATOR_LR}
        return {"discriminator": "off"}


ARMS = (*(Arm(name) for name in SETS), *(Arm(name, False) for name in ALONE))


@dataclass(frozen=True)
class Bench:
    """The folders, and the epochs of an arm."""

    demo: Path
    out: Path
    epochs: int

    @property
    def data(self) -> Path:
        return self.demo / "data"

    def labels(self, name: str) -> Path:
        return self.out / "labels" / name

    def make_labels(self, name: str) -> None:
        """Create a label set with the teachers or from another set, unless it exists."""
        source, settings = SETS[name]
        if source is not None:
            output = self.labels(name)
            convert.run(LabelsConvertConfig(labels=self.labels(source), output=output, **settings))
            return
        precompute.run(
            PrecomputeConfig(
                data_dir=self.data,
                output=self.labels(name),
                teacher=tuple(f"{n}={self.demo / f'teacher-{n}'}" for n in TEACHERS),
                num_views=self.epochs,
                img_size=IMG_SIZE,
                workers=0,
                **VIEWS,
                **settings,
            )
        )

    def train(self, arm: Arm, seed: int) -> dict[str, float]:
        """Distil with the settings of the demo, resume, or read a finished run; return figures."""
        run = self.out / f"seed-{seed}" / arm.name
        if not (run / REPORT_NAME).exists():
            distill.run(
                DistillConfig(
                    data_dir=self.data,
                    labels=self.labels(arm.labels),
                    model=STUDENT,
                    initial_checkpoint=self.demo / f"seed-{seed}" / "start",
                    epochs=self.epochs,
                    lr=LR,
                    weight_decay=0.0,
                    batch_size=BATCH_SIZE,
                    val_interval=self.epochs,
                    workers=0,
                    seed=seed,
                    output=run,
                    resume=run if has_checkpoint(run) else None,
                    **arm.settings(),
                )
            )
        names, *_, last = (row.split(",") for row in (run / "summary.csv").read_text().split())
        trained = dict(zip(names, last, strict=True))
        return {
            "loss": float(trained["train_similarity_loss"]),
            "found_out": 100.0 * float(trained.get("train_discriminator_accuracy", "nan")),
            **compare_with_labels(run, self.data, self.labels("dense")),
        }


# --- properties of the labels ---------------------------------------------------------------------


def of_training(folder: Path) -> Labels:
    """Return every training label of a set, image by image."""
    labels = LabelSet.open(folder)
    files = [file for _, files in labels.blocks for file in files]
    return concat([all_rows(file, labels.encoding).labels for file in files])


def divergence(probs_NC: Tensor, recovered_NC: Tensor) -> Tensor:
    """Return KL(p || recovered) of each row, nats, float64."""
    # KL(p || q) = sum_c p_c (ln p_c - ln q_c), 0 ln 0 = 0
    exact_NC, other_NC = probs_NC.double(), recovered_NC.double().clamp_min(MIN_PROB)
    return (torch.xlogy(exact_NC, exact_NC) - torch.xlogy(exact_NC, other_NC)).sum(1)


def only_cut(probs_NC: Tensor, labels: Labels) -> Tensor:
    """Return p at the stored classes, and the mean of the other classes elsewhere, N x C."""
    kept = labels.kept()
    counts_NC = torch.zeros_like(probs_NC)
    counts_NC.scatter_add_(1, kept.indices_NK, kept.is_kept_NK.to(probs_NC.dtype))
    is_kept_NC = counts_NC > 0
    rest_N1 = probs_NC.masked_fill(is_kept_NC, 0.0).sum(1, keepdim=True)
    num_others_N1 = (~is_kept_NC).sum(1, keepdim=True).clamp_min(1)
    return torch.where(is_kept_NC, probs_NC, rest_N1 / num_others_N1)


def labels_row(folder: Path, dense_NC: Tensor) -> list[str]:
    """Return the cells of a set: its encoding, bytes and classes, and the loss of precision."""
    labels = of_training(folder)
    split = info.run(LabelsInfoConfig(labels=folder))["roles"]["train"]
    num_kept_N = labels.kept().is_kept_NK.sum(1).double()
    lost_N = divergence(dense_NC, labels.to_dense())
    cut = float(divergence(dense_NC, only_cut(dense_NC, labels)).mean())
    # C - 1 classes and a tail of one lose nothing
    uncut = 100.0 * float((num_kept_N >= dense_NC.shape[1] - 1).double().mean())
    return [
        str(LabelSet.open(folder).encoding),
        f"{split['bytes_per_view']:.2f}",
        f"{float(num_kept_N.mean()):.2f}",
        f"{uncut:.1f}",
        f"{float(lost_N.mean()):.5f}",
        f"{float(lost_N.quantile(0.99)):.4f}",
        f"{abs(cut):.5f}",  # not -0
    ]


# --- tables ---------------------------------------------------------------------------------------


def spread(values: list[float], digits: int, sign: str = "") -> str:
    """Return mean ± standard deviation; only the mean of a single value."""
    text = f"{mean(values):{sign}.{digits}f}"
    return f"{text} ± {stdev(values):.{digits}f}" if len(values) > 1 else text


def students_row(title: str, runs: list[dict[str, float]]) -> list[str]:
    cells = [
        spread([run[name] for run in runs], digits)
        for name, digits in (("loss", 4), ("top1", 2), ("agreement", 2), ("kl", 4))
    ]
    each = " ".join(f"{run['top1']:.2f}" for run in runs)
    found_out = mean(run["found_out"] for run in runs)
    return [title, *cells, each, "" if math.isnan(found_out) else f"{found_out:.0f}"]


def paired_row(
    title: str, runs: list[dict[str, float]], dense: list[dict[str, float]]
) -> list[str]:
    """Return the differences between the students of a set and of the dense set, by seed."""
    cells = [title]
    for name, digits in (("loss", 4), ("top1", 2), ("agreement", 2), ("kl", 4)):
        apart = [run[name] - other[name] for run, other in zip(runs, dense, strict=True)]
        cells.append(spread(apart, digits, "+"))
        if name == "top1":
            cells.append(" ".join(f"{value:+.2f}" for value in apart))
    return cells


def print_tables(bench: Bench, found: dict[Arm, list[dict[str, float]]]) -> None:
    dense_NC = of_training(bench.labels("dense")).to_dense()
    names = dict.fromkeys(arm.labels for arm in found)
    labels = {name: labels_row(bench.labels(name), dense_NC) for name in names}
    titles = {
        arm: labels[arm.labels][0] + ("" if arm.has_discriminator else "; D off") for arm in found
    }
    lost = ["KL to dense", "p99", "KL of the cut"]
    print(table(["labels", "bytes a view", "mean k", "k ≥ C − 1, %", *lost], list(labels.values())))
    known = ["similarity loss, last epoch", "top-1 %", "agreement %", "KL(ensemble ‖ student)"]
    rows = [students_row(titles[arm], runs) for arm, runs in found.items()]
    print(table(["labels", *known, "top-1 per seed", "D correct, %"], rows))
    rows = [
        paired_row(titles[arm], runs, found[arm.dense])
        for arm, runs in found.items()
        if arm != arm.dense
    ]
    known.insert(2, "top-1 per seed")
    print(table(["minus dense", *known], rows))


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    names = [arm.name for arm in ARMS]
    parser.add_argument("--arms", nargs="*", choices=names, default=names, metavar="ARM")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(words)
    use_one_thread()

    bench = Bench(options.demo, options.output, QUICK_EPOCHS if options.quick else EPOCHS)
    seeds = range(1 if options.quick else options.seeds)
    asked = {arm for arm in ARMS if arm.name in options.arms}
    asked |= {arm.dense for arm in asked}
    arms = [arm for arm in ARMS if arm in asked]
    needed = {"dense", *(arm.labels for arm in arms), *(arm.dense.labels for arm in arms)}
    for name in SETS:
        if name in needed:
            bench.make_labels(name)
    found: dict[Arm, list[dict[str, float]]] = {arm: [] for arm in arms}
    for seed in seeds:
        for arm in arms:
            found[arm].append(bench.train(arm, seed))
    print_tables(bench, found)
    print(
        f"{datetime.date.today()}, {os.cpu_count()} cores, {platform.machine()}, "
        f"torch {torch.__version__}, {len(seeds)} seeds, {bench.epochs} epochs"
    )


if __name__ == "__main__":
    main()
