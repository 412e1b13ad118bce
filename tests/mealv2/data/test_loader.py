"""mealv2.data.loader: the views asked for, in order, the same from any number of threads."""

import collections
import gc
import itertools
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mealv2.data import batch_cut
from mealv2.data import pixels as mealv2_pixels
from mealv2.data.buffers import BufferPool
from mealv2.data.content_hash import ImageCheck, KnownHashes
from mealv2.data.folder import ImageFolder, UnorderedSource
from mealv2.data.image_cache import ImageCache
from mealv2.data.loader import WaitTimer, _Pace, read_views
from mealv2.data.pixels import centre_crop, cut, decode
from mealv2.data.requests import CENTRE, centre_requests, check_failures, failures_by_key
from mealv2.data.view_reader import BatchReader, ViewReader
from mealv2.errors import DataError
from mealv2.view_operations import Operation
from mealv2.views import DrawnViews, View, Views, view_of


def test_centre_requests_ask_each_image_once() -> None:
    requests = centre_requests([4, 2, 9], 2)
    assert requests == [[(4, (CENTRE,)), (2, (CENTRE,))], [(9, (CENTRE,))]]


# --- pixels -------------------------------------------------------------------------------------

VIEWS = DrawnViews(7)
REQUESTS = [[(0, (0, 3)), (7, (1,))], [(5, (CENTRE,))], [(9, (2, 2, CENTRE)), (1, (0,))]]


@pytest.fixture
def source(data_dir: Path) -> ImageFolder:
    return ImageFolder(data_dir, "train")


class Counting(UnorderedSource):
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
    pixels = ViewReader(source, img_size=24, views=VIEWS).read(REQUESTS[2])
    image, other = decode(source.read(9)), decode(source.read(1))
    (height, width, _), (other_height, other_width, _) = image.shape, other.shape
    box = view_of(source.keys[9], 2, seed=7, width=width, height=height)
    first = view_of(source.keys[1], 0, seed=7, width=other_width, height=other_height)
    by_hand = [
        cut(image, box, 24),
        cut(image, box, 24),
        centre_crop(image, 24),
        cut(other, first, 24),
    ]
    assert (pixels.positions, pixels.views) == ([9, 9, 9, 1], [2, 2, CENTRE, 0])
    assert pixels.images_BCHW.dtype == torch.uint8
    np.testing.assert_array_equal(pixels.images_BCHW.permute(0, 2, 3, 1).numpy(), by_hand)
    assert pixels.sizes_B2.tolist() == [[width, height]] * 3 + [[other_width, other_height]]
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


def test_loader_reads_the_same_again(source: ImageFolder) -> None:
    reader = ViewReader(source, img_size=24, views=VIEWS)
    loader = read_views(reader, REQUESTS, workers=1)
    first = [p.images_BCHW.clone() for p in loader]
    assert all(map(torch.equal, first, (p.images_BCHW for p in loader)))


def test_views_that_go_on_in_the_next_requests_come_from_one_decode(source: ImageFolder) -> None:
    counting = Counting(source)
    reader = ViewReader(counting, img_size=8, views=VIEWS)
    # 3 images of 50 views each, in batches of 16 views
    rows = [(position, view) for position in (4, 1, 8) for view in range(50)]
    requests = [
        [(p, tuple(v for q, v in rows[start : start + 16] if q == p)) for p in _places(rows, start)]
        for start in range(0, 150, 16)
    ]
    for workers in (0, 3):
        counting.reads.clear()
        found = list(read_views(reader, requests, workers=workers))
        assert [pair for p in found for pair in zip(p.positions, p.views, strict=True)] == rows
        assert counting.reads == {4: 1, 1: 1, 8: 1}


def _places(rows: list[tuple[int, int]], start: int) -> list[int]:
    return list(dict.fromkeys(position for position, _ in rows[start : start + 16]))


