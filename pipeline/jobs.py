"""One of several jobs that share the shards of a set: which it is, which are its, what it says.

Nothing is claimed: job i of n makes the shards i, i + n, ... of the list, whatever others do.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mealv2.errors import ConfigError, IncompleteError
from pipeline import environment, logs
from pipeline.config import Jobs
from pipeline.mirror import Store
from pipeline.stage_one import Role, StageOne


@dataclass(frozen=True)
class Job:
    """Job ``index`` of ``count``; ``listed`` are the shards to share, None for all."""

    index: int
    count: int
    listed: tuple[str, ...] | None = None

    @property
    def is_part(self) -> bool:
        """Whether there may be shards that are not its, so that it finishes no set."""
        return self.count > 1 or self.listed is not None

    def share(self, names: list[str]) -> list[str]:
        """Return which of a set's shards are its; raises ConfigError for one that is none."""
        listed = names if self.listed is None else list(self.listed)
        unknown = sorted(set(listed) - set(names))
        if unknown:
            raise ConfigError(
                f"--shard-list names {unknown[0]!r}, which is no shard that this command makes; "
                f"its shards have names such as {', '.join(names[:1])}"
            )
        return listed[self.index :: self.count]


def chosen(config: Jobs) -> Job:
    """Return which job a command is, by its flags or its environment, and say so.

    Raises ConfigError.
    """
    listed = None if config.shard_list is None else _names_in(config.shard_list)
    if config.job_index is not None and config.num_jobs is not None:
        index, count, where = config.job_index, config.num_jobs, "--job-index"
    else:
        index, count, where = environment.job()
    if count > 1 and not environment.is_spoken_for():
        logs.say(f"job {index} of {count}, counted from 0 ({where})")
    return Job(index, count, listed)


def _names_in(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"--shard-list {path} cannot be read: {error}") from None
    names = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not names:
        logs.say(f"--shard-list {path} is empty: nothing is to be made")
    return names


def label_share(
    job: Job, stage: StageOne, roles: list[Role], *, last: str | None = None
) -> dict[str, Any]:
    """Make what is missing of a job's shards; return its report.

    ``last`` is the command that ends the set, where it is not finish. Raises IncompleteError, at
    the end, where some failed.
    """
    began = time.monotonic()
    names = [role.planned(n).name for role in roles for n in range(len(role.shards))]
    share = job.share(names)
    is_spoken_for = environment.is_spoken_for()
    what = "process" if is_spoken_for else "job"
    logs.say(f"this {what}'s share: {len(share)} of {logs.count(len(names), 'shard')}")
    made, failed = stage.label_some(roles, frozenset(share))
    report = report_of(job, stage.store, made, began, last=last)
    report |= {"shards": len(share), "failed": failed}
    if failed:
        first, reason = next(iter(failed.items()))
        advice = "" if is_spoken_for else "; the same command again makes what is missing"
        raise IncompleteError(
            f"{len(failed)} of {logs.count(len(share), 'shard')} failed, first {first} "
            f"({reason}){advice}",
            report,
        )
    return report


def report_of(
    job: Job, store: Store, made: int, began: float, *, last: str | None = None
) -> dict[str, Any]:
    """Return the report of a job that did its part, and say what ends a set."""
    if not environment.is_spoken_for():
        logs.say(f"done; after the last job: {last or f'`mealv2 labels finish {store.place}`'}")
    return {
        "labels": store.place,
        "job_index": job.index,
        "num_jobs": job.count,
        "shards_made": made,
        "seconds": round(time.monotonic() - began, 2),
    }
