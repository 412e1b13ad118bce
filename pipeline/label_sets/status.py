"""`mealv2 labels status`: which shards are complete, and the command to run next.

The files alone decide, not a scheduler or a log: jobs may be running, dead, or running twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mealv2 import label_set
from mealv2.errors import ConfigError, IncompleteError, LabelSetError
from mealv2.label_set import MANIFEST_NAME, PLAN_NAME, CheckedShard, PlannedShard, creating_command
from mealv2.label_set.shard import APPENDED_PREFIX
from mealv2.labelling import manifest
from mealv2.storage.atomic import TEMPORARY_PREFIX, write_atomic
from mealv2.storage.json_format import json_sha256
from mealv2.storage.urls import is_url, shown
from pipeline import console
from pipeline.config import LabelsStatusConfig
from pipeline.labelling.store import local_folder

_MAX_LOGGED = 20  # damaged shards that are logged one by one


@dataclass(frozen=True)
class _Block:
    """Shards of the same views of a split: checked, or why they are missing or damaged."""

    split: str
    views: range
    shards: dict[str, CheckedShard | str]

    @property
    def complete(self) -> list[dict[str, Any]]:
        """The manifest entries of the complete shards."""
        return [shard.entry for shard in manifest.complete_of(self.shards)]

    @property
    def num_hashed(self) -> int:
        """The number of images in complete shards that have a content hash."""
        return sum(len(shard.hashes) for shard in manifest.complete_of(self.shards))

    @property
    def incomplete(self) -> dict[str, str]:
        """Why the other shards are not complete, by name."""
        return manifest.incomplete_of(self.shards)

    def report(self) -> dict[str, Any]:
        complete, incomplete = self.complete, self.incomplete
        return {
            "role": self.split,
            "views": [self.views.start, self.views.stop],
            "shards": len(self.shards),
            "complete": len(complete),
            "missing": [name for name, why in incomplete.items() if why == manifest.MISSING],
            "damaged": {name: why for name, why in incomplete.items() if why != manifest.MISSING},
            "images": sum(entry["images"] for entry in complete),
            "content_hashes": self.num_hashed,
            "bytes": sum(entry["bytes"] for entry in complete),
        }


def run(config: LabelsStatusConfig) -> dict[str, Any]:
    """Check every file of a set; return the report.

    Raises LabelSetError if the folder has no label set, IncompleteError with the report if shards
    or the manifest are missing, ConfigError if --list cannot be written.
    """
    if config.list_ is not None:
        _check_list_path(config.list_)
    folder = local_folder(config, config.labels, require_complete=False, whole_files=True)
    plan = _plan(folder)
    plan_sha256 = json_sha256(plan)
    blocks = [
        _Block(shards[0].split, shards[0].views, manifest.check_shards(folder, shards, plan_sha256))
        for shards in _shards_by_block(folder, plan)
    ]
    # the manifest is read after the files: an older one could miss a new file
    listed = label_set.listed_sha256(folder, plan_sha256)
    # incomplete blocks of added views do not count: the set is finished without them
    counted = [block for block in blocks if not (block.views.start and block.incomplete)]
    complete = {e["name"]: e["sha256"] for block in counted for e in block.complete}
    is_finished = bool(listed) and listed == complete
    to_make, next_command = _next(config, plan, blocks, is_finished=is_finished)
    if config.list_ is not None:
        write_atomic(config.list_, "".join(f"{name}\n" for name in to_make).encode())
    report = {
        "labels": shown(config.labels),
        "finished": is_finished,
        "blocks": [block.report() for block in blocks],
        "bytes": sum(entry["bytes"] for block in blocks for entry in block.complete),
        # in a copy of a URL, the cache removes them
        "temporary_files": {} if is_url(config.labels) else manifest.temporary_files(folder),
        "unlisted_files": _unlisted_files(folder, {n for block in blocks for n in block.shards}),
        "next": next_command,
    }
    _print_report(report)
    if next_command is None:
        return report
    incomplete = {name: why for block in blocks for name, why in block.incomplete.items()}
    problem = "no manifest of its shards"
    if incomplete:
        shards = console.count(sum(len(block.shards) for block in blocks), "shard")
        problem = f"{manifest.count_incomplete(incomplete)} of {shards}"
    state = "is not finished"
    if is_finished:  # without added views, which `add-views` completes
        left_out = [f"{b.views.start} to {b.views.stop - 1}" for b in blocks if b.incomplete]
        state = f"is finished but for views {console.first_names(left_out)}"
    raise IncompleteError(
        f"{shown(config.labels)} {state}: {problem}; next: {next_command}", report
    )


def _check_list_path(path: Path) -> None:
    """Raise ConfigError if --list cannot be written, before the files are read."""
    if path.is_dir():
        raise ConfigError(f"--list {path} is a folder; give the name of a file")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--list {path}: there is no folder {path.parent}; make it first")


def _plan(folder: Path) -> dict[str, Any]:
    """Return the plan of a set from plan.json, or from the copy in the manifest."""
    try:
        return label_set.read_plan(folder)
    except LabelSetError:
        if not (folder / MANIFEST_NAME).exists():
            raise
        return dict(label_set.read_manifest(folder)["plan"])


def _shards_by_block(folder: Path, plan: dict[str, Any]) -> list[list[PlannedShard]]:
    """Return the shards of each block: of the plan, then of views that were added.

    The plan of a derived set does not list its shards, but its manifest does.
    """
    try:
        listed = label_set.read_manifest(folder)
    except LabelSetError:
        listed = {}
    roles = listed["roles"] if listed.get("plan") == plan else {}
    blocks = []
    for split in sorted(plan["roles"]):
        entries = roles[split]["blocks"] if split in roles else []
        views = [range(*entry["views"]) for entry in entries]
        if entries and "derived" in plan:
            numbers = range(len(entries[0]["shards"]))
            first = [PlannedShard(split, number, views[0], None) for number in numbers]
        else:
            first = [
                shard
                for shard in manifest.planned_shards(str(folder), plan)
                if shard.split == split
            ]
        blocks.append(first)
        stop = first[0].views.stop
        for added in views[1:] + manifest.block_views(folder, split):
            if added.start == stop:  # a block that does not follow is not part of the set
                blocks.append([replace(shard, views=added) for shard in first])
                stop = added.stop
    return blocks


def _next(
    config: LabelsStatusConfig, plan: dict[str, Any], blocks: Sequence[_Block], *, is_finished: bool
) -> tuple[list[str], str | None]:
    """Return the next command and the shards it makes; None for a finished set."""
    folder = shown(config.labels)
    list_flag = "" if config.list_ is None else f" --shard-list {config.list_}"
    added = [block for block in blocks if block.views.start > 0]
    if names := [name for block in blocks if block not in added for name in block.incomplete]:
        if "derived" in plan:
            return names, f"the same {creating_command(plan)} again"
        flags = "".join(f" --teacher {_spec(teacher['model'])}" for teacher in plan["teachers"])
        flags += f" --num-views {plan['roles']['train']['num_views']}"
        command = f"mealv2 precompute --data-dir …{flags} … --output {folder}{list_flag}"
        return names, f"`{command}`, with the same flags as before"
    names = [name for block in added for name in block.incomplete]
    if names or (added and not is_finished and "derived" in plan):
        command = f"mealv2 labels add-views {folder} --num-views {added[-1].views.stop}"
        return names, f"`{command} --data-dir …{list_flag}`"
    return [], None if is_finished else f"`mealv2 labels finish {folder}`"


def _spec(model: str) -> str:
    """Return the value of --teacher; a model without a weights tag has a local checkpoint."""
    if model.lower().endswith(".onnx"):
        return f"…/{model}"
    return model if "." in model else f"{model}=…"


def _unlisted_files(folder: Path, names: set[str]) -> list[str]:
    """Return the files in the folder that are neither part of the set nor temporary."""
    known = names | {MANIFEST_NAME, PLAN_NAME}
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.name not in known
        and not path.is_dir()
        and not path.name.startswith(TEMPORARY_PREFIX)
        and f"-{APPENDED_PREFIX}" not in path.name
    )


def _print_report(report: dict[str, Any]) -> None:
    rows = [["", "views", "shards", "complete", "missing", "damaged", "size"]]
    for block in report["blocks"]:
        first, stop = block["views"]
        counts = [block["shards"], block["complete"], len(block["missing"]), len(block["damaged"])]
        size = console.size_of(block["bytes"])
        rows.append([block["role"], f"{first}-{stop - 1}", *map(str, counts), size])
    console.info(console.table(rows))
    unhashed = [b for b in report["blocks"] if b["content_hashes"] < b["images"]]
    for block in unhashed:
        number = console.count(block["images"] - block["content_hashes"], "image")
        console.info(
            f"{block['role']}: {number} without a content hash, known by name and size only"
        )
    damaged = [why for block in report["blocks"] for why in block["damaged"].values()]
    for why in damaged[:_MAX_LOGGED]:
        console.info(why)
    if len(damaged) > _MAX_LOGGED:
        console.info(f"and {console.count(len(damaged) - _MAX_LOGGED, 'more damaged shard')}")
    if temporary := report["temporary_files"]:
        oldest = max(file["age_s"] for file in temporary.values())
        console.info(
            f"{console.count(len(temporary), 'temporary file')} of jobs that were killed or still "
            f"run, the oldest {console.duration(oldest)} old"
        )
    if unlisted := report["unlisted_files"]:
        files = console.count(len(unlisted), "file")
        console.info(f"not part of the set: {files} ({console.first_names(unlisted)})")
    if report["finished"]:
        console.info("finished: the manifest lists all complete files")
