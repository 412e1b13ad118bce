"""Figures of an experiment's rows by seed: tables in Markdown, results.json; the command line."""

import argparse
import datetime
import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import timm
import torch
import torchvision

from benchmarks.experiments import Config, Report, Row, finished, run_all
from mealv2.errors import ConfigError, MealError
from mealv2.intervals import interval
from mealv2.label_set import LabelSet
from mealv2.storage.atomic import write_atomic
from mealv2.storage.json_format import canonical_json
from pipeline import load_model
from pipeline.config import EvaluateConfig
from pipeline.loading.sources import open_images
from pipeline.runtime.device import create_runtime
from pipeline.training.evaluator import Evaluator

RESULTS_NAME = "results.json"
TABLE_NAME = "table.md"


def compare_with_labels(
    run: Path, data_dir: Path, labels: Path, class_map: Path | None = None
) -> dict[str, float]:
    """Return a student's accuracy on val, and its agreement with and KL to a set's labels."""
    config = EvaluateConfig(data_dir=data_dir, checkpoint=run, class_map=class_map, workers=0)
    source = open_images(config, data_dir, config.val_split)
    found = load_model.load(config, classes=source.classes)
    evaluator = Evaluator(
        source,
        create_runtime(config),
        config,
        img_size=found.img_size,
        resize=config.resize,
        labels=LabelSet.open(labels, split="val"),
    )
    return evaluator(found.model, num_classes=len(source.classes)).summary()


@dataclass(frozen=True)
class Figures:
    """A figure of a row by seed, and its differences to the row it is compared with."""

    values: dict[int, float]
    differences: dict[int, float]

    def as_json(self) -> dict[str, Any]:
        """Return the figures with means and 95 % intervals."""
        found: dict[str, Any] = {}
        for name, by_seed in vars(self).items():
            each = list(by_seed.values())
            found[name] = {str(seed): value for seed, value in by_seed.items()}
            found[f"mean_{name}"] = mean(each) if each else None
            found[f"interval_95_{name}"] = interval(each)
        return found


def figures(
    rows: Sequence[Row],
    seeds: Iterable[int],
    name: str = "top1",
    *,
    report_of: Callable[[Config], Report | None] = finished,
) -> dict[str, Figures]:
    """Return one figure of the finished runs of every row; differences are within a seed.

    ``report_of`` returns the figures of a run by name, None if it is not finished.
    """
    values: dict[str, dict[int, float]] = {}
    for row in rows:
        reports = {seed: report_of(row.result(seed)) for seed in seeds}
        values[row.name] = {
            seed: report[name] for seed, report in reports.items() if report and name in report
        }
    found = {}
    for row in rows:
        of, own = values.get(row.reference, {}), values[row.name]
        found[row.name] = Figures(own, {seed: own[seed] - of[seed] for seed in own if seed in of})
    return found


# --- tables ---------------------------------------------------------------------------------------


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    cells = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells) + "\n"


def mean_cell(values: Sequence[float], digits: int = 2, sign: str = "") -> str:
    """Return the mean and, from two values on, its 95 % interval."""
    if not values:
        return ""
    between = interval(values)
    text = f"{mean(values):{sign}.{digits}f}"
    if between is None:
        return text
    low, high = between
    return f"{text} ({low:{sign}.{digits}f} to {high:{sign}.{digits}f})"


def rows_table(rows: Sequence[Row], found: Mapping[str, Figures]) -> str:
    """Return the table of rows with at least one finished run."""
    titles = {row.name: row.title for row in rows}
    lines = []
    for row in rows:
        each = found[row.name]
        if not each.values:
            continue
        lines.append(
            [
                row.title,
                str(len(each.values)),
                mean_cell(list(each.values.values())),
                titles.get(row.reference, ""),
                mean_cell(list(each.differences.values()), sign="+"),
                " ".join(f"{value:.2f}" for value in each.values.values()),
            ]
        )
    head = ["row", "seeds", "top-1 % (95 %)", "minus row", "difference (95 %)", "top-1 by seed"]
    return table(head, lines)


def environment() -> dict[str, Any]:
    """Return date, hardware and versions."""
    info = Path("/proc/cpuinfo")
    text = info.read_text("utf-8") if info.exists() else ""
    cpu = re.search(r"model name\s*: (.*)", text)
    return {
        "date": str(datetime.date.today()),
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in (torch, torchvision, timm)},
    }


def write_results(output: Path, rows: Sequence[Row], seeds: Sequence[int]) -> str:
    """Write results.json and table.md of the finished runs; return the table."""
    found = figures(rows, seeds)
    text = rows_table(rows, found)
    by_row = {
        row.name: {"title": row.title, "reference": row.reference, **found[row.name].as_json()}
        for row in rows
    }
    results = {"environment": environment(), "figure": "top1", "rows": by_row}
    write_atomic(output / RESULTS_NAME, canonical_json(results).encode())
    write_atomic(output / TABLE_NAME, text.encode())
    return text


# --- command line ---------------------------------------------------------------------------------


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the flags of every experiment."""
    found = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    found.add_argument("data_dir", type=Path, metavar="PATH", help="data set, as --data-dir")
    found.add_argument("--output", type=Path, required=True, help="folder to make or continue")
    found.add_argument("--seeds", type=_count, default=3, help="seeds 0 to N - 1")
    found.add_argument("--quick", action="store_true", help="only the most telling rows")
    found.add_argument("--rows", nargs="+", metavar="ROW", help="only these rows")
    found.add_argument("--minus", metavar="ROW", help="compare all rows with this one")
    found.add_argument("--jobs", type=_count, default=1, help="runs at a time")
    found.add_argument("--table", action="store_true", help="print what is finished, run nothing")
    return found


def _count(text: str) -> int:
    """Return the value of a flag that is a number from 1 on."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 on")
    return int(text)


def chosen(rows: Sequence[Row], options: argparse.Namespace) -> list[Row]:
    """Return the rows that the flags ask for, and those they are compared with.

    --minus replaces the row that each is compared with.
    """
    by_name = {row.name: row for row in rows}
    for name in (*(options.rows or ()), *([options.minus] if options.minus else [])):
        if name not in by_name:
            raise ConfigError(f"no row {name}; known: {', '.join(by_name)}")
    asked = {row.name for row in rows if row.is_quick or not options.quick}
    asked = set(options.rows) if options.rows else asked
    if options.minus:
        rows = [
            replace(row, reference="" if row.name == options.minus else options.minus)
            for row in rows
        ]
    by_name = {row.name: row for row in rows}
    asked |= {by_name[name].reference for name in asked}
    return [row for row in rows if row.name in asked]


def run_rows(rows: Sequence[Row], options: argparse.Namespace) -> None:
    """Make the runs of the rows, seed by seed, and print and write their table."""
    seeds = range(options.seeds)
    if not options.table:
        run_all((c for seed in seeds for row in rows for c in row.runs(seed)), jobs=options.jobs)
    print(write_results(options.output, rows, seeds))


def exit_with_message(main: Callable[[], None]) -> None:
    """Call ``main``; end with one line and its exit code if a user can fix what went wrong."""
    try:
        main()
    except MealError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
