"""`mealv2 labels status`: which shards are whole, from the files alone, and what to run next.

Never from a scheduler or a log: jobs may be running, dead, or running twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mealv2 import label_set
from mealv2.errors import ConfigError, IncompleteError, LabelSetError
from mealv2.label_set import MANIFEST_NAME, PLAN_NAME, CheckedShard, PlannedShard, creating_command
from mealv2.label_set.shard import APPENDED_PREFIX
from mealv2.storage.atomic import TEMPORARY_PREFIX, write_atomic
from mealv2.storage.json_format import json_sha256
from mealv2.storage.urls import is_url, shown
from pipeline import console
from pipeline.config import LabelsStatusConfig
from pipeline.labelling.manifest import (
    MISSING,
    block_views,
    check_shards,
    count_incomplete,
    temporary_files,
)
from pipeline.labelling.store import local_folder

_SHOWN = 20  # damaged shards that are said one by one


@dataclass(frozen=True)
class _Block:
    """Shards of the same views of a role, and what was found of each."""

    split: str
    views: range
    found: dict[str, CheckedShard | str]

    @property
    def complete(self) -> list[dict[str, Any]]:
        """What a manifest says of those that are whole."""
        return [shard.entry for shard in self.found.values() if isinstance(shard, CheckedShard)]

    @property
    def broken(self) -> dict[str, str]:
        """Why the others are not."""
        return {name: why for name, why in self.found.items() if isinstance(why, str)}

    def report(self) -> dict[str, Any]:
        damaged = {name: why for name, why in self.broken.items() if why != MISSING}
        return {
            "role": self.split,
            "views": [self.views.start, self.views.stop],
            "shards": len(self.found),
            "whole": len(self.complete),
            "missing": [name for name, why in self.broken.items() if why == MISSING],
            "damaged": damaged,
            "images": sum(entry["images"] for entry in self.complete),
            "bytes": sum(entry["bytes"] for entry in self.complete),
        }


def run(config: LabelsStatusConfig) -> dict[str, Any]:
    """Look at every file of a set; return the report. Raises LabelSetError for what is no set.

    Raises IncompleteError, with the report, where shards or the manifest are lacking, ConfigError
    for a --list that cannot be written.
    """
    if config.list_ is not None:
        _check_shard_list(config.list_)
    folder = local_folder(config, config.labels, require_complete=False)
    plan = _plan(folder)
    plan_sha256 = json_sha256(plan)
    blocks = [
        _Block(
            shards[0].split,
            shards[0].views,
            dict(
                zip(
                    (s.name for s in shards), check_shards(folder, shards, plan_sha256), strict=True
                )
            ),
        )
        for shards in _shards_of(folder, plan)
    ]
    # read after the files, so that it is not one of before
    listed = [(s["name"], s["sha256"]) for block in _listed(folder, plan) for s in block["shards"]]
    # views that are still being added do not count: without them it is a set as well
    counted = [block for block in blocks if not (block.views.start and block.broken)]
    is_finished = bool(listed) and sorted(listed) == sorted(
        (entry["name"], entry["sha256"]) for block in counted for entry in block.complete
    )
    incomplete, next_command = _next(config, plan, blocks, is_finished=is_finished)
    if config.list_ is not None:
        write_atomic(config.list_, "".join(f"{name}\n" for name in incomplete).encode())
    names = {name for block in blocks for name in block.found}
    report = {
        "labels": shown(config.labels),
        "finished": is_finished,
        "blocks": [block.report() for block in blocks],
        "bytes": sum(entry["bytes"] for block in blocks for entry in block.complete),
        # the cache removes those of copies
        "strays": {} if is_url(config.labels) else temporary_files(folder),
        "others": _unlisted_files(folder, names),
        "next": next_command,
    }
    _print_report(report)
    if next_command is None:
        return report
    broken = {name: why for block in blocks for name, why in block.broken.items()}
    problem = (
        f"{count_incomplete(broken)} of {console.count(len(names), 'shard')}"
        if broken
        else "no manifest of its shards"
    )
    raise IncompleteError(
        f"{shown(config.labels)} is not finished: {problem}; next: {next_command}", report
    )


def _check_shard_list(path: Path) -> None:
    """Raise ConfigError for a --list that could not be written when all was looked at."""
    if path.is_dir():
        raise ConfigError(f"--list {path} is a folder; give the name of a file")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--list {path}: there is no folder {path.parent}; make it first")


def _plan(folder: Path) -> dict[str, Any]:
    """Return the plan of a set, which the manifest repeats."""
    try:
        return label_set.read_plan(folder)
    except LabelSetError:
        if not (folder / MANIFEST_NAME).exists():
            raise
        return dict(label_set.read_manifest(folder)["plan"])


def _shards_of(folder: Path, plan: dict[str, Any]) -> list[list[PlannedShard]]:
    """Return the shards of each block: of the plan, then of views that were added or begun.

    The plan of a set made of others does not say them, but its manifest does.
    """
    blocks = []
    for split in sorted(plan["roles"]):
        listed = _listed(folder, plan, split)
        if listed and "derived" in plan:
            views = range(*listed[0]["views"])
            first = [PlannedShard(split, n, views, None) for n in range(len(listed[0]["shards"]))]
        else:
            first = [shard for shard in _planned(folder, plan) if shard.split == split]
        blocks.append(first)
        stop = first[0].views.stop
        started = [range(*block["views"]) for block in listed[1:]] + block_views(folder, split)
        for views in started:
            if views.start == stop:  # others do not follow: they are not of the set
                blocks.append([replace(shard, views=views) for shard in first])
                stop = views.stop
    return blocks


def _listed(folder: Path, plan: dict[str, Any], split: str | None = None) -> list[dict[str, Any]]:
    """Return the blocks that a manifest of this plan lists, of one role or of all."""
    try:
        manifest = label_set.read_manifest(folder)
    except LabelSetError:
        return []
    if manifest["plan"] != plan:
        return []
    entries = manifest["roles"]
    return [block for name in entries if split in (None, name) for block in entries[name]["blocks"]]


def _planned(folder: Path, plan: dict[str, Any]) -> list[PlannedShard]:
    try:
        return label_set.planned_shards(plan)
    except LabelSetError as error:
        raise LabelSetError(f"{folder}: {error}") from None


def _next(
    config: LabelsStatusConfig,
    plan: dict[str, Any],
    blocks: Sequence[_Block],
    *,
    is_finished: bool,
) -> tuple[list[str], str | None]:
    """Return which shards the next command makes, and that command; None for a finished set."""
    folder = shown(config.labels)
    added = [block for block in blocks if block.views.start > 0]
    incomplete = [name for block in blocks if block not in added for name in block.broken]
    if incomplete:
        return incomplete, _again(config, plan)
    incomplete = [name for block in added for name in block.broken]
    if incomplete or (added and not is_finished and "derived" in plan):
        words = f"mealv2 labels add-views {folder} --num-views {added[-1].views.stop}"
        return incomplete, f"`{words} --data-dir …{_list_flag(config)}`"
    return [], None if is_finished else f"`mealv2 labels finish {folder}`"


def _again(config: LabelsStatusConfig, plan: dict[str, Any]) -> str:
    """Return the command that makes what is lacking, with what the plan knows of its words."""
    if "derived" in plan:
        return f"the same {creating_command(plan)} again"
    teachers = "".join(f" --teacher {_spec(teacher['model'])}" for teacher in plan["teachers"])
    num_views = plan["roles"]["train"]["num_views"]
    words = f"mealv2 precompute --data-dir …{teachers} --num-views {num_views}"
    return f"`{words} … --output {shown(config.labels)}{_list_flag(config)}`, as before"


def _spec(model: str) -> str:
    """Return how a teacher is given: one without a tag has weights of its own somewhere."""
    return model if "." in model else f"{model}=…"


def _list_flag(config: LabelsStatusConfig) -> str:
    return "" if config.list_ is None else f" --shard-list {config.list_}"


def _unlisted_files(folder: Path, names: set[str]) -> list[str]:
    """Return which other files lie in the folder: neither the set's nor temporary ones."""
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
    rows = [["", "views", "shards", "whole", "missing", "damaged", "size"]]
    for block in report["blocks"]:
        first, stop = block["views"]
        counts = [len(block["missing"]), len(block["damaged"])]
        numbers = map(str, [block["shards"], block["whole"], *counts])
        rows.append(
            [block["role"], f"{first}-{stop - 1}", *numbers, console.size_of(block["bytes"])]
        )
    console.info(console.table(rows))
    damaged = [why for block in report["blocks"] for why in block["damaged"].values()]
    for why in damaged[:_SHOWN]:
        console.info(why)
    if len(damaged) > _SHOWN:
        console.info(f"and {console.count(len(damaged) - _SHOWN, 'more damaged shard')}")
    if temporaries := report["strays"]:
        oldest = max(temporary["age_s"] for temporary in temporaries.values())
        console.info(
            f"{console.count(len(temporaries), 'temporary file')} of jobs that were killed or "
            f"still "
            f"run, the oldest {console.duration(oldest)} old"
        )
    if unlisted := report["others"]:
        console.info(
            f"not the set's: {console.count(len(unlisted), 'file')} "
            f"({console.first_names(unlisted)})"
        )
    if report["finished"]:
        console.info("finished: the manifest is there, of these files")
