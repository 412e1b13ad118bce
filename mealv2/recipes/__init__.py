"""The published trainings, one TOML file each: settings, expected numbers and their source.

Those of this folder are MEAL V2's on ImageNet, those of cifar10/ are MEAL's.
"""

import difflib
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mealv2.errors import ConfigError

_FOLDER = Path(__file__).parent
_CIFAR = _FOLDER / "cifar10"
_SUFFIX = ".toml"
ABLATION = "ablation-"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The published numbers of a training, and its settings.

    ``top1`` and ``top5`` are the validation accuracy in percent, None if ``source`` has no number;
    ``params_m`` is millions of parameters. ``teachers`` applies to ``precompute`` and ``distill``;
    these and ``finetune``, the training of teachers, apply to one command, and are empty for one
    that has no part in the training. Their keys are fields of the configs.
    """

    name: str
    title: str
    source: str
    params_m: float
    top1: float | None = None
    top5: float | None = None
    notes: list[str]
    distill: dict[str, Any]
    teachers: dict[str, Any] = field(default_factory=dict)
    precompute: dict[str, Any] = field(default_factory=dict)
    finetune: dict[str, Any] = field(default_factory=dict)

    def settings(
        self, command: Literal["precompute", "distill", "finetune"], *, online: bool = False
    ) -> dict[str, Any]:
        """Return the settings of a command; ``distill`` has teachers only if ``online``.

        Raises ConfigError for a command that has no part in the training.
        """
        own: dict[str, Any] = getattr(self, command)
        if not own:
            raise ConfigError(f"recipe {self.name} has no settings for {command}")
        if command == "precompute" or (command == "distill" and online):
            return self.teachers | own
        return own


def names() -> list[str]:
    """Return the names of the recipes for ImageNet, the ablations last."""
    found = [path.stem for path in _FOLDER.glob(f"*{_SUFFIX}")]
    return sorted(found, key=lambda name: (name.startswith(ABLATION), name))


def cifar10_names() -> list[str]:
    """Return the names of the recipes for CIFAR-10."""
    return sorted(path.stem for path in _CIFAR.glob(f"*{_SUFFIX}"))


def text(name: str) -> str:
    """Return the TOML of a recipe; raises ConfigError for an unknown name."""
    known = [*names(), *cifar10_names()]
    if name not in known:
        suggestion = difflib.get_close_matches(name, known, n=3)
        hint = f"known: {', '.join(known)}"
        if suggestion:
            hint = f"did you mean {', '.join(suggestion)}?"
        raise ConfigError(f"unknown recipe {name!r}; {hint}")
    folder = _CIFAR if name in cifar10_names() else _FOLDER
    return (folder / f"{name}{_SUFFIX}").read_text(encoding="utf-8")


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
