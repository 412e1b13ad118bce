"""What is whole in the folder of a plan, and the manifest: written from the files as they are."""

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from mealv2 import label_set
from mealv2.errors import LabelSetError
from mealv2.files import TEMPORARY_PREFIX, file_sha256, json_sha256
from mealv2.label_set import CheckedShard, PlannedShard, ShardFile, maker_of
from pipeline import copies, logs, runtime
from pipeline.mirror import Folder, Store

MISSING = "missing"
_READERS = 4  # shards that are read at once
_OLD_S = 86400.0  # a temporary file that no running job can still be writing


def finish(
    store: Store,
    plan: dict[str, Any],
    *,
    batch_size: int | None = None,
    listed: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Check every shard of a plan; write and return the manifest. Makes no shard.

    Blocks of added views that are there whole are listed too; ``listed`` are the SHA-256 that some
    of their files must have, by name. ``batch_size`` is what the teachers answered in; None keeps
    what a manifest said. Raises LabelSetError naming what is not whole.
    """
    store.bring_all()
    folder, plan_sha256 = store.folder, json_sha256(plan)
    before = label_set.listed_sha256(folder, plan_sha256)
    shards = label_set.planned_shards(plan)
    checked = dict(zip(shards, check_all(folder, shards, plan_sha256), strict=True))
    if broken := {s.name: why for s, why in checked.items() if isinstance(why, str)}:
        raise LabelSetError(
            f"{store.place}: {how_many(broken)} of {logs.count(len(shards), 'shard')} "
            f"({some(broken)}); run the same {maker_of(plan)} again, then `mealv2 labels finish "
            f"{store.place}`"
        )
    whole = [(s.role, found) for s, found in checked.items() if isinstance(found, CheckedShard)]
    entries = {
        role: _entry(folder, plan, role, [c for name, c in whole if name == role], listed)
        for role in plan["roles"]
    }
    say_other_files(before, entries)
    known = {"batch_size": batch_size or batch_size_of(folder)}
    manifest = label_set.write_manifest(
        folder,
        plan,
        roles=entries,
        versions=runtime.versions(),
        **{name: value for name, value in known.items() if value is not None},
    )
    store.publish(label_set.MANIFEST_NAME, replace=True)
    say_strays(store)
    return manifest


def finish_and_tell(
    store: Store, plan: dict[str, Any], *, batch_size: int | None
) -> dict[str, Any]:
    """Finish a set that jobs made, say how good its teachers are, and return its report."""
    report = report_of(store, finish(store, plan, batch_size=batch_size))
    if "accuracy" in report:
        say_accuracy(report["accuracy"], len(plan["classes"]))
    return report


def check_all(
    folder: Path, shards: Sequence[PlannedShard], plan_sha256: str
) -> Iterator[CheckedShard | str]:
    """Yield of every shard what a manifest says of it, or why it is not whole."""
    with ThreadPoolExecutor(_READERS, thread_name_prefix="checking") as threads:
        found = threads.map(partial(_checked, folder, plan_sha256=plan_sha256), shards)
        yield from logs.progress(found, total=len(shards), what="checking", unit="shards")


def _checked(folder: Path, shard: PlannedShard, *, plan_sha256: str) -> CheckedShard | str:
    try:
        return label_set.check_shard(folder, shard, plan_sha256)
    except FileNotFoundError:
        return MISSING
    except LabelSetError as error:
        return copies.told(str(error))
    except OSError as error:
        return f"cannot read {folder / shard.name}: {error.strerror}"


def how_many(broken: Mapping[str, str]) -> str:
    """Return how many shards are missing and how many damaged, in words."""
    num_missing = sum(why == MISSING for why in broken.values())
    counts = {"missing": num_missing, "damaged": len(broken) - num_missing}
    return " and ".join(f"{count} {what}" for what, count in counts.items() if count)


def some(names: Sequence[str] | Mapping[str, str]) -> str:
    """Return the first few of names."""
    return ", ".join([*names][:3]) + (", …" if len(names) > 3 else "")


def _entry(
    folder: Path,
    plan: dict[str, Any],
    role: str,
    shards: Sequence[CheckedShard],
    listed: Mapping[str, str],
) -> dict[str, Any]:
    """Return what the manifest says of a role."""
    skipped = skipped_in(shards)
    if skipped:
        logs.say(f"{role}: {logs.count(len(skipped), 'image')} skipped, listed in manifest.json")
    views = [0, plan["roles"][role]["num_views"]]
    block = {"views": views, "shards": [shard.entry for shard in shards]}
    more = added_blocks(folder, role, block, json_sha256(plan), listed=listed)
    return {
        "blocks": [block, *more],
        "num_images": sum(shard.num_images for shard in shards),
        "skipped": skipped,
        **({"accuracy": accuracy_of(plan, shards)} if role == "val" else {}),
    }


def skipped_in(files: Sequence[ShardFile | CheckedShard]) -> dict[str, str]:
    """Return why images have no labels, by key."""
    return {
        key: missing["reason"] for file in files for key, missing in file.header["skipped"].items()
    }


def say_other_files(before: Mapping[str, str], roles: Mapping[str, Any]) -> None:
    """Say of which shards a manifest that was there told other bytes."""
    blocks = [block for role in roles.values() for block in role["blocks"]]
    now = {shard["name"]: shard["sha256"] for block in blocks for shard in block["shards"]}
    other = [name for name in now.keys() & before.keys() if now[name] != before[name]]
    if other:
        logs.say(
            f"made anew since the manifest that was there: {logs.count(len(other), 'shard')} "
            f"({some(sorted(other))})"
        )


# --- blocks of views ------------------------------------------------------------------------------


def whole_shard(
    folder: Path, shard: PlannedShard, plan_sha256: str, listed_sha256: str | None = None
) -> ShardFile | None:
    """Return a shard that is there and checks, or None and say why.

    ``listed_sha256`` is what a manifest says of its bytes, those that only HDF5 reads included.
    """
    path = folder / shard.name
    try:
        file = ShardFile(path)
        label_set.refuse_broken(file, shard, plan_sha256)
        is_listed = listed_sha256 in (None, file_sha256(path))
    except FileNotFoundError:
        return None
    except LabelSetError as error:
        logs.say(f"{error}; making it anew")
        return None
    if not is_listed:
        logs.say(f"shard {path} is not the one in the manifest; making it anew")
        return None
    return file


def describe_block(views: range, files: Sequence[ShardFile]) -> dict[str, Any]:
    """Return what the manifest says of the shards of a block of views."""
    listed = [label_set.describe_file(f.path, num_images=f.num_images) for f in files]
    return {"views": [views.start, views.stop], "shards": listed}


def added_blocks(
    folder: Path,
    role: str,
    last: dict[str, Any],
    plan_sha256: str,
    *,
    listed: Mapping[str, str],
) -> list[dict[str, Any]]:
    """Return the blocks of views that were added after ``last`` and are there whole.

    ``listed`` are the SHA-256 that some files must have, by name.
    """
    stop = last["views"][1]
    blocks = []
    for views in block_views(folder, role):
        if views.start != stop:
            continue
        shards = [PlannedShard(role, n, views, None) for n in range(len(last["shards"]))]
        found = check_all(folder, shards, plan_sha256)
        entries = [shard.entry for shard in found if isinstance(shard, CheckedShard)]
        if len(entries) == len(shards) and all(
            listed.get(e["name"], e["sha256"]) == e["sha256"] for e in entries
        ):
            blocks.append({"views": [views.start, views.stop], "shards": entries})
            stop = views.stop
        else:
            logs.say(
                f"views {views.start} to {views.stop - 1} are not all there, and left out; "
                "`mealv2 labels add-views` goes on with them"
            )
    return blocks


def block_views(folder: Path, role: str) -> list[range]:
    """Return the ranges of views that added shards in a folder are named after, in order."""
    named = (re.fullmatch(rf"{role}-\d+-views-(\d+)-(\d+)\.h5", p.name) for p in folder.iterdir())
    found = {range(int(name[1]), int(name[2]) + 1) for name in named if name}
    return sorted(found, key=lambda views: (views.start, views.stop))


# --- what is said of a set ------------------------------------------------------------------------


def accuracy_of(
    plan: dict[str, Any], files: Sequence[ShardFile] | Sequence[CheckedShard]
) -> dict[str, Any]:
    """Return top-1/top-5 in percent of every teacher and of the ensemble, from counts."""
    images = sum(file.num_images for file in files)
    top1, top5 = (
        np.sum([file.header["counts"][name] for file in files], axis=0) * 100.0 / max(1, images)
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


def say_accuracy(accuracy: dict[str, Any], num_classes: int) -> None:
    """Say how good the teachers are."""
    ensemble = accuracy["ensemble"]
    known = [*((t["model"], t) for t in accuracy["teachers"]), ("ensemble", ensemble)]
    rows = [[name, f"{f['top1']:.2f}", f"{f['top5']:.2f}"] for name, f in known]
    logs.say(logs.table([["teachers on the validation split", "top-1", "top-5"], *rows]))
    if ensemble["top1"] < 200.0 / num_classes:
        logs.say("the ensemble is near chance: are these its classes, in this order?")


def report_of(store: Store, manifest: dict[str, Any]) -> dict[str, Any]:
    """Return what stage one says of a set that is finished."""
    entries = manifest["roles"]
    train = entries["train"]
    shards = [s for entry in entries.values() for b in entry["blocks"] for s in b["shards"]]
    return {
        "labels": store.place,
        "images": train["num_images"],
        "views": train["num_images"] * manifest["plan"]["roles"]["train"]["num_views"],
        "skipped": sum(len(entry["skipped"]) for entry in entries.values()),
        "bytes": sum(shard["bytes"] for shard in shards),
        **({"accuracy": entries["val"]["accuracy"]} if "val" in entries else {}),
    }


def strays_of(folder: Path) -> dict[str, dict[str, float]]:
    """Return the temporary files in a folder, with their bytes and their age in seconds."""
    found: dict[str, dict[str, float]] = {}
    for path in sorted(folder.glob(f"{TEMPORARY_PREFIX}*")):
        try:
            stat = path.stat()
        except OSError:
            continue  # it has its final name now
        age_s = max(0.0, time.time() - stat.st_mtime)
        found[path.name] = {"bytes": stat.st_size, "age_s": round(age_s, 1)}
    return found


def say_strays(store: Store) -> None:
    """Say which temporary files are left over; whose they are nobody knows, so they stay.

    Those of copies are no user's business: the cache removes them.
    """
    if not isinstance(store, Folder):
        return
    strays = strays_of(store.folder)
    if not strays:
        return
    old = [name for name, stray in strays.items() if stray["age_s"] > _OLD_S]
    logs.say(
        f"{store.place} holds {logs.count(len(strays), 'temporary file')} of jobs that were killed "
        f"or still run ({TEMPORARY_PREFIX}*), {len(old)} of them older than a day; remove them "
        "when none runs"
    )


def batch_size_of(folder: Path) -> int | None:
    """Return the batch size that the manifest in a folder says its labels were made with."""
    try:
        return label_set.read_manifest(folder).get("batch_size")
    except LabelSetError:
        return None
