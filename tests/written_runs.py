"""Folders of runs as a training writes them, made without training."""

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mealv2.storage.run_files import CONFIG_NAME, METRICS_NAME, REPORT_NAME, SUMMARY_NAME


def write_run(
    folder: Path,
    *,
    seed: int = 0,
    epochs: int = 6,
    planned: int | None = None,
    best: int | None = None,
    top1: float = 70.0,
    model: str = "test_resnet",
    num_classes: int = 3,
    is_soft: bool = True,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write a run of ``epochs`` epochs that ends at ``top1``; finished if that is all of them.

    The best epoch is the last one, or ``best``, which is one point better.
    """
    folder.mkdir(parents=True)
    planned = epochs if planned is None else planned
    config = {"model": model, "seed": seed, "epochs": planned, "data_dir": "/data", "lr": 0.01}
    if is_soft:
        config |= {"discriminator": "official", "labels": None}
    (folder / CONFIG_NAME).write_text(json.dumps({**config, **(settings or {})}))
    rows = [_row(e, epochs, seed, top1, is_soft=is_soft) for e in range(1, epochs + 1)]
    if best is not None:
        rows[best - 1]["val_top1"] = top1 + 1
    if rows:
        with (folder / SUMMARY_NAME).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    versions = {"mealv2": "0.1", "torch": "2.0"}
    session = {"step": 0, "ranks": 1, "device": "cpu", "precision": "float32", "versions": versions}
    start = {"top1": top1 - 10, "top5": 90.0, "cross_entropy": 1.5, "ece": 8.0, "num_images": 30}
    if is_soft:
        start |= {"agreement": 60.0, "kl": 0.5}
    events = [{"event": "session", "time": 1e9, **session}]
    events += [{"event": "validation", "time": 1e9 + 1, "epoch": 0, **start}]
    events += [{"event": "epoch", "time": 1e9 + 60 * r["epoch"], "steps": 1, **r} for r in rows]
    (folder / METRICS_NAME).write_text("".join(json.dumps(event) + "\n" for event in events))
    student = {
        "architecture": model,
        "num_classes": num_classes,
        "model_args": {},
        "pretrained_cfg": {"input_size": [3, 32, 32]},
    }
    (folder / "student").mkdir()
    (folder / "student" / CONFIG_NAME).write_text(json.dumps(student))
    if rows and epochs == planned:
        figures = {n.removeprefix("val_"): v for n, v in rows[-1].items() if n.startswith("val_")}
        report = {"model": model, "epochs": epochs, "steps": epochs, "seconds": 1.0, **figures}
        (folder / REPORT_NAME).write_text(json.dumps(report))
    return folder


def _row(epoch: int, epochs: int, seed: int, top1: float, *, is_soft: bool) -> dict[str, Any]:
    left = 1 - epoch / epochs
    noise = 0.3 * math.sin(7.0 * epoch + seed)
    row = {"epoch": epoch, "lr": 0.01 * (0.1 if left < 0.4 else 1.0), "train_loss": 1 + left}
    row |= {"train_top1": top1 - 12 * left, "train_top5": 94 - 3 * left}
    if is_soft:
        row |= {
            "train_similarity_loss": 0.6 + left,
            "train_discriminator_loss": 0.52 + 0.17 * left,
            "train_discriminator_accuracy": 0.5 + 0.3 * (1 - left),
            "train_discriminator_gradient_ratio": 0.1 + 0.05 * noise,
        }
    else:
        row |= {"train_cross_entropy": 1 + left}
    row |= {
        "val_top1": top1 - 8 * left + noise * left + seed / 10,
        "val_top5": 95 - 2 * left,
        "val_cross_entropy": 1 + 0.5 * left,
        "val_ece": 3 + 4 * left,
    }
    return row | ({"val_agreement": 80 - 9 * left, "val_kl": 0.2 + 0.2 * left} if is_soft else {})
