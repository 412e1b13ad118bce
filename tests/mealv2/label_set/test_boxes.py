"""mealv2.label_set.boxes: the hash of a shard's boxes is that of its views, one by one."""

import numpy as np
import pytest

from mealv2.label_set import Images, Shard, boxes, boxes_of, boxes_sha256
from mealv2.view_recipe import ViewRecipe
from mealv2.views import DrawnViews

RECIPES = {
    "paper": ViewRecipe(),
    "small, long boxes": ViewRecipe(scale=(0.01, 0.9), ratio=(0.1, 20.0)),  # few fit at first
    "padded": ViewRecipe(crop="pad", padding=4),  # a box may begin outside of the image
    "whole image": ViewRecipe(crop="center"),
    "upside down": ViewRecipe(vflip=0.5),
    "with operations": ViewRecipe(color_jitter=0.4, reprob=0.25),
}
SIZES = np.array([[500, 375], [375, 500], [1, 9], [32, 32], [4000, 30], [64, 48], [2, 2]], "<u4")


def shard_of(sizes_N2: np.ndarray, num_views: int = 5) -> Shard:
    """Return a shard of views 3 to 3 + V."""
    zeros_N = np.zeros(len(sizes_N2), np.int64)
    images = Images(sizes_N2, zeros_N, zeros_N)
    keys = [f"é/{n}.jpg" for n in range(len(sizes_N2))]
    return Shard("00" * 32, "train", 0, 3, num_views, keys, [], images)


@pytest.mark.parametrize("at_once", [1, 12, 1 << 20])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_boxes_are_those_of_each_view(
    recipe: ViewRecipe, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boxes, "_DRAWN_AT_ONCE", at_once)
    views, shard = DrawnViews(11, recipe), shard_of(SIZES)
    each = [
        views.view(key, index, width=width, height=height).box()
        for key, (width, height) in zip(shard.keys, SIZES.tolist(), strict=True)
        for index in range(3, 8)
    ]
    assert boxes_of(shard, views) == boxes_sha256(np.array(each, np.uint32))


def test_a_shard_without_images_has_the_hash_of_no_bytes() -> None:
    assert boxes_of(shard_of(SIZES[:0]), DrawnViews(0)) == boxes_sha256(np.empty((0, 5)))


@pytest.mark.parametrize("recipe", [ViewRecipe(), ViewRecipe(crop="pad", padding=4)])
def test_an_image_without_pixels_has_no_views(recipe: ViewRecipe) -> None:
    sizes_N2 = SIZES.copy()
    sizes_N2[3, 1] = 0
    with pytest.raises(ValueError, match="an image of 32x0 pixels has no views"):
        boxes_of(shard_of(sizes_N2), DrawnViews(0, recipe))
