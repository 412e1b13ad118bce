"""mealv2.detection.views, .task and .reader: whole images and their boxes, resized alike."""

from pathlib import Path

import numpy as np
import pytest
import torch
from coco import draw_coco, write_annotations
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mealv2.data.coco import CocoSource
from mealv2.data.coco_name import find_coco
from mealv2.data.requests import CENTRE
from mealv2.detection.reader import WholeImageReader
from mealv2.detection.task import ObjectTargets, on_view
from mealv2.detection.views import WholeView, WholeViews

DETECTRON2 = (640, 672, 704, 736, 768, 800)
VIEWS = WholeViews(seed=3, size=800, max_size=1333, train_sizes=DETECTRON2, hflip=0.5)


def test_evaluation_resizes_as_detectron2() -> None:
    # scale 800 / 480; then 1333 / 1333.33…, rounded a half up
    assert VIEWS.view("a", CENTRE, width=640, height=480) == WholeView(800, 1067, False)
    assert VIEWS.view("a", CENTRE, width=500, height=300) == WholeView(800, 1333, False)
    assert VIEWS.view("a", CENTRE, width=3000, height=300) == WholeView(133, 1333, False)


def test_training_draws_all_sizes_and_half_of_the_flips() -> None:
    drawn = [VIEWS.view(f"{n}", 7, width=1000, height=1000) for n in range(1200)]
    counts = {size: sum(view.height == size for view in drawn) for size in DETECTRON2}
    assert sum(counts.values()) == 1200
    assert all(140 < number < 260 for number in counts.values())  # 200, 4 standard deviations
    assert 530 < sum(view.is_flipped for view in drawn) < 670


def test_a_view_depends_on_seed_key_and_epoch_only() -> None:
    def drawn(seed: int, key: str, epochs: range) -> list[WholeView]:
        views = WholeViews(seed, 800, 1333, DETECTRON2, 0.5)
        return [views.view(key, e, width=640, height=480) for e in epochs]

    first = drawn(3, "a", range(20))
    assert drawn(3, "a", range(20)) == first
    others = (drawn(4, "a", range(20)), drawn(3, "b", range(20)), drawn(3, "a", range(20, 40)))
    assert all(other != first for other in others)


@given(
    width=st.integers(1, 900),
    height=st.integers(1, 900),
    new=st.tuples(st.integers(1, 900), st.integers(1, 900)),
    flip=st.booleans(),
    corners=st.lists(st.floats(0, 1), min_size=4, max_size=4),
)
def test_boxes_follow_the_view(
    width: int, height: int, new: tuple[int, int], flip: bool, corners: list[float]
) -> None:
    x, y = sorted(corners[:2]), sorted(corners[2:])
    box = np.array([x[0] * width, y[0] * height, x[1] * width, y[1] * height])
    expected = np.array([x[0] * new[1], y[0] * new[0], x[1] * new[1], y[1] * new[0]])
    if flip:
        expected[[0, 2]] = new[1] - expected[[2, 0]]
    view = WholeView(*new, flip)
    found = on_view(torch.from_numpy(box[None]), view, width=width, height=height)
    np.testing.assert_allclose(found.numpy()[0], expected, atol=1e-9)


@pytest.fixture
def square(tmp_path: Path) -> CocoSource:
    """A white rectangle on black, at 10 to 50 of 100 and 20 to 60 of 80 pixels."""
    (tmp_path / "train").mkdir()
    pixels = np.zeros((80, 100, 3), dtype=np.uint8)
    pixels[20:60, 10:50] = 255
    Image.fromarray(pixels).save(tmp_path / "train/a.png")
    image = {"id": 1, "file_name": "a.png", "width": 100, "height": 80}
    annotation = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [10, 20, 40, 40]}
    write_annotations(tmp_path, "train", [image], [annotation])
    return CocoSource(find_coco(tmp_path, "train"))


@pytest.mark.parametrize("hflip", [0.0, 1.0])
def test_pixels_and_boxes_are_on_the_same_view(square: CocoSource, hflip: float) -> None:
    views = WholeViews(seed=0, size=80, max_size=400, train_sizes=(40, 80, 160), hflip=hflip)
    reader, targets = WholeImageReader(square, views), ObjectTargets(square, views)
    sizes = set()
    for epoch in range(12):
        (batch,) = reader.batches([[(0, (epoch,))]])
        found = targets.batch([0], [epoch], batch.images_BCHW)
        (((height, width), boxes_N4, classes_N),) = found.objects
        assert batch.images_BCHW.shape == (1, 3, height, width)
        rows, columns = (batch.images_BCHW[0, 0] > 127).nonzero().T
        bounds = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(boxes_N4[0], bounds, atol=0.51)
        assert classes_N.tolist() == [0]
        sizes.add(height)
    assert sizes == {40, 80, 160}


def test_a_batch_is_padded_and_threads_read_the_same(tmp_path: Path) -> None:
    source = CocoSource(find_coco(draw_coco(tmp_path / "set"), "train"))
    views = WholeViews(seed=0, size=64, max_size=200, train_sizes=(48, 64), hflip=0.5)
    requests = [[(p, (e,)) for p in range(3 * k, 3 * k + 3)] for e in range(3) for k in range(2)]
    batches = list(WholeImageReader(source, views).batches(requests))
    threaded = list(WholeImageReader(source, views, workers=2).batches(requests))
    assert len(batches) == len(threaded) == 6
    for one, two in zip(batches, threaded, strict=True):
        assert torch.equal(one.images_BCHW, two.images_BCHW)
        assert (one.positions, one.views) == (two.positions, two.views)
        objects = ObjectTargets(source, views).batch(one.positions, one.views, one.images_BCHW)
        heights, widths = zip(*(found.size for found in objects.objects), strict=True)
        assert one.images_BCHW.shape == (3, 3, max(heights), max(widths))
        for image, found in zip(one.images_BCHW, objects.objects, strict=True):
            height, width = found.size
            assert int(image[:, height:].sum()) == int(image[:, :, width:].sum()) == 0
            assert int(image[:, :height, :width].min()) > 0  # the grey around the shapes


def test_images_that_cannot_be_read_or_have_another_size_fail(tmp_path: Path) -> None:
    folder = draw_coco(tmp_path / "set")
    (folder / "train/000101.png").write_bytes(b"no image")
    Image.new("RGB", (10, 10)).save(folder / "train/000102.png")
    source = CocoSource(find_coco(folder, "train"))
    views = WholeViews(seed=0, size=64, max_size=200, train_sizes=(64,), hflip=0.5)
    (batch,) = WholeImageReader(source, views).batches([[(p, (0,)) for p in range(3)]])
    assert batch.positions == [2]
    assert len(batch.images_BCHW) == 1
    assert set(batch.failed) == {0, 1}
    assert "it has 10 x 10 pixels, its annotations are of" in batch.failed[1]
