"""Group runs into methods: runs that differ in nothing but the seed."""

import itertools
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from mealv2.intervals import interval, paired_p
from mealv2.report.run import Row, Run

# where a run was made, on what, and what it logged: not how it trains
_FREE = {
    *("seed", "output", "resume", "auto_resume", "workers", "device", "cache_dir", "cache_size"),
    *("cache_images", "check_images", "log_interval", "log_tensorboard", "log_trackio"),
    *(
        "log_wandb",
        "log_weights",
        "wandb_project",
        "checkpoint_hist",
        "recovery_interval",
        "dry_run",
    ),
}
_PER_SEED = ("initial_checkpoint", "model")  # a seed can have a start of its own


@dataclass(frozen=True)
class Method:
    """Runs with equal settings but for the seed, in the order of their seeds."""

    name: str
    runs: tuple[Run, ...]

    @property
    def model(self) -> str:
        """The name of the student."""
        return self.runs[0].model

    def by_seed(self, metric: str) -> dict[int, float]:
        """Return the metric of the last epoch by seed; only seeds with one run that has it."""
        found: dict[int, list[float]] = {}
        for run in self.runs:
            if run.seed is not None and run.last and metric in run.last[1]:
                found.setdefault(run.seed, []).append(run.last[1][metric])
        return {seed: values[0] for seed, values in found.items() if len(values) == 1}


@dataclass(frozen=True)
class Comparison:
    """One method minus another, seed by seed: ``differences`` of a metric of the last epoch."""

    first: str
    second: str
    metric: str
    seeds: tuple[int, ...]
    differences: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean difference."""
        return mean(self.differences)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the mean; None for one seed."""
        return interval(self.differences)

    @property
    def p(self) -> float | None:
        """The two-sided p of the paired t-test; None for one seed."""
        return paired_p(self.differences)


def methods_of(runs: Sequence[Run]) -> list[Method]:
    """Return the methods of runs, in the order in which they first appear, with unique names."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_identity(run), []).append(run)
    named = [(_name(group, runs), group) for group in groups.values()]
    found: list[Method] = []
    for name, group in named:
        taken = sum(method.name.split(" (")[0] == name for method in found)
        ordered = sorted(group, key=lambda run: run.seed or 0)
        found.append(Method(f"{name} ({taken + 1})" if taken else name, tuple(ordered)))
    return found


def comparison_of(first: Method, second: Method, metric: str) -> Comparison | None:
    """Return the differences of the seeds that both have; None where there is none."""
    own, others = first.by_seed(metric), second.by_seed(metric)
    seeds = tuple(sorted(own.keys() & others.keys()))
    if not seeds:
        return None
    differences = tuple(own[seed] - others[seed] for seed in seeds)
    return Comparison(first.name, second.name, metric, seeds, differences)


def differing_settings(methods: Sequence[Method]) -> dict[str, list[Any]]:
    """Return the settings in which methods differ, with the value of each method.

    None for a setting that a method does not have.
    """
    configs = [{k: v for k, v in m.runs[0].config.items() if k not in _FREE} for m in methods]
    names = dict.fromkeys(name for config in configs for name in sorted(config))
    rows = {name: [config.get(name) for config in configs] for name in names}
    return {name: values for name, values in rows.items() if any(v != values[0] for v in values)}


def average(rows: Sequence[Row | None], name: str) -> list[float]:
    """Return the values of a figure in the rows that have it."""
    return [row[name] for row in rows if row is not None and name in row]


def _identity(run: Run) -> str:
    """Return text that is equal for the runs of one method."""
    config = {name: value for name, value in run.config.items() if name not in _FREE}
    for name in _PER_SEED:
        if isinstance(value := config.get(name), str):
            config[name] = _without_seed(value, run.seed)
    return json.dumps(config, sort_keys=True)


def _without_seed(path: str, seed: int | None) -> str:
    return re.sub(rf"(?i)(seed[-_=]?){seed}(?!\d)", r"\1*", path)


def _name(group: Sequence[Run], runs: Sequence[Run]) -> str:
    """Return the name of a method: what the paths of its runs have in common and others do not."""
    paths = {run: _parts(run, runs) for run in group}
    first, *rest = paths.values()
    common = [part for part in first if all(part in other for other in rest)]
    if common:
        return "/".join(common)
    texts = ["/".join(parts) for parts in paths.values()]
    columns = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False))
    prefix = "".join(letters[0] for letters in columns).rstrip("-_./ 0123456789")
    prefix = re.sub(r"(?i)[-_./ ]*(seed|run)s?$", "", prefix)
    return prefix or texts[0]


def _parts(run: Run, runs: Sequence[Run]) -> list[str]:
    """Return the parts of a run's path below the folder that all runs have in common."""
    paths = [os.path.abspath(other.path) for other in runs]  # noqa: PTH100  # links stay
    shared = os.path.commonpath(paths) if len(set(paths)) > 1 else os.path.dirname(paths[0])  # noqa: PTH120
    own = os.path.relpath(os.path.abspath(run.path), shared)  # noqa: PTH100
    return list(Path(own).parts)
