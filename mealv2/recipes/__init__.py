"""The published trainings, one TOML file each: settings, expected numbers and their source."""

import difflib
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mealv2.errors import ConfigError

_FOLDER = Path(__file__).parent
_SUFFIX = ".toml"
ABLATION = "ablation-"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The published numbers of a training, and its settings.

    ``top1`` and ``top5`` are ImageNet's validation accuracy in percent, None if ``source`` has no
    number; ``params_m`` is millions of parameters. ``teachers`` applies to both commands,
    ``precompute`` and ``distill`` to one; their keys are fields of the configs.
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
        """Return the settings of a command; ``distill`` has teachers only if ``online``."""
        if command == "precompute":
            return self.teachers | self.precompute
        return (self.teachers if online else {}) | self.distill


def names() -> list[str]:
    """Return the names of all recipes, the ablations last."""
    found = [path.stem for path in _FOLDER.glob(f"*{_SUFFIX}")]
    return sorted(found, key=lambda name: (name.startswith(ABLATION), name))


def text(name: str) -> str:
    """Return the TOML of a recipe; raises ConfigError for an unknown name."""
    known = names()
    if name not in known:
        suggestion = difflib.get_close_matches(name, known, n=3)
        hint = f"known: {', '.join(known)}"
        if suggestion:
            hint = f"did you mean {', '.join(suggestion)}?"
        raise ConfigError(f"unknown recipe {name!r}; {hint}")
    return (_FOLDER / f"{name}{_SUFFIX}").read_text(encoding="utf-8")


def load(name: str) -> Recipe:
    """Return a recipe; raises ConfigError for an unknown name.

    A file with ``base`` has only the settings that differ from another recipe, and in ``unset`` the
    settings that it does not have.
    """
    fields = tomllib.loads(text(name))
    if "base" in fields:
        base, unset = load(fields.pop("base")), fields.pop("unset", ())
        distill = base.distill | fields.get("distill", {})
        fields["distill"] = {key: v for key, v in distill.items() if key not in unset}
        fields |= {key: getattr(base, key) for key in ("params_m", "teachers", "precompute")}
    return Recipe(name=name, **fields)
