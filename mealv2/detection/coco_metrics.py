"""COCO's average precisions of detections, computed by pycocotools."""

import contextlib
import importlib
import io
from collections.abc import Collection, Sequence
from typing import Any

METRICS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")  # the order of pycocotools

# one detection: image id, category id, left, top, width, height, score
Detection = tuple[int, int, float, float, float, float, float]


def average_precisions(
    annotations: dict[str, Any], detections: Sequence[Detection], image_ids: Collection[int]
) -> dict[str, float]:
    """Return COCO's six average precisions by name, in percent, of detections on some images.

    ``annotations`` are those of a file in COCO's format. AP is the mean over classes and over the
    overlaps 0.50, 0.55, …, 0.95, of at most 100 detections of an image; small objects have an
    ``area`` below 32², large ones above 96² pixels. Crowds are neither hits nor misses. A figure
    of a size that no object has is left out. Needs pycocotools.
    """
    coco = importlib.import_module("pycocotools.coco")
    evaluation = importlib.import_module("pycocotools.cocoeval")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        truth, found = coco.COCO(), coco.COCO()
        truth.dataset = _truth(annotations)
        truth.createIndex()
        found.dataset = {**truth.dataset, "annotations": _rows(detections)}
        found.createIndex()
        measured = evaluation.COCOeval(truth, found, "bbox")
        measured.params.imgIds = sorted(image_ids)
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    return {
        name: 100.0 * float(value)
        for name, value in zip(METRICS, measured.stats, strict=False)
        if value >= 0.0  # -1: there is no such object
    }


def _truth(annotations: dict[str, Any]) -> dict[str, Any]:
    """Return the annotations as pycocotools needs them.

    Ids count from 1: it takes a match with id 0 for none. What a file may leave out is added: the
    area, else that of the box, and iscrowd.
    """
    rows = [
        {"iscrowd": 0, "area": row["bbox"][2] * row["bbox"][3], **row, "id": number}
        for number, row in enumerate(annotations["annotations"], 1)
    ]
    return {
        "images": annotations["images"],
        "categories": annotations["categories"],
        "annotations": rows,
    }


def _rows(detections: Sequence[Detection]) -> list[dict[str, Any]]:
    """Return detections as pycocotools' ``loadRes`` makes them of boxes."""
    return [
        {
            "id": number,
            "image_id": image_id,
            "category_id": category_id,
            "bbox": [left, top, width, height],
            "area": width * height,
            "iscrowd": 0,
            "score": score,
        }
        for number, (image_id, category_id, left, top, width, height, score) in enumerate(
            detections, 1
        )
    ]
