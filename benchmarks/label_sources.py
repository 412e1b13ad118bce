"""Distil the demo's student from labels of four sources and compare the results.

    mealv2 demo --seeds 3 --output demo
    python benchmarks/label_sources.py --demo demo --output label-sources --seeds 3

Data, teachers and starts come from the demo's folder. The arms, interleaved seed by seed, have the
same images in the same order: a dense label set, a top-3 set, the teachers online, and a set with
half of the views, for which the teachers label the other half. Prints a Markdown table.
"""

import argparse
import datetime
import os
import platform
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from mealv2.storage.json_format import read_json
from pipeline import distill, precompute
from pipeline.config import DistillConfig, PrecomputeConfig
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
from pipeline.runtime.device import use_one_thread
from pipeline.training.run_folder import REPORT_NAME

SETS: dict[str, dict[str, Any]] = {
    "dense": {"num_views": EPOCHS, "topk": "all", "label_dtype": "float32"},
    "top-3": {"num_views": EPOCHS, "topk": "3", "label_dtype": "float16"},
    "half": {"num_views": EPOCHS // 2, "topk": "3", "label_dtype": "float16"},
}
FIGURES = ("train_similarity_loss", "val_kl", "val_agreement", "val_top1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    use_one_thread()

    data, teachers = (
        options.demo / "data",
        tuple(f"{n}={options.demo / f'teacher-{n}'}" for n in TEACHERS),
    )
    for name, settings in SETS.items():
        precompute.run(
            PrecomputeConfig(
                data_dir=data,
                output=options.output / f"labels-{name}",
                teacher=teachers,
                img_size=IMG_SIZE,
                workers=0,
                **VIEWS,
                **settings,
            )
        )
    online = {"online": True, "teacher": teachers, "img_size": IMG_SIZE, **VIEWS}
    arms: dict[str, dict[str, Any]] = {
        "dense set, float32": {"labels": options.output / "labels-dense"},
        "top-3 set, float16": {"labels": options.output / "labels-top-3"},
        "online": online,
        "online, D shown log-probabilities": {**online, "discriminator_input": "log-probs"},
        "half stored (top-3), half online": {
            "labels": options.output / "labels-half",
            "missing": "teach",
            "teacher": teachers,
        },
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    for seed in range(options.seeds):
        for number, (name, settings) in enumerate(arms.items()):
            folder = options.output / f"seed-{seed}" / f"arm-{number}"
            if not (folder / REPORT_NAME).exists():
                distill.run(
                    DistillConfig(
                        data_dir=data,
                        model=STUDENT,
                        initial_checkpoint=options.demo / f"seed-{seed}" / "start",
                        epochs=EPOCHS,
                        lr=LR,
                        discriminator_lr=DISCRIMINATOR_LR,
                        batch_size=BATCH_SIZE,
                        val_interval=50,
                        workers=0,
                        seed=seed,
                        output=folder,
                        **settings,
                    )
                )
            report = read_json(folder / REPORT_NAME)
            found[name].append({**last_row(folder), "seconds": report["seconds"]})
    print(table(found))
    print(
        f"\n{datetime.date.today()}, {os.cpu_count()} cores, {platform.machine()}, "
        f"torch {torch.__version__}, {options.seeds} seeds, {EPOCHS} epochs"
    )


def last_row(run: Path) -> dict[str, float]:
    """Return the figures of the last epoch of a run."""
    names, *_, last = (line.split(",") for line in (run / "summary.csv").read_text().splitlines())
    return {n: float(v) for n, v in zip(names, last, strict=True) if v}


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Return mean and standard deviation over the seeds as a Markdown table, and each top-1."""
    head = ["labels", "similarity loss, last epoch", "KL on val", "agreement %", "top-1 %"]
    lines = ["| " + " | ".join([*head, "top-1 per seed", "s"]) + " |", "|---" * 7 + "|"]
    for name, runs in found.items():
        cells = [name]
        for figure, digits in zip(FIGURES, (4, 4, 2, 2), strict=True):
            values = [run[figure] for run in runs]
            spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.{digits}f}{spread}")
        cells.append(" ".join(f"{run['val_top1']:.2f}" for run in runs))
        cells.append(f"{mean(run['seconds'] for run in runs):.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
