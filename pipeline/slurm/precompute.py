"""`mealv2 slurm precompute`: an array over the shards that are missing, then the manifest."""

import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mealv2 import label_set
from mealv2.errors import ConfigError, LabelSetError
from mealv2.label_set import CheckedShard, PlannedShard
from mealv2.storage.atomic import list_folder
from mealv2.storage.json_format import json_sha256
from pipeline import console
from pipeline.config import PrecomputeConfig, SlurmPrecomputeConfig, StageCommand, plain
from pipeline.labelling.manifest import check_shards
from pipeline.labelling.plan import open_sources, plan_shards
from pipeline.labelling.store import Store, open_store
from pipeline.slurm import scripts, submitting
from pipeline.slurm.submitting import Round

Script = tuple[Path, str]  # where it lies, and its text
OWN_OPTIONS = ("job_index", "num_jobs", "shard_list", "dry_run")


def run(
    config: SlurmPrecomputeConfig, checked: Callable[[Iterable[str]], StageCommand]
) -> dict[str, Any] | str:
    """Submit what a label set lacks; return the report, or the scripts with --print.

    Raises MealError: nothing is submitted unless the stage's flags make a config, its images are
    there, and its folder is a label set's or empty.
    """
    stage = checked(config.flags)
    assert isinstance(stage.config, PrecomputeConfig)
    submitting.check_supported(stage, *OWN_OPTIONS)
    this = submitting.next_round(stage.config.output)
    store = open_store(stage.config, stage.config.output)
    out = plain(stage.config.output)
    missing, is_finished = _missing(stage.config, store)
    report = {"labels": out, "missing": len(missing), "array": None, "finish": None}
    if is_finished:
        console.info(f"{out}: nothing is missing, and its manifest is there; nothing to submit")
        return "" if config.print_ else report
    if not missing:
        console.info(f"{out}: nothing is missing but its manifest")
    array = _array(config, stage, this, len(missing)) if missing else None
    finish = _finish(config, stage.config, this)
    if config.print_:
        return _printed(config, array, finish)
    submitting.keep(this.path("precompute", "txt"), "".join(f"{name}\n" for name in missing))
    for path, text in filter(None, (array, finish)):
        submitting.keep(path, text)
    if jobs := submitting.still_there(this):
        console.info(
            f"jobs {', '.join(jobs)} are at the same set: what they do, too, is done twice"
        )
    after = None
    if array is not None:
        report["array"] = submitting.submit(submitting.sbatch_words(config, array[0]))
        submitting.record(this, report)
        after = f"afterany:{report['array']}"
    words = submitting.sbatch_words(config, finish[0], after=after)
    report["finish"] = submitting.submit(words, done=report)
    submitting.record(this, report)
    return report


def _printed(config: SlurmPrecomputeConfig, array: Script | None, finish: Script) -> str:
    """Return both scripts, each behind the command that would submit it."""
    after = "afterany:ARRAY" if array else None
    last = (submitting.sbatch_words(config, finish[0], after=after), finish[1])
    first = [(submitting.sbatch_words(config, array[0]), array[1])] if array else []
    return submitting.printed([*first, last])


def _array(
    config: SlurmPrecomputeConfig, stage: StageCommand, this: Round, num_missing: int
) -> Script:
    """Return the script of the array."""
    tasks = min(config.array, num_missing)
    names = this.path("precompute", "txt")
    head = scripts.head(
        config,
        f"Labels {num_missing} shards in {tasks} tasks; they are listed in {names}.",
        {
            "job-name": scripts.job_name("precompute", this.folder.parent),
            "array": f"0-{tasks - 1}",
            "ntasks": 1,
            "output": f"{this.log}/precompute-%A_%a.out",
            **scripts.node_resources(config),
        },
    )
    job_flags = [
        f"--shard-list {shlex.quote(str(names))}",
        f'--job-index "$SLURM_ARRAY_TASK_ID" --num-jobs {tasks}',
    ]
    worker = scripts.command([*scripts.PYTHON, "mealv2", "precompute"], stage.words, job_flags)
    return this.path("precompute"), head + scripts.alone(worker)


def _finish(config: SlurmPrecomputeConfig, stage: PrecomputeConfig, this: Round) -> Script:
    """Return the script that writes the manifest."""
    head = scripts.head(
        config,
        "Checks every shard and writes the manifest: only then the label set is one.",
        {
            "job-name": scripts.job_name("finish", this.folder.parent),
            "ntasks": 1,
            "output": f"{this.log}/finish-%j.out",
        },
    )
    start = [*scripts.PYTHON, "mealv2", "labels", "finish", str(plain(stage.output))]
    known = [] if stage.batch_size == "auto" else ["--batch-size", str(stage.batch_size)]
    return this.path("finish"), head + scripts.alone(scripts.command(start, known))


def _missing(config: PrecomputeConfig, store: Store) -> tuple[list[str], bool]:
    """Return the shards that are not there whole, and whether the set is finished."""
    store.fetch_all()
    folder = store.folder
    if not (folder / label_set.PLAN_NAME).exists():
        names = folder.is_dir() and list_folder(folder)
        if names:
            raise ConfigError(f"{store.location} is no label set and not empty ({names[0]}, …)")
        # the first worker writes the plan itself
        plan = plan_shards(config, open_sources(config))
        return [shard.name for shard in label_set.planned_shards(plan)], False
    plan = label_set.read_plan(folder)
    _check_same_plan(config, store, plan)
    shards = label_set.planned_shards(plan)
    plan_sha256 = json_sha256(plan)
    found = dict(zip(shards, check_shards(folder, shards, plan_sha256), strict=True))
    missing = [shard.name for shard, what in found.items() if isinstance(what, str)]
    listed = label_set.listed_sha256(folder, plan_sha256)
    return missing, not missing and _are_listed(found, listed)


def _are_listed(found: dict[PlannedShard, CheckedShard | str], listed: dict[str, str]) -> bool:
    """Return whether a manifest says of shards that are whole what they are."""
    return all(
        isinstance(what, CheckedShard) and listed.get(shard.name) == what.entry["sha256"]
        for shard, what in found.items()
    )


def _check_same_plan(config: PrecomputeConfig, store: Store, plan: dict[str, Any]) -> None:
    """Raise LabelSetError where a plan differs from the flags in what needs no teacher to see."""
    train = plan["roles"].get("train", {})
    differing = [
        f"{name} is {existing} there and {planned} here"
        for name, existing, planned in (
            ("--num-views", train.get("num_views"), config.num_views),
            ("--img-size", plan["img_size"], config.img_size),
            ("--shard-size", plan.get("shard_size"), config.shard_size or plan.get("shard_size")),
            ("--view-seed", train.get("views", {}).get("seed"), config.view_seed),
        )
        if existing != planned
    ]
    if differing:
        raise LabelSetError(
            f"{store.location} holds another label set: {'; '.join(differing)}. Give another "
            "--output, or the settings it was made with"
        )
