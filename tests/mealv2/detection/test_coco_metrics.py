"""mealv2.detection.coco_metrics: average precisions by hand, and those of pycocotools itself."""

import contextlib
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mealv2.detection.coco_metrics import METRICS, Detection, average_precisions


def truth(*objects: tuple[int, int, list[float]], first_id: int = 1) -> dict[str, Any]:
    """Annotations of (image id, category id, box), as a file has them."""
    annotations = [
        {
            "id": number,
            "image_id": image_id,
            "category_id": category,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": 0,
        }
        for number, (image_id, category, box) in enumerate(objects, first_id)
    ]
    images = [{"id": n, "file_name": f"{n}.jpg", "width": 400, "height": 400} for n in (1, 2, 3)]
    categories = [{"id": n, "name": f"class {n}"} for n in (3, 7, 90)]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.mark.parametrize("first_id", [0, 1])  # pycocotools takes id 0 for no match
def test_precision_and_recall_by_hand(first_id: int) -> None:
    # hit, miss, hit of two objects: precision 1 up to recall 0.5, then 2/3; of the recalls 0, 0.01,
    # …, 1, 51 are up to 0.5
    boxes = [[10.0, 10.0, 40.0, 40.0], [100.0, 100.0, 50.0, 60.0]]
    annotations = truth((1, 3, boxes[0]), (1, 3, boxes[1]), first_id=first_id)
    detections: list[Detection] = [
        (1, 3, *boxes[0], 0.9),
        (1, 3, 300.0, 300.0, 40.0, 40.0, 0.8),
        (1, 3, *boxes[1], 0.7),
    ]
    found = average_precisions(annotations, detections, [1])
    expected = 100 * (51 * 1 + 50 * 2 / 3) / 101
    assert found == {name: pytest.approx(expected) for name in ("ap", "ap50", "ap75", "ap_medium")}


def test_overlaps_by_hand() -> None:
    # the left 72 of 100 columns: an overlap of 0.72, a hit at 0.50 to 0.70, 5 of the 10 overlaps
    annotations = truth((1, 3, [0.0, 0.0, 100.0, 100.0]))
    found = average_precisions(annotations, [(1, 3, 0.0, 0.0, 72.0, 100.0, 0.5)], [1])
    assert found == {
        "ap": pytest.approx(50.0),
        "ap50": pytest.approx(100.0),
        "ap75": 0.0,
        "ap_large": pytest.approx(50.0),
    }


def test_classes_count_alike() -> None:
    annotations = truth((1, 3, [0, 0, 50, 50]), (2, 7, [0, 0, 50, 50]), (3, 7, [9, 9, 50, 50]))
    found = average_precisions(annotations, [(1, 3, 0.0, 0.0, 50.0, 50.0, 0.5)], [1, 2, 3])
    assert found["ap"] == pytest.approx(50.0)


def test_crowds_are_neither_hits_nor_misses() -> None:
    annotations = truth((1, 3, [0, 0, 50, 50]), (1, 3, [100, 100, 200, 200]))
    annotations["annotations"][1]["iscrowd"] = 1
    detections: list[Detection] = [
        (1, 3, 120.0, 120.0, 40.0, 40.0, 0.9),
        (1, 3, 0.0, 0.0, 50.0, 50.0, 0.5),
    ]
    assert average_precisions(annotations, detections, [1])["ap"] == pytest.approx(100.0)


def test_area_and_iscrowd_may_be_left_out() -> None:
    annotations = truth((1, 3, [0.0, 0.0, 20.0, 20.0]))
    for name in ("area", "iscrowd"):
        del annotations["annotations"][0][name]
    found = average_precisions(annotations, [(1, 3, 0.0, 0.0, 20.0, 20.0, 0.5)], [1])
    assert set(found) == {"ap", "ap50", "ap75", "ap_small"}


def test_no_detections_is_zero() -> None:
    annotations = truth((1, 3, [0.0, 0.0, 20.0, 20.0]))
    assert average_precisions(annotations, [], [1])["ap"] == 0.0


def test_random_detections_have_pycocotools_own_figures(tmp_path: Path) -> None:
    draw = random.Random(7)

    def box() -> list[float]:
        side = draw.choice([20, 60, 150])
        return [draw.uniform(0, 200), draw.uniform(0, 200), side, side * draw.uniform(0.5, 1.5)]

    objects = [(draw.randint(1, 3), draw.choice([3, 7, 90]), box()) for _ in range(40)]
    annotations = truth(*objects)
    annotations["annotations"][0]["iscrowd"] = 1
    near = [
        (image_id, category, *(side + draw.uniform(-6, 6) for side in found), draw.random())
        for image_id, category, found in objects
        for _ in range(3)
    ]
    far = [(draw.randint(1, 3), draw.choice([3, 7, 90]), *box(), draw.random()) for _ in range(60)]
    detections: list[Any] = near + far

    (tmp_path / "truth.json").write_text(json.dumps(annotations))
    names = ("image_id", "category_id", "bbox", "score")
    rows = [(i, c, [x, y, w, h], s) for i, c, x, y, w, h, s in detections]
    results = [dict(zip(names, row, strict=True)) for row in rows]
    (tmp_path / "found.json").write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(tmp_path / "truth.json"))
        evaluation = COCOeval(coco, coco.loadRes(str(tmp_path / "found.json")), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    expected = dict(zip(METRICS, 100 * evaluation.stats[:6], strict=True))
    assert all(3 < value < 97 for value in expected.values())
    assert average_precisions(annotations, detections, [1, 2, 3]) == expected


def test_only_the_given_images_count(capsys: pytest.CaptureFixture[str]) -> None:
    annotations = truth((1, 3, [0.0, 0.0, 50.0, 50.0]), (2, 3, [0.0, 0.0, 50.0, 50.0]))
    found = average_precisions(annotations, [(1, 3, 0.0, 0.0, 50.0, 50.0, 0.5)], [1])
    assert found["ap"] == pytest.approx(100.0)
    assert capsys.readouterr().out == ""
