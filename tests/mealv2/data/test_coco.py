"""mealv2.data.coco: images and boxes in COCO's format, and what is wrong with them in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from coco import draw_coco, write_annotations
from PIL import Image

from mealv2.data.coco import PUBLISHED, CocoSource
from mealv2.data.coco_name import find_coco
from mealv2.data.source import fingerprint
from mealv2.errors import ConfigError

Rows = list[dict[str, Any]]


def opened(folder: Path, split: str = "train") -> CocoSource:
    return CocoSource(find_coco(folder, split))


@pytest.fixture
def one_image(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes an image of 40 x 30, and these annotations and image entries."""

    def write(annotations: Rows, images: Rows | None = None) -> Path:
        (tmp_path / "train").mkdir(exist_ok=True)
        Image.new("RGB", (40, 30)).save(tmp_path / "train/a.png")
        entry = {"id": 5, "file_name": "a.png", "width": 40, "height": 30}
        write_annotations(tmp_path, "train", images or [entry], annotations)
        return tmp_path

    return write


def row(bbox: Any, **more: Any) -> dict[str, Any]:
    return {"id": 1, "image_id": 5, "category_id": 7, "bbox": bbox, **more}


def test_category_ids_with_gaps_become_class_ids_in_their_order(one_image: Any) -> None:
    boxes = [row([1, 2, 3, 4], category_id=number) for number in (90, 3, 7)]
    source = opened(one_image(boxes))
    assert source.category_ids == [3, 7, 90]
    assert source.classes == ["rectangle", "ellipse", "triangle"]
    assert source.images[0].objects == tuple((1, 2, 4, 6, number) for number in (2, 0, 1))


def test_boxes_are_clipped_and_those_without_an_area_and_crowds_are_counted(one_image: Any) -> None:
    rows = [
        row([-5, -6, 20, 20]),
        row([30, 20, 100, 100]),
        row([10, 10, 0, 5]),
        row([50, 10, 5, 5]),
        row([10, 10, 5, 5], iscrowd=1),
    ]
    source = opened(one_image(rows))
    assert source.images[0].objects == ((0, 0, 15, 14, 1), (30, 20, 40, 30, 1))
    (remark,) = source.left_out.remarks
    assert remark == "boxes left out: 1 of crowds, 2 without an area inside the image"


def test_images_without_objects_are_not_trained_on(tmp_path: Path) -> None:
    folder = draw_coco(tmp_path / "set")
    path = folder / "annotations/instances_train.json"
    found = json.loads(path.read_text())
    found["annotations"] = [r for r in found["annotations"] if r["image_id"] not in (101, 104)]
    path.write_text(json.dumps(found))
    source = opened(folder)
    assert len(source) == 6
    assert source.with_objects() == [1, 2, 4, 5]


def test_all_layouts_are_found(tmp_path: Path) -> None:
    folder = draw_coco(tmp_path / "set")
    expected = fingerprint(opened(folder))
    (folder / "images").mkdir()
    (folder / "train").rename(folder / "images/train2017")
    (folder / "annotations/instances_train.json").rename(
        folder / "annotations/instances_train2017.json"
    )
    assert fingerprint(opened(folder)) == expected
    beside = folder / "images/train2017/_annotations.coco.json"
    (folder / "annotations/instances_train2017.json").rename(beside)
    assert fingerprint(opened(folder / "images", "train2017")) == expected


def test_the_published_name_compares_sizes(tmp_path: Path) -> None:
    folder = draw_coco(tmp_path / "set", splits={"train2017": 2})
    assert opened(folder).left_out.remarks == []
    (remark,) = opened(tmp_path / "coco:set").left_out.remarks
    assert "has 2 images, published are 118287" in remark


def test_published_sizes_are_those_of_table_8() -> None:
    for year in ("2014", "2017"):
        assert PUBLISHED[f"train{year}"] + PUBLISHED[f"val{year}"] == 123_287
    assert PUBLISHED["test2014"] == 40_775


def test_the_fingerprint_has_the_boxes(one_image: Any) -> None:
    before = fingerprint(opened(one_image([row([1, 2, 3, 4])])))
    assert fingerprint(opened(one_image([row([1, 2, 3, 5])]))) != before


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("../a.png", "not a path in its folder"),
        ("/etc/passwd", "not a path in its folder"),
        ("x/../../a.png", "not a path in its folder"),
        ("", "not a path in its folder"),
        ("b.png", "of which 1 are not in"),
    ],
)
def test_hostile_and_missing_images_are_errors(one_image: Any, name: str, named: str) -> None:
    entry = {"id": 5, "file_name": name, "width": 40, "height": 30}
    with pytest.raises(ConfigError, match=named):
        opened(one_image([], [entry]))


def test_missing_images_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    folder = draw_coco(tmp_path / "set")
    for name in ("000102", "000103"):
        (folder / f"train/{name}.png").unlink()
    with pytest.raises(ConfigError, match=r"of which 2 are not in .*train \(000102.png, …\)"):
        opened(folder)


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        (row([1, 2, 3]), "needs a bbox"),
        (row("box"), "needs a bbox"),
        (row([1, 2, 3, "4"]), "needs a bbox"),
        (row([1, 2, 3, 1e300]), "needs a bbox"),
        (row([1, 2, 3, True]), "needs a bbox"),
        (row([1, 2, 3, 4], image_id=6), "unknown image_id"),
        (row([1, 2, 3, 4], image_id=[5]), "unknown image_id"),
        (row([1, 2, 3, 4], category_id=8), "unknown category_id"),
    ],
)
def test_a_broken_annotation_is_shown(one_image: Any, broken: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        opened(one_image([broken]))


@pytest.mark.parametrize(
    "entry",
    [
        {"id": 5, "file_name": "a.png", "width": 40},
        {"id": 5, "file_name": "a.png", "width": 40, "height": 0},
        {"id": 5, "file_name": "a.png", "width": 40, "height": 2.5},
        {"id": "5", "file_name": "a.png", "width": 40, "height": 30},
        {"id": 5, "width": 40, "height": 30},
    ],
)
def test_a_broken_image_entry_is_shown(one_image: Any, entry: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="an image needs"):
        opened(one_image([], [entry]))


def test_an_image_listed_twice_is_an_error(one_image: Any) -> None:
    entry = {"id": 5, "file_name": "a.png", "width": 40, "height": 30}
    for other in (entry | {"id": 6}, entry | {"file_name": "./a.png", "id": 7}):
        with pytest.raises(ConfigError, match="twice"):
            opened(one_image([], [entry, other]))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"images": [1]}', "\xff", '{"images": {}}'])
def test_damaged_json_is_one_line(one_image: Any, text: str) -> None:
    folder = one_image([])
    (folder / "annotations/instances_train.json").write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError) as error:
        opened(folder)
    assert "instances_train.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_split_says_where_files_belong(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"annotations/instances_val.json with images in val/"):
        find_coco(tmp_path, "val")
    with pytest.raises(ConfigError, match="plain name"):
        find_coco(tmp_path, "../val")
