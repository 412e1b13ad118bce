"""Measure a model on a split: accuracy, also per class, confusion and calibration."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mealv2.data.held_out import by_name
from mealv2.data.source import ImageSource, multi_labels_of
from mealv2.errors import ConfigError
from mealv2.metrics import Evaluation, Predictions
from mealv2.storage.atomic import write_atomic
from mealv2.storage.json_format import canonical_json
from mealv2.text import printable
from pipeline import console, load_model
from pipeline.config import EvaluateConfig
from pipeline.loading.sources import held_out_of, open_images, warn_missing
from pipeline.runtime.device import Runtime, create_runtime
from pipeline.training.evaluator import Evaluator, MultiLabelEvaluator

NUM_SHOWN = 5  # classes, and pairs of classes
MAX_MATRIX = 5000  # classes of a confusion matrix with all its zeros: a file of 50 MB

Confusion = list[tuple[int, int, int]]  # label, predicted class, images


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate; print the metrics as text without --json; return the report.

    Raises MealError and OSError.
    """
    runtime = create_runtime(config)
    held_out = held_out_of(config, train_split=config.train_split or "train")
    source = open_images(
        config, config.data_dir, config.val_split, held_out=held_out, multi_label=True
    )
    known = load_model.known_classes(config)
    if known and (matched := by_name(source, known)) not in (None, source):
        if missing := sorted(set(known) - set(source.classes)):
            warn_missing(config.val_split, config.data_dir, missing)
        source = matched
    found = load_model.load(config, classes=source.classes)
    if held_out is not None and found.held_out not in (None, held_out.flags):
        console.info(
            f"warning: {found.name} was trained with {' '.join(found.held_out or ())}: {held_out} "
            "chooses other images, among them some that it may have been trained on"
        )
    model = runtime.to_device(found.model)
    if model.num_classes != len(source.classes):
        raise ConfigError(
            f"{found.name} has {model.num_classes} classes, {source.name} has {len(source.classes)}"
        )
    if multi_labels_of(source) is not None:
        return _evaluate_multi_label(config, runtime, source, found)
    evaluator = Evaluator(source, runtime, config, img_size=found.img_size, resize=config.resize)
    predictions = Predictions(model.num_classes)
    figures = evaluator(model, num_classes=model.num_classes, predictions=predictions)
    report = {
        "model": model.tag,
        "img_size": found.img_size,
        **figures.summary(),
    }
    rows = _class_rows(source.classes, figures)
    if config.results_file is not None:
        load_model.write_results(config.results_file, {**report, "per_class": rows}, rows)
    confusion = predictions.confusion()
    if config.output is not None:
        bins = vars(figures.calibration())
        details = {"per_class": rows, "confusion": confusion, "calibration": bins}
        _write_folder(config.output, report | details, rows, confusion, source.classes)
    if not config.json:
        console.result(_shown(report, source, rows, confusion))
    return report


def _evaluate_multi_label(
    config: EvaluateConfig, runtime: Runtime, source: ImageSource, found: load_model.LoadedModel
) -> dict[str, Any]:
    """Return the report of a split whose images have several classes: average precisions."""
    if config.output is not None:
        raise ConfigError(f"--output has no effect on {source.name}: give --results-file")
    evaluator = MultiLabelEvaluator(
        source, runtime, config, img_size=found.img_size, resize=config.resize
    )
    figures = evaluator.evaluation(found.model, num_classes=found.model.num_classes)
    report = {"model": found.model.tag, "img_size": found.img_size, **figures.summary()}
    classes = zip(source.classes, figures.per_class(), strict=True)
    rows = [{"class": name, **row} for name, row in classes]
    if config.results_file is not None:
        load_model.write_results(config.results_file, {**report, "per_class": rows}, rows)
    if not config.json:
        console.result(_shown_multi_label(report, source, rows))
    return report


