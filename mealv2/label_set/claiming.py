"""Whose a folder is: what its plan, its manifest and its shards say, and its plan written."""

import re
from pathlib import Path
from typing import Any

from mealv2.errors import ConfigError, LabelSetError
from mealv2.files import canonical_json, content_of, json_sha256, write_whole
from mealv2.label_set.manifest import PLAN_NAME, read_manifest, read_plan
from mealv2.label_set.shard_file import ShardFile

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
    names = content_of(folder)
    of_plan, of_manifest = _plan_is(folder, plan), _manifest_is(folder, plan)
    if of_plan and of_manifest:
        of_shards = None
    else:
        of_shards = _shards_are(folder, names, json_sha256(plan))
    says = (of_plan, of_manifest, of_shards)
    ours, others = says.count(True), says.count(False)
    if ours < others or (ours == others > 0 and of_shards is False):
        raise _belongs_to_another(folder, plan)
    if ours and not (of_plan and (folder / PLAN_NAME).read_bytes() == data):
        write_whole(folder / PLAN_NAME, data)
    elif not ours:
        if names and PLAN_NAME not in names:
            raise ConfigError(f"{folder} is no label set and not empty ({names[0]}, …)")
        # a plan that cannot be read, and nothing else: no label can be lost
        write_whole(folder / PLAN_NAME, data, replace=of_plan is None and names == [PLAN_NAME])
        if read_plan(folder) != plan:  # another job was first
            raise _belongs_to_another(folder, plan)


def _plan_is(folder: Path, plan: dict[str, Any]) -> bool | None:
    """Return whether plan.json is this plan, None where it cannot be read."""
    try:
        return read_plan(folder) == plan
    except LabelSetError:
        return None


def _manifest_is(folder: Path, plan: dict[str, Any]) -> bool | None:
    """Return whether the manifest is of this plan, None where it cannot be read."""
    try:
        return bool(read_manifest(folder)["plan"] == plan)
    except LabelSetError:
        return None


def _shards_are(folder: Path, names: list[str], plan_sha256: str) -> bool | None:
    """Return whether at least half of the shards are of a plan, None where none can be read."""
    ours = others = 0
    for name in filter(_SHARD.fullmatch, names):
        try:
            is_ours = ShardFile(folder / name).header["plan_sha256"] == plan_sha256
        except (LabelSetError, OSError):
            continue
        ours, others = ours + is_ours, others + (not is_ours)
    return ours >= others if ours + others else None


def _belongs_to_another(folder: Path, plan: dict[str, Any]) -> LabelSetError:
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


def _differences(there: object, here: object, name: str = "") -> list[str]:
    """List in words where two JSON values differ, by dotted name."""
    if isinstance(there, dict) and isinstance(here, dict):
        return [
            line
            for key in sorted(there.keys() | here.keys())
            for line in _differences(there.get(key), here.get(key), f"{name}.{key}".lstrip("."))
        ]
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        return [
            line
            for position, (a, b) in enumerate(zip(there, here, strict=True))
            for line in _differences(a, b, f"{name}[{position}]")
        ]
    return [] if there == here else [f"{name} is {_short(there)} there and {_short(here)} here"]


def _short(value: object) -> str:
    text = f"{len(value)} entries" if isinstance(value, list | dict) else str(value)
    return text if len(text) <= 40 else text[:37] + "…"
