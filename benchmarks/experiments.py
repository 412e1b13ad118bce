"""Experiments of many runs: rows by seed, resumable, compared with intervals over the seeds.

A row is a list of configs of the commands; the last one is its result. Rows share the runs that
have one folder. What a run needs comes first: the runs whose folders its config names.
"""

import concurrent.futures as futures
import dataclasses
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import mean_logits, present_classes
from benchmarks.mean_logits import MeanLogitsConfig
from benchmarks.present_classes import PresentClassesConfig
from mealv2.errors import ConfigError
from mealv2.storage.atomic import write_atomic
from mealv2.storage.json_format import canonical_json, read_json
from pipeline import distill, finetune, precompute, transfer
from pipeline.config import (
    DistillConfig,
    FinetuneConfig,
    LabelsConvertConfig,
    LabelsMergeConfig,
    PrecomputeConfig,
    TransferConfig,
)
from pipeline.label_sets import convert, merge
from pipeline.runtime.device import use_one_thread
from pipeline.training.run_folder import has_checkpoint

Training = FinetuneConfig | DistillConfig
Derived = LabelsConvertConfig | LabelsMergeConfig | MeanLogitsConfig | PresentClassesConfig
Labels = PrecomputeConfig | Derived
Config = Labels | Training
Report = dict[str, Any]

# what the arms of one experiment have in common: the result is the last epoch, on one schedule
COMMON: Mapping[str, Any] = {
    "select": "last",
    "sched_on_updates": False,
    "workers": 0,
    "log_interval": 1000,
    "checkpoint_hist": 1,
}
_FREE = frozenset({"output", "resume", "workers", "device", "job_index", "num_jobs"})
_RUN: Mapping[type, Callable[[Any], Report]] = {
    PrecomputeConfig: precompute.run,
    LabelsConvertConfig: convert.run,
    LabelsMergeConfig: merge.run,
    MeanLogitsConfig: mean_logits.run,
    PresentClassesConfig: present_classes.run,
    FinetuneConfig: finetune.run,
    DistillConfig: distill.run,
    TransferConfig: transfer.run,
}


@dataclass(frozen=True)
class Row:
    """A row of the table: ``runs`` returns the configs that make it from a seed.

    ``reference`` is the name of the row to compare it with; none for an empty text.
    """

    name: str
    title: str
    runs: Callable[[int], Sequence[Config]]
    reference: str = ""
    is_quick: bool = False

    def result(self, seed: int) -> Training:
        """Return the config of the run that the row reports."""
        last = self.runs(seed)[-1]
        assert isinstance(last, FinetuneConfig | DistillConfig)
        return last


# --- runs -----------------------------------------------------------------------------------------


def make(config: Config) -> Report:
    """Return the report of a run: kept, resumed or new. Raises MealError and OSError.

    OUTPUT.json beside its folder keeps settings and report. Raises ConfigError if the folder was
    made with other settings.
    """
    use_one_thread()
    kept = _kept(config)
    if "report" in kept:
        return dict(kept["report"])
    record = {"command": type(config).__name__, "settings": _settings(config)}
    path = _record_path(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, canonical_json(record).encode())
    if isinstance(config, FinetuneConfig | DistillConfig) and has_checkpoint(_folder(config)):
        config = dataclasses.replace(config, resume=_folder(config))
    report = _RUN[type(config)](config)
    write_atomic(path, canonical_json(record | {"report": report}).encode())
    return report


def finished(config: Config) -> Report | None:
    """Return the report of a finished run, None before; raises ConfigError for other settings."""
    report = _kept(config).get("report")
    return None if report is None else dict(report)


def run_all(configs: Iterable[Config], *, jobs: int = 1) -> None:
    """Make runs in their order, ``jobs`` at a time in processes of their own.

    Those of one folder must be equal. Raises as ``make``; runs in progress end first.
    """
    by_folder = distinct(configs)
    missing = {folder: each for folder, each in by_folder.items() if finished(each) is None}
    if jobs == 1:
        for number, config in enumerate(missing.values()):
            _announce(config, len(missing) - number)
            make(config)
        return
    needs = {folder: needed(each, by_folder) & missing.keys() for folder, each in missing.items()}
    context = multiprocessing.get_context("spawn")
    with futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        running: dict[futures.Future[Report], Path] = {}
        while missing or running:
            ready = [folder for folder in missing if not needs[folder]]
            for folder in ready[: jobs - len(running)]:
                _announce(missing[folder], len(missing))
                running[pool.submit(make, missing.pop(folder))] = folder
            done, _ = futures.wait(running, return_when=futures.FIRST_COMPLETED)
            for future in done:
                folder = running.pop(future)
                future.result()
                for others in needs.values():
                    others.discard(folder)


def distinct(configs: Iterable[Config]) -> dict[Path, Config]:
    """Return the runs by folder, each once, in order; raises ValueError if two differ."""
    by_folder: dict[Path, Config] = {}
    for config in configs:
        if by_folder.setdefault(_folder(config), config) != config:
            raise ValueError(f"two runs with different settings are in {_folder(config)}")
    return by_folder


def needed(config: Config, folders: Iterable[Path]) -> set[Path]:
    """Return the folders, its own left out, that a config names: labels, weights, teachers."""
    values = {name: value for name, value in vars(config).items() if name not in _FREE}
    named: set[str] = set()
    for value in values.values():
        for item in value if isinstance(value, tuple) else (value,):
            named |= {str(item), str(item).partition("=")[2]}
    return {folder for folder in folders if str(folder) in named}


def differences(config: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """Return the settings, folders of output left out, in which two runs differ.

    A setting that only one of them has is compared with None.
    """
    one, two = _settings(config), _settings(other)
    names = sorted(one.keys() | two.keys())
    pairs = {name: (one.get(name), two.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _folder(config: Config) -> Path:
    return Path(str(config.output))


def _record_path(config: Config) -> Path:
    folder = _folder(config)
    return folder.with_name(f"{folder.name}.json")


def _settings(config: Config) -> dict[str, Any]:
    return {name: value for name, value in config.as_json().items() if name not in _FREE}


def _kept(config: Config) -> dict[str, Any]:
    path = _record_path(config)
    if not (path.exists() and _folder(config).exists()):
        return {}
    kept = dict(read_json(path))
    old, new = _defaults_of_new_settings(config) | kept["settings"], _settings(config)
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            raise ConfigError(
                f"{_folder(config)} was made with {name} {old.get(name)}, not {new.get(name)}; "
                "give another --output"
            )
    return kept


def _defaults_of_new_settings(config: Config) -> dict[str, Any]:
    """Return the settings that have their default: a run from before there were such is kept."""
    settings = _settings(config)
    return {
        field.name: settings[field.name]
        for field in dataclasses.fields(config)
        if field.name in settings and getattr(config, field.name) == field.default
    }


def _announce(config: Config, left: int) -> None:
    print(f"== {_folder(config)} ({left} runs left)", file=sys.stderr, flush=True)
