"""What a setting is: a dataclass field with a help text, its spelling, the checks of its value."""

import dataclasses
import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from mealv2.errors import ConfigError
from mealv2.storage.urls import Location, is_url, located

Group = Literal[
    "Labels",
    "Data",
    "Views",
    "Model",
    "Optimisation",
    "Loss",
    "Results",
    "Run and checkpoints",
    "Jobs",
    "Hardware",
    "Batch job",
]
PathKind = Literal[
    "data set",
    "label set",
    "new label set",
    "weights",
    "teachers",
    "images",
    "folder",
    "new folder",
    "file",
    "new file",
]


def setting(
    default: Any,
    text: str,
    *,
    group: Group,
    shown: str | None = None,
    aliases: tuple[str, ...] = (),
    path: PathKind | None = None,
    need: str | None = None,
    convert: Callable[[Any], Any] | None = None,
) -> Any:
    """Return a field with its help text.

    ``group`` is its heading in ``--help``. ``shown`` replaces a default that says nothing, such as
    None. ``aliases`` are its old names. ``path`` says what the command line checks before it
    imports torch. ``need`` says when an optional setting must be given. ``convert`` is applied to
    values from the command line.
    """
    metadata = {
        "help": text,
        "group": group,
        "shown": shown,
        "aliases": aliases,
        "path": path,
        "need": need,
        "convert": convert,
    }
    return field(default=default, metadata=metadata)


def required(text: str, *, group: Group, **more: Any) -> Any:
    """Return a field that must be given; ``more`` as in ``setting``."""
    return setting(dataclasses.MISSING, text, group=group, **more)


def positional(text: str, *, path: PathKind | None = None) -> Any:
    """Return a field that must be given, without a flag: an argument of the command line."""
    metadata = {"help": text, "shown": None, "positional": True, "path": path}
    return field(metadata=metadata)


def teachers_setting(
    default: Any, text: str, *, shown: str | None = None, path: PathKind | None = "teachers"
) -> Any:
    """Return a field that names teachers; the command line makes their paths absolute."""
    return setting(default, text, group="Labels", shown=shown, path=path, convert=absolute_teachers)


def recipe_setting() -> Any:
    """Return the field of a command that a published recipe can fill in."""
    return setting(
        None,
        "Published recipe: its settings apply where no flag is given; `mealv2 recipes` lists them.",
        group="Run and checkpoints",
        shown="none",
    )


def aliases_of(known: "dataclasses.Field[Any]") -> tuple[str, ...]:
    """Return the old names of a field."""
    found: tuple[str, ...] = known.metadata.get("aliases", ())
    return found


def current_name(config: type, name: str) -> str:
    """Return today's name of a field; unknown names stay as they are."""
    known = dataclasses.fields(config)
    return next((f.name for f in known if name in aliases_of(f)), name)


