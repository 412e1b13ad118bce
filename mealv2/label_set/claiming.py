"""Whose a folder is: what its plan, its manifest and its shards say, and its plan written."""

import re
from pathlib import Path
from typing import Any

from mealv2.errors import ConfigError, LabelSetError
from mealv2.label_set.manifest import PLAN_NAME, read_manifest, read_plan
from mealv2.label_set.shard_file import ShardFile
from mealv2.storage.atomic import list_folder, write_atomic
from mealv2.storage.json_format import canonical_json, json_sha256

_SHARD = re.compile(r"(train|val)-\d+(-views-\d+-\d+)?\.h5")
_MAX_DIFFERENCES = 3


def claim(folder: Path, plan: dict[str, Any]) -> None:
    """Make ``folder`` the place of the label set that ``plan`` describes.

    Plan, manifest and shards each say whose they are; most of them decide, and between two that
    disagree the shards, so that no stray file can make labels be thrown away. plan.json is written
    where it is not there, and anew where it alone is lost, damaged or of another set. Raises
    ConfigError for a folder that holds something else, LabelSetError naming what differs when it
    belongs to another plan, OSError where it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = canonical_json(plan).encode()
    names = list_folder(folder)
    plan_matches, manifest_matches = _plan_matches(folder, plan), _manifest_matches(folder, plan)
    if plan_matches and manifest_matches:
        shards_match = None
    else:
        shards_match = _shards_match(folder, names, json_sha256(plan))
    evidence = (plan_matches, manifest_matches, shards_match)
    num_matching, num_other = evidence.count(True), evidence.count(False)
    if num_matching < num_other or (num_matching == num_other > 0 and shards_match is False):
        raise _other_label_set(folder, plan)
    if num_matching and not (plan_matches and (folder / PLAN_NAME).read_bytes() == data):
        write_atomic(folder / PLAN_NAME, data)
    elif not num_matching:
        if names and PLAN_NAME not in names:
            raise ConfigError(f"{folder} is no label set and not empty ({names[0]}, …)")
        # a plan that cannot be read, and nothing else: no label can be lost
        write_atomic(
            folder / PLAN_NAME, data, replace=plan_matches is None and names == [PLAN_NAME]
        )
        if read_plan(folder) != plan:  # another job was first
            raise _other_label_set(folder, plan)


def _plan_matches(folder: Path, plan: dict[str, Any]) -> bool | None:
    """Return whether plan.json is this plan, None where it cannot be read."""
    try:
        return read_plan(folder) == plan
    except LabelSetError:
        return None


def _manifest_matches(folder: Path, plan: dict[str, Any]) -> bool | None:
    """Return whether the manifest is of this plan, None where it cannot be read."""
    try:
        return bool(read_manifest(folder)["plan"] == plan)
    except LabelSetError:
        return None


def _shards_match(folder: Path, names: list[str], plan_sha256: str) -> bool | None:
    """Return whether at least half of the shards are of a plan, None where none can be read."""
    num_matching = num_other = 0
    for name in filter(_SHARD.fullmatch, names):
        try:
            matches = ShardFile(folder / name).header["plan_sha256"] == plan_sha256
        except (LabelSetError, OSError):
            continue
        num_matching, num_other = num_matching + matches, num_other + (not matches)
    return num_matching >= num_other if num_matching + num_other else None


def _other_label_set(folder: Path, plan: dict[str, Any]) -> LabelSetError:
    """Return the error for a folder of another set, with what differs."""
    differing: list[str] = []
    for read in (read_plan, lambda folder: read_manifest(folder)["plan"]):
        try:
            differing = differing or _differences(read(folder), plan)
        except LabelSetError:
            continue
    differing = differing or ["its shards were made by another plan"]
    shown = "; ".join(differing[:_MAX_DIFFERENCES])
    more = len(differing) - _MAX_DIFFERENCES
    only_views = len(differing) == 1 and differing[0].startswith("roles.train.num_views ")
    hint = "; `mealv2 labels add-views` adds views to a set" if only_views else ""
    if any(line.startswith("probe_sha256 ") for line in differing):
        hint += "; its views were resized to other pixels, by other versions of torch or Pillow"
    return LabelSetError(
        f"{folder} holds another label set: {shown}{f'; and {more} more' if more > 0 else ''}. "
        f"Give another --output, or the settings it was made with{hint}"
    )


def _differences(existing: object, planned: object, name: str = "") -> list[str]:
    """List in words where two JSON values differ, by dotted name."""
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
        else [f"{name} is {_short(existing)} there and {_short(planned)} here"]
    )


def _short(value: object) -> str:
    text = f"{len(value)} entries" if isinstance(value, list | dict) else str(value)
    return text if len(text) <= 40 else text[:37] + "…"
