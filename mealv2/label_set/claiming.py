"""Claiming a folder for a label set: its plan, manifest and shards must match."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mealv2.errors import ConfigError, LabelSetError
from mealv2.label_set.manifest import PLAN_NAME, read_manifest, read_plan
from mealv2.label_set.shard_file import ShardFile
from mealv2.storage.atomic import list_folder, write_atomic
from mealv2.storage.json_format import canonical_json, json_sha256
from mealv2.storage.regular_files import read_regular

_SHARD = re.compile(r"(train|val)-\d+(-views-\d+-\d+)?\.h5")
_MAX_DIFFERENCES = 3
_ReadPlan = Callable[[Path], dict[str, Any]]


def claim(folder: Path, plan: dict[str, Any]) -> None:
    """Make ``folder`` the folder of the label set that ``plan`` describes.

    Plan, manifest and shards each belong to a plan. The majority decides, and the shards decide a
    tie, so that one wrong file cannot cause the loss of labels. plan.json is written if it is
    missing, and replaced if only it is damaged or differs. Raises ConfigError for a folder with
    other files, LabelSetError with the differences for another plan, OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = canonical_json(plan).encode()
    names = list_folder(folder)
    plan_matches = _matches(read_plan, folder, plan)
    manifest_matches = _matches(_planned, folder, plan)
    if plan_matches and manifest_matches:
        shards_match = None
    else:
        shards_match = _shards_match(folder, names, json_sha256(plan))
    evidence = (plan_matches, manifest_matches, shards_match)
    num_matching, num_other = evidence.count(True), evidence.count(False)
    if num_matching < num_other or (num_matching == num_other > 0 and shards_match is False):
        raise _other_label_set(folder, plan)
    if num_matching and not (plan_matches and read_regular(folder / PLAN_NAME) == data):
        write_atomic(folder / PLAN_NAME, data)
    elif not num_matching:
        if names and PLAN_NAME not in names:
            raise ConfigError(f"{folder} is not a label set and not empty ({names[0]}, …)")
        # replace a damaged plan only if it is the only file: no label can be lost
        write_atomic(
            folder / PLAN_NAME, data, replace=plan_matches is None and names == [PLAN_NAME]
        )
        if read_plan(folder) != plan:  # another job was first
            raise _other_label_set(folder, plan)


def _planned(folder: Path) -> dict[str, Any]:
    """Return the plan in the manifest; raises LabelSetError as ``read_manifest``."""
    plan: dict[str, Any] = read_manifest(folder)["plan"]
    return plan


def _matches(read: _ReadPlan, folder: Path, plan: dict[str, Any]) -> bool | None:
    """Return whether a function reads this plan, None if it raises LabelSetError."""
    try:
        return read(folder) == plan
    except LabelSetError:
        return None


def _shards_match(folder: Path, names: list[str], plan_sha256: str) -> bool | None:
    """Return whether at least half of the shards belong to a plan, None without any shard."""
    num_matching = num_other = 0
    for name in filter(_SHARD.fullmatch, names):
        try:
            matches = ShardFile(folder / name).header["plan_sha256"] == plan_sha256
        except (LabelSetError, OSError):
            continue
        num_matching, num_other = num_matching + matches, num_other + (not matches)
    return num_matching >= num_other if num_matching + num_other else None


def _other_label_set(folder: Path, plan: dict[str, Any]) -> LabelSetError:
    """Return the error for a folder of another set, with the differences."""
    differing: list[str] = []
    for read in (read_plan, _planned):
        try:
            differing = differing or _differences(read(folder), plan)
        except LabelSetError:
            continue
    differing = differing or ["its shards belong to another plan"]
    shown = "; ".join(differing[:_MAX_DIFFERENCES])
    more = len(differing) - _MAX_DIFFERENCES
    only_views = len(differing) == 1 and differing[0].startswith("roles.train.num_views ")
    hint = "; `mealv2 labels add-views` adds views to a set" if only_views else ""
    if any(line.startswith("probe_sha256 ") for line in differing):
        hint += "; another version of torch or Pillow resizes views to other pixels"
    if any(line.startswith("operations_sha256 ") for line in differing):
        hint += "; another version of timm or Pillow changes views to other pixels"
    return LabelSetError(
        f"{folder} holds another label set: {shown}{f'; and {more} more' if more > 0 else ''}. "
        f"Use another --output, or the same settings{hint}"
    )


def _differences(existing: object, planned: object, name: str = "") -> list[str]:
    """Describe the differences between two JSON values, by dotted name."""
    if isinstance(existing, dict) and isinstance(planned, dict):
        return [
            line
            for key in sorted(existing.keys() | planned.keys())
            for line in _differences(
                existing.get(key), planned.get(key), f"{name}.{key}".lstrip(".")
            )
        ]
    if isinstance(existing, list) and isinstance(planned, list) and len(existing) == len(planned):
        return [
            line
            for position, (a, b) in enumerate(zip(existing, planned, strict=True))
            for line in _differences(a, b, f"{name}[{position}]")
        ]
    return (
        []
        if existing == planned
        else [f"{name} is {_short(existing)} in the set and {_short(planned)} in this run"]
    )


def _short(value: object) -> str:
    text = f"{len(value)} entries" if isinstance(value, list | dict) else str(value)
    return text if len(text) <= 40 else text[:37] + "…"
