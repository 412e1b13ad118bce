"""pipeline.loaders: order and batches as pure functions, the same pixels from any worker."""

import collections
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from mealv2.errors import DataError
from mealv2.images import ImageFolder, centre_crop, cut, decode
from mealv2.views import DrawnViews, view_of
from pipeline.loaders import (
    CENTRE,
    ViewReader,
    batches,
    centre_requests,
    epoch_order,
    name_failures,
    read_views,
    refuse_failures,
)

# --- order and batches --------------------------------------------------------------------------


@pytest.mark.parametrize("num_images", [0, 1, 2, 7, 1000])
@pytest.mark.parametrize("epoch", [0, 1, 179])
def test_epoch_order_is_a_permutation(num_images: int, epoch: int) -> None:
    order = epoch_order(num_images, seed=3, epoch=epoch)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(num_images))


@pytest.mark.parametrize(
    ("seed", "epoch", "golden"),
    [
        (0, 0, [2, 6, 1, 3, 4, 8, 10, 5, 0, 7, 9, 11]),
        (5, 3, [3, 8, 2, 0, 4, 1, 10, 7, 9, 5, 6, 11]),
    ],
)
def test_epoch_order_is_frozen(seed: int, epoch: int, golden: list[int]) -> None:
    assert epoch_order(12, seed=seed, epoch=epoch).tolist() == golden


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (5, 3), ((1 << 63) - 1, 179)])
def test_epoch_order_is_what_its_formula_says(seed: int, epoch: int) -> None:
    mask = (1 << 64) - 1

    def mix(word: int) -> int:
        word = word * 0x9E3779B97F4A7C15 & mask
        word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & mask
        word = (word ^ word >> 27) * 0x94D049BB133111EB & mask
        return word ^ word >> 31

    start = mix(seed + mix(epoch + 1) & mask)
    by_hand = sorted(range(50), key=lambda position: mix(position + start & mask))
    assert epoch_order(50, seed=seed, epoch=epoch).tolist() == by_hand


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(epoch_order(30, seed=s, epoch=e).tolist()) for s in range(8) for e in range(8)}
    assert len(orders) == 64


def test_first_place_is_uniform_over_the_images() -> None:
    first = [int(epoch_order(8, seed=1, epoch=epoch)[0]) for epoch in range(4000)]
    counts = np.bincount(first, minlength=8)
    # chi-square, 7 degrees of freedom: 29.9 is passed once in 10,000 fair draws
    assert ((counts - 500) ** 2 / 500).sum() < 29.9


@pytest.mark.parametrize("num_images", [0, 1, 2, 7, 8, 9, 16, 17, 36])
@pytest.mark.parametrize("batch_size", [1, 2, 8, 50])
def test_batches_use_every_image_once_in_order(num_images: int, batch_size: int) -> None:
    order = epoch_order(num_images, seed=0, epoch=0)
    cut_up = batches(order, batch_size)
    assert [p for batch in cut_up for p in batch] == order.tolist()
    assert all(len(batch) == batch_size for batch in cut_up[:-1])
    if num_images:
        assert 1 <= len(cut_up[-1]) <= batch_size + 1


@pytest.mark.parametrize(
    ("num_images", "batch_size", "sizes"),
    [(17, 8, [8, 9]), (9, 8, [9]), (18, 8, [8, 8, 2]), (1, 8, [1]), (3, 1, [1, 1, 1]), (3, 2, [3])],
)
def test_last_batch_of_one_joins_the_one_before(
    num_images: int, batch_size: int, sizes: list[int]
) -> None:
    assert [len(batch) for batch in batches(range(num_images), batch_size)] == sizes


def test_centre_requests_ask_each_image_once() -> None:
    requests = centre_requests([4, 2, 9], 2)
    assert requests == [[(4, (CENTRE,)), (2, (CENTRE,))], [(9, (CENTRE,))]]


# --- pixels -------------------------------------------------------------------------------------

VIEWS = DrawnViews(7)
REQUESTS = [[(0, (0, 3)), (7, (1,))], [(5, (CENTRE,))], [(9, (2, 2, CENTRE)), (1, (0,))]]


@pytest.fixture
def source(data_dir: Path) -> ImageFolder:
    return ImageFolder(data_dir, "train")


class Counting:
    """An ImageSource that counts how often each image is read."""

    name = "counting"

    def __init__(self, source: ImageFolder) -> None:
        self._source = source
        self.keys, self.labels, self.sizes = source.keys, source.labels, source.sizes
        self.classes = source.classes
        self.reads: collections.Counter[int] = collections.Counter()

    def read(self, position: int) -> bytes:
        self.reads[position] += 1
        return self._source.read(position)


