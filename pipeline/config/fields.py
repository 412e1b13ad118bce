"""Settings as dataclass fields: help text, group, bounds and old name; how values are read."""

import dataclasses
import math
import operator
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mealv2.errors import ConfigError
from mealv2.storage.urls import Location, is_url, located, without_secrets

T = TypeVar("T")

REQUIRED: Any = dataclasses.MISSING
MAX_SEED = (1 << 63) - 1
MAX_IMG_SIZE = 8192  # pixels; a view has 200 MB then
MAX_WORKERS = 1024  # each reads two batches ahead
# The headings of --help, in their order.
GROUPS = (
    *("Labels", "Data", "Views", "Model", "Optimisation", "Loss"),
    *("Results", "Run and checkpoints", "Jobs", "Hardware", "Batch job"),
)
_BOUNDS = {
    "low": ("at least", operator.ge),
    "high": ("at most", operator.le),
    "above": ("greater than", operator.gt),
}


@dataclass(frozen=True)
class About:
    """The metadata of a field: all of a setting but its name, type and default."""

    help: str
    group: str = ""  # one of GROUPS
    shown: str | None = None  # the default in --help, where the value does not explain itself
    alias: str | None = None  # the old name
    path: str | None = None  # a check of pipeline.command_line.paths, made before torch is imported
    need: str | None = None  # when an optional setting must be given
    convert: Callable[[Any], Any] | None = None  # applied to the flag's value
    low: float | None = None
    high: float | None = None
    above: float | None = None
    positional: bool = False  # an argument instead of a flag
    commas: bool = False  # a tuple of numbers is one value, separated by commas
    current: Callable[[Mapping[str, Any]], Any] | None = None  # of all settings, today's value


@typing.dataclass_transform(kw_only_default=True, frozen_default=True)
def frozen(config: type[T]) -> type[T]:
    """Make a frozen dataclass with keyword arguments of a class of settings.

    ``Settings`` has what is left out here: with all of it, making some 40 classes takes a tenth of
    the time of ``mealv2 --help``.
    """
    return dataclass(frozen=True, kw_only=True, eq=False, repr=False)(config)


def setting(default: Any, text: str, **about: Any) -> Any:
    """Return a dataclass field with a help text; ``about`` as in ``About``."""
    return field(default=default, metadata=vars(About(text, **about)))


def split_commas(texts: Iterable[str]) -> tuple[str, ...]:
    """Return the parts of texts that may be comma-separated lists."""
    return tuple(part.strip() for text in texts for part in text.split(","))


def absolute_teachers(specs: Iterable[str]) -> tuple[str, ...]:
    """Return one spec per teacher, NAME, NAME=CHECKPOINT or FILE.onnx, with absolute paths."""
    found = []
    for spec in split_teachers(specs):
        if spec.lower().endswith(".onnx") and "=" not in spec:
            found.append(os.path.abspath(spec))  # noqa: PTH100
            continue
        name, equals, path = spec.partition("=")
        require(not is_url(path), f"--teacher {name}=CHECKPOINT must be a local path, not a URL")
        found.append(f"{name}={os.path.abspath(path)}" if path else name + equals)  # noqa: PTH100
    return tuple(found)


def split_teachers(texts: Iterable[str]) -> tuple[str, ...]:
    """Return one spec per teacher, NAME or NAME=CHECKPOINT, from texts that may be lists.

    A comma separates teachers, unless it is in the path of a checkpoint: a path reaches to the
    last comma, or the end, up to which it exists, and to the end if none exists.
    """
    found = []
    for text in texts:
        left: str | None = text.strip()
        while left is not None:
            spec, left = _first_teacher(left)
            found.append(spec)
    return tuple(found)


def _first_teacher(text: str) -> tuple[str, str | None]:
    """Return the first spec of a comma-separated list, and the rest of the list, if any."""
    first, comma, rest = text.partition(",")
    if not comma or "=" not in first:
        return first.strip(), rest.strip() if comma else None
    name, _, paths = text.partition("=")
    ends = [*(position for position, c in enumerate(paths) if c == ","), len(paths)]
    exists = os.path.exists  # unlike Path's: false also for a name that is too long
    end = next((e for e in reversed(ends) if exists(paths[:e].strip())), len(paths))
    more = paths[end + 1 :].strip() if end < len(paths) else None
    return f"{name.strip()}={paths[:end].strip()}", more


