"""mealv2.data.image_cache: all images of a source, or none."""

import numpy as np

from mealv2.data.image_cache import ImageCache


def _image(side: int) -> np.ndarray:
    return np.zeros((side, side, 3), dtype=np.uint8)


def test_images_are_kept_if_as_many_of_their_size_fit() -> None:
    cache = ImageCache(1000, 1000 * 300)
    for position in range(1000):
        cache.add(position, _image(10))
    assert len(cache) == 1000
    assert cache.get(999) is not None
    assert cache.get(1000) is None


def test_none_is_kept_if_the_first_show_that_they_do_not_fit() -> None:
    cache = ImageCache(1000, 1000 * 300 - 1)
    for position in range(1000):
        cache.add(position, _image(10))
    assert len(cache) == 0
    assert not cache.is_open


def test_memory_is_never_exceeded_when_later_images_are_larger() -> None:
    cache = ImageCache(100, 100 * 300)
    for position in range(100):
        cache.add(position, _image(10 if position < 40 else 40))
    assert len(cache) == 40 + (100 * 300 - 40 * 300) // (40 * 40 * 3)


def test_few_images_decide_for_themselves() -> None:
    cache = ImageCache(3, 2 * 300)
    for position in range(3):
        cache.add(position, _image(10))
    assert len(cache) == 2
    assert ImageCache(0, 100).is_open is False
