"""`mealv2 labels info`: what a label set is, from its manifest and the heads of its files."""

import re
from pathlib import Path
from typing import Any

from mealv2 import label_set
from mealv2.errors import LabelSetError
from mealv2.label_set import Encoding, creating_command, read_header, read_manifest, read_plan
from mealv2.label_set.shard import APPENDED_PREFIX
from mealv2.storage.urls import shown
from pipeline import console
from pipeline.config import LabelsInfoConfig
from pipeline.labelling.store import local_folder

_SHARD = re.compile(r"(\w+)-\d+(-views-\d+-\d+)?\.h5")


def run(config: LabelsInfoConfig) -> dict[str, Any]:
    """Describe a set, one that is not finished too; return the report. Raises LabelSetError.

    No labels are read, and of each file no more than its head: a large set takes no longer.
    """
    folder = local_folder(config, config.labels, require_complete=False)
    manifest_is_there, plan_is_there = (
        (folder / name).exists() for name in (label_set.MANIFEST_NAME, label_set.PLAN_NAME)
    )
    is_finished = manifest_is_there or not plan_is_there
    manifest = read_manifest(folder) if is_finished else {"plan": read_plan(folder)}
    plan = manifest["plan"]
    report = {
        "labels": shown(config.labels),
        "finished": is_finished,
        "format_version": plan["format_version"],
        "plan_sha256": manifest.get("plan_sha256"),
        "classes": len(plan["classes"]),
        "teachers": [teacher["model"] for teacher in plan.get("teachers", [])],
        "encoding": plan.get("labels"),
        "img_size": plan["img_size"],
        "derived": plan.get("derived"),
    }
    _print_plan(folder, plan)
    if not is_finished:
        return report | {"roles": _unfinished(folder, plan)}
    splits = {name: _split(folder, manifest, name) for name in manifest["roles"]}
    for name, split in splits.items():
        _print_split(name, split)
    return report | {"roles": splits}


def _line(name: str, value: str) -> None:
    console.info(f"{name:<15} {value}")


def _print_plan(folder: Path, plan: dict[str, Any]) -> None:
    views = plan["roles"].get("train", {}).get("views", {})
    _line("label set", str(folder))
    _line("format version", str(plan["format_version"]))
    _line("classes", str(len(plan["classes"])))
    _line("teachers", ", ".join(teacher["model"] for teacher in plan.get("teachers", [])))
    _line("labels keep", str(Encoding.of_plan(plan)))
    _line("image size", f"{plan['img_size']} pixels")
    _line("views", f"{views.get('name')}" + (f", seed {views['seed']}" if "seed" in views else ""))
    if "derived" in plan:
        _line("made by", f"{creating_command(plan)}: {plan['derived']['how']}")


def _print_split(name: str, split: dict[str, Any]) -> None:
    _line(
        name,
        f"{console.count(split['images'], 'image')} x {console.count(split['views'], 'view')}, "
        f"{console.count(split['shards'], 'shard')}, "
        f"{console.size_of(split['bytes'])}, {split['bytes_per_view']:.1f} bytes a label",
    )
    if split["skipped"]:
        _line("", f"{console.count(split['skipped'], 'image')} skipped")
    if split["appended_rows"]:
        _line("", f"{console.count(split['appended_rows'], 'label')} appended")
    if "accuracy" in split:
        _line("", f"ensemble top-1 {split['accuracy']['ensemble']['top1']:.2f}")


def _split(folder: Path, manifest: dict[str, Any], name: str) -> dict[str, Any]:
    """Describe a role of a finished set; raises LabelSetError for a file that is not there whole.

    Appended rows are counted apart, their bytes too.
    """
    entry = manifest["roles"][name]
    shards = [shard for block in entry["blocks"] for shard in block["shards"]]
    headers = [_header(folder / shard["name"], manifest) for shard in shards]
    appended = [
        _header(path, manifest) for path in sorted(folder.glob(f"{name}-{APPENDED_PREFIX}*.h5"))
    ]
    num_labels = sum(header["num_views"] * _rows(header) for header in headers)
    label_bytes = sum(header["columns"]["labels"]["shape"][0] for header in headers)
    return {
        "images": sum(map(_rows, headers[: len(entry["blocks"][0]["shards"])])),
        "views": max((block["views"][1] for block in entry["blocks"]), default=0),
        "shards": len(shards),
        "bytes": sum(shard["bytes"] for shard in shards),
        "label_bytes": label_bytes,
        "bytes_per_view": round(label_bytes / max(1, num_labels), 2),
        "skipped": len(entry["skipped"]),
        "appended_rows": sum(map(_rows, appended)),
        **({"accuracy": entry["accuracy"]} if "accuracy" in entry else {}),
    }


def _rows(header: dict[str, Any]) -> int:
    return int(header["columns"]["key_ends"]["shape"][0])


def _header(path: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    try:
        return read_header(path)
    except OSError as error:
        raise LabelSetError(
            f"cannot read shard {path}: {error.strerror}; run the same "
            f"{creating_command(manifest['plan'])} again to make it anew"
        ) from None


def _unfinished(folder: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """Say and return how many shards of each role are there."""
    found = [match for path in folder.iterdir() if (match := _SHARD.fullmatch(path.name))]
    splits = {}
    for name, split in plan["roles"].items():
        existing = sum(match[1] == name for match in found)
        splits[name] = {"images": split["num_images"], "shards": existing}
        of = ""
        if "derived" not in plan:
            splits[name]["of"] = sum(s.split == name for s in label_set.planned_shards(plan))
            of = f" of {splits[name]['of']}"
        _line(name, f"{split['num_images']} images, {existing}{of} shards are there")
    console.info(
        f"not finished: run the same {creating_command(plan)} again; `mealv2 labels status` says "
        f"more"
    )
    return splits
