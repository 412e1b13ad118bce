"""What a label set says of itself: the plan, before the first label, the manifest, after the last.

plan.json holds everything that determines the labels; a folder has one plan for ever. manifest.json
repeats it, lists the shards that were found whole, with their hashes, and is the only "done".
"""

from pathlib import Path
from typing import Any

from mealv2.errors import ConfigError, LabelSetError
from mealv2.files import (
    TEMPORARY_PREFIX,
    canonical_json,
    file_sha256,
    json_sha256,
    read_json,
    write_whole,
)

FORMAT = "mealv2 label set"
FORMAT_VERSION = 1
PLAN_NAME = "plan.json"
MANIFEST_NAME = "manifest.json"
_MAX_DIFFERENCES = 3


def shard_name(role: str, number: int) -> str:
    """Return the file name of a shard; ``role`` is ``train`` or ``val``."""
    return f"{role}-{number:05d}.h5"


def shard_ranges(num_images: int, shard_size: int) -> list[range]:
    """Return the image positions of each shard: ``shard_size`` in a row, the last one fewer."""
    return [
        range(start, min(start + shard_size, num_images))
        for start in range(0, num_images, shard_size)
    ]


def claim(folder: Path, plan: dict[str, Any]) -> None:
    """Make ``folder`` the place of the label set that ``plan`` describes.

    Writes plan.json when there is none, and anew when a finished set of this plan has lost it or
    had it damaged: the manifest repeats it, under its hash. Raises ConfigError for a folder that
    holds something else, LabelSetError naming what differs when it belongs to another plan, OSError
    where it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = canonical_json(plan).encode()
    if _is_finished_set_of(folder, plan):
        if not (folder / PLAN_NAME).exists() or (folder / PLAN_NAME).read_bytes() != data:
            write_whole(folder / PLAN_NAME, data)
        return
    if not (folder / PLAN_NAME).exists():
        strange = sorted(
            p.name for p in folder.iterdir() if not p.name.startswith(TEMPORARY_PREFIX)
        )
        if strange:
            raise ConfigError(f"{folder} is no label set and not empty ({strange[0]}, …)")
    write_whole(folder / PLAN_NAME, data, replace=False)
    differing = _differences(read_plan(folder), plan)
    if differing:
        shown = "; ".join(differing[:_MAX_DIFFERENCES])
        more = len(differing) - _MAX_DIFFERENCES
        raise LabelSetError(
            f"{folder} holds another label set: {shown}{f'; and {more} more' if more > 0 else ''}. "
            "Give another --out, or the settings it was made with"
        )


def _is_finished_set_of(folder: Path, plan: dict[str, Any]) -> bool:
    try:
        return bool(read_manifest(folder)["plan"] == plan)
    except LabelSetError:
        return False


def read_plan(folder: Path) -> dict[str, Any]:
    """Return plan.json; raises LabelSetError where it is missing or damaged."""
    return _read(folder / PLAN_NAME, "it is no label set folder, or its plan was removed")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return manifest.json; raises LabelSetError where it is missing, damaged or changed."""
    missing = (
        "no label set there; give the --out of `mealv2 precompute`"
        if not (folder / PLAN_NAME).exists()
        else ("the label set is not finished; run the same `mealv2 precompute` again")
    )
    manifest = _read(folder / MANIFEST_NAME, missing)
    if not isinstance(manifest.get("plan"), dict) or not _lists_shards(manifest.get("roles")):
        raise LabelSetError(f"{folder / MANIFEST_NAME} lacks its plan or its shards")
    if manifest.get("plan_sha256") != json_sha256(manifest["plan"]):
        raise LabelSetError(f"{folder / MANIFEST_NAME} was changed: its plan has another SHA-256")
    return manifest


def write_manifest(folder: Path, plan: dict[str, Any], **parts: Any) -> dict[str, Any]:
    """Write and return manifest.json: the plan, its hash, and ``parts`` (roles, versions)."""
    manifest = {"plan": plan, "plan_sha256": json_sha256(plan), **parts}
    write_whole(folder / MANIFEST_NAME, canonical_json(manifest).encode())
    return manifest


def describe_file(path: Path, *, num_images: int) -> dict[str, Any]:
    """Return what the manifest says of a shard file."""
    return {
        "name": path.name,
        "bytes": path.stat().st_size,
        "images": num_images,
        "sha256": file_sha256(path),
    }


def _read(path: Path, missing: str) -> dict[str, Any]:
    try:
        value = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise LabelSetError(f"no {path}: {missing}") from None
    except ValueError as error:
        raise LabelSetError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise LabelSetError(f"{path} is damaged: not a JSON object")
    plan = value.get("plan", value)
    if not isinstance(plan, dict) or plan.get("format") != FORMAT:
        raise LabelSetError(f"{path} does not describe a {FORMAT}")
    if plan.get("format_version") != FORMAT_VERSION:
        raise LabelSetError(
            f"{path} has format version {plan.get('format_version')}; "
            f"this mealv2 reads {FORMAT_VERSION}; use the version that wrote it"
        )
    return value


def _lists_shards(roles: object) -> bool:
    """Return whether every role lists shard files of the folder itself, with size and hash."""
    if not isinstance(roles, dict):
        return False
    for role in roles.values():
        if not (isinstance(role, dict) and isinstance(role.get("skipped"), dict)):
            return False
        shards = role.get("shards")
        if not isinstance(shards, list) or not all(isinstance(entry, dict) for entry in shards):
            return False
        for entry in shards:
            name = entry.get("name")
            if not isinstance(name, str) or Path(name).name != name:
                return False
            if not isinstance(entry.get("bytes"), int) or not isinstance(entry.get("sha256"), str):
                return False
    return True


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
