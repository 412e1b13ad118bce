"""What a finished run prints: a table of accuracies, the size of the result, the next commands."""

import shlex
from pathlib import Path
from typing import Any

from mealv2.models.detector import Detector
from mealv2.models.factory import is_factory
from mealv2.storage.urls import shown
from mealv2.storage.weight_files import EXPORT_FOLDER, WEIGHTS_NAME
from pipeline import console
from pipeline.config import TrainConfig
from pipeline.training.spec import TrainingSpec

# the names of metrics in what is printed
METRICS = {
    "top1": "top-1",
    "top5": "top-5",
    "map": "mAP",
    "map_11point": "11-point mAP",
    "agreement": "agreement",
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
}
_RESIZE_FLAGS = {
    "torch": [],
    "pil": ["--exact-pil"],
    "torch-bicubic": ["--interpolation", "bicubic"],
    "pil-bicubic": ["--exact-pil", "--interpolation", "bicubic"],
}


def accuracies(rows: dict[str, dict[str, Any]]) -> str:
    """Return a table of metrics by name, with the columns that some row has."""
    columns = [name for name in METRICS if any(name in row for row in rows.values())]
    cells = [
        [title, *(f"{row[name]:.2f}" if name in row else "" for name in columns)]
        for title, row in rows.items()
    ]
    return console.table([["accuracy", *(METRICS[name] for name in columns)], *cells])


def student_rows(
    last: dict[str, Any], best: dict[str, Any], *, last_epoch: int
) -> dict[str, dict[str, Any]]:
    """Return the metrics of the last and of the best epoch by name; ``best`` has both in it."""
    if best["epoch"] == last_epoch:
        return {f"student, epoch {last_epoch} (last, best)": last}
    return {
        f"student, epoch {best['epoch']} (best)": best["metrics"],
        f"student, epoch {last_epoch} (last)": last,
    }


def model_line(spec: TrainingSpec, run: Path, *, epoch: int, trained: str) -> str:
    """Return the line of the result: its folder, epoch, architecture and size."""
    folder = run / EXPORT_FOLDER
    num_parameters = sum(p.numel() for p in spec.student.backbone.parameters())
    num_bytes = (folder / WEIGHTS_NAME).stat().st_size
    return (
        f"result {folder}: {spec.student.tag} after epoch {epoch}, "
        f"{num_parameters / 1e6:.3g} M parameters, {console.size_of(num_bytes)}; {trained}"
    )


def next_commands(config: TrainConfig, spec: TrainingSpec, run: Path) -> list[str]:
    """Return the commands that measure and export the result of a run.

    They name a model of the user's own code, which runs only if the command line names it; as no
    timm folder can hold it, it is exported to ONNX.
    """
    if isinstance(spec.student, Detector):
        return []  # evaluate and export are for classifiers
    tag = spec.student.tag
    own, to = (["--model", tag], "onnx") if is_factory(tag) else ([], "timm")
    found = []
    if spec.evaluator is not None:
        words = ["--data-dir", shown(config.data_dir), "--checkpoint", str(run), *own]
        if config.val_split != "val":
            words += ["--val-split", config.val_split]
        if config.on_bad_image != "fail":
            words += ["--on-bad-image", config.on_bad_image]
        words += [
            *spec.held_out_flags,
            *_RESIZE_FLAGS[spec.resize],
        ]
        found.append(shlex.join(["mealv2", "evaluate", *words]))
    return [*found, shlex.join(["mealv2", "export", str(run), "--to", to, *own])]
