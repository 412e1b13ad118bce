"""Check the shards of a label set and write its manifest, from the files alone."""

import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from mealv2 import label_set
from mealv2.errors import LabelSetError
from mealv2.label_set import CheckedShard, PlannedShard, ShardFile, creating_command
from mealv2.labelling.store import Store
from mealv2.messages import info, progress
from mealv2.runtime import library_versions
from mealv2.storage.atomic import TEMPORARY_PREFIX, file_sha256
from mealv2.storage.json_format import json_sha256
from mealv2.text import count, first_names, table, use_display_names

MISSING = "missing"
_NUM_READERS = 4  # threads that read shards
_OLD_S = 86400.0  # no running job still writes a temporary file of this age


def finalize(store: Store, plan: dict[str, Any], *, batch_size: int | None) -> dict[str, Any]:
    """Write the manifest of a set whose shards other processes made; return the report.

    Logs the accuracy of the teachers. Raises as write_manifest.
    """
    report = report_of(store, write_manifest(store, plan, batch_size=batch_size))
    if "accuracy" in report:
        log_accuracy(report["accuracy"], len(plan["classes"]))
    return report


def write_manifest(
    store: Store,
    plan: dict[str, Any],
    *,
    batch_size: int | None = None,
    listed: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Check every shard of a plan; write and return the manifest.

    The manifest lists complete blocks of added views too; ``listed`` are the SHA-256 that some of
    their files must have, by name. ``batch_size`` None keeps the value of an existing manifest.
    Raises LabelSetError naming the shards that are missing or damaged.
    """
    shards = planned_shards(store.location, plan)
    store.fetch_all()
    folder, plan_sha256 = store.folder, json_sha256(plan)
    before = label_set.listed_sha256(folder, plan_sha256)
    found = check_shards(folder, shards, plan_sha256)
    if incomplete := incomplete_of(found):
        raise LabelSetError(
            f"{store.location}: {count_incomplete(incomplete)} of "
            f"{count(len(shards), 'shard')} ({first_names(incomplete)}); run the "
            f"same {creating_command(plan)} again, then `mealv2 labels finish {store.location}`"
        )
    splits = {}
    for name, split in plan["roles"].items():
        of_split = complete_of({s.name: found[s.name] for s in shards if s.split == name})
        blocks = [(range(split["num_views"]), of_split)]
        splits[name] = describe_split(folder, plan, name, blocks, listed=listed)
    _log_replaced(before, splits)
    batch_size = batch_size or recorded_batch_size(folder)
    optional = {} if batch_size is None else {"batch_size": batch_size}
    manifest = label_set.write_manifest(
        folder, plan, roles=splits, versions=library_versions(), **optional
    )
    store.upload(label_set.MANIFEST_NAME, replace=True)
    _log_temporary_files(store)
    return manifest


def planned_shards(location: str, plan: dict[str, Any]) -> list[PlannedShard]:
    """Return the shards of a plan; raises LabelSetError for a plan that does not list them."""
    try:
        return label_set.planned_shards(plan)
    except LabelSetError as error:
        raise LabelSetError(f"{location}: {error}") from None


def check_shards(
    folder: Path, shards: Sequence[PlannedShard], plan_sha256: str
) -> dict[str, CheckedShard | str]:
    """Return every shard by name: checked, or why it is missing or damaged."""
    with ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="checking") as threads:
        found = threads.map(partial(_check_shard, folder, plan_sha256=plan_sha256), shards)
        checked = progress(found, total=len(shards), what="checking", unit="shards")
        return {shard.name: result for shard, result in zip(shards, checked, strict=True)}


def _check_shard(folder: Path, shard: PlannedShard, *, plan_sha256: str) -> CheckedShard | str:
    try:
        return label_set.check_shard(folder, shard, plan_sha256)
    except FileNotFoundError:
        return MISSING
    except LabelSetError as error:
        return use_display_names(str(error))
    except OSError as error:
        return f"cannot read {folder / shard.name}: {error.strerror}"


def require_complete(
    folder: Path, shards: Sequence[PlannedShard], plan_sha256: str
) -> list[CheckedShard]:
    """Check shards of this run; raises LabelSetError if one is missing or damaged."""
    found = check_shards(folder, shards, plan_sha256)
    for name in incomplete_of(found):
        raise LabelSetError(
            f"shard {folder / name} was removed or damaged after it was written; run the same "
            "command again"
        )
    return complete_of(found)


def complete_of(found: Mapping[str, CheckedShard | str]) -> list[CheckedShard]:
    """Return the complete shards that ``check_shards`` found."""
    return [shard for shard in found.values() if isinstance(shard, CheckedShard)]


def incomplete_of(found: Mapping[str, CheckedShard | str]) -> dict[str, str]:
    """Return why the other shards are missing or damaged, by name."""
    return {name: why for name, why in found.items() if isinstance(why, str)}


def count_incomplete(incomplete: Mapping[str, str]) -> str:
    """Return the numbers of missing and of damaged shards as text: "2 missing and 1 damaged"."""
    num_missing = sum(why == MISSING for why in incomplete.values())
    counts = {"missing": num_missing, "damaged": len(incomplete) - num_missing}
    return " and ".join(f"{count} {kind}" for kind, count in counts.items() if count)


def describe_split(
    folder: Path,
    plan: dict[str, Any],
    split: str,
    blocks: Sequence[tuple[range, Sequence[CheckedShard]]],
    *,
    listed: Mapping[str, str],
) -> dict[str, Any]:
    """Return the manifest entry of a split: its blocks of views, and complete added ones."""
    described = [describe_block(views, shards) for views, shards in blocks]
    described += _added_blocks(folder, split, described[-1], json_sha256(plan), listed)
    _, first = blocks[0]
    skipped = {key: image["reason"] for s in first for key, image in s.header["skipped"].items()}
    if skipped:
        images = count(len(skipped), "image")
        info(f"{split}: {images} skipped, listed in manifest.json")
    has_counts = all(shard.header["counts"] for shard in first)  # of correct predictions
    hashes = {key: value for shard in first for key, value in shard.hashes.items()}
    content = label_set.content_of(hashes)
    return {
        "blocks": described,
        "num_images": sum(shard.num_images for shard in first),
        "skipped": skipped,
        **({"content": content} if content else {}),
        **({"accuracy": accuracy_of(plan, first)} if has_counts else {}),
    }


def _log_replaced(before: Mapping[str, str], splits: Mapping[str, Any]) -> None:
    """Log which shards have other bytes than the previous manifest lists."""
    now = {shard["name"]: shard["sha256"] for shard in label_set.listed_shards(splits)}
    replaced = [name for name in now.keys() & before.keys() if now[name] != before[name]]
    if replaced:
        info(
            f"replaced since the previous manifest: {count(len(replaced), 'shard')} "
            f"({first_names(sorted(replaced))})"
        )


# --- blocks of views ------------------------------------------------------------------------------


def is_complete(
    folder: Path, shard: PlannedShard, plan_sha256: str, listed_sha256: str | None = None
) -> bool:
    """Return whether a shard exists and is complete; log why a damaged one is not.

    ``listed_sha256`` is the SHA-256 of the file in a manifest. Only it covers all bytes of the
    file; the checksums in the shard do not cover those that only HDF5 reads.
    """
    path = folder / shard.name
    try:
        label_set.check_planned_shard(ShardFile(path), shard, plan_sha256)
        if listed_sha256 in (None, file_sha256(path)):
            return True
        info(f"shard {path} is not the one in the manifest; making it again")
    except FileNotFoundError:
        pass
    except LabelSetError as error:
        info(f"{error}; making it again")
    return False


def describe_block(views: range, shards: Sequence[CheckedShard]) -> dict[str, Any]:
    """Return the manifest entry of a block of views."""
    return {"views": [views.start, views.stop], "shards": [shard.entry for shard in shards]}


def _added_blocks(
    folder: Path, split: str, last: dict[str, Any], plan_sha256: str, listed: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Return the complete blocks of views that follow the block ``last``."""
    stop = last["views"][1]
    blocks, left_out = [], list[range]()
    for views in block_views(folder, split):
        if views.start != stop:
            left_out.append(views)
            continue
        shards = [PlannedShard(split, n, views, None) for n in range(len(last["shards"]))]
        complete = complete_of(check_shards(folder, shards, plan_sha256))
        if len(complete) == len(shards) and all(
            listed.get(s.entry["name"], s.entry["sha256"]) == s.entry["sha256"] for s in complete
        ):
            blocks.append(describe_block(views, complete))
            stop = views.stop
        else:
            left_out.append(views)
    left_out = [views for views in left_out if views.stop > stop]
    if left_out:
        ranges = first_names([f"{views.start} to {views.stop - 1}" for views in left_out])
        info(
            f"not listed: views {ranges}; those from {stop} on are not complete; "
            "`mealv2 labels add-views` completes them"
        )
    return blocks


def block_views(folder: Path, split: str) -> list[range]:
    """Return the ranges of views in the names of added shards, in order."""
    named = (re.fullmatch(rf"{split}-\d+-views-(\d+)-(\d+)\.h5", p.name) for p in folder.iterdir())
    found = {range(int(name[1]), int(name[2]) + 1) for name in named if name}
    return sorted(found, key=lambda views: (views.start, views.stop))


# --- accuracy, report, temporary files ------------------------------------------------------------


def accuracy_of(plan: dict[str, Any], shards: Sequence[CheckedShard]) -> dict[str, Any]:
    """Return the top-1 and top-5 accuracy in percent of every teacher and of the ensemble."""
    images = sum(shard.num_images for shard in shards)
    top1, top5 = (
        np.sum([shard.header["counts"][name] for shard in shards], axis=0) * 100.0 / max(1, images)
        for name in ("top1", "top5")
    )
    figures = [
        {"top1": round(float(a), 4), "top5": round(float(b), 4)}
        for a, b in zip(top1, top5, strict=True)
    ]
    named = zip(plan["teachers"], figures[:-1], strict=True)
    return {
        "num_images": images,
        "teachers": [{"model": teacher["model"], **figure} for teacher, figure in named],
        "ensemble": figures[-1],
    }


def log_accuracy(accuracy: dict[str, Any], num_classes: int) -> None:
    """Log the accuracy of the teachers as a table."""
    ensemble = accuracy["ensemble"]
    known = [*((t["model"], t) for t in accuracy["teachers"]), ("ensemble", ensemble)]
    rows = [[name, f"{f['top1']:.2f}", f"{f['top5']:.2f}"] for name, f in known]
    info(table([["teachers on the validation split", "top-1", "top-5"], *rows]))
    if ensemble["top1"] < 200.0 / num_classes:
        info(
            "the ensemble is hardly better than chance: check that the teachers were trained on "
            "these classes, in this order"
        )


def report_of(store: Store, manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the report of precompute for a set with a manifest."""
    splits = manifest["roles"]
    train = splits["train"]
    return {
        "labels": store.location,
        "images": train["num_images"],
        "views": train["num_images"] * manifest["plan"]["roles"]["train"]["num_views"],
        "skipped": sum(len(entry["skipped"]) for entry in splits.values()),
        "bytes": sum(shard["bytes"] for shard in label_set.listed_shards(splits)),
        **({"accuracy": splits["val"]["accuracy"]} if "val" in splits else {}),
    }


def temporary_files(folder: Path) -> dict[str, dict[str, float]]:
    """Return the size in bytes and the age in seconds of each temporary file in a folder."""
    found: dict[str, dict[str, float]] = {}
    for path in sorted(folder.glob(f"{TEMPORARY_PREFIX}*")):
        try:
            stat = path.stat()
        except OSError:
            continue  # it has its final name now
        age_s = max(0.0, time.time() - stat.st_mtime)
        found[path.name] = {"bytes": stat.st_size, "age_s": round(age_s, 1)}
    return found


def _log_temporary_files(store: Store) -> None:
    """Log the temporary files of a folder; they stay, because a running job may own them."""
    files = temporary_files(store.folder)
    if not files or not store.keeps_temporary_files:
        return
    num_old = sum(file["age_s"] > _OLD_S for file in files.values())
    info(
        f"{store.location} holds {count(len(files), 'temporary file')} of jobs that were "
        f"killed or still run ({TEMPORARY_PREFIX}*), {num_old} of them older than a day; remove "
        "them when no job runs"
    )


def recorded_batch_size(folder: Path) -> int | None:
    """Return the batch size in the manifest of a folder, None if there is none."""
    try:
        return label_set.read_manifest(folder).get("batch_size")
    except LabelSetError:
        return None
