"""mealv2.view_operations: golden numbers, timm's arguments and distributions, the same pixels."""

import json
import random
from collections import Counter
from itertools import islice, product
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
from mealv2.hash_draws import hash_words, log_of_double
from mealv2.view_operations import (
    _NAMES,
    _SIGNED,
    ERASE,
    EraseMode,
    Operation,
    level_numbers,
    normal,
    parse_rand_augment,
)
from mealv2.view_recipe import FILL, NOISE_MEAN, NOISE_STD, ViewRecipe
from mealv2.views import view_of

GOLDEN_DIR = Path(__file__).parents[1] / "golden"
ARGUMENTS = json.loads((GOLDEN_DIR / "views.json").read_text("utf-8"))
GOLDEN = json.loads((GOLDEN_DIR / "view_operations.json").read_text("utf-8"))
P_VALUE = 1e-5
ALL = ViewRecipe(color_jitter=0.4, aa="rand-m9-n2-mstd0.5", reprob=0.5, remode="pixel", recount=2)
RECIPES = {
    "color-jitter": ViewRecipe(color_jitter=0.4),
    "rand": ViewRecipe(aa="rand-m9-n2-mstd0.5"),
    "rand-inc": ViewRecipe(aa="rand-m15-n3-p0.7-mstd101-mmax15-inc1"),
    "erase-const": ViewRecipe(reprob=0.25),
    "erase-rand": ViewRecipe(reprob=1.0, remode="rand", recount=3),
    "all": ALL,
}


def operations(recipe: ViewRecipe, count: int) -> list[tuple[Operation, ...]]:
    return [recipe.operations(f"{number}.jpg", 1, number) for number in range(count)]


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", RECIPES)
def test_operations_of_twenty_views_are_the_golden_ones(name: str) -> None:
    found = []
    for row in ARGUMENTS:
        place = {part: row[part] for part in ("seed", "width", "height")}
        view = view_of(row["key"], row["index"], **place, recipe=RECIPES[name])
        plain = view_of(row["key"], row["index"], **place)
        assert view.box() == plain.box()
        found.append([[o.name, list(o.numbers), o.is_bicubic] for o in view.operations])
    assert len(found) == 20
    assert found == GOLDEN[name]


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


TEXTS = ("rand-m9-n2-mstd0.5", "rand-m9-mstd1.5-inc1", "rand-n3-p0.7", "rand-m12-mstd101-mmax15")


@pytest.mark.parametrize("text", TEXTS)
def test_rand_augment_draws_names_and_numbers_as_timm(text: str) -> None:
    ours, theirs = operations(ViewRecipe(aa=text), 3000), timms_operations(text, 3000)
    counts = [Counter(o.name for ops in views for o in ops) for views in (ours, theirs)]
    table = [[counted[name] for name in _NAMES] for counted in counts]
    assert stats.chi2_contingency(table).pvalue > P_VALUE
    sizes = np.array([np.bincount(list(map(len, views)), minlength=4) for views in (ours, theirs)])
    assert stats.chi2_contingency(sizes[:, sizes.sum(axis=0) > 0]).pvalue > P_VALUE
    for name in _NAMES:
        one, other = (
            [o.numbers for ops in views for o in ops if o.name == name] for views in (ours, theirs)
        )
        assert min(len(one), len(other)) > 100
        assert {len(numbers) for numbers in one} == {len(numbers) for numbers in other}
        if one[0]:
            found, expected = ([numbers[0] for numbers in drawn] for drawn in (one, other))
            assert stats.ks_2samp(found, expected).pvalue > P_VALUE, name
    turned = [o.is_bicubic for ops in ours for o in ops]
    assert stats.binomtest(sum(turned), len(turned), 0.5).pvalue > P_VALUE


def timms_operations(text: str, count: int) -> list[list[Operation]]:
    """Return what timm would apply to some images, without the images."""
    timms = rand_augment_transform(text, {})
    seen: list[Operation] = []
    for op in timms.ops:
        name = op.name.removesuffix("Increasing")
        op.aug_fn = lambda image, *args, name=name, **_: seen.append(Operation(name, args))
    random.seed(0)
    np.random.seed(0)  # timm's
    views = []
    for _ in range(count):
        seen.clear()
        timms(None)
        views.append(list(seen))
    return views


def test_logarithm_and_normal_numbers_are_those_of_the_formula() -> None:
    values = np.concatenate([np.random.default_rng(0).random(2000), [1.0, 1e-300, 0.75, 1.5]])
    found = [log_of_double(value) for value in values]
    np.testing.assert_allclose(found, np.log(values), rtol=4e-16, atol=4e-16)
    words = hash_words("test", "a", 0, 0)
    drawn = [normal(words) for _ in range(50)]
    u = np.array([word >> 11 for word in islice(hash_words("test", "a", 0, 0), 400)])
    x_N, y_N = (2 * u.astype(np.float64) / 2**53 - 1).reshape(-1, 2).T
    s_N = x_N**2 + y_N**2
    expected = (x_N * np.sqrt(-2 * np.log(np.where(s_N < 1, s_N, 0.5)) / s_N))[s_N < 1]
    np.testing.assert_allclose(drawn, expected[:50], rtol=1e-13)


def levels(text: str) -> np.ndarray:
    """Return the levels of operations whose number is in proportion to it."""
    drawn = [o for ops in operations(ViewRecipe(aa=text), 300) for o in ops]
    return np.array([10 * abs(o.numbers[0]) / _SIGNED[o.name] for o in drawn if o.name in _SIGNED])


