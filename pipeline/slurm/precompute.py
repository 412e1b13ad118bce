"""`mealv2 slurm precompute`: an array job for the missing shards, then a job for the manifest."""

import shlex
from typing import Any

from mealv2 import label_set
from mealv2.errors import ConfigError, LabelSetError
from mealv2.labelling.manifest import check_shards, complete_of, incomplete_of
from mealv2.labelling.plan import plan_shards
from mealv2.labelling.store import Store
from mealv2.storage.atomic import list_folder
from mealv2.storage.json_format import json_sha256
from pipeline import console
from pipeline.config import PrecomputeConfig, SlurmPrecomputeConfig, StageCommand, plain
from pipeline.labelling.sources import open_sources
from pipeline.labelling.store import open_store
from pipeline.slurm import scripts, submitting
from pipeline.slurm.submitting import Submission


def run(config: SlurmPrecomputeConfig, check_flags: submitting.CheckFlags) -> dict[str, Any] | str:
    """Submit the missing parts of a label set; return the report, or the scripts with --print.

    Raises MealError. Submits nothing if the flags are wrong, the images do not exist, or the
    folder has another label set or other files.
    """
    stage = check_flags(config.flags)
    assert isinstance(stage.config, PrecomputeConfig)
    submitting.check_supported(stage, "job_index", "num_jobs", "shard_list", "dry_run")
    submission = submitting.next_submission(stage.config.output)
    output = plain(stage.config.output)
    missing, is_finished = _missing(stage.config)
    report = {"labels": output, "missing": len(missing), "array": None, "finish": None}
    if is_finished:
        console.info(f"{output}: the label set is finished; nothing to submit")
        return "" if config.print_ else report
    if not missing:
        console.info(f"{output}: only the manifest is missing")
    texts = {}
    if missing:
        texts["precompute"] = _array_script(config, stage, submission, len(missing))
    texts["finish"] = _finish_script(config, stage, submission)
    if config.print_:
        after = {"finish": "afterany:ARRAY"} if missing else {}
        return submitting.printable(
            [
                (submitting.sbatch_command(config, submission.path(n), after=after.get(n)), text)
                for n, text in texts.items()
            ]
        )
    names = "".join(f"{name}\n" for name in missing)
    submitting.write_script(submission.path("precompute", "txt"), names)
    for name, text in texts.items():
        submitting.write_script(submission.path(name), text)
    if jobs := submitting.queued_jobs(submission):
        console.info(f"jobs {', '.join(jobs)} make shards of the same set: some are made twice")
    dependency = None
    for name in texts:
        words = submitting.sbatch_command(config, submission.path(name), after=dependency)
        job = submitting.submit(words, submitted=report)
        report["array" if name == "precompute" else name] = job
        submitting.write_report(submission, report)
        dependency = f"afterany:{job}"
    return report


def _array_script(
    config: SlurmPrecomputeConfig, stage: StageCommand, submission: Submission, num_missing: int
) -> str:
    tasks = min(config.array, num_missing)
    names = submission.path("precompute", "txt")
    head = scripts.head(
        config,
        f"Labels the {num_missing} shards listed in {names}, in {tasks} tasks.",
        {
            "job-name": scripts.job_name("precompute", submission.folder.parent),
            "array": f"0-{tasks - 1}",
            "ntasks": 1,
            "output": f"{submission.log_folder}/precompute-%A_%a.out",
            **scripts.node_resources(config),
        },
    )
    job_flags = [
        f"--shard-list {shlex.quote(str(names))}",
        f'--job-index "$SLURM_ARRAY_TASK_ID" --num-jobs {tasks}',
    ]
    start = [*scripts.PYTHON, "mealv2", "precompute"]
    return head + scripts.single_process(scripts.command(start, stage.words, job_flags))


def _finish_script(
    config: SlurmPrecomputeConfig, stage: StageCommand, submission: Submission
) -> str:
    assert isinstance(stage.config, PrecomputeConfig)
    head = scripts.head(
        config,
        "Checks every shard and writes the manifest, which makes the label set readable.",
        {
            "job-name": scripts.job_name("finish", submission.folder.parent),
            "ntasks": 1,
            "output": f"{submission.log_folder}/finish-%j.out",
        },
    )
    batch_size = stage.config.batch_size
    start = [*scripts.PYTHON, "mealv2", "labels", "finish", str(plain(stage.config.output))]
    known = [] if batch_size == "auto" else ["--batch-size", str(batch_size)]
    return head + scripts.single_process(scripts.command(start, known))


def _missing(config: PrecomputeConfig) -> tuple[list[str], bool]:
    """Return the missing and damaged shards, and whether the set is finished."""
    store = open_store(config, config.output)
    store.fetch_all()
    folder = store.folder
    if not (folder / label_set.PLAN_NAME).exists():
        if names := folder.is_dir() and list_folder(folder):
            raise ConfigError(
                f"{store.location} has files but no label set ({names[0]}, …); give a new folder"
            )
        # the first task writes the plan, which needs the teachers
        plan = plan_shards(config, open_sources(config))
        return [shard.name for shard in label_set.planned_shards(plan)], False
    plan = label_set.read_plan(folder)
    _check_same_plan(config, store, plan)
    plan_sha256 = json_sha256(plan)
    found = check_shards(folder, label_set.planned_shards(plan), plan_sha256)
    missing = list(incomplete_of(found))
    listed = label_set.listed_sha256(folder, plan_sha256)
    is_listed = all(
        listed.get(shard.entry["name"]) == shard.entry["sha256"] for shard in complete_of(found)
    )
    return missing, not missing and is_listed


def _check_same_plan(config: PrecomputeConfig, store: Store, plan: dict[str, Any]) -> None:
    """Raise LabelSetError if a plan differs from the flags that need no teachers to compare."""
    train = plan["roles"].get("train", {})
    differing = [
        f"{name} is {existing} there, {planned} here"
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
            f"{store.location} has another label set: {'; '.join(differing)}. Give another "
            "--output, or the settings it was made with"
        )
