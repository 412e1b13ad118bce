"""mealv2.cutmix: what is pasted or blended, how much is left, and how mixes are drawn."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from timm.data.mixup import FastCollateMixup, Mixup

import reference
from mealv2.cutmix import Blend, Box, Mix, cutmix_box, draw_mix

quickly = settings(max_examples=200, deadline=None, derandomize=True)


def numbered(batch_size: int, img_size: int, dtype: torch.dtype) -> torch.Tensor:
    """Return images of which every pixel says whose it is."""
    of_image = torch.arange(batch_size, dtype=dtype)[:, None, None, None]
    return of_image.repeat(1, 3, img_size, img_size).contiguous(memory_format=torch.channels_last)


def drawn(step: int, *, beta: float = 1.0, img_size: int = 64, seed: int = 3) -> Mix:
    mix = draw_mix(4, img_size, cutmix=beta, probability=1.0, seed=(seed, 0, step))
    assert mix is not None
    return mix


# --- pasting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_pixels_in_the_box_are_the_partners_and_all_others_the_images_own(dtype):
    images = torch.arange(5 * 3 * 8 * 8).reshape(5, 3, 8, 8).remainder(251).to(dtype)
    before = images.clone()
    order = torch.tensor([3, 0, 4, 2, 1])
    mixed = Mix(order, Box(top=1, left=2, bottom=4, right=7)).apply(images)
    assert mixed.dtype == dtype
    for row in range(5):
        for y in range(8):
            for x in range(8):
                source = order[row] if 1 <= y < 4 and 2 <= x < 7 else row
                assert torch.equal(mixed[row, :, y, x], before[source, :, y, x])
    assert torch.equal(images, before), "the images given stay as they are"


@pytest.mark.parametrize("step", range(20))
def test_own_share_is_the_share_of_pixels_that_are_the_images_own(step):
    mix = drawn(step, img_size=37)
    order = torch.tensor([1, 2, 3, 0])  # nobody is its own partner: every pasted pixel shows
    mixed = Mix(order, mix.box).apply(numbered(4, 37, torch.uint8))
    own = (mixed == numbered(4, 37, torch.uint8)).float().mean(dim=(1, 2, 3))
    assert own.tolist() == pytest.approx([mix.lam(37)] * 4, abs=1e-6)


def test_a_mix_at_another_size_has_the_same_partners_and_share():
    mix = Mix(torch.tensor([1, 0]), Box(top=4, left=8, bottom=16, right=32))
    assert mix.at(1.5).box == (6, 12, 24, 48)
    assert mix.at(1.5).lam(48) == mix.lam(32)
    mixed = mix.at(0.5).apply(numbered(2, 16, torch.uint8))
    assert torch.equal(mixed, mix.apply(numbered(2, 32, torch.uint8))[:, :, ::2, ::2])


def test_an_empty_box_leaves_every_pixel_and_a_whole_one_none():
    images = numbered(2, 8, torch.uint8)
    order = torch.tensor([1, 0])
    empty, whole = (Mix(order, cutmix_box(share, 4, 4, 8)) for share in (1.0, 0.0))
    assert torch.equal(empty.apply(images), images)
    assert torch.equal(whole.apply(images), images[order])
    assert (empty.lam(8), whole.lam(8)) == (1.0, 0.0)


# --- blending -----------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.7311, 1.0])
def test_blended_pixels_are_timms_for_the_same_lambda(monkeypatch, weight):
    rng = np.random.default_rng(0)
    images_BCHW = torch.from_numpy(rng.integers(0, 256, (6, 3, 9, 9), dtype=np.uint8))
    blend = Blend(torch.arange(6).flip(0), weight)  # timm's partners
    monkeypatch.setattr(np.random, "beta", lambda a, b: weight)
    batch = [(image.numpy(), 0) for image in images_BCHW]
    expected, _ = FastCollateMixup(mixup_alpha=1.0)(batch)
    assert torch.equal(blend.apply(images_BCHW), expected)
    floats_BCHW = torch.randn(6, 3, 9, 9)
    expected, _ = Mixup(mixup_alpha=1.0)(floats_BCHW.clone(), torch.zeros(6, dtype=torch.int64))
    torch.testing.assert_close(blend.apply(floats_BCHW), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_a_blend_is_the_references_and_leaves_the_images(dtype):
    images = torch.arange(5 * 3 * 8 * 8).reshape(5, 3, 8, 8).remainder(251).to(dtype)
    before, order = images.clone(), torch.tensor([3, 0, 4, 2, 1])
    mixed = Blend(order, 0.3).apply(images)
    assert mixed.dtype == dtype
    assert torch.equal(images, before)
    expected = reference.blended(before.double().numpy(), order.numpy(), 0.3)
    step = {torch.uint8: 0.5, torch.float32: 1e-4, torch.bfloat16: 0.5}[dtype]
    np.testing.assert_allclose(mixed.double().numpy(), expected, rtol=0, atol=step + 1e-4)
    assert Blend(order, 0.3).lam(8) == 0.3


# --- the box ------------------------------------------------------------------------------------


@quickly
@given(
    share=st.floats(0, 1),
    size=st.integers(1, 512),
    at=st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True)),
)
def test_a_box_lies_inside_the_image_and_is_no_larger_than_its_share(share, size, at):
    row, column = (int(part * size) for part in at)
    box = cutmix_box(share, row, column, size)
    assert 0 <= box.top <= row <= box.bottom <= size
    assert 0 <= box.left <= column <= box.right <= size
    side = math.sqrt(1 - share) * size
    assert max(box.bottom - box.top, box.right - box.left) <= side
    assert 0 <= Mix(torch.zeros(1), box).lam(size) <= 1


@pytest.mark.parametrize(
    ("share", "centre", "expected"),
    [
        (0.75, (112, 112), Box(56, 56, 168, 168)),  # half the side of 224
        (0.75, (0, 223), Box(0, 167, 56, 224)),  # cut off at two borders
        (0.9, (100, 100), Box(65, 65, 135, 135)),  # int(224 * sqrt(0.1)) = 70
        (0.99999, (9, 9), Box(9, 9, 9, 9)),  # a side below one pixel
    ],
)
def test_boxes_are_those_of_rand_bbox(share, centre, expected):
    assert cutmix_box(share, *centre, 224) == expected


# --- the draw -----------------------------------------------------------------------------------


def test_a_mix_is_a_pure_function_of_its_place():
    def draw(place: tuple[int, int, int]) -> tuple[list[int], Box]:
        mix = draw_mix(16, 64, cutmix=1.0, probability=1.0, seed=place)
        assert mix is not None
        return mix.order_B.tolist(), mix.box

    places = [(seed, epoch, step) for seed in (0, 1) for epoch in (0, 1) for step in (0, 1)]
    first = [draw(place) for place in places]
    np.random.default_rng().random()
    torch.rand(3)
    assert [draw(place) for place in reversed(places)] == first[::-1]
    assert len({str(mix) for mix in first}) == len(places)


def test_the_global_generators_are_not_touched():
    before = torch.get_rng_state()
    drawn(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_partners_are_a_permutation():
    for step in range(50):
        assert sorted(drawn(step).order_B.tolist()) == [0, 1, 2, 3]


def mixed_share(probability: float, *, steps: int = 2000) -> float:
    mixes = (
        draw_mix(2, 8, cutmix=1.0, probability=probability, seed=(0, 0, s)) for s in range(steps)
    )
    return sum(mix is not None for mix in mixes) / steps


def test_probability_0_mixes_no_batch_and_1_every_one():
    assert (mixed_share(0.0), mixed_share(1.0)) == (0.0, 1.0)


@pytest.mark.parametrize("probability", [0.2, 0.5])
def test_a_share_of_the_batches_as_given_is_mixed(probability):
    share = mixed_share(probability)
    assert stats.binomtest(round(2000 * share), 2000, probability).pvalue > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.5, 1.0, 4.0])
def test_lambda_is_beta_distributed(beta):
    """Seen in boxes that no border cuts off: their side is int(S sqrt(1 - lambda)), 2 at a time."""
    size = 4096
    lambdas = []
    for step in range(4000):
        mix = drawn(step, beta=beta, img_size=size)
        box = mix.box
        sides = {box.bottom - box.top, box.right - box.left}
        cut_off = 0 in (box.top, box.left) or size in (box.bottom, box.right)
        if not cut_off:
            (side,) = sides
            lambdas.append((1 - ((side + 1) / size) ** 2, (side + 1) / size))
    # a box of side s has its centre in the inner (1 - s)^2 of the image: so much of lambda is seen
    grid = np.linspace(1e-6, 1 - 1e-6, 20_001)
    density = stats.beta.pdf(grid, beta, beta) * (1 - np.sqrt(1 - grid)) ** 2
    cumulative = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    cumulative /= cumulative[-1]
    seen = np.array([value for value, _ in lambdas])
    assert len(seen) > 200
    assert stats.kstest(seen, lambda x: np.interp(x, grid, cumulative)).pvalue > 0.01


def test_centres_are_uniform_over_the_image():
    """Of small boxes, whose centre is seen wherever they lie."""
    size = 512
    rows, columns = [], []
    for step in range(6000):
        box = drawn(step, img_size=size).box
        whole = box.top > 0 and box.bottom < size and box.left > 0 and box.right < size
        if whole and box.bottom - box.top <= size // 2:
            rows.append((box.top + box.bottom) / 2)
            columns.append((box.left + box.right) / 2)
    inner = [
        (row, column)
        for row, column in zip(rows, columns, strict=True)
        if size / 4 < row < 3 * size / 4 and size / 4 < column < 3 * size / 4
    ]
    assert len(inner) > 300
    for values in zip(*inner, strict=True):
        scaled = (np.array(values) - size / 4) / (size / 2)
        assert stats.kstest(scaled, "uniform").pvalue > 0.01
    assert stats.spearmanr(*zip(*inner, strict=True)).pvalue > 0.01


# --- mixup, and both ----------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_lambda_of_mixup_is_beta_distributed(alpha):
    drawn = [draw_mix(4, 8, mixup=alpha, seed=(0, 0, step)) for step in range(2000)]
    assert all(isinstance(mix, Blend) for mix in drawn)
    lambdas = [mix.weight for mix in drawn]
    assert stats.kstest(lambdas, stats.beta(alpha, alpha).cdf).pvalue > 0.01
    partners = np.array([mix.order_B.tolist() for mix in drawn])
    assert (np.sort(partners) == np.arange(4)).all()
    assert stats.chisquare(np.bincount(partners[:, 0])).pvalue > 0.01


@pytest.mark.parametrize("switch", [0.0, 0.3, 1.0])
def test_with_both_a_share_of_the_batches_as_given_gets_cutmix(switch):
    settings = {"mixup": 0.2, "cutmix": 1.0, "switch_probability": switch, "probability": 0.8}
    drawn = [draw_mix(4, 8, **settings, seed=(1, 0, step)) for step in range(2000)]
    mixed = [mix for mix in drawn if mix is not None]
    assert stats.binomtest(len(mixed), 2000, 0.8).pvalue > 0.01
    num_cutmix = sum(isinstance(mix, Mix) for mix in mixed)
    assert stats.binomtest(num_cutmix, len(mixed), switch).pvalue > 0.01


def test_a_blend_is_a_pure_function_of_its_place_and_none_without_alphas():
    one, other = (draw_mix(16, 8, mixup=0.2, seed=(0, 1, 2)) for _ in range(2))
    assert one.weight == other.weight
    assert one.order_B.tolist() == other.order_B.tolist()
    assert draw_mix(16, 8, mixup=0.2, seed=(0, 1, 3)).weight != one.weight
    assert draw_mix(16, 8, seed=(0, 1, 2)) is None
