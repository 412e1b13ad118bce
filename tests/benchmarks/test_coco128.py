"""benchmarks.coco128: boxes in YOLO's form become COCO's."""

import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.coco128 import as_coco
from mealv2.data.coco import CocoSource
from mealv2.data.coco_name import find_coco


@pytest.fixture
def yolo(tmp_path: Path) -> Path:
    """Two pictures of 200 x 100; the second has no label file."""
    folder = tmp_path / "yolo"
    for split in ("train2017", "val2017"):
        (folder / "images" / split).mkdir(parents=True)
        (folder / "labels" / split).mkdir(parents=True)
        for number in (7, 9):
            Image.new("RGB", (200, 100)).save(folder / "images" / split / f"{number:012}.jpg")
        lines = "0 0.5 0.5 0.25 0.5\n2 0.1 0.2 0.2 0.4\n0 0.5 0.5 1 1\n1 0.5 0.5 0.1 0.1\n"
        (folder / "labels" / split / f"{7:012}.txt").write_text(lines + "2 0.9 0.9 0.2 0.2\n")
    names = "# form\npath: .\nnames:\n  0: person\n  1: bicycle\n  2: car\n"
    (folder / "config.yaml").write_text(names)
    return folder


def test_boxes_are_converted_and_the_most_frequent_classes_are_kept(
    yolo: Path, tmp_path: Path
) -> None:
    folder = as_coco(yolo, tmp_path / "coco", num_classes=2)
    found = json.loads((folder / "annotations/instances_train2017.json").read_text())
    assert [row["bbox"] for row in found["annotations"]] == [
        [75.0, 25.0, 50.0, 50.0],
        [0.0, 0.0, 40.0, 40.0],
        [0.0, 0.0, 200.0, 100.0],
        [160.0, 80.0, 40.0, 20.0],
    ]
    assert [row["category_id"] for row in found["annotations"]] == [1, 3, 1, 3]
    assert [row["id"] for row in found["annotations"]] == [1, 2, 3, 4]
    source = CocoSource(find_coco(folder, "val"))
    assert source.classes == ["person", "car"]
    assert source.with_objects() == [0]
    assert len(source) == 2