def _shown_multi_label(
    report: dict[str, Any], source: ImageSource, rows: list[dict[str, Any]]
) -> str:
    """Return average precisions as text: the means, then a line for each class."""
    images = console.count(report["num_images"], "image")
    table = [["class", "images", "ignored", "AP %", "11-point AP %"]]
    for row in rows:
        figures = [row["ap"], row["ap_11point"]]
        cells = ["-" if value is None else f"{100 * value:.2f}" for value in figures]
        name = printable(row["class"], is_line=True)
        table.append([name, str(row["present"]), str(row["ignored"]), *cells])
    return "\n".join(
        [
            f"{report['model']} at {report['img_size']} pixels on {images} of {source.name}",
            f"mAP {report['map']:.2f} %, 11-point mAP (VOC2007) {report['map_11point']:.2f} %",
            console.table(table),
        ]
    )


def _class_rows(classes: Sequence[str], figures: Evaluation) -> list[dict[str, Any]]:
    """Return images, correct ones and top-1 of every class."""
    return [
        {
            "class": name,
            "images": images,
            "correct": correct,
            "top1": 100.0 * correct / max(1, images),
        }
        for name, (images, correct) in zip(classes, figures.per_class(), strict=True)
    ]


# --- files --------------------------------------------------------------------------------------


def _write_folder(
    folder: Path,
    report: dict[str, Any],
    rows: list[dict[str, Any]],
    confusion: Confusion,
    classes: Sequence[str],
) -> None:
    """Write evaluation.json, per-class.csv and confusion-matrix.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "evaluation.json", canonical_json(report).encode())
    load_model.write_results(folder / "per-class.csv", report, rows)
    if len(classes) > MAX_MATRIX:
        console.info(f"no confusion-matrix.csv of {len(classes)} classes: see evaluation.json")
        return
    write_atomic(folder / "confusion-matrix.csv", _matrix(confusion, classes).encode())


def _matrix(confusion: Confusion, classes: Sequence[str]) -> str:
    """Return the confusion matrix as CSV: a row for each class, a column for each prediction."""
    counts: dict[int, dict[int, int]] = {}
    for label, predicted, number in confusion:
        counts.setdefault(label, {})[predicted] = number
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [load_model.spreadsheet_cell(name) for name in classes]
    writer.writerow(["class", *names])
    for label, name in enumerate(names):
        row = counts.get(label, {})
        writer.writerow([name, *(row.get(predicted, 0) for predicted in range(len(names)))])
    return text.getvalue()


# --- text ---------------------------------------------------------------------------------------


def _shown(
    report: dict[str, Any], source: ImageSource, rows: list[dict[str, Any]], confusion: Confusion
) -> str:
    """Return the metrics as text: the total, the most confused and the weakest classes."""
    size, images = report["img_size"], console.count(report["num_images"], "image")
    lines = [
        f"{report['model']} at {size} x {size} pixels on {images} of {source.name}",
        f"top-1 {report['top1']:.2f} %, top-5 {report['top5']:.2f} %, "
        f"cross-entropy {report['cross_entropy']:.4f}, "
        f"calibration error (ECE) {report['ece']:.2f} %",
    ]
    errors = [entry for entry in confusion if entry[0] != entry[1]]
    errors.sort(key=lambda entry: -entry[2])
    if errors:
        lines.append("most confused (class, taken for):")
        for label, predicted, number in errors[:NUM_SHOWN]:
            pair = f"{_name(source, label)}, {_name(source, predicted)}"
            lines.append(f"  {pair}: {number} of {rows[label]['images']}")
    weakest = sorted(
        (row for row in rows if row["correct"] < row["images"]), key=lambda row: float(row["top1"])
    )
    if weakest and len(rows) > NUM_SHOWN:
        lines.append("lowest top-1:")
        for row in weakest[:NUM_SHOWN]:
            name = printable(row["class"], is_line=True)
            lines.append(f"  {name}: {row['top1']:.2f} %, {row['correct']} of {row['images']}")
    return "\n".join(lines)


def _name(source: ImageSource, class_id: int) -> str:
    return printable(source.classes[class_id], is_line=True)
