"""What changes the pixels of a view after crop and flips: drawn here, applied by mealv2.data.

RandAugment, colour jitter and random erasing as in timm, with numbers from our hash.
"""

import math
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, Literal, NamedTuple

from mealv2.hash_draws import below, exp, log, log_of_double, uniform

EraseMode = Literal["const", "rand", "pixel"]
ERASE: dict[EraseMode, str] = {"const": "Erase", "rand": "EraseRand", "pixel": "ErasePixel"}
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
    """One operation: timm's name or one of ERASE, its numbers, the filter of a transform."""

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
    """Read timm's spelling of RandAugment; raises ValueError for another policy or section."""
    name, *sections = text.split("-")
    if name != "rand":
        raise ValueError("of timm's policies only RandAugment, rand-…, can be drawn from a hash")
    values: dict[str, Any] = {}
    for section in sections:
        found = re.fullmatch(r"([a-z]+)([0-9]{1,6})(\.[0-9]{1,9})?", section)
        known = found is not None and found[1] in RandAugment._fields and found[1] not in values
        if found is None or not known or (found[3] and found[1] not in ("p", "mstd")):
            raise ValueError(
                f"section {section!r} is not one of m, n, mmax and inc with an integer, p and mstd"
            )
        values[found[1]] = (float if found[1] in ("p", "mstd") else int)(section[len(found[1]) :])
    parameters = RandAugment(**values)
    has_bounds = parameters.m <= 30 and parameters.mmax <= 30 and 1 <= parameters.n <= 16
    if not has_bounds or parameters.p > 1 or parameters.inc > 1:
        raise ValueError("m and mmax may be up to 30, n 1 to 16, p 0 to 1, inc 0 or 1")
    return parameters


def rand_augment(parameters: RandAugment, words: Iterator[int]) -> Iterator[Operation]:
    """Draw the operations of a view: n, with replacement, each applied with probability p.

    timm: RandAugment, AugmentOp.
    """
    for _ in range(parameters.n):
        name = _NAMES[below(len(_NAMES), next(words))]
        if uniform(next(words)) >= parameters.p:
            continue
        level = _level(parameters, words)
        bits = below(4, next(words))
        is_increasing = bool(parameters.inc) and name in _INCREASING
        numbers = level_numbers(name, level, 1 - (bits & 2), is_increasing=is_increasing)
        yield Operation(name, numbers, bool(bits & 1))


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
    probability: float, mode: EraseMode, max_count: int, words: Iterator[int]
) -> Iterator[Operation]:
    """Draw the boxes to erase: height, width, top and left as parts of a view's side and room.

    1 to ``max_count`` boxes share the area. A fifth number is the seed of the noise of a box. timm:
    RandomErasing.
    """
    if uniform(next(words)) >= probability:
        return
    count = 1 + below(max_count, next(words))
    for _ in range(count):
        for _ in range(TRIES):
            seed = () if mode == "const" else (float(next(words) >> 11),)
            area, ratio, top, left = (uniform(next(words)) for _ in range(4))
            area = (ERASE_AREA[0] + (ERASE_AREA[1] - ERASE_AREA[0]) * area) / count
            ratio = exp(_ERASE_LOGS[0] + (_ERASE_LOGS[1] - _ERASE_LOGS[0]) * ratio)
            height, width = math.sqrt(area * ratio), math.sqrt(area / ratio)
            if height < 1 and width < 1:
                yield Operation(ERASE[mode], (height, width, top, left, *seed))
                break
