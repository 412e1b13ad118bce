"""Hold out a part of a split for validation: a pure function of seed, keys and classes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from mealv2.data.source import ImageSource
from mealv2.data.subset import Subset
from mealv2.errors import ConfigError


@dataclass(frozen=True)
class HeldOut:
    """The images of the split ``of`` that are held out as the split ``name``, and the others.

    Of each class of n images, round(fraction * n) are held out, at least 1 and at most n - 1: those
    with the smallest hash of seed and key. So the two parts depend on nothing but the keys of each
    class, and pictures added to one class leave the others as they are.
    """

    fraction: float
    seed: int = 0
    of: str = "train"
    name: str = "val"

    def __str__(self) -> str:
        return f"--val-fraction {self.fraction:g} --split-seed {self.seed}"

    @property
    def flags(self) -> list[str]:
        """The flags of a command that make the same choice."""
        of = [] if self.of == "train" else ["--train-split", self.of]
        seed = [] if self.seed == 0 else ["--split-seed", str(self.seed)]
        return ["--val-fraction", str(self.fraction), *seed, *of]

    def as_json(self) -> dict[str, Any]:
        """Return the entry of a plan."""
        return {"version": 1, **vars(self)}

    @classmethod
    def from_json(cls, value: Any) -> "HeldOut | None":
        """Return what ``as_json`` returned, None for None; raises ConfigError for another value."""
        match value:
            case None:
                return None
            case {
                "version": 1,
                "fraction": float(fraction),
                "seed": int(seed),
                "of": str(of),
                "name": str(name),
            } if 0 < fraction < 1 and 0 <= seed < 1 << 64:
                return cls(fraction, seed, of, name)
        raise ConfigError(f"the label set has images held out in an unknown way: {value!r}")

    def is_of(self, split: str) -> bool:
        """Return whether a split is one of the two parts."""
        return split in (self.of, self.name)

    def part(self, source: ImageSource, split: str) -> Subset:
        """Return the part of the split ``of`` that is ``split``.

        Raises ConfigError if no class has two images.
        """
        chosen = set(held_out_positions(self, source))
        is_held = split != self.of
        if is_held and not chosen:
            raise ConfigError(
                f"{self}: no class of {source.name} has two images, so none can be held out; "
                "use --val-split none"
            )
        positions = [p for p in range(len(source)) if (p in chosen) == is_held]
        count, total = f"{len(chosen)} of {len(source)} images", self.of
        note = f"{count} of {total}, held out" if is_held else f"{total} without {count} held out"
        return Subset(source, positions, split=split, note=note, flags=self.flags)


def held_out_positions(held_out: HeldOut, source: ImageSource) -> list[int]:
    """Return the positions of the images of a source that are held out, in order."""
    by_class: dict[int, list[tuple[int, str, int]]] = {}
    for position, (key, label) in enumerate(zip(source.keys, source.labels, strict=True)):
        by_class.setdefault(label, []).append((_word(key, held_out.seed), key, position))
    held: list[int] = []
    for images in by_class.values():
        count = math.floor(held_out.fraction * len(images) + 0.5)
        count = min(max(count, 1), len(images) - 1)
        held += [position for _, _, position in sorted(images)[:count]]
    return sorted(held)


def _word(key: str, seed: int) -> int:
    """Return 64 bits of BLAKE2b of a key: its place in the order in which images are held out."""
    head = b"mealv2/held-out/1\0" + seed.to_bytes(8, "little")
    return int.from_bytes(blake2b(head + key.encode(), digest_size=8).digest(), "little")


def by_name(source: ImageSource, classes: Sequence[str]) -> ImageSource | None:
    """Return a source with other class ids: those of its class names among ``classes``.

    The source itself if its classes are these; None if it has a class that is not among them.
    """
    if list(source.classes) == list(classes):
        return source
    if not set(source.classes) <= set(classes):
        return None
    return Subset(source, range(len(source)), split=source.split, classes=classes)
