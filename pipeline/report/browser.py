"""The label browser: what the teachers said about views of training images; suspected errors."""

from typing import Any

from mealv2.data.source import UNLABELLED
from mealv2.report import browser
from pipeline import load_model
from pipeline.report.images import write_images
from pipeline.report.label_data import NO_LABELS, LabelData, label_data
from pipeline.report.sections import Inputs, Section, write_data

TITLE = "Label browser"
_DATA_NAME, _ERRORS_PATH = "browser", "data/label-errors.csv"


def section(inputs: Inputs) -> Section:
    """Return the section, after its images and data are written below ``inputs.output``.

    Raises LabelSetError for damaged labels.
    """
    data = label_data(inputs)
    if data is None:
        return Section("browser", TITLE, missing=NO_LABELS)
    chosen = browser.choose_images(data.sample, data.errors)
    records = browser.image_records(data.labels, data.sample, data.errors, chosen)
    if data.source is not None:
        write_images(inputs.output, data.labels, data.source, records)
    table = data.errors.table(data.sample)
    script = write_data(inputs.output, _DATA_NAME, _browser_data(data, records))
    missing = data.no_images
    if problems := sum("problem" in record for record in records):
        missing = f"{problems} of {len(records)} images cannot be shown; the list says why."
    context = {
        "num_images": len(records),
        "num_views": sum(len(record["views"]) for record in records),
        "sample": data.sample.size_text,
        "views_of_image": browser.VIEWS_OF_IMAGE,
        "has_hard_labels": bool((data.sample.hard_N != UNLABELLED).any()),
        "num_suspected": len(data.errors),
        "num_labelled": data.errors.num_labelled,
        "suspects": _suspects(data, table, records),
        "errors_path": _write_errors(inputs, table),
    }
    scripts = script, "assets/browser.js"
    return Section("browser", TITLE, "browser.html", context, missing=missing, scripts=scripts)


def _write_errors(inputs: Inputs, table: list[dict[str, Any]]) -> str | None:
    """Write all suspected label errors as CSV; return the path below the report, None if none."""
    if not table:
        return None
    load_model.write_results(inputs.output / _ERRORS_PATH, {}, table)
    return _ERRORS_PATH


def _browser_data(data: LabelData, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what assets/browser.js shows: the records, with class names for the ids in them."""
    named = {
        class_id
        for record in records
        for class_id in (
            record["hard"],
            record["suggested"],
            *(c for c, _ in record["mean"]),
            *(c for view in record["views"] for c, _ in view["top"]),
        )
        if class_id is not None
    }
    return {
        "classes": {class_id: data.labels.classes[class_id] for class_id in sorted(named)},
        "numClasses": data.labels.num_classes,
        "reasons": browser.REASONS,
        "images": [_rounded(record) for record in records],
    }


def _suspects(
    data: LabelData, table: list[dict[str, Any]], records: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the most suspicious images, each with its row of the table and its small image."""
    by_key = {record["key"]: (number, record) for number, record in enumerate(records)}
    found = []
    for row in table[: browser.MAX_SUSPECTS]:
        number, record = by_key[row["key"]]
        size = record.get("shown_size", (None, None))
        image = {"image": record.get("image"), "width": size[0], "height": size[1]}
        found.append({**row, **image, "number": number})
    return found


def _rounded(value: Any) -> Any:
    """Return a JSON value whose floats have four digits: enough for a page."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