def test_rows_are_the_views_asked_for_in_order(source: ImageFolder) -> None:
    pixels = ViewReader(source, img_size=24, views=VIEWS)[REQUESTS[2]]
    image, other = decode(source.read(9)), decode(source.read(1))
    box = view_of(source.keys[9], 2, seed=7, width=image.width, height=image.height)
    first = view_of(source.keys[1], 0, seed=7, width=other.width, height=other.height)
    by_hand = [
        cut(image, box, 24),
        cut(image, box, 24),
        centre_crop(image, 24),
        cut(other, first, 24),
    ]
    assert (pixels.positions, pixels.views) == ([9, 9, 9, 1], [2, 2, CENTRE, 0])
    assert pixels.images_BCHW.dtype == torch.uint8
    np.testing.assert_array_equal(pixels.images_BCHW.permute(0, 2, 3, 1).numpy(), by_hand)
    assert pixels.sizes_B2.tolist() == [list(image.size)] * 3 + [list(other.size)]
    boxes = [[b.top, b.left, b.height, b.width, int(b.flip)] for b in (box, first)]
    assert pixels.boxes_B5.tolist() == [boxes[0], boxes[0], [0] * 5, boxes[1]]


def test_an_image_is_decoded_once_for_all_its_views(source: ImageFolder) -> None:
    counting = Counting(source)
    requests = [[(position, (0, 1, 2, 3)) for position in part] for part in ([0, 1], [2, 3])]
    reader = ViewReader(counting, img_size=16, views=VIEWS)
    rows = sum(len(p.positions) for p in read_views(reader, requests, workers=0))
    assert rows == 16
    assert counting.reads == {0: 1, 1: 1, 2: 1, 3: 1}


def _rows(source: ImageFolder, workers: int) -> list[tuple[object, ...]]:
    loader = read_views(ViewReader(source, img_size=24, views=VIEWS), REQUESTS, workers=workers)
    return [
        (
            p.images_BCHW.numpy().tobytes(),
            p.sizes_B2.tolist(),
            p.boxes_B5.tolist(),
            p.positions,
            p.views,
        )
        for p in loader
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_pixels_or_order(source: ImageFolder, workers: int) -> None:
    assert _rows(source, workers) == _rows(source, 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_leaves_the_global_generators_alone(source: ImageFolder, workers: int) -> None:
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    _rows(source, workers)
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


def test_kept_workers_read_the_same_again(source: ImageFolder) -> None:
    reader = ViewReader(source, img_size=24, views=VIEWS)
    loader = read_views(reader, REQUESTS, workers=1, keep_workers=True)
    first = [p.images_BCHW.clone() for p in loader]
    assert all(map(torch.equal, first, (p.images_BCHW for p in loader)))


# --- images that cannot be read -----------------------------------------------------------------


def _spoil(data: Path, key: str, how: str) -> None:
    path = data / "train" / key
    whole = path.read_bytes()
    if how == "missing":
        path.unlink()
        return
    spoilt = {"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"no image at all\n"}
    path.write_bytes(spoilt[how])


@pytest.mark.parametrize("how", ["truncated", "empty", "text", "missing"])
@pytest.mark.parametrize("workers", [0, 1])
def test_bad_image_is_reported_and_its_neighbours_are_read(
    own_data: Path, how: str, workers: int
) -> None:
    source = ImageFolder(own_data, "train")
    _spoil(own_data, source.keys[1], how)
    requests: Sequence[list[tuple[int, tuple[int, ...]]]] = [[(0, (0, 1)), (1, (0, 1)), (2, (0,))]]
    reader = ViewReader(source, img_size=16, views=VIEWS)
    (pixels,) = read_views(reader, requests, workers=workers)
    assert (pixels.positions, pixels.views) == ([0, 0, 2], [0, 1, 0])
    assert len(pixels.images_BCHW) == len(pixels.sizes_B2) == len(pixels.boxes_B5) == 3
    assert list(pixels.failed) == [1]
    assert pixels.failed[1]
    assert name_failures(source, pixels.failed) == {source.keys[1]: pixels.failed[1]}


def test_batch_of_bad_images_only_is_empty(own_data: Path) -> None:
    source = ImageFolder(own_data, "train")
    _spoil(own_data, source.keys[0], "empty")
    pixels = ViewReader(source, img_size=16, views=VIEWS)[[(0, (0, 1))]]
    assert pixels.images_BCHW.shape == (0, 3, 16, 16)
    assert (pixels.sizes_B2.shape, pixels.boxes_B5.shape) == ((0, 2), (0, 5))
    assert pixels.failed == {0: "the file is empty"}


def test_failures_are_refused_by_name_unless_skipped(source: ImageFolder) -> None:
    refuse_failures(source, {3: "broken"}, "skip")
    refuse_failures(source, {}, "fail")
    with pytest.raises(DataError, match=f"train/{source.keys[3]}: broken; .*--on-bad-image skip"):
        refuse_failures(source, {3: "broken"}, "fail")
