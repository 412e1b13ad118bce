"""What changes the pixels of a view after crop and flips: drawn here, applied by mealv2.data.

RandAugment, colour jitter and random erasing as in timm, with numbers from our hash.
"""

import math
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

from mealv2.hash_draws import below, exp, log, log_of_double, uniform

ERASE = "Erase"
ERASE_AREA = (0.02, 1 / 3)  # timm: area of the box over the area of the view
ERASE_RATIO = (Fraction(3, 10), Fraction(10, 3))
_ERASE_LOGS = (log(ERASE_RATIO[0]), log(ERASE_RATIO[1]))
TRIES = 10
_UNIFORM_STD = 100  # timm: above it the magnitude is uniform in 0..m

_JITTERS = ("Brightness", "Contrast", "Color")  # torchvision: brightness, contrast, saturation
# timm's _RAND_TRANSFORMS, in its order; those with a second form have another scale with inc1
_NAMES = (
    *("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd"),
    *("Color", "Contrast", "Brightness", "Sharpness"),
    *("ShearX", "ShearY", "TranslateXRel", "TranslateYRel"),
)
_INCREASING = {"Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness"}
_SIGNED = {"Rotate": 30.0, "ShearX": 0.3, "ShearY": 0.3, "TranslateXRel": 0.45}
_SIGNED["TranslateYRel"] = 0.45


class Operation(NamedTuple):
    """One operation: timm's name (RandAugment's), ERASE, its numbers, the filter of a transform."""

    name: str
    numbers: tuple[float, ...] = ()
    is_bicubic: bool = False


class RandAugment(NamedTuple):
    """The parameters of timm's ``rand-m9-n2-mstd0.5``, under its names."""

    m: int = 10
    n: int = 2
    p: float = 0.5
    mstd: float = 0.0
    mmax: int = 10
    inc: int = 0


def parse_rand_augment(text: str) -> RandAugment:
    """Read timm's spelling of RandAugment; raises ValueError for any other policy or section."""
    kinds: dict[str, Any] = {"m": int, "n": int, "p": float, "mstd": float, "mmax": int, "inc": int}
    name, *sections = text.split("-")
    values: dict[str, Any] = {}
    for section in sections:
        found = re.fullmatch(r"([a-z]+)([0-9]{1,6}(?:\.[0-9]{1,9})?)", section)
        if found is None or found[1] not in kinds or found[1] in values:
            raise ValueError(f"section {section!r} is unknown")
        values[found[1]] = kinds[found[1]](found[2])
    parameters = RandAugment(**values)
    bounds = parameters.m <= 30 and 1 <= parameters.n <= 16 and parameters.mmax <= 30
    if name != "rand" or not bounds or parameters.p > 1 or parameters.inc > 1:
        raise ValueError("it is not rand with m and mmax to 30, n from 1 to 16, p to 1, inc0 or 1")
    return parameters


def rand_augment(parameters: RandAugment, words: Iterator[int]) -> Iterator[Operation]:
    """Draw the operations of a view: n, with replacement, each applied with probability p.

    timm: RandAugment, AugmentOp.
    """
    for _ in range(parameters.n):
        name = _NAMES[below(len(_NAMES), next(words))]
        is_applied, sign = uniform(next(words)) < parameters.p, 1 - 2 * below(2, next(words))
        is_bicubic = below(2, next(words)) == 1
        level = _level(parameters, words)
        if is_applied:
            is_increasing = bool(parameters.inc) and name in _INCREASING
            numbers = level_numbers(name, level, sign, is_increasing=is_increasing)
            yield Operation(name, numbers, is_bicubic)


def _level(parameters: RandAugment, words: Iterator[int]) -> float:
    """Return m with noise, from 0 to mmax."""
    level = float(parameters.m)
    if parameters.mstd > _UNIFORM_STD:
        level *= uniform(next(words))
    elif parameters.mstd:
        level += parameters.mstd * normal(words)
    return max(0.0, min(level, float(parameters.mmax or 10)))


def normal(words: Iterator[int]) -> float:
    """Return a standard normal number (Marsaglia's polar method)."""
    while True:
        x, y = (2.0 * uniform(next(words)) - 1.0 for _ in range(2))
        square = x * x + y * y
        if 0.0 < square < 1.0:
            return x * math.sqrt(-2.0 * log_of_double(square) / square)


def level_numbers(name: str, level: float, sign: int, *, is_increasing: bool) -> tuple[float, ...]:
    """Return the arguments of an operation at a level (timm: LEVEL_TO_ARG)."""
    part = level / 10
    if name in _SIGNED:
        return (sign * part * _SIGNED[name],)
    if name == "Posterize":
        return (4 - int(part * 4) if is_increasing else int(part * 4),)
    if name == "Solarize":
        thresh = min(256, int(part * 256))
        return (256 - thresh if is_increasing else thresh,)
    if name == "SolarizeAdd":
        return (min(128, int(part * 110)),)
    if name in _INCREASING:
        return (max(0.1, 1.0 + sign * (part * 0.9)) if is_increasing else part * 1.8 + 0.1,)
    return ()


def colour_jitter(strength: float, words: Iterator[int]) -> Iterator[Operation]:
    """Draw brightness, contrast and saturation in random order (torchvision: ColorJitter)."""
    names = list(_JITTERS)
    while names:
        name = names.pop(below(len(names), next(words)))
        low, high = max(0.0, 1.0 - strength), 1.0 + strength
        yield Operation(name, (low + (high - low) * uniform(next(words)),))


def random_erasing(
    probability: float, *, has_noise: bool, words: Iterator[int]
) -> Iterator[Operation]:
    """Draw the box to erase: height, width, top and left as parts of a view's side and of its room.

    A fifth number seeds the noise of its pixels. timm: RandomErasing.
    """
    seed = next(words) >> 11
    if uniform(next(words)) >= probability:
        return
    low, high = _ERASE_LOGS
    for _ in range(TRIES):
        area, ratio, top, left = (uniform(next(words)) for _ in range(4))
        area = ERASE_AREA[0] + (ERASE_AREA[1] - ERASE_AREA[0]) * area
        ratio = exp(low + (high - low) * ratio)
        height, width = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if height < 1 and width < 1:
            yield Operation(ERASE, (height, width, top, left, *((float(seed),) * has_noise)))
            return
