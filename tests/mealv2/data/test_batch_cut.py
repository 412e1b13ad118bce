"""mealv2.data.batch_cut: to the bit what cutting one by one gives."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mealv2.data import batch_cut
from mealv2.data.batch_cut import MAX_SIDE, can_cut, centre_crop_batch, cut_batch, is_exact
from mealv2.data.pixels import RESIZES, Resize, centre_crop, cut
from mealv2.views import View

TORCH: tuple[Resize, ...] = ("torch", "torch-bicubic")
SIDES = st.integers(1, 70)


def _noise(seed: int, num: int, height: int, width: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    noise = generator.integers(0, 256, (num, height, width, 3), dtype=np.uint8)
    return np.where(noise[..., :1] < 64, noise // 200 * 255, noise)  # some black and white


@given(st.integers(0, 999), SIDES, SIDES, SIDES, st.sampled_from(TORCH), st.integers(0, 9))
def test_views_cut_together_are_those_cut_one_by_one(
    seed: int, height: int, width: int, img_size: int, resize: Resize, border: int
) -> None:
    generator = np.random.default_rng(seed)
    images = _noise(seed, 5, height, width)
    heights = generator.integers(1, height + 1, 5)
    widths = generator.integers(1, width + 1, 5)
    tops = generator.integers(0, height - heights + 1) + generator.integers(-border, border + 1, 5)
    lefts = generator.integers(0, width - widths + 1) + generator.integers(-border, border + 1, 5)
    boxes = np.stack([tops, lefts, heights, widths, generator.integers(0, 4, 5)], axis=1)

    together = cut_batch(images, boxes, img_size, resize=resize)

    one_by_one = [
        cut(image, View(*box[:4], bool(box[4] & 1), bool(box[4] & 2)), img_size, resize=resize)
        for image, box in zip(images, boxes.tolist(), strict=True)
    ]
    np.testing.assert_array_equal(together, one_by_one)


@pytest.mark.parametrize("border", [0, 4])
def test_crops_without_a_resize_are_copies(border: int) -> None:
    images = _noise(1, 16, 32, 32)
    generator = np.random.default_rng(2)
    corners = generator.integers(-border, border + 1, (16, 2))
    flips = np.arange(16) % 4
    boxes = np.column_stack([corners, np.full((16, 2), 32), flips])
    one_by_one = [
        cut(image, View(*box[:4], bool(box[4] & 1), bool(box[4] & 2)), 32)
        for image, box in zip(images, boxes.tolist(), strict=True)
    ]
    np.testing.assert_array_equal(cut_batch(images, boxes, 32), one_by_one)


@given(st.integers(0, 99), SIDES, SIDES, SIDES, st.sampled_from(TORCH))
def test_centre_crops_cut_together_are_those_cut_one_by_one(
    seed: int, height: int, width: int, img_size: int, resize: Resize
) -> None:
    images = _noise(seed, 3, height, width)
    together = centre_crop_batch(images, img_size, resize=resize)
    one_by_one = [centre_crop(image, img_size, resize=resize) for image in images]
    np.testing.assert_array_equal(together, one_by_one)


@pytest.mark.parametrize("resize", TORCH)
def test_no_partial_sum_needs_more_bits_than_its_numbers_have(resize: Resize) -> None:
    for length in range(1, MAX_SIDE + 1):
        for new_length in range(1, MAX_SIDE + 8):
            table = batch_cut._table(length, new_length, resize)
            unit = np.abs(table[table != 0]).astype(np.float64)
            bits = next(b for b in range(23) if not (unit * 2.0**b % 1).any())
            largest = 255 * np.maximum(table, 0).astype(np.float64).sum(axis=1).max() + 0.5
            digits = 24 if table.dtype == np.float32 else 53
            assert largest * 2.0**bits < 2.0**digits, (length, new_length)


def test_bright_rows_beside_dark_ones_are_summed_exactly() -> None:
    row = np.full(40, 255, dtype=np.uint8)
    row[:5] = [246, 249, 246, 211, 241]
    image = np.repeat(np.repeat(row[None, :, None], 40, axis=0), 3, axis=2)
    for pixels in (image, image.transpose(1, 0, 2)):
        images = np.stack([pixels] * 16)
        boxes = np.tile([0, 0, 40, 40, 0], (16, 1))
        together = cut_batch(images, boxes, 19, resize="torch-bicubic")
        expected = cut(pixels, View(0, 0, 40, 40, False), 19, resize="torch-bicubic")
        np.testing.assert_array_equal(together, [expected] * 16)


def test_autocast_and_lower_precision_change_no_pixel() -> None:
    images = _noise(3, 16, 32, 32)
    before = centre_crop_batch(images, 28)
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            np.testing.assert_array_equal(centre_crop_batch(images, 28), before)
    finally:
        torch.set_float32_matmul_precision(precision)


def test_this_machine_cuts_small_images_together_if_torch_resizes() -> None:
    assert all(map(is_exact, TORCH))
    assert [can_cut(resize, 32, 32, 32) for resize in RESIZES] == [True, False, True, False]
    assert not can_cut("torch", 32, 500, 32)
    assert not can_cut("torch", 32, 32, 224)


def test_another_resize_of_torch_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def brighter(*args: object, **kwargs: object) -> np.ndarray:
        return np.maximum(1, cut(*args, **kwargs))  # type: ignore[arg-type]

    monkeypatch.setattr(batch_cut, "cut", brighter)
    assert not is_exact.__wrapped__("torch")