class _Tracked(np.ndarray):
    """Batch of which it is known how many are alive."""

    alive: set[int] = set()  # noqa: RUF012
    most = 0

    @classmethod
    def of(cls, pixels_HWC: np.ndarray) -> "_Tracked":
        tracked = pixels_HWC.view(cls)
        cls.alive.add(id(tracked))
        cls.most = max(cls.most, len(cls.alive))
        weakref.finalize(tracked, cls.alive.discard, id(tracked))
        return tracked


@pytest.mark.parametrize("workers", [0, 2])
def test_decoded_images_are_let_go_of_once_they_are_cut(
    source: ImageFolder, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    _Tracked.alive.clear()
    _Tracked.most = 0
    monkeypatch.setattr(mealv2_pixels, "decode", lambda data: _Tracked.of(decode(data)))
    monkeypatch.setattr(batch_cut, "MAX_SIDE", 1)  # these are small: they would be cut together
    reader = ViewReader(source, img_size=8, views=VIEWS)
    requests = [[(position, (0,)) for position in range(36)] for _ in range(4)]
    for pixels in read_views(reader, requests, workers=workers):
        assert len(pixels.positions) == 36
    # one a thread, and the last image of each batch that was begun
    assert 0 < _Tracked.most <= workers + 4
    gc.collect()
    assert not _Tracked.alive


@pytest.mark.parametrize("workers", [0, 2])
def test_memory_is_used_again_once_nothing_holds_a_batch(source: ImageFolder, workers: int) -> None:
    reader = ViewReader(source, img_size=16, views=VIEWS)
    requests = [[(position, (0,)) for position in range(9)]] * 30
    places = [p.images_BCHW.data_ptr() for p in read_views(reader, requests, workers=workers)]
    # three ahead, the next one, the one here, and that of the task a thread has just ended
    assert len(set(places)) <= 6 + workers

    kept = [p.images_BCHW[0] for p in read_views(reader, requests, workers=workers)]
    assert len({image.data_ptr() for image in kept}) == 30
    assert all(torch.equal(image, kept[0]) for image in kept)


# --- small images, images in memory ---------------------------------------------------------------

NUM_SMALL = 40


@pytest.fixture
def small(tmp_path: Path) -> ImageFolder:
    """Images of 32 x 32 pixels, some of 30 x 28, one of 50 x 32."""
    generator = np.random.default_rng(0)
    (tmp_path / "train" / "a").mkdir(parents=True)
    for n in range(NUM_SMALL):
        size = (50, 32) if n == 7 else (30, 28) if n % 5 == 0 else (32, 32)
        noise = generator.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "train" / "a" / f"{n:02d}.png")
    return ImageFolder(tmp_path, "train")


def _by_hand(source: ImageFolder, rows: list[tuple[int, int]], size: int) -> list[np.ndarray]:
    found = []
    for position, index in rows:
        image = decode(source.read(position))
        height, width, _ = image.shape
        if index == CENTRE:
            found.append(centre_crop(image, size))
        else:
            view = VIEWS.view(source.keys[position], index, width=width, height=height)
            found.append(cut(image, view, size))
    return found


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("index", [3, CENTRE])
def test_small_images_are_cut_together_to_the_same_views(
    small: ImageFolder, index: int, workers: int
) -> None:
    cache = ImageCache(NUM_SMALL, 1 << 20)
    counting = Counting(small)
    reader = ViewReader(counting, img_size=28, views=VIEWS, other_sizes=(24,), cache=cache)
    requests = [[(position, (index,)) for position in range(NUM_SMALL)]] * 3

    batches = list(read_views(reader, requests, workers=workers))

    rows = [(position, index) for position in range(NUM_SMALL)]
    for batch in batches:
        assert list(zip(batch.positions, batch.views, strict=True)) == rows
        for size, images in ((28, batch.images_BCHW), (24, batch.other_sizes[24])):
            expected = _by_hand(small, rows, size)
            np.testing.assert_array_equal(images.permute(0, 2, 3, 1).numpy(), expected)
        assert np.array_equal(batch.boxes_B5, batches[0].boxes_B5)
        assert batch.sizes_B2.tolist() == [
            list(decode(small.read(position)).shape[1::-1]) for position in range(NUM_SMALL)
        ]
    if workers == 0:  # threads read ahead
        assert set(counting.reads.values()) == {1}
    assert len(cache) == NUM_SMALL
    counting.reads.clear()
    reader.read(requests[0])
    assert not counting.reads