def current_names(config: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings under today's names; raises ConfigError where two names contradict."""
    found = {name: value for name, value in values.items() if current_name(config, name) == name}
    for old in values.keys() - found.keys():
        name, value = current_name(config, old), values[old]
        if found.get(name) is None:
            found[name] = value
        elif value not in (None, found[name]):
            raise ConfigError(f"{old!r} is the old name of {name!r}, and the two differ; keep one")
    return found


def split_teachers(specs: Iterable[str]) -> list[str]:
    """Return one spec a teacher, NAME or NAME=CHECKPOINT, of texts that may be comma lists."""
    return [part.strip() for text in specs for part in text.split(",")]


def absolute_teachers(specs: Iterable[str]) -> tuple[str, ...]:
    """Return one spec a teacher, with absolute paths."""
    found = []
    for spec in split_teachers(specs):
        name, equals, path = spec.partition("=")
        found.append(f"{name}={os.path.abspath(path)}" if path else name + equals)  # noqa: PTH100
    return tuple(found)


def flag(name: str) -> str:
    """Return the command-line spelling of a field."""
    return "--" + name.rstrip("_").replace("_", "-")  # from_ is --from


def spelling(known: "dataclasses.Field[Any]") -> str:
    """Return what the command line calls a field: its flag, or its word in capitals."""
    return known.name.upper() if known.metadata.get("positional") else flag(known.name)


def default_of(config: type, name: str) -> Any:
    return next(f.default for f in dataclasses.fields(config) if f.name == name)


def at_least(config: object, low: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not low <= value < math.inf:  # nan is neither
            raise ConfigError(f"{flag(name)} must be at least {low} and finite, got {value}")


def between(config: object, low: float, high: float, name: str) -> None:
    if not low <= getattr(config, name) <= high:
        raise ConfigError(f"{flag(name)} must lie in [{low}, {high}], got {getattr(config, name)}")


def without_effect(config: object, mode: str, *names: str) -> None:
    """Raise ConfigError for a setting that was given but does nothing in this mode."""
    for name in names:
        if getattr(config, name) != default_of(type(config), name):
            raise ConfigError(f"{flag(name)} has no effect {mode}")


def check_normalisation(config: Any) -> None:
    """Check --mean and --std."""
    if (config.mean is None) != (config.std is None):
        raise ConfigError("--mean and --std go together")
    if config.mean is not None and not all(map(math.isfinite, config.mean)):
        raise ConfigError(f"--mean must be finite, got {config.mean}")
    if config.std is not None and not all(0 < value < math.inf for value in config.std):
        raise ConfigError(f"--std must be positive and finite, got {config.std}")


def num_bytes_of(name: str, text: str) -> int:
    """Return the bytes of a size such as 500MB or 1.5TB, in powers of 1000."""
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([kKMGT]?)B?", text)
    num_bytes = (
        0 if found is None else float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " ")
    )
    if num_bytes < 1:
        raise ConfigError(
            f"{flag(name)} must be a size such as 500MB or 100GB (B, KB, MB, GB, TB), got {text!r}"
        )
    return int(num_bytes)


def check_seed(config: object, name: str) -> None:
    if not 0 <= getattr(config, name) < 1 << 63:
        raise ConfigError(f"{flag(name)} must lie in [0, 2**63), got {getattr(config, name)}")


def plain(value: Any) -> Any:
    """Return a setting as a JSON value: paths absolute, tuples as lists."""
    if isinstance(value, Path):
        return os.path.abspath(value)  # noqa: PTH100  # without following links
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def typed(known: "dataclasses.Field[Any]", value: Any) -> Any:
    """Turn a JSON value into a field's type: lists to tuples, text to paths."""
    if not _fits(known.type, value):
        raise ConfigError(f"{spelling(known)} cannot be {value!r}")
    if isinstance(value, list | tuple):
        if known.type == tuple[Path, ...]:
            value = map(Path, value)
        return tuple(value) or (known.default if known.default is not dataclasses.MISSING else ())
    if value is not None and known.type in (Path, Path | None):
        if is_url(value):
            raise ConfigError(f"{spelling(known)} must be a path of this machine, not a URL")
        return Path(value)
    return located(value) if value is not None and is_location(known) else value


def is_location(known: "dataclasses.Field[Any]") -> bool:
    """Return whether a field is a path or a URL."""
    return known.type in (Location, Location | None)


def _fits(kind: Any, value: Any) -> bool:
    """Return whether a JSON value, or one from the command line, can be of a field's type."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return any(_fits(part, value) for part in typing.get_args(kind))
    if typing.get_origin(kind) is typing.Literal:
        return value in typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        items = typing.get_args(kind)
        if not isinstance(value, list | tuple):
            return False
        if items[-1] is not Ellipsis and len(items) != len(value) and value:
            return False
        return all(_fits(items[0], item) for item in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is Path:
        return isinstance(value, str | Path)
    return value is None if kind is type(None) else isinstance(value, kind)
