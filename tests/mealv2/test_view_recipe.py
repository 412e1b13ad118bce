"""mealv2.view_recipe: golden views of each recipe, torchvision's distribution, the entry."""

import copy
import json
import math
import struct
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torchvision.transforms import RandomCrop, RandomResizedCrop
from torchvision.transforms import functional as tv

from mealv2.data.pixels import DecodedImage, centre_crop, cut
from mealv2.view_recipe import ViewRecipe
from mealv2.views import RECIPE, DrawnViews, View, view_of

GOLDEN_DIR = Path(__file__).parents[1] / "golden"
ARGUMENTS = json.loads((GOLDEN_DIR / "views.json").read_text("utf-8"))
GOLDEN = json.loads((GOLDEN_DIR / "view_recipes.json").read_text("utf-8"))
P_VALUE = 1e-5

PAD = ViewRecipe(crop="pad")
WIDE = ViewRecipe(scale=(0.35, 1.0), ratio=(0.5, 2.0))


def as_row(view: View) -> list[int]:
    return [view.top, view.left, view.height, view.width, int(view.flip), int(view.vflip)]


def words(purpose: str, key: str, seed: int, index: int) -> list[int]:
    """Return the first 24 words of a stream, all at once."""
    found = []
    for block in range(3):
        head = f"mealv2/{purpose}/1\0".encode() + struct.pack("<QQQ", seed, index, block)
        digest = blake2b(head + key.encode("utf-8"), digest_size=64).digest()
        found += struct.unpack("<8Q", digest)
    return found


def view_by_numpy(recipe: ViewRecipe, key: str, index: int, seed: int, w: int, h: int) -> list[int]:
    """Return the view of a recipe by NumPy and the C library's exp and log."""
    word = words("view", key, seed, index)
    unit = [(number >> 11) / 2**53 for number in word]
    flips = [
        int(unit[0] < recipe.hflip),
        int((words("vflip", key, seed, index)[0] >> 11) / 2**53 < recipe.vflip),
    ]
    if recipe.crop == "center":
        return [0, 0, h, w, *flips]
    if recipe.crop == "pad":
        side, room = min(w, h), 2 * recipe.padding + 1
        top = word[1] * (h - side + room) // 2**64 - recipe.padding
        left = word[2] * (w - side + room) // 2**64 - recipe.padding
        return [top, left, side, side, *flips]
    areas = w * h * (recipe.scale[0] + np.diff(recipe.scale) * np.array(unit[3:23:2]))
    low, high = map(math.log, recipe.ratio)
    ratios = np.exp(low + (high - low) * np.array(unit[4:23:2]))
    widths, heights = np.rint(np.sqrt(areas * ratios)), np.rint(np.sqrt(areas / ratios))
    fits = np.flatnonzero((widths > 0) & (widths <= w) & (heights > 0) & (heights <= h))
    if len(fits):
        box_w, box_h = int(widths[fits[0]]), int(heights[fits[0]])
        top, left = word[1] * (h - box_h + 1) // 2**64, word[2] * (w - box_w + 1) // 2**64
    else:
        box_w = min(w, max(1, round(h * recipe.ratio[1]))) if w / h > recipe.ratio[1] else w
        box_h = min(h, max(1, round(w / recipe.ratio[0]))) if w / h < recipe.ratio[0] else h
        top, left = (h - box_h) // 2, (w - box_w) // 2
    return [top, left, box_h, box_w, *flips]


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda g: g["recipe"]["name"])
def test_twenty_views_of_each_recipe_are_the_golden_ones(golden: dict[str, Any]) -> None:
    recipe = ViewRecipe.from_entry(golden["recipe"])
    assert len(golden["views"]) == 20
    for row, expected in zip(ARGUMENTS, golden["views"], strict=True):
        place = {name: row[name] for name in ("seed", "width", "height")}
        assert as_row(view_of(row["key"], row["index"], **place, recipe=recipe)) == expected
        numbers = (row["key"], row["index"], row["seed"], row["width"], row["height"])
        assert view_by_numpy(recipe, *numbers) == expected