@pytest.mark.parametrize(
    "choose", [lambda n: True, lambda n: False, lambda n: n % 3 == 1], ids=["one", "all", "both"]
)
def test_one_thread_and_all_threads_read_the_same(
    small: ImageFolder, choose: Callable[[int], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    (small.folder / "a" / "03.png").write_bytes(b"not a PNG")
    asked = itertools.count()
    monkeypatch.setattr(_Pace, "is_cheap", property(lambda self: choose(next(asked))))
    reader = ViewReader(small, img_size=28, views=VIEWS)
    requests = [[(p, (n,)) for p in range(n % 3, NUM_SMALL, 1 + n % 2)] for n in range(12)]
    requests[5] = []
    alone = list(read_views(reader, requests, workers=0))
    for batch, other in zip(read_views(reader, requests, workers=3), alone, strict=True):
        assert (batch.positions, batch.views) == (other.positions, other.views)
        assert torch.equal(batch.images_BCHW, other.images_BCHW)
        assert batch.failed == other.failed

    def broken() -> Iterator[list[tuple[int, tuple[int, ...]]]]:
        yield from requests[:7]
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        list(read_views(reader, broken(), workers=3))
    begun = iter(read_views(reader, requests, workers=3))
    next(begun)
    begun.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name.startswith("mealv2-read")]


def test_one_thread_stops_reading_alone_where_it_waits_for_files(small: ImageFolder) -> None:
    class Far(Counting):
        def read(self, position: int) -> bytes:
            threading.Event().wait(0.01)
            return super().read(position)

    request = [(position, (0,)) for position in range(NUM_SMALL) if position != 7]  # it is large
    cache = ImageCache(NUM_SMALL, 1 << 20)
    ViewReader(small, img_size=28, views=VIEWS, cache=cache).read(request)
    for source, kept, is_cheap in ((small, cache, True), (Far(small), None, False)):
        reader, pace = ViewReader(source, img_size=28, views=VIEWS, cache=kept), _Pace()
        memory = BufferPool(pin_memory=False)
        batches = (BatchReader(reader, request, memory=memory) for _ in range(3))
        for _ in range(3):
            pace.read_next(batches)
        assert pace.is_cheap == is_cheap


def test_views_that_leave_a_box_are_cut_one_by_one(small: ImageFolder) -> None:
    class Changed(Views):
        def view(self, key: str, index: int, *, width: int, height: int) -> View:
            centre = View(0, 0, height, width, True, is_centre=True)
            return replace(centre, operations=(Operation("Invert", ()),))

    batch = ViewReader(small, img_size=28, views=Changed()).read([(p, (0,)) for p in range(20)])
    for position, pixels in enumerate(batch.images_BCHW.permute(0, 2, 3, 1).numpy()):
        image = decode(small.read(position))
        height, width, _ = image.shape
        view = Changed().view("", 0, width=width, height=height)
        np.testing.assert_array_equal(pixels, cut(image, view, 28))


def test_views_and_centre_crop_of_one_image_stay_in_their_rows(small: ImageFolder) -> None:
    reader = ViewReader(small, img_size=28, views=VIEWS, cache=ImageCache(NUM_SMALL, 1 << 20))
    request = [(position, (1, CENTRE, 1)) for position in range(20)]
    rows = [(position, index) for position, views in request for index in views]
    for _ in range(2):
        batch = reader.read(request)
        expected = _by_hand(small, rows, 28)
        np.testing.assert_array_equal(batch.images_BCHW.permute(0, 2, 3, 1).numpy(), expected)


def test_damaged_image_in_a_batch_of_small_ones_is_reported_each_time(small: ImageFolder) -> None:
    (small.folder / "a" / "03.png").write_bytes(b"not a PNG")
    reader = ViewReader(small, img_size=28, views=VIEWS, cache=ImageCache(NUM_SMALL, 1 << 20))
    request = [(position, (0,)) for position in range(NUM_SMALL)]
    for _ in range(2):
        batch = reader.read(request)
        assert list(batch.failed) == [3]
        assert len(batch.positions) == NUM_SMALL - 1


@pytest.mark.parametrize("is_always", [False, True])
def test_image_in_memory_is_compared_as_often_as_asked(small: ImageFolder, is_always: bool) -> None:
    counting = Counting(small)
    check = ImageCheck(KnownHashes.none(NUM_SMALL), always=is_always)
    cache = ImageCache(NUM_SMALL, 1 << 20)
    reader = ViewReader(counting, img_size=28, views=VIEWS, check=check, cache=cache)
    for _ in range(3):
        reader.read([(position, (0,)) for position in range(NUM_SMALL)])
    assert set(counting.reads.values()) == {3 if is_always else 1}


def test_hashes_of_a_batch_come_from_files_not_from_memory(small: ImageFolder) -> None:
    cache = ImageCache(NUM_SMALL, 1 << 20)
    reader = ViewReader(small, img_size=28, views=VIEWS, keeps_hashes=True, cache=cache)
    for _ in range(2):
        assert len(reader.read([(0, (0,)), (1, (0,))]).hashes) == 2


def test_reading_leaves_the_threads_of_the_caller_alone(source: ImageFolder) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        _rows(source, 2)
        assert torch.get_num_threads() == before + 1
        names = [thread.name for thread in threading.enumerate()]
        assert not [name for name in names if name.startswith("mealv2-read")]
    finally:
        torch.set_num_threads(before)


def test_reading_that_is_given_up_ends_its_threads(source: ImageFolder) -> None:
    reader = ViewReader(source, img_size=8, views=VIEWS)
    pixels = iter(read_views(reader, [[(0, (0,))]] * 1000, workers=2))
    next(pixels)
    pixels.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name.startswith("mealv2-read")]


