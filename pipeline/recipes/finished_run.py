"""What `mealv2 recipes record` reads: the files of a finished run, and records of others, checked.

A user may have edited all of them, so every value is checked once, here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mealv2 import recipes
from mealv2.errors import ConfigError
from mealv2.storage.json_format import read_json
from mealv2.storage.regular_files import read_regular
from pipeline.config import FREE_ON_RESUME, DistillConfig, FinetuneConfig, current_names, flag
from pipeline.training.run_folder import (
    CONFIG_NAME,
    METRICS_NAME,
    REPORT_NAME,
    SESSION,
    parse_event,
    saved_settings,
)

_Check = Callable[[Any], bool]
_MAX_TIME_S = datetime(9999, 1, 1, tzinfo=UTC).timestamp()
_MAX_COUNT = 1 << 53
VERSIONS = ("mealv2", "torch", "timm")


@dataclass(frozen=True)
class FinishedRun:
    """A run: settings, report, and an event ``session`` for each process that trained it.

    In a session are its ``seconds``, and when it ``ended`` in seconds since 1970.
    """

    config: DistillConfig
    report: dict[str, Any]
    sessions: list[dict[str, Any]]


def read_run(run: Path) -> FinishedRun:
    """Read a finished run of a recipe; raises ConfigError for what is none or is damaged."""
    config = _config(run)
    return FinishedRun(config, _report(run, config), _sessions(run))


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read a file of results, none if it does not exist; raises ConfigError."""
    if not path.exists():
        return []
    try:
        found = read_json(path)
        if not isinstance(found, dict) or not isinstance(found.get("results"), list):
            raise ValueError("it has no list of results")
        for number, record in enumerate(found["results"], start=1):
            _require(record, _RECORD, f"result {number}")
    except (OSError, ValueError, ConfigError) as error:
        raise ConfigError(
            f"cannot read results from {path}: {error}; give another --output"
        ) from None
    return list(found["results"])


def is_utf8(value: Any) -> bool:
    """Return whether a value is text that has an encoding: some names of files have none."""
    return isinstance(value, str) and value.encode(errors="replace").decode() == value


def _config(run: Path) -> DistillConfig:
    """Return the settings of a run of a recipe."""
    path = run / CONFIG_NAME
    try:
        values = read_json(path)
        if not isinstance(values, dict):
            raise ValueError("it has no settings")
        config = DistillConfig.from_json(values)
    except (OSError, ValueError, TypeError, OverflowError, ConfigError) as error:
        if isinstance(error, ConfigError) and _is_of_finetune(values):
            raise ConfigError(f"{run} is a run of finetune; recipes are of distill") from None
        raise ConfigError(f"{run} is not a run of `mealv2 distill` ({error})") from None
    if config.recipe is None:
        raise ConfigError(f"{run} is not a run of a recipe; train with --recipe")
    # the weights are what the settings in their checkpoint made them
    saved, found = current_names(DistillConfig, saved_settings(run) or {}), config.as_json()
    for name in sorted((saved.keys() & found.keys()) - FREE_ON_RESUME):
        if saved[name] != found[name]:
            raise ConfigError(
                f"{flag(name)} is {found[name]} in {path}, but {saved[name]} in the checkpoint: "
                "restore config.json"
            )
    return config


def _is_of_finetune(values: dict[str, Any]) -> bool:
    try:
        FinetuneConfig.from_json(values)
    except (ConfigError, ValueError, TypeError):
        return False
    return True


def _report(run: Path, config: DistillConfig) -> dict[str, Any]:
    path = run / REPORT_NAME
    try:
        report = read_json(path)
    except FileNotFoundError:
        raise ConfigError(
            f"{run} is not finished: it has no {REPORT_NAME}; continue it with "
            f"`mealv2 distill --resume {run}`"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is damaged ({error})") from None
    if isinstance(report, dict) and "top1" not in report:
        raise ConfigError(f"{run} has no accuracy: it was trained with --val-split none")
    _require(report, _REPORT, str(path))
    if config.labels is not None:
        _require(report.get("labels"), _LABELS, f"labels in {path}")
    return dict(report)


def _sessions(run: Path) -> list[dict[str, Any]]:
    """Return the sessions; steps that were lost and made again count once."""
    found: list[dict[str, Any]] = []
    path = run / METRICS_NAME
    try:
        lines = read_regular(path).splitlines()
    except OSError:
        lines = []
    for event in filter(None, map(parse_event, lines)):
        if event.get("event") == SESSION:
            _require(event, _SESSION, f"a session in {path}")
            found.append(event)
        if found and _is_time(event.get("time")):
            # a clock may be set back
            found[-1]["ended"] = max(event["time"], found[-1]["time"])
            found[-1]["seconds"] = found[-1]["ended"] - found[-1]["time"]
    if not found:
        raise ConfigError(
            f"{path} does not say on what the run was trained: the run is of an "
            "earlier version, or the file was removed"
        )
    return found


def _require(values: Any, checks: Mapping[str, _Check], where: str) -> None:
    """Raise ConfigError for the first value that is missing or not possible."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where} is no JSON object")
    for name, check in checks.items():
        if name not in values:
            raise ConfigError(f"{where} has no {name}")
        if not check(values[name]):
            raise ConfigError(f"{where}: {name} cannot be {str(values[name])[:50]!r}")


def _is_number(value: Any, most: float = 1e15, least: float = 0.0) -> bool:
    return type(value) in (int, float) and least <= value <= most  # not NaN


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_COUNT


def _is_percent(value: Any) -> bool:
    return _is_number(value, 100.0)


def _is_time(value: Any) -> bool:
    return _is_number(value, _MAX_TIME_S)


def _is_list_of_text(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_utf8, value))


def _has_versions(value: Any) -> bool:
    return isinstance(value, dict) and all(is_utf8(value.get(name)) for name in VERSIONS)


def _has_published(value: Any) -> bool:
    return isinstance(value, dict) and all(
        name in value and _or_none(_is_percent)(value[name]) for name in ("top1", "top5")
    )


def _or_none(check: _Check) -> _Check:
    return lambda value: value is None or check(value)


_REPORT: dict[str, _Check] = {
    **dict.fromkeys(("num_images", "steps", "selected_epoch", "best_epoch"), _is_count),
    **dict.fromkeys(("top1", "top5", "best_top1"), _is_percent),
}
_LABELS: dict[str, _Check] = {"num_views": _is_count, "plan_sha256": is_utf8}
_SESSION: dict[str, _Check] = {
    "time": _is_time,
    "ranks": lambda value: _is_count(value) and 0 < value <= 1_000_000,
    **dict.fromkeys(("device", "precision"), is_utf8),
    "versions": _has_versions,
}
_RECORD: dict[str, _Check] = {
    "recipe": lambda value: value in recipes.names(),
    "published": _has_published,
    **dict.fromkeys(("top1", "top5", "best_top1"), _is_percent),
    "difference": _or_none(lambda value: _is_number(value, 100.0, -100.0)),
    **dict.fromkeys(("epoch", "best_epoch"), _is_count),
    "hours": _is_number,
    "gpu_hours": _or_none(_is_number),
    **dict.fromkeys(("hardware", "labels", "date", "run"), is_utf8),
    "versions": _has_versions,
    "differs": _is_list_of_text,
}
