"""What a label set says of itself: the plan, before the first label, the manifest, after the last.

plan.json holds everything that determines the labels; a folder has one plan for ever. manifest.json
repeats it, lists the shards that were found whole, with their hashes, and is the only "done".
"""

import itertools
import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from mealv2.errors import LabelSetError
from mealv2.label_set.shard import FORMAT_VERSION, HEAD_SIZE
from mealv2.storage.atomic import write_atomic
from mealv2.storage.json_format import (
    canonical_json,
    json_sha256,
    own_sha256,
    parse_json,
    with_own_sha256,
)

FORMAT = "mealv2 label set"
PLAN_NAME = "plan.json"
MANIFEST_NAME = "manifest.json"
UNKNOWN = "unknown"  # of imported labels: the hash of a teacher's weights, for one
_ADVICE = "the command that made the set writes it anew from the shards"
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{,200}")
_OWN_SHA256 = "manifest_sha256"


def shard_name(split: str, number: int, views: range | None = None) -> str:
    """Return the file name of a shard; ``split`` is ``train`` or ``val``.

    ``views`` are those of a block that was added to the set's first views.
    """
    block = "" if views is None else f"-views-{views.start}-{views.stop - 1}"
    return f"{split}-{number:05d}{block}.h5"


def shard_ranges(num_images: int, shard_size: int) -> list[range]:
    """Return the image positions of each shard: ``shard_size`` in a row, the last one fewer."""
    return [
        range(start, min(start + shard_size, num_images))
        for start in range(0, num_images, shard_size)
    ]


def planned_ranges(plan: dict[str, Any], split: str) -> list[range]:
    """Return the image positions of each shard of a role, as its plan says them.

    Raises KeyError, TypeError or ValueError for a plan that does not.
    """
    entry = plan["roles"][split]
    sizes = entry.get("shard_sizes")
    if sizes is None:
        return shard_ranges(entry["num_images"], plan["shard_size"])
    if sum(sizes) != entry["num_images"] or not all(size > 0 for size in sizes):
        raise ValueError(f"shards of {sum(sizes)} images, not {entry['num_images']}")
    ends = itertools.accumulate(sizes)
    return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def read_plan(folder: Path) -> dict[str, Any]:
    """Return plan.json; raises LabelSetError where it is missing or damaged."""
    return _read(folder / PLAN_NAME, "it is no label set folder, or its plan was removed")


def creating_command(plan: dict[str, Any]) -> str:
    """Return the command that makes a set of this plan, as a person writes it."""
    return f"`mealv2 {plan.get('derived', {}).get('command', 'precompute')}`"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return manifest.json; raises LabelSetError where it is missing, damaged or changed."""
    path = folder / MANIFEST_NAME
    missing = "no label set there; give the --output of `mealv2 precompute`"
    if not path.exists() and (folder / PLAN_NAME).exists():
        again = creating_command(read_plan(folder))
        missing = f"the label set is not finished; run the same {again} again"
    data = _read_bytes(path, missing)
    own = own_sha256(data, _OWN_SHA256)
    if own is not None and with_own_sha256(data, _OWN_SHA256) != data:
        raise LabelSetError(f"{path} is damaged: it fails its own SHA-256; {_ADVICE}")
    manifest = _parsed(path, data)
    if own is None:
        raise LabelSetError(f"{path} is damaged: it lacks its own SHA-256; {_ADVICE}")
    if not isinstance(manifest.get("plan"), dict) or not _is_plan(manifest["plan"]):
        raise LabelSetError(f"{path} lacks its plan")
    try:
        plan_sha256 = json_sha256(manifest["plan"])
    except RecursionError:
        raise LabelSetError(f"{path} is damaged: it is nested too deep") from None
    if manifest.get("plan_sha256") != plan_sha256:
        raise LabelSetError(f"{path} was changed: its plan has another SHA-256; {_ADVICE}")
    if not _lists_shards(manifest.get("roles")):
        raise LabelSetError(f"{path} lacks its shards")
    return manifest


def write_manifest(folder: Path, plan: dict[str, Any], **parts: Any) -> dict[str, Any]:
    """Write and return manifest.json: the plan, its hash, and ``parts`` (roles, versions)."""
    manifest = {
        _OWN_SHA256: "0" * 64,
        "plan": plan,
        "plan_sha256": json_sha256(plan),
        **parts,
    }
    data = with_own_sha256(canonical_json(manifest).encode(), _OWN_SHA256)
    write_atomic(folder / MANIFEST_NAME, data)
    return manifest | {_OWN_SHA256: own_sha256(data, _OWN_SHA256)}


def listed_sha256(folder: Path, plan_sha256: str) -> dict[str, str]:
    """Return the SHA-256 of every shard that a manifest of this plan lists; {} without one."""
    try:
        manifest = read_manifest(folder)
    except LabelSetError:
        return {}
    if manifest["plan_sha256"] != plan_sha256:
        return {}
    return {shard["name"]: shard["sha256"] for shard in listed_shards(manifest["roles"])}


def listed_shards(splits: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what the roles of a manifest say of their shard files."""
    return [s for split in splits.values() for block in split["blocks"] for s in block["shards"]]