def test_the_default_recipe_is_the_papers_of_version_1() -> None:
    assert json.dumps(ViewRecipe().entry()) == json.dumps(RECIPE)
    assert RECIPE == {
        "name": "random-resized-crop",
        "version": 1,
        "hash": "blake2b-512",
        "scale": [0.08, 1.0],
        "ratio": [3 / 4, 4 / 3],
        "tries": 10,
        "flip_probability": 0.5,
    }


def test_a_flip_upside_down_changes_nothing_else() -> None:
    for index in range(50):
        plain = view_of("a.jpg", index, seed=1, width=60, height=40)
        flipped = view_of("a.jpg", index, seed=1, width=60, height=40, recipe=ViewRecipe(vflip=1.0))
        assert as_row(flipped) == [*as_row(plain)[:5], 1]
        assert plain.box()[4] + 2 == flipped.box()[4]


def test_a_box_outside_of_the_image_is_kept_in_twos_complement() -> None:
    box = np.array(View(-3, 2, 8, 8, True).box(), dtype=np.uint32).view(np.int32)
    assert box.tolist() == [-3, 2, 8, 8, 1]


# --- torchvision's distribution -------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height", "padding"), [(32, 32, 4), (28, 36, 2)])
def test_padded_crops_are_where_torchvisions_are(width: int, height: int, padding: int) -> None:
    side, count = min(width, height), 8000
    recipe = ViewRecipe(crop="pad", padding=padding)
    ours = [
        view_of(f"{n}.png", n, seed=5, width=width, height=height, recipe=recipe)
        for n in range(count)
    ]
    image = torch.empty(3, height + 2 * padding, width + 2 * padding)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        theirs = [RandomCrop.get_params(image, (side, side))[:2] for _ in range(count)]
    rows, columns = height - side + 2 * padding + 1, width - side + 2 * padding + 1
    tables = [
        np.bincount(np.array(cells), minlength=rows * columns)
        for cells in (
            [(v.top + padding) * columns + v.left + padding for v in ours],
            [top * columns + left for top, left in theirs],
        )
    ]
    assert len(tables[0]) == rows * columns
    assert stats.chi2_contingency(np.array(tables)).pvalue > P_VALUE
    assert stats.binomtest(sum(v.flip for v in ours), count, 0.5).pvalue > P_VALUE


