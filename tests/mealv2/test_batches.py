"""mealv2.batches: order and batches as pure functions."""

import numpy as np
import pytest

from mealv2.batches import SHUFFLE_WINDOW, epoch_order, split_batches


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


# --- groups that should be read together ----------------------------------------------------------

GROUPS = {
    "none": [],
    "one": [0],
    "even": list(range(0, 1000, 50)),
    "uneven": [0, 1, 2, 300, 301, 500, 650, 800, 801, 802, 950, 999],
    "empty ones": [0, 0, 10, 10, 10, 700, 1000, 1000],
    "one each": list(range(1000)),
}


@pytest.mark.parametrize("case", GROUPS)
@pytest.mark.parametrize("epoch", [0, 1, 179])
def test_order_by_groups_is_a_permutation(case: str, epoch: int) -> None:
    num_images = 1000 if GROUPS[case] else 0
    order = epoch_order(num_images, seed=3, epoch=epoch, groups=GROUPS[case])
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(num_images))


def test_order_by_groups_is_frozen() -> None:
    order = epoch_order(20, seed=5, epoch=3, groups=list(range(0, 20, 2)))
    golden = [3, 8, 17, 2, 0, 14, 18, 4, 1, 15, 7, 9, 5, 16, 6, 19, 12, 13, 10, 11]
    assert order.tolist() == golden


@pytest.mark.parametrize("case", ["even", "uneven", "one each"])
def test_so_many_groups_are_read_at_a_time_and_each_once(case: str) -> None:
    groups = GROUPS[case]
    order = epoch_order(1000, seed=1, epoch=2, groups=groups)
    group_of = np.searchsorted(groups, order, side="right") - 1
    windows, left = [], group_of.tolist()
    sizes = np.diff([*groups, 1000])
    for _ in range(0, len(groups), SHUFFLE_WINDOW):
        # a window is what its first groups are: it ends when all of their images were read
        window: list[int] = []
        for group in left:
            if group not in window and len(window) < SHUFFLE_WINDOW:
                window.append(group)
        num_images = int(sum(sizes[group] for group in window))
        assert set(left[:num_images]) == set(window)
        windows.append(window)
        left = left[num_images:]
    assert left == []
    assert sorted(group for window in windows for group in window) == list(range(len(groups)))


def test_images_of_a_window_are_mixed_and_groups_meet_others_in_every_epoch() -> None:
    groups = GROUPS["even"]
    orders = [epoch_order(1000, seed=1, epoch=epoch, groups=groups) for epoch in range(30)]
    met: set[tuple[int, int]] = set()
    for order in orders:
        first = [int(p) // 50 for p in order[: 50 * SHUFFLE_WINDOW]]
        assert len(set(first)) == SHUFFLE_WINDOW
        assert len(set(first[:50])) >= SHUFFLE_WINDOW - 2, (
            "the first batch has images of nearly all"
        )
        met |= {(a, b) for a in first for b in first}
    assert len(met) > 390, "of 400 pairs"
    assert len({tuple(order.tolist()) for order in orders}) == 30


@pytest.mark.parametrize("num_images", [0, 1, 2, 7, 8, 9, 16, 17, 36])
@pytest.mark.parametrize("batch_size", [1, 2, 8, 50])
def test_batches_use_every_image_once_in_order(num_images: int, batch_size: int) -> None:
    order = epoch_order(num_images, seed=0, epoch=0)
    cut_up = split_batches(order, batch_size)
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
    assert [len(batch) for batch in split_batches(range(num_images), batch_size)] == sizes
