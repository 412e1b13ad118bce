"""mealv2.data.image_cache: all images of a source, or none."""

import numpy as np
import pytest

from mealv2.data.image_cache import ImageCache


def _image(side: int) -> np.ndarray:
    return np.zeros((side, side, 3), dtype=np.uint8)


IMAGE = 300 + 256  # bytes of 10 x 10 pixels, and of what holds them


def test_images_are_kept_if_as_many_of_their_size_fit() -> None:
    cache = ImageCache(1000, 1000 * IMAGE)
    for position in range(1000):
        cache.add(position, _image(10))
    assert len(cache) == 1000
    assert cache.get(999) is not None
    assert cache.get(1000) is None


@pytest.mark.parametrize(("num_images", "num_bytes"), [(1000, 1000 * IMAGE - 1), (3, 2 * IMAGE)])
def test_none_is_kept_if_they_do_not_fit(num_images: int, num_bytes: int) -> None:
    cache = ImageCache(num_images, num_bytes)
    for position in range(num_images):
        cache.add(position, _image(10))
    assert len(cache) == 0
    assert not cache.is_open


def test_the_first_images_are_enough_to_give_up() -> None:
    cache = ImageCache(1000, 1000 * IMAGE - 1)
    for position in range(31):
        cache.add(position, _image(10))
    assert cache.is_open
    cache.add(31, _image(10))
    assert not cache.is_open


def test_all_are_freed_when_later_images_are_larger() -> None:
    cache = ImageCache(100, 100 * IMAGE)
    for position in range(100):
        cache.add(position, _image(10 if position < 40 else 40))
        assert sum(image.nbytes for image in cache._pixels.values()) <= 100 * IMAGE
    assert len(cache) == 0
    assert not cache.is_open


def test_no_images_or_no_memory_keep_nothing() -> None:
    assert not ImageCache(0, 100).is_open
    assert not ImageCache(100, 0).is_open
