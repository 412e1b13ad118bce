"""The folder of one run: config.json, metrics.jsonl, summary.csv, report.json."""

import csv
import io
import itertools
import json
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from mealv2.errors import ConfigError
from mealv2.storage.atomic import list_folder, write_atomic
from mealv2.storage.json_format import canonical_json, read_json

REPORT_NAME = "report.json"
LABELS_NAME = "labels.json"


def checkpoint_path(run: Path, step: int) -> Path:
    """Return the path of the checkpoint after a step."""
    return run / "checkpoints" / f"step-{step:08d}.pt"


def checkpoint_paths(run: Path) -> list[Path]:
    """Return the checkpoints of a run folder, oldest first."""
    return sorted((run / "checkpoints").glob("step-*.pt"))


def has_checkpoint(run: Path) -> bool:
    """Return whether a run folder has a checkpoint."""
    return bool(checkpoint_paths(run))


class RunFolder:
    """The folder of one run: settings, metrics.jsonl (per event), summary.csv (per epoch).

    labels.json names the labels that the run is made from.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: list[dict[str, Any]] = []

    @classmethod
    def create(
        cls,
        path: Path | None,
        config: dict[str, Any],
        *,
        name: str,
        labels: dict[str, Any] | None = None,
    ) -> "RunFolder":
        """Make a run folder, under runs/ if not named; raises ConfigError if it holds a run.

        ``labels`` describes the labels it is made from. A run without a checkpoint has nothing to
        lose: its folder is reused.
        """
        if path is None:
            path = _new_folder(Path("runs"), f"{name}-{datetime.now():%Y%m%d-%H%M%S}")
        if has_checkpoint(path):
            raise ConfigError(
                f"{path} already holds a run; continue it with --resume {path}, "
                "or give another --output"
            )
        _check_is_free(path)
        path.mkdir(parents=True, exist_ok=True)
        # a run repeated with --config gets a folder of its own
        config = {**config, "output": None, "resume": None}
        write_atomic(path / "config.json", canonical_json(config).encode())
        if labels is not None:
            write_atomic(path / LABELS_NAME, canonical_json(labels).encode())
        run = cls(path)
        run.metrics_path.write_bytes(b"")
        return run

    @classmethod
    def reopen(cls, path: Path, *, epoch: int, step: int) -> "RunFolder":
        """Open a run folder to continue after ``epoch`` complete epochs and ``step`` steps.

        Log lines after that point are dropped: those steps run again.
        """
        run = cls(path)
        if run.summary_path.exists():
            with run.summary_path.open(newline="", encoding="utf-8") as file:
                rows = [dict(row) for row in csv.DictReader(file)]
            run._rows = [row for row in rows if int(row["epoch"]) <= epoch]
        if run.metrics_path.exists():
            lines = run.metrics_path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _is_before(line, epoch=epoch, step=step)]
            write_atomic(run.metrics_path, "".join(f"{line}\n" for line in kept).encode())
        return run

    @property
    def metrics_path(self) -> Path:
        """The path of the events, one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def summary_path(self) -> Path:
        """The path of the table of epochs."""
        return self.path / "summary.csv"

    def log(self, event: str, **figures: Any) -> None:
        """Append one event to metrics.jsonl."""
        line = json.dumps({"event": event, "time": round(time.time(), 3), **figures})
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def report(self) -> dict[str, Any] | None:
        """Return report.json of a finished run; None before."""
        path = self.path / REPORT_NAME
        return dict(read_json(path)) if path.exists() else None

    def write_report(self, report: dict[str, Any]) -> None:
        """Write report.json: the run is finished."""
        write_atomic(self.path / REPORT_NAME, canonical_json(report).encode())

    def log_epoch(self, row: Mapping[str, Any]) -> None:
        """Add an epoch to summary.csv."""
        self._rows.append(dict(row))
        text = io.StringIO()
        names = list(dict.fromkeys(name for row in self._rows for name in row))
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        write_atomic(self.summary_path, text.getvalue().encode())


class ReadOnlyRunFolder(RunFolder):
    """The run folder of a rank that leaves writing to the main one."""

    def log(self, event: str, **figures: Any) -> None:
        """Write nothing."""

    def write_report(self, report: dict[str, Any]) -> None:
        """Write nothing."""

    def log_epoch(self, row: Mapping[str, Any]) -> None:
        """Write nothing."""


def _check_is_free(path: Path) -> None:
    """Raise ConfigError for a folder of something else, or of a run that lost its checkpoints."""
    if not path.exists():
        return
    if not path.is_dir():
        raise ConfigError(f"{path} is a file; --output is a folder to make")
    names = list_folder(path)
    if names and not ("config.json" in names and "metrics.jsonl" in names):
        raise ConfigError(
            f"{path} is not empty and has no run ({names[0]}, …); give another --output"
        )
    # the disk may have been full at the first epoch's checkpoint, but then there is no second epoch
    summary = path / "summary.csv"
    epochs = len(summary.read_bytes().splitlines()) - 1 if summary.exists() else 0
    if REPORT_NAME in names or epochs > 1:
        raise ConfigError(f"the run in {path} has lost its checkpoints; give another --output")


def _is_before(line: str, *, epoch: int, step: int) -> bool:
    """Return whether a line of metrics.jsonl is of that point or before (half a line: no)."""
    try:
        event = json.loads(line)
    except ValueError:
        return False
    return int(event["step"]) <= step if "step" in event else int(event["epoch"]) <= epoch


def _new_folder(parent: Path, name: str) -> Path:
    """Make a folder of this name, or with a number behind it where the name is taken."""
    parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        path = parent / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise AssertionError("count never ends")
