"""The plan and the manifest of a label set.

plan.json holds everything that determines the labels; it never changes. manifest.json repeats it
and lists the complete shards with their hashes; a set is finished if it has a manifest.
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
from mealv2.storage.regular_files import read_regular

FORMAT = "mealv2 label set"
PLAN_NAME = "plan.json"
MANIFEST_NAME = "manifest.json"
UNKNOWN = "unknown"  # in the plan of imported labels, for example a hash of weights
_ADVICE = "run the command that made the set again: it writes the file from the shards"
_PLAN_ADVICE = "restore it from a copy, or make a new label set"
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{,200}")
_OWN_SHA256 = "manifest_sha256"
_MAX_SHARDS = 1 << 24  # of a split: a larger number of images is a damaged one


def shard_name(split: str, number: int, views: range | None = None) -> str:
    """Return the file name of a shard; ``views`` are those of a block added to a finished set."""
    block = "" if views is None else f"-views-{views.start}-{views.stop - 1}"
    return f"{split}-{number:05d}{block}.h5"


def shard_ranges(num_images: int, shard_size: int) -> list[range]:
    """Return the image positions of each shard; the last one may be smaller."""
    return [
        range(start, min(start + shard_size, num_images))
        for start in range(0, num_images, shard_size)
    ]


def planned_ranges(plan: dict[str, Any], split: str) -> list[range]:
    """Return the image positions of each shard of a split.

    Raises KeyError, TypeError or ValueError for a plan that does not define them.
    """
    entry = plan["roles"][split]
    sizes = entry.get("shard_sizes")
    if sizes is None:
        num_images, shard_size = entry["num_images"], plan["shard_size"]
        is_count = type(num_images) is int and type(shard_size) is int and shard_size > 0
        if not is_count or not 0 <= num_images <= _MAX_SHARDS * shard_size:
            raise ValueError(f"{num_images} images in shards of {shard_size}")
        return shard_ranges(num_images, shard_size)
    if sum(sizes) != entry["num_images"] or not all(size > 0 for size in sizes):
        raise ValueError(f"the shards have {sum(sizes)} images, not {entry['num_images']}")
    ends = itertools.accumulate(sizes)
    return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def read_plan(folder: Path) -> dict[str, Any]:
    """Return plan.json; raises LabelSetError where it is missing, damaged or not a plan."""
    path = folder / PLAN_NAME
    data = _read_bytes(path, "not a label set, or its plan was removed")
    plan = _parsed(path, data, advice=_PLAN_ADVICE)
    if not _fits(plan, _PLAN):
        raise LabelSetError(f"{path} is damaged: it is no valid plan; {_PLAN_ADVICE}")
    return plan


def is_label_set(folder: Path) -> bool:
    """Return whether a folder has a label set, finished or not."""
    return any((folder / name).is_file() for name in (PLAN_NAME, MANIFEST_NAME))


def creating_command(plan: dict[str, Any]) -> str:
    """Return the command that makes a set of this plan."""
    return f"`mealv2 {plan.get('derived', {}).get('command', 'precompute')}`"


def remaking_command(plan: dict[str, Any], name: str) -> str:
    """Return the command that makes a shard again: of added views, only their own."""
    return "`mealv2 labels add-views`" if "-views-" in name else creating_command(plan)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return manifest.json; raises LabelSetError where it is missing, damaged or changed."""
    path = folder / MANIFEST_NAME
    missing = "not a label set; give the --output of `mealv2 precompute`"
    if not path.exists() and (folder / PLAN_NAME).exists():
        again = creating_command(read_plan(folder))
        missing = f"the label set is not finished; run the same {again} again"
    data = _read_bytes(path, missing)
    own = own_sha256(data, _OWN_SHA256)
    if own is not None and with_own_sha256(data, _OWN_SHA256) != data:
        raise LabelSetError(f"{path} is damaged: it fails its own SHA-256; {_ADVICE}")
    manifest = _parsed(path, data)
    if own is None:
        raise LabelSetError(f"{path} is damaged: its own SHA-256 is missing; {_ADVICE}")
    if not _fits(manifest.get("plan"), _PLAN):
        raise LabelSetError(f"{path} has no valid plan")
    try:
        plan_sha256 = json_sha256(manifest["plan"])
    except RecursionError:
        raise LabelSetError(f"{path} is damaged: its plan is nested too deeply") from None
    if manifest.get("plan_sha256") != plan_sha256:
        raise LabelSetError(f"{path} was changed: its plan has another SHA-256; {_ADVICE}")
    if not _lists_shards(manifest.get("roles")):
        raise LabelSetError(f"{path} has no valid list of shards")
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
    """Return the manifest's entries of all shards."""
    return [s for split in splits.values() for block in split["blocks"] for s in block["shards"]]