def test_a_fault_in_a_thread_is_raised_where_its_pixels_are_waited_for(
    source: ImageFolder,
) -> None:
    with pytest.raises(AssertionError, match="only centre crops"):
        list(read_views(ViewReader(source, img_size=8), [[(0, (0,))]], workers=1))


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
    assert failures_by_key(source, pixels.failed) == {source.keys[1]: pixels.failed[1]}


def test_batch_of_bad_images_only_is_empty(own_data: Path) -> None:
    source = ImageFolder(own_data, "train")
    _spoil(own_data, source.keys[0], "empty")
    pixels = ViewReader(source, img_size=16, views=VIEWS).read([(0, (0, 1))])
    assert pixels.images_BCHW.shape == (0, 3, 16, 16)
    assert (pixels.sizes_B2.shape, pixels.boxes_B5.shape) == ((0, 2), (0, 5))
    assert pixels.failed == {0: "the file is empty"}


def test_failures_are_refused_by_name_unless_skipped(source: ImageFolder) -> None:
    check_failures(source, {3: "broken"}, "skip")
    check_failures(source, {}, "fail")
    with pytest.raises(DataError, match=f"train/{source.keys[3]}: broken; .*--on-bad-image skip"):
        check_failures(source, {3: "broken"}, "fail")


def test_wait_timer_measures_the_wait_for_items_and_not_the_work_on_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    clock = types.SimpleNamespace(perf_counter=lambda: now)
    monkeypatch.setattr("mealv2.data.loader.time", clock)

    def items() -> Iterator[int]:
        nonlocal now
        for number in range(3):
            now += 10.0 if number == 0 else 3.0
            yield number

    timer = WaitTimer(items())
    assert (timer.start_s, timer.take()) == (None, 0.0)
    for _ in timer:
        now += 1.0  # 1 s of work on each item
    assert timer.start_s == 10.0
    assert timer.take() == 16.0
    assert timer.take() == 0.0, "each second counts once"
