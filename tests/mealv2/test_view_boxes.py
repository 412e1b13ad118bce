"""mealv2.view_boxes: to the bit what a view's own function gives."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mealv2.view_boxes import boxes_of
from mealv2.view_recipe import ViewRecipe
from mealv2.views import DrawnViews, View, Views

RECIPES = {
    "paper": ViewRecipe(),
    "small, long boxes": ViewRecipe(scale=(0.01, 0.9), ratio=(0.1, 20.0)),  # few fit at first
    "large": ViewRecipe(scale=(1.0, 1.0), hflip=1.0),
    "padded": ViewRecipe(crop="pad", padding=4),
    "not padded": ViewRecipe(crop="pad", padding=0, hflip=0.0),
    "upside down": ViewRecipe(vflip=0.5),
}
SIDES = st.integers(1, 40_000) | st.integers(1, 40)


def _row(view: View) -> list[int]:
    return [view.top, view.left, view.height, view.width, view.flip | view.vflip << 1]


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@given(seed=st.integers(0, 2**64 - 1), sides=st.lists(st.tuples(SIDES, SIDES), min_size=1))
def test_boxes_are_those_of_each_view(
    recipe: ViewRecipe, seed: int, sides: list[tuple[int, int]]
) -> None:
    views = DrawnViews(seed, recipe)
    keys = [f"train/é{n % 3}.png" for n in range(len(sides))]
    indices = [n * 7 % 2**64 for n in range(len(sides))]
    widths, heights = np.array(sides).T

    boxes = boxes_of(views, keys, indices, widths, heights)

    assert boxes.tolist() == [
        _row(views.view(key, index, width=width, height=height))
        for key, index, (width, height) in zip(keys, indices, sides, strict=True)
    ]


def test_ten_thousand_square_images_have_the_boxes_of_their_views() -> None:
    views, num = DrawnViews(3), 10_000
    keys = [str(n) for n in range(num)]
    sides = np.full(num, 32)
    boxes = boxes_of(views, keys, [1] * num, sides, sides)
    assert boxes.tolist() == [_row(views.view(key, 1, width=32, height=32)) for key in keys]


def test_boxes_of_other_views_are_asked_for_one_by_one() -> None:
    class Whole(Views):
        def view(self, key: str, index: int, *, width: int, height: int) -> View:
            return View(0, 0, height, width, bool(index), True)

    boxes = boxes_of(Whole(), ["a", "b"], [0, 1], np.array([5, 6]), np.array([7, 8]))
    assert boxes.tolist() == [[0, 0, 7, 5, 2], [0, 0, 8, 6, 3]]


@pytest.mark.parametrize("index", [-1, 2**64])
def test_an_index_out_of_range_is_refused_as_by_a_view(index: int) -> None:
    side = np.array([32])
    with pytest.raises(ValueError, match="must lie in"):
        boxes_of(DrawnViews(0), ["a"], [index], side, side)


def test_no_views_have_no_boxes() -> None:
    none = np.empty(0, dtype=np.int64)
    assert boxes_of(DrawnViews(0), [], [], none, none).shape == (0, 5)