def describe_file(path: Path, *, num_images: int, data: bytes | None = None) -> dict[str, Any]:
    """Return the manifest's entry of a shard; ``data`` is the content if it was read before."""
    data = read_regular(path) if data is None else data
    return {
        "name": path.name,
        "bytes": len(data),
        "images": num_images,
        "sha256": sha256(data).hexdigest(),
        "head_sha256": sha256(data[:HEAD_SIZE]).hexdigest(),
    }


def _read_bytes(path: Path, missing: str) -> bytes:
    try:
        return read_regular(path)
    except (FileNotFoundError, NotADirectoryError):
        raise LabelSetError(f"no {path}: {missing}") from None
    except IsADirectoryError:
        raise LabelSetError(f"{path} is a folder, not a file of a label set") from None
    except OSError as error:
        raise LabelSetError(f"cannot read {path}: {error.strerror}") from None


def _parsed(path: Path, data: bytes, *, advice: str = _ADVICE) -> dict[str, Any]:
    """Parse plan or manifest; raises LabelSetError for another format or version."""
    try:
        value = parse_json(data)
    except ValueError as error:
        raise LabelSetError(f"{path} is damaged: {error}; {advice}") from None
    if not isinstance(value, dict):
        raise LabelSetError(f"{path} is damaged: not a JSON object; {advice}")
    plan = value.get("plan", value)
    if not isinstance(plan, dict) or plan.get("format") != FORMAT:
        raise LabelSetError(f"{path} does not describe a {FORMAT}")
    if plan.get("format_version") != FORMAT_VERSION:
        raise LabelSetError(
            f"{path} has format version {plan.get('format_version')}; "
            f"this mealv2 reads {FORMAT_VERSION}; use the version that wrote it"
        )
    return value


# --- what every reader relies on ------------------------------------------------------------------


def _fits(value: object, form: Any) -> bool:
    """Return whether a JSON value has a form.

    A form is a type, a predicate, [form of each item], {str: form of each value}, or {name: form},
    where a name that ends in "?" is optional.
    """
    if isinstance(form, list):
        return isinstance(value, list) and all(_fits(item, form[0]) for item in value)
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return False
        if str in form:
            return all(_fits(item, form[str]) for item in value.values())
        return all(
            _fits(value[name.rstrip("?")], item) if name.rstrip("?") in value else name[-1] == "?"
            for name, item in form.items()
        )
    return isinstance(value, form) if isinstance(form, type) else bool(form(value))


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value < 1 << 62


def _is_range(value: object) -> bool:
    return _fits(value, [int]) and len(value) == 2 and 0 <= value[0] < value[1] < 1 << 62  # type: ignore[arg-type,index]


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and _FILE_NAME.fullmatch(value) is not None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


_PLAN = {
    "classes": [str],
    "img_size": _is_count,
    "shard_size?": _is_count,
    "roles": {
        str: {"num_views": _is_count, "views?": dict, "split?": str, "shard_sizes?": [_is_count]}
    },
    "teachers?": [{"model": str}],
    "derived?": {"how": str, "from": list, "command?": str},
}
_FIGURES = {"top1": _is_number, "top5": _is_number}
_SHARD = {"name": _is_file_name, "bytes": int, "sha256": str}
_SPLIT = {
    "skipped": {str: str},
    "content?": {"algorithm": str, "images": int, "sha256": str},
    "accuracy?": {"teachers": [_FIGURES], "ensemble": _FIGURES},
    "blocks": [{"views": _is_range, "shards": [_SHARD]}],
}


def _lists_shards(splits: object) -> bool:
    """Return whether every split lists shards of the folder, in blocks of contiguous views."""
    if not (isinstance(splits, dict) and splits and _fits(splits, {str: _SPLIT})):
        return False
    for split in splits.values():
        ends = [0, *(end for block in split["blocks"] for end in block["views"])]
        if len(ends) == 1 or ends[:-1:2] != ends[1::2]:
            return False
    return True