def test_levels_are_normal_or_uniform_and_clipped() -> None:
    words = hash_words("test", "a", 0, 0)
    assert stats.kstest([normal(words) for _ in range(2000)], "norm").pvalue > P_VALUE
    normals = levels("rand-m5-n16-p1-mstd1")
    assert len(normals) > 1000
    assert stats.kstest(normals, stats.norm(5, 1).cdf).pvalue > P_VALUE
    clipped = levels("rand-m9-n16-p1-mstd1")
    assert clipped.max() == pytest.approx(10)
    share = stats.norm.sf(10, loc=9, scale=1)
    assert stats.binomtest(int((clipped > 9.999).sum()), len(clipped), share).pvalue > P_VALUE
    uniforms = levels("rand-m8-n16-p1-mstd101")
    assert stats.kstest(uniforms / 8, "uniform").pvalue > P_VALUE


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


def test_the_area_of_several_boxes_is_distributed_as_timms() -> None:
    side, zeros_SSC = 32, np.zeros((32, 32, 3), dtype=np.uint8)
    drawn = operations(ViewRecipe(reprob=0.9, recount=3), 1500)
    ours = [(apply_operations(zeros_SSC, ops) == FILL).mean() for ops in drawn]
    timms = RandomErasing(0.9, mode="const", max_count=3, device="cpu")
    random.seed(0)
    theirs = [1 - float(timms(torch.ones(3, side, side)).mean()) for _ in range(1500)]
    assert stats.ks_2samp(ours, theirs).pvalue > P_VALUE
    assert {len(ops) for ops in drawn} == {0, 1, 2, 3}


@pytest.mark.parametrize("mode", ["pixel", "rand"])
def test_erased_pixels_are_timms_noise_after_normalisation(mode: EraseMode) -> None:
    count, side = (1, 400) if mode == "pixel" else (2000, 2)
    fill = [Operation(ERASE[mode], (1.0, 1.0, 0.0, 0.0, float(seed))) for seed in range(count)]
    pixels_SSC = np.zeros((side, side, 3), dtype=np.uint8)
    ours = np.concatenate([apply_operations(pixels_SSC, [o])[:-1, :-1] for o in fill])
    theirs = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        timms = RandomErasing(1.0, 0.9, 0.9, min_aspect=1, mode=mode, device="cpu")
        for _ in range(count):
            noise_CSS = timms(torch.full((3, max(side, 16), max(side, 16)), torch.inf))
            rows_NC = noise_CSS[:, noise_CSS[0].isfinite()].T
            theirs.append(rows_NC if mode == "pixel" else rows_NC[:1])
    theirs_NC = torch.cat(theirs).numpy() * NOISE_STD + NOISE_MEAN
    theirs_NC = np.clip(np.rint(255 * theirs_NC), 0, 255)
    for channel in range(3):
        sample = ours[..., channel].ravel()
        assert stats.ks_2samp(sample, theirs_NC[:, channel]).pvalue > P_VALUE
        assert {sample.min(), sample.max()} == {0, 255}


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
    noisy = apply_operations(pixels, [Operation(ERASE["pixel"], (0.5, 0.25, 0.0, 0.999, 7.0))])
    assert np.array_equal(pixels, kept)
    assert np.array_equal(noisy[16:], pixels[16:])
    assert (noisy[:16, 24:] != pixels[:16, 24:]).mean() > 0.9
    plain = apply_operations(pixels, [Operation(ERASE["rand"], (0.5, 0.25, 0.0, 0.999, 7.0))])
    assert len(np.unique(plain[:16, 24:].reshape(-1, 3), axis=0)) == 1


@pytest.mark.parametrize("name", _NAMES)
def test_every_level_up_to_30_can_be_applied(pixels: np.ndarray, name: str) -> None:
    for level, sign, is_increasing in product((0.0, 9.5, 30.0), (1, -1), (False, True)):
        numbers = level_numbers(name, level, sign, is_increasing=is_increasing)
        found = apply_operations(pixels, [Operation(name, numbers)])
        assert found.shape == pixels.shape
        assert found.dtype == np.uint8
        if name == "Posterize":  # an image of no bits is black, as with older versions of Pillow
            assert found.any() == (numbers[0] > 0)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        *((text, "only RandAugment") for text in ("original", "augmix-m5", "3a", "v0-mstd0.5")),
        *((f"rand-{section}", "is not one of") for section in ("x3", "tweights", "m9.5", "m-1")),
        *((f"rand-{section}", "is not one of") for section in ("m9-m9", "", "m9-mstdinf", "m")),
        *((f"rand-{section}", "may be up to") for section in ("m99", "n0", "p1.5", "inc2")),
    ],
)
def test_other_policies_and_sections_are_named(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_rand_augment(text)
    with pytest.raises(ValueError, match=rf"^aa must be like rand-m9-n2-mstd0\.5.*{reason}"):
        ViewRecipe(aa=text)


def test_every_parameter_survives_the_manifest() -> None:
    for recipe in RECIPES.values():
        assert ViewRecipe.from_entry(json.loads(json.dumps(recipe.entry()))) == recipe


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *(("rand_augment", change) for change in ({"m": 8}, {"text": 3}, {"text": "rand-m8"})),
        ("rand_augment", {"more": 1}),
        *(("random_erasing", change) for change in ({"max_count": 2.0}, {"mode": ["pixel"]})),
        *(("random_erasing", change) for change in ({"noise_std": 1}, {"tries": 9})),
    ],
)
def test_a_changed_entry_is_refused(name: str, change: dict[str, Any]) -> None:
    entry = json.loads(json.dumps(ALL.entry()))
    entry[name] |= change
    with pytest.raises(ValueError, match=r"parameter|remode must be"):
        ViewRecipe.from_entry(entry)
