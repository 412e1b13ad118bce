"""The published trainings, one TOML file each: settings, expected numbers and their source."""

import difflib
import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

from mealv2.errors import ConfigError

_SUFFIX = ".toml"
_ABLATION = "ablation-"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What was published of one training, and the settings that stand for it.

    ``top1`` and ``top5`` are ImageNet's validation accuracy in per cent as ``source`` states them,
    None where it states none; ``params_m`` is millions of parameters. ``teachers`` serves both
    stages, ``precompute`` and ``distill`` one each; their keys are fields of the stages' configs.
    """

    name: str
    title: str
    source: str
    params_m: float
    top1: float | None = None
    top5: float | None = None
    notes: list[str]
    teachers: dict[str, Any]
    precompute: dict[str, Any]
    distill: dict[str, Any]

    def settings(
        self, command: Literal["precompute", "distill"], *, online: bool = False
    ) -> dict[str, Any]:
        """Return a stage's settings; ``distill`` has teachers of its own only when ``online``."""
        if command == "precompute":
            return self.teachers | self.precompute
        return (self.teachers if online else {}) | self.distill


def names() -> list[str]:
    """Return the names of all recipes, the ablations last."""
    files = (entry.name for entry in resources.files(__name__).iterdir())
    found = [name.removesuffix(_SUFFIX) for name in files if name.endswith(_SUFFIX)]
    return sorted(found, key=lambda name: (name.startswith(_ABLATION), name))


def text(name: str) -> str:
    """Return a recipe's TOML; raises ConfigError, with the nearest names, for an unknown one."""
    known = names()
    if name not in known:
        suggestion = difflib.get_close_matches(name, known, n=3)
        hint = (
            f"did you mean {', '.join(suggestion)}?" if suggestion else f"known: {', '.join(known)}"
        )
        raise ConfigError(f"unknown recipe {name!r}; {hint}")
    return (resources.files(__name__) / f"{name}{_SUFFIX}").read_text(encoding="utf-8")


def load(name: str) -> Recipe:
    """Return a recipe; raises ConfigError, with the nearest names, for an unknown one."""
    return Recipe(name=name, **tomllib.loads(text(name)))
