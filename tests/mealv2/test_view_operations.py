"""mealv2.view_operations: golden numbers, timm's arguments and distributions, the same pixels."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from timm.data.auto_augment import (
    _HPARAMS_DEFAULT,
    _RAND_TRANSFORMS,
    LEVEL_TO_ARG,
    NAME_TO_OP,
    rand_augment_transform,
)
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import ColorJitter
from torchvision.transforms import functional as tv

from mealv2.data.operations import apply_operations
from mealv2.hash_draws import hash_words
from mealv2.view_operations import (
    _NAMES,
    ERASE,
    Operation,
    level_numbers,
    normal,
    parse_rand_augment,
)
from mealv2.view_recipe import FILL, ViewRecipe
from mealv2.views import view_of

GOLDEN_DIR = Path(__file__).parents[1] / "golden"
ARGUMENTS = json.loads((GOLDEN_DIR / "views.json").read_text("utf-8"))
GOLDEN = json.loads((GOLDEN_DIR / "view_operations.json").read_text("utf-8"))
P_VALUE = 1e-5
ALL = ViewRecipe(color_jitter=0.4, aa="rand-m9-n2-mstd0.5", reprob=0.5, remode="pixel")


def operations(recipe: ViewRecipe, count: int) -> list[tuple[Operation, ...]]:
    return [recipe.operations(f"{number}.jpg", 1, number) for number in range(count)]


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def test_operations_of_twenty_views_are_the_golden_ones() -> None:
    found = []
    for row in ARGUMENTS:
        place = {name: row[name] for name in ("seed", "width", "height")}
        view = view_of(row["key"], row["index"], **place, recipe=ALL)
        plain = view_of(row["key"], row["index"], **place)
        assert view.box() == plain.box()
        found.append([[o.name, list(o.numbers), o.is_bicubic] for o in view.operations])
    assert found == GOLDEN


@pytest.mark.parametrize("is_increasing", [False, True])
@pytest.mark.parametrize("name", _RAND_TRANSFORMS)
def test_numbers_of_a_level_are_timms(
    monkeypatch: pytest.MonkeyPatch, name: str, is_increasing: bool
) -> None:
    assert tuple(_RAND_TRANSFORMS) == _NAMES
    increasing = f"{name}Increasing"
    timms = LEVEL_TO_ARG[increasing if is_increasing and increasing in LEVEL_TO_ARG else name]
    for sign, draw in ((1, 0.1), (-1, 0.9)):
        monkeypatch.setattr(random, "random", lambda draw=draw: draw)
        for level in (0.0, 2.5, 9.0, 10.0):
            expected = timms(level, _HPARAMS_DEFAULT) if timms else ()
            found = level_numbers(name, level, sign, is_increasing=is_increasing)
            assert found == pytest.approx(expected)
            assert list(map(type, found)) == list(map(type, expected))


@pytest.mark.parametrize("text", ["rand-m9-n2-mstd0.5", "rand-m9-mstd0.5-inc1", "rand-n3-p0.7"])
def test_rand_augment_draws_operations_as_often_as_timm(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    ours = operations(ViewRecipe(aa=text), 1000)
    timms = rand_augment_transform(text, {})
    seen: list[str] = []
    lengths = []
    for op in timms.ops:  # keep what would be applied, without images
        op.aug_fn = lambda image, *_, name=op.name, **__: seen.append(name) or image
    random.seed(0)
    np.random.seed(0)  # timm's
    for _ in range(1000):
        before = len(seen)
        timms(None)
        lengths.append(len(seen) - before)
    names = Counter(operation.name for of_view in ours for operation in of_view)
    theirs = Counter(name.removesuffix("Increasing") for name in seen)
    table = [[counts[name] for name in _NAMES] for counts in (names, theirs)]
    assert stats.chi2_contingency(table).pvalue > P_VALUE
    sizes = [np.bincount(list(map(len, ours)), minlength=4), np.bincount(lengths, minlength=4)]
    sizes = np.array(sizes)
    assert stats.chi2_contingency(sizes[:, sizes.sum(axis=0) > 0]).pvalue > P_VALUE


def test_levels_are_normal_and_clipped() -> None:
    words = hash_words("test", "a", 0, 0)
    assert stats.kstest([normal(words) for _ in range(2000)], "norm").pvalue > P_VALUE
    recipe = ViewRecipe(aa="rand-m9-n2-p1-mstd1")
    drawn = [o for ops in operations(recipe, 1500) for o in ops]
    angles = [abs(o.numbers[0]) for o in drawn if o.name == "Rotate"]
    assert max(angles) == 30.0
    inside = np.array([angle / 3 for angle in angles if angle < 30])
    truncated = stats.truncnorm(-np.inf, 1.0, loc=9, scale=1)
    assert stats.kstest(inside, truncated.cdf).pvalue > P_VALUE
    uniform = [
        abs(o.numbers[0]) / 30
        for ops in operations(ViewRecipe(aa="rand-m10-p1-mstd101"), 2000)
        for o in ops
        if o.name == "Rotate"
    ]
    assert stats.kstest(uniform, "uniform").pvalue > P_VALUE


def test_colour_jitter_is_distributed_as_torchvisions() -> None:
    ours = operations(ViewRecipe(color_jitter=0.4), 2000)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        jitter = ColorJitter(0.4, 0.4, 0.4)
        theirs = [
            jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, None)
            for _ in range(2000)
        ]
    for place, name in enumerate(("Brightness", "Contrast", "Color"), start=1):
        factors = [o.numbers[0] for ops in ours for o in ops if o.name == name]
        assert len(factors) == 2000
        assert stats.ks_2samp(factors, [found[place] for found in theirs]).pvalue > P_VALUE
    orders = Counter(tuple(o.name for o in ops) for ops in ours)
    assert len(orders) == 6
    assert stats.chisquare(list(orders.values())).pvalue > P_VALUE


def test_erased_boxes_are_distributed_as_timms() -> None:
    side, boxes = 64, []
    for ops in operations(ViewRecipe(reprob=1.0), 500):
        pixels_SSC = np.zeros((side, side, 3), dtype=np.uint8)
        boxes.append(box_of((apply_operations(pixels_SSC, ops) == FILL).all(axis=2)))
    timms, theirs = RandomErasing(1.0, mode="const", device="cpu"), []
    random.seed(0)
    for _ in range(500):
        theirs.append(box_of(timms(torch.ones(3, side, side))[0].numpy() == 0))
    for ours_N, theirs_N in zip(np.array(boxes).T, np.array(theirs).T, strict=True):
        assert stats.ks_2samp(ours_N, theirs_N).pvalue > P_VALUE
    rate = sum(bool(ops) for ops in operations(ViewRecipe(reprob=0.25), 4000))
    assert stats.binomtest(rate, 4000, 0.25).pvalue > P_VALUE


def box_of(is_erased: np.ndarray) -> tuple[int, int, int, int]:
    """Return top, left, height and width of an erased box; zeros if there is none."""
    rows, columns = is_erased.any(axis=1).nonzero()[0], is_erased.any(axis=0).nonzero()[0]
    if not len(rows):
        return 0, 0, 0, 0
    assert is_erased.sum() == len(rows) * len(columns)
    return int(rows[0]), int(columns[0]), len(rows), len(columns)


def test_pixels_are_what_timms_and_torchvisions_functions_make(pixels: np.ndarray) -> None:
    image = Image.fromarray(pixels)
    for name in ("Brightness", "Contrast", "Color"):
        function = getattr(tv, f"adjust_{'saturation' if name == 'Color' else name.lower()}")
        found = apply_operations(pixels, [Operation(name, (1.3,))])
        assert np.array_equal(found, np.asarray(function(image, 1.3)))
    turned = apply_operations(pixels, [Operation("Rotate", (20.0,), is_bicubic=True)])
    options = {"fillcolor": FILL, "resample": Image.Resampling.BICUBIC}
    assert np.array_equal(turned, np.asarray(NAME_TO_OP["Rotate"](image, 20.0, **options)))
    kept = pixels.copy()
    noisy = apply_operations(pixels, [Operation(ERASE, (0.5, 0.25, 0.0, 0.999, 7.0))])
    assert np.array_equal(pixels, kept)
    assert np.array_equal(noisy[16:], pixels[16:])
    assert (noisy[:16, 24:] != pixels[:16, 24:]).mean() > 0.9
    assert stats.kstest(noisy[:16, 24:].ravel() / 256, "uniform").pvalue > P_VALUE


@pytest.mark.parametrize(
    "text",
    [
        "original",
        "augmix-m5",
        "rand-x3",
        "rand-m9-m9",
        "rand-m99",
        "rand-n0",
        "rand-tweights",
    ],
)
def test_other_policies_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"unknown|it is not rand"):
        parse_rand_augment(text)
    with pytest.raises(ValueError, match=r"^aa must be like rand-m9-n2-mstd0\.5"):
        ViewRecipe(aa=text)


@pytest.mark.parametrize("change", [{"m": 8}, {"text": 3}, {"text": "rand-m8"}, {"more": 1}])
def test_a_changed_entry_is_refused(change: dict[str, Any]) -> None:
    entry = json.loads(json.dumps(ALL.entry()))
    assert ViewRecipe.from_entry(entry) == ALL
    entry["rand_augment"] |= change
    with pytest.raises(ValueError, match="parameter"):
        ViewRecipe.from_entry(entry)