def describe_file(path: Path, *, num_images: int) -> dict[str, Any]:
    """Return what the manifest says of a shard file."""
    with path.open("rb") as file:
        head = file.read(HEAD_SIZE)
        digest = sha256(head)
        while part := file.read(1 << 20):
            digest.update(part)
        size = file.tell()
    return {
        "name": path.name,
        "bytes": size,
        "images": num_images,
        "sha256": digest.hexdigest(),
        "head_sha256": sha256(head).hexdigest(),
    }


def _read(path: Path, missing: str) -> dict[str, Any]:
    return _parsed(path, _read_bytes(path, missing))


def _read_bytes(path: Path, missing: str) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise LabelSetError(f"no {path}: {missing}") from None
    except IsADirectoryError:
        raise LabelSetError(f"{path} is a folder, not a file of a label set") from None
    except OSError as error:
        raise LabelSetError(f"cannot read {path}: {error.strerror}") from None


def _parsed(path: Path, data: bytes) -> dict[str, Any]:
    """Parse plan or manifest; raises LabelSetError for another format or version."""
    try:
        value = parse_json(data)
    except ValueError as error:
        raise LabelSetError(
            f"{path} is damaged: {error}; the command that made the set writes it anew"
        ) from None
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


def _is_plan(plan: dict[str, Any]) -> bool:
    """Return whether a plan has what every reader asks it for."""
    classes, splits = plan.get("classes"), plan.get("roles")
    teachers, derived = plan.get("teachers", []), plan.get("derived", {"how": "", "from": []})
    if not (isinstance(teachers, list) and isinstance(derived, dict)):
        return False
    if not (isinstance(derived.get("how"), str) and isinstance(derived.get("from"), list)):
        return False
    if not all(isinstance(t, dict) and isinstance(t.get("model"), str) for t in teachers):
        return False
    return (
        isinstance(classes, list)
        and all(isinstance(name, str) for name in classes)
        and _is_count(plan.get("img_size"))
        and isinstance(splits, dict)
        and all(
            isinstance(split, dict)
            and _is_count(split.get("num_views"))
            and isinstance(split.get("views", {}), dict)
            for split in splits.values()
        )
    )


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value < 1 << 62


def _lists_shards(splits: object) -> bool:
    """Return whether every role lists shard files of the folder itself, with size and hashes."""
    if not isinstance(splits, dict) or not splits:
        return False
    for split in splits.values():
        if not (isinstance(split, dict) and isinstance(split.get("skipped"), dict)):
            return False
        if not all(isinstance(reason, str) for reason in split["skipped"].values()):
            return False
        if "accuracy" in split and not _is_accuracy(split["accuracy"]):
            return False
        blocks = split.get("blocks")
        if not (isinstance(blocks, list) and blocks and all(map(_is_block, blocks))):
            return False
        begins = [0, *(block["views"][1] for block in blocks[:-1])]
        if begins != [block["views"][0] for block in blocks]:
            return False
    return True


def _is_accuracy(accuracy: object) -> bool:
    if not isinstance(accuracy, dict) or not isinstance(accuracy.get("teachers"), list):
        return False
    return all(
        isinstance(figures, dict)
        and all(isinstance(figures.get(name), int | float) for name in ("top1", "top5"))
        for figures in (*accuracy["teachers"], accuracy.get("ensemble"))
    )


def _is_block(block: object) -> bool:
    if not isinstance(block, dict):
        return False
    views, shards = block.get("views"), block.get("shards")
    if not (isinstance(views, list) and len(views) == 2 and isinstance(shards, list)):
        return False
    if not (all(isinstance(view, int) for view in views) and 0 <= views[0] < views[1] < 1 << 62):
        return False
    return all(
        isinstance(entry, dict)
        and isinstance(name := entry.get("name"), str)
        and _FILE_NAME.fullmatch(name)
        and isinstance(entry.get("bytes"), int)
        and isinstance(entry.get("sha256"), str)
        for entry in shards
    )