argument = partial(setting, REQUIRED, positional=True)
in_labels = partial(setting, group="Labels")
in_data = partial(setting, group="Data")
in_views = partial(setting, group="Views")
in_img_size = partial(in_views, low=1, high=MAX_IMG_SIZE)
in_model = partial(setting, group="Model")
in_optimisation = partial(setting, group="Optimisation")
in_loss = partial(setting, group="Loss")
in_results = partial(setting, group="Results")
in_run = partial(setting, group="Run and checkpoints")
in_jobs = partial(setting, group="Jobs")
in_hardware = partial(setting, group="Hardware")
in_batch_job = partial(setting, group="Batch job")
teachers = partial(in_labels, path="teachers", convert=absolute_teachers)


def current_name(config: type, name: str) -> str:
    """Return the current name of a field, given this or its old name."""
    known = dataclasses.fields(config)
    return next((f.name for f in known if f.metadata["alias"] == name), name)


def current_names(config: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings under their current names, with values of today's meaning.

    Raises ConfigError if a setting has different values under both names.
    """
    found = {name: value for name, value in values.items() if current_name(config, name) == name}
    for old in values.keys() - found.keys():
        name, value = current_name(config, old), values[old]
        if found.get(name) is None:
            found[name] = value
        elif value not in (None, found[name]):
            raise ConfigError(f"{old!r} is the old name of {name!r}, and the two differ; keep one")
    for known in dataclasses.fields(config):
        current = known.metadata["current"]
        if current is not None and found.get(known.name) is not None:
            found[known.name] = current(found)
    return found


def flag(name: str) -> str:
    """Return the command-line spelling of a field."""
    return "--" + name.rstrip("_").replace("_", "-")  # from_ is --from


def spelling(known: "dataclasses.Field[Any]") -> str:
    """Return how the command line shows a field: as a flag or as an argument in capitals."""
    return known.name.upper() if known.metadata["positional"] else flag(known.name)


def require(holds: object, message: str) -> None:
    """Raise ConfigError unless the condition holds."""
    if not holds:
        raise ConfigError(message)


def check_bounds(config: Any) -> None:
    """Check each number against the bounds of its field."""
    for known in dataclasses.fields(config):
        value = getattr(config, known.name)
        if not isinstance(value, int | float):
            continue
        for name, (relation, holds) in _BOUNDS.items():
            limit = known.metadata[name]
            if limit is not None and not (holds(value, limit) and value < math.inf):
                finite = " and finite" if isinstance(value, float) else ""
                raise ConfigError(f"{flag(known.name)} must be {relation} {limit}{finite}: {value}")


def without_effect(config: Any, mode: str, *names: str) -> None:
    """Raise ConfigError if one of these settings is given; in this mode it has no effect."""
    for known in dataclasses.fields(config):
        if known.name in names and getattr(config, known.name) != known.default:
            raise ConfigError(f"{flag(known.name)} has no effect {mode}")


def num_bytes_of(name: str, text: str) -> int:
    """Return the bytes of a size such as 500MB or 1.5TB, in powers of 1000."""
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([kKMGT]?)B?", text)
    num_bytes = int(float(found[1]) * 1000 ** " KMGT".find(found[2].upper() or " ")) if found else 0
    units = "500MB or 100GB (B, KB, MB, GB, TB)"
    require(num_bytes >= 1, f"{flag(name)} must be a size like {units}, got {text!r}")
    return num_bytes


def plain(value: Any) -> Any:
    """Return a setting as a JSON value: paths absolute, tuples as lists, URLs without secrets."""
    if is_url(value):
        return without_secrets(value)
    if isinstance(value, Path):
        return os.path.abspath(value)  # noqa: PTH100  # symbolic links stay
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def typed(known: "dataclasses.Field[Any]", value: Any) -> Any:
    """Convert a JSON value to a field's type: lists to tuples, text to paths."""
    require(_fits(known.type, value), f"{spelling(known)} cannot be {value!r}")
    if isinstance(value, list | tuple):
        items = map(Path, value) if known.type == tuple[Path, ...] else value
        return tuple(items) or (() if known.default is REQUIRED else known.default)
    if value is not None and known.type in (Path, Path | None):
        require(not is_url(value), f"{spelling(known)} must be a local path, not a URL")
        return Path(value)
    return located(value) if value is not None and is_location(known) else value


def is_location(known: "dataclasses.Field[Any]") -> bool:
    """Return whether a field is a path or a URL."""
    return known.type in (Location, Location | None)


def _fits(kind: Any, value: Any) -> bool:
    """Return whether a value from JSON or from the command line fits a field's type."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(part, value) for part in parts)
    if origin is typing.Literal:
        return value in parts
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return False
        has_length = parts[-1] is Ellipsis or len(value) in (0, len(parts))
        return has_length and all(_fits(parts[0], item) for item in value)
    if isinstance(value, bool):
        return kind is bool
    accepted = {float: int | float, Path: str | Path}.get(kind, kind)
    return isinstance(value, accepted)