@pytest.mark.parametrize(("width", "height"), [(500, 375), (64, 200)])
def test_boxes_of_other_scales_and_ratios_are_distributed_as_torchvisions(
    width: int, height: int
) -> None:
    ours = [
        view_of(f"{n}.png", n, seed=5, width=width, height=height, recipe=WIDE) for n in range(4000)
    ]
    image = torch.empty(3, height, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        theirs = np.array(
            [
                RandomResizedCrop.get_params(image, list(WIDE.scale), list(WIDE.ratio))
                for _ in range(2000)
            ]
        )
    boxes = np.array([as_row(view)[:4] for view in ours])
    for figure in (
        lambda b: b[:, 2] * b[:, 3],
        lambda b: np.log(b[:, 3] / b[:, 2]),
        lambda b: b[:, 0] / np.maximum(1, height - b[:, 2]),
        lambda b: b[:, 1] / np.maximum(1, width - b[:, 3]),
    ):
        assert stats.ks_2samp(figure(boxes), figure(theirs), method="asymp").pvalue > P_VALUE


@pytest.mark.parametrize("probability", [0.0, 0.2, 1.0])
def test_flips_come_as_often_as_asked_and_do_not_depend_on_each_other(probability: float) -> None:
    recipe = ViewRecipe(hflip=probability, vflip=probability)
    views = [view_of(f"{n}", n, seed=2, width=9, height=9, recipe=recipe) for n in range(4000)]
    for flips in ([v.flip for v in views], [v.vflip for v in views]):
        assert stats.binomtest(sum(flips), 4000, probability).pvalue > P_VALUE
    if probability == 0.2:
        both = sum(v.flip and v.vflip for v in views)
        assert stats.binomtest(both, 4000, 0.04).pvalue > P_VALUE


# --- pixels ---------------------------------------------------------------------------------------


def picture(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(3).integers(1, 256, (height, width, 3), dtype=np.uint8)


def test_padded_crop_of_an_image_of_the_views_size_is_torchvisions_of_cifar() -> None:
    pixels_HWC = picture(32, 32)
    padded_CHW = tv.pad(torch.from_numpy(pixels_HWC).permute(2, 0, 1), [4])
    for index in range(40):
        view = view_of("a.png", index, seed=0, width=32, height=32, recipe=PAD)
        expected_CHW = tv.crop(padded_CHW, view.top + 4, view.left + 4, 32, 32)
        if view.flip:
            expected_CHW = tv.hflip(expected_CHW)
        assert np.array_equal(cut(pixels_HWC, view, 32), expected_CHW.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("view", [View(-9, 0, 8, 8, False), View(0, 40, 8, 8, True)])
def test_a_box_outside_of_the_image_is_black(view: View) -> None:
    assert not cut(picture(40, 30), view, 8).any()


@pytest.mark.parametrize("resize", ["torch", "pil", "torch-bicubic", "pil-bicubic"])
def test_centre_view_is_the_crop_of_evaluation_with_flips(resize: Any) -> None:
    pixels_HWC = picture(50, 41)
    expected_SSC = centre_crop(pixels_HWC, 24, resize=resize)
    recipe = ViewRecipe(crop="center", hflip=0.5, vflip=0.5)
    seen = set()
    for index in range(12):
        view = view_of("a.png", index, seed=0, width=50, height=41, recipe=recipe)
        found_SSC = DecodedImage(pixels_HWC, 50, 41).cut(view, 24, resize=resize)
        rows, columns = -1 if view.vflip else 1, -1 if view.flip else 1
        assert np.array_equal(found_SSC, expected_SSC[::rows, ::columns])
        assert found_SSC.flags.c_contiguous
        seen.add((view.flip, view.vflip))
    assert len(seen) == 4


@pytest.mark.parametrize("flips", [(False, True), (True, True)])
def test_flips_of_a_box_are_of_the_resized_pixels(flips: tuple[bool, bool]) -> None:
    box = (3, 5, 20, 17)
    plain = cut(picture(40, 30), View(*box, False), 16)
    found = cut(picture(40, 30), View(*box, *flips), 16)
    assert np.array_equal(found, plain[::-1, :: -1 if flips[0] else 1])


# --- the entry of a manifest ----------------------------------------------------------------------

RECIPES = [ViewRecipe.from_entry(golden["recipe"]) for golden in GOLDEN]


@pytest.mark.parametrize("recipe", [ViewRecipe(), *RECIPES])
def test_an_entry_there_and_back_is_the_same_recipe(recipe: ViewRecipe) -> None:
    drawn = DrawnViews(7, recipe)
    entry = json.loads(json.dumps(drawn.entry()))
    assert DrawnViews.from_entry(entry).entry() == entry
    assert DrawnViews.from_entry(entry).recipe.crop == recipe.crop


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.sampled_from([ViewRecipe(), *RECIPES]), st.data())
def test_a_damaged_entry_is_refused_and_never_read_as_another_recipe(
    recipe: ViewRecipe, data: st.DataObject
) -> None:
    known = DrawnViews(3, recipe).entry()
    entry = copy.deepcopy(known)
    name = data.draw(st.sampled_from([*entry, "more"]))
    value = data.draw(JSON)
    if value is None:
        entry.pop(name, None)
    else:
        entry[name] = value
    with suppress(ValueError):  # not raised for a valid number in place of another one
        assert DrawnViews.from_entry(entry).entry() == entry


@pytest.mark.parametrize(
    "values",
    [
        {"scale": (0.0, 1.0)},
        {"scale": (0.5, 0.4)},
        {"scale": (0.5, 1.5)},
        {"scale": (0.5, math.nan)},
        {"ratio": (0.0, 1.0)},
        {"ratio": (2.0, 1.0)},
        {"ratio": (1.0, 1e9)},
        {"padding": -1},
        {"padding": 10**6},
        {"hflip": 1.5},
        {"vflip": math.nan},
    ],
)
def test_a_parameter_out_of_bounds_is_named(values: dict[str, Any]) -> None:
    (name,) = values
    with pytest.raises(ValueError, match=f"^{name} must be"):
        ViewRecipe(**values)
