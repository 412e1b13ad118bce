"""Divide the shards of a label set over jobs: job i of n makes the shards i, i + n, ...

Jobs do not communicate and do not lock shards.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mealv2.errors import ConfigError, IncompleteError
from mealv2.labelling.annotator import Annotator
from mealv2.labelling.plan import LabelSplit
from mealv2.labelling.shards import CompleteCheck, find_missing, label_shards
from mealv2.labelling.store import Store
from mealv2.storage.regular_files import read_regular
from pipeline import console
from pipeline.config import JobsConfig
from pipeline.runtime import env


@dataclass(frozen=True)
class Job:
    """Job ``index`` of ``count``; ``listed`` are the shards to divide, None means all.

    ``last_step`` is the command that completes the set after all jobs, by default
    `mealv2 labels finish`.
    """

    index: int
    count: int
    listed: tuple[str, ...] | None = None
    last_step: str | None = None

    @property
    def is_part(self) -> bool:
        """Whether other jobs may make some of the shards; then this job writes no manifest."""
        return self.count > 1 or self.listed is not None

    def select(self, names: list[str]) -> list[str]:
        """Return the shards of this job; raises ConfigError if the list names an unknown shard."""
        listed = names if self.listed is None else list(self.listed)
        unknown = sorted(set(listed) - set(names))
        if unknown:
            raise ConfigError(
                f"--shard-list names {unknown[0]!r}, which is not a shard of this command; its "
                f"shards have names like {', '.join(names[:1])}"
            )
        return listed[self.index :: self.count]


def choose_job(config: JobsConfig) -> Job:
    """Return the job of this process, from flags or the environment. Raises ConfigError."""
    listed = None if config.shard_list is None else _read_names(config.shard_list)
    if config.job_index is not None and config.num_jobs is not None:
        index, count, given_by = config.job_index, config.num_jobs, "--job-index"
    else:
        index, count, given_by = env.job()
    if count > 1 and not env.is_child_process():
        console.info(f"job {index} of {count}, counted from 0 ({given_by})")
    return Job(index, count, listed)


def _read_names(path: Path) -> tuple[str, ...]:
    try:
        lines = read_regular(path).decode("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"--shard-list {path} cannot be read: {error}") from None
    names = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not names:
        console.info(f"--shard-list {path} is empty: no shard to make")
    return names


def label_part(
    job: Job,
    splits: Sequence[LabelSplit],
    annotator: Annotator,
    store: Store,
    *,
    workers: int,
    check_complete: CompleteCheck | None = None,
) -> dict[str, Any]:
    """Make the missing shards of a job; return its report.

    If one is missing, ``check_complete`` checks the job's complete shards first; those of other
    jobs are not opened.
    A shard that fails does not stop the others. Signals are not handled, because schedulers requeue
    jobs that a signal killed. Raises IncompleteError with the report, at the end, if shards failed,
    and OSError if the disk is full.
    """
    began = time.monotonic()
    all_names = [shard.name for split in splits for shard in split.planned]
    names = frozenset(job.select(all_names))
    is_worker = env.is_child_process()
    kind = "process" if is_worker else "job"
    console.info(f"this {kind} makes {len(names)} of {console.count(len(all_names), 'shard')}")
    failed: dict[str, str] = {}
    numbers_of = {
        split.name: [shard.number for shard in split.planned if shard.name in names]
        for split in splits
    }
    # without a manifest's SHA-256: it may be older than a shard that another job made again
    missing_of = {
        split.name: find_missing(split, store, numbers=numbers_of[split.name]) for split in splits
    }
    num_missing = sum(map(len, missing_of.values()))
    if num_missing and check_complete is not None:
        for split in splits:
            missing = missing_of[split.name]
            check_complete(split, [n for n in numbers_of[split.name] if n not in missing])
    for split in splits:
        missing = missing_of[split.name]
        label_shards(split, missing, annotator, store, workers=workers, failed=failed)
    report = job_report(job, store, num_missing - len(failed), began)
    report |= {"shards": len(names), "failed": failed}
    if failed:
        first, reason = next(iter(failed.items()))
        advice = "" if is_worker else "; run the same command again to make the missing ones"
        raise IncompleteError(
            f"{len(failed)} of {console.count(len(names), 'shard')} failed, first {first} "
            f"({reason}){advice}",
            report,
        )
    return report


def job_report(job: Job, store: Store, num_made: int, began: float) -> dict[str, Any]:
    """Return the report of a job, and log the command that completes the set after all jobs."""
    if not env.is_child_process():
        command = job.last_step or f"`mealv2 labels finish {store.location}`"
        console.info(f"done; after the last job: {command}")
    return {
        "labels": store.location,
        "job_index": job.index,
        "num_jobs": job.count,
        "shards_made": num_made,
        "seconds": round(time.monotonic() - began, 2),
    }
