"""`mealv2 labels info`: describe a label set from its manifest and the heads of its files."""

import re
from pathlib import Path
from typing import Any

from mealv2 import label_set
from mealv2.errors import LabelSetError
from mealv2.label_set import MANIFEST_NAME, PLAN_NAME, Encoding, creating_command
from mealv2.label_set.shard import APPENDED_PREFIX
from mealv2.label_set.split_size import num_rows, split_size
from mealv2.storage.urls import shown
from pipeline import console
from pipeline.config import LabelsInfoConfig
from pipeline.labelling.store import local_folder

_SHARD = re.compile(r"(\w+)-\d+(-views-\d+-\d+)?\.h5")


def run(config: LabelsInfoConfig) -> dict[str, Any]:
    """Describe a set, finished or not; return the report. Raises LabelSetError.

    Reads the heads of the files but no labels, so a large set takes no longer.
    """
    folder = local_folder(config, config.labels, require_complete=False)
    has_manifest, has_plan = ((folder / name).exists() for name in (MANIFEST_NAME, PLAN_NAME))
    is_finished = has_manifest or not has_plan  # with neither, read_manifest raises the error
    manifest = label_set.read_manifest(folder) if is_finished else {}
    plan = manifest["plan"] if is_finished else label_set.read_plan(folder)
    report = {
        "labels": shown(config.labels),
        "finished": is_finished,
        "format_version": plan["format_version"],
        "plan_sha256": manifest.get("plan_sha256"),
        "classes": len(plan["classes"]),
        "teachers": [teacher["model"] for teacher in plan.get("teachers", [])],
        "encoding": plan.get("labels"),
        "img_size": plan["img_size"],
        "teacher_img_sizes": [
            t.get("img_size", plan["img_size"]) for t in plan.get("teachers", [])
        ],
        "derived": plan.get("derived"),
    }
    views = plan["roles"].get("train", {}).get("views", {})
    seed = f", seed {views['seed']}" if "seed" in views else ""
    lines = {
        "label set": folder,
        "format version": plan["format_version"],
        "classes": len(plan["classes"]),
        "teachers": ", ".join(map(_teacher, plan.get("teachers", []))),
        "encoding": Encoding.of_plan(plan),
        "image size": f"{plan['img_size']} pixels",
        "views": f"{views.get('name')}{seed}",
    }
    if "derived" in plan:
        lines["made by"] = f"{creating_command(plan)}: {plan['derived']['how']}"
    for name, value in lines.items():
        _log(name, value)
    if not is_finished:
        return report | {"roles": _unfinished(folder, plan)}
    return report | {"roles": {name: _split(folder, manifest, name) for name in manifest["roles"]}}


def _teacher(teacher: dict[str, Any]) -> str:
    """Return the name of a teacher, and the size of its views if it has one of its own."""
    size = f" at {teacher['img_size']} pixels" if "img_size" in teacher else ""
    return f"{teacher['model']}{size}"


def _log(name: str, value: object) -> None:
    console.info(f"{name:<15} {value}")


def _split(folder: Path, manifest: dict[str, Any], name: str) -> dict[str, Any]:
    """Log and return the description of a split; raises LabelSetError for a damaged file.

    The bytes and rows of appended files are not in those of the shards.
    """
    entry = manifest["roles"][name]
    shards = label_set.listed_shards({name: entry})
    headers = [_header(folder / shard["name"]) for shard in shards]
    appended = sorted(folder.glob(f"{name}-{APPENDED_PREFIX}*.h5"))
    size = split_size(entry, headers)
    split = {
        "images": size.images,
        "views": size.views,
        "shards": size.shards,
        "bytes": size.bytes,
        "label_bytes": size.label_bytes,
        "bytes_per_view": round(size.bytes_per_view, 2),
        "skipped": len(entry["skipped"]),
        "content_hashes": entry.get("content", {}).get("images", 0),
        "appended_rows": sum(num_rows(_header(path)) for path in appended),
        **({"accuracy": entry["accuracy"]} if "accuracy" in entry else {}),
        **({"encoding_loss": size.loss._asdict()} if size.loss else {}),
    }
    images, views, shards_ = (console.count(split[f"{u}s"], u) for u in ("image", "view", "shard"))
    sizes = f"{console.size_of(split['bytes'])}, {split['bytes_per_view']:.1f} bytes a label"
    _log(name, f"{images} x {views}, {shards_}, {sizes}")
    if size.loss:
        _log("", f"KL of the labels {size.loss}")
    num_images, num_hashed = split["images"] + split["skipped"], split["content_hashes"]
    of = "all" if num_hashed == num_images else f"{num_hashed} of {num_images}"
    _log("", f"content hashes of {of} images" if num_hashed else "no content hashes of its images")
    if split["skipped"]:
        _log("", f"{console.count(split['skipped'], 'image')} skipped")
    if split["appended_rows"]:
        _log("", f"{console.count(split['appended_rows'], 'label')} appended")
    if "accuracy" in split:
        _log("", f"ensemble top-1 {split['accuracy']['ensemble']['top1']:.2f}")
    return split


def _header(path: Path) -> dict[str, Any]:
    advice = "`mealv2 labels verify` lists all damage, and what to do"
    try:
        return label_set.read_header(path)
    except LabelSetError as error:
        raise LabelSetError(f"{error}; {advice}") from None
    except OSError as error:
        raise LabelSetError(f"cannot read shard {path}: {error.strerror}; {advice}") from None


def _unfinished(folder: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """Log and return how many shards of each split exist."""
    found = [match for path in folder.iterdir() if (match := _SHARD.fullmatch(path.name))]
    splits = {}
    for name, split in plan["roles"].items():
        existing = sum(match[1] == name for match in found)
        splits[name] = {"images": split["num_images"], "shards": existing}
        of = ""
        if "derived" not in plan:
            splits[name]["of"] = sum(s.split == name for s in label_set.planned_shards(plan))
            of = f" of {splits[name]['of']}"
        _log(name, f"{split['num_images']} images, {existing}{of} shards")
    console.info(
        f"not finished: run the same {creating_command(plan)} again; "
        "`mealv2 labels status` shows details"
    )
    return splits
