"""The folder of one run: config.json, metrics.jsonl, summary.csv, report.json."""

import csv
import io
import itertools
import json
import os
import struct
import time
import zipfile
import zlib
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from mealv2.errors import ConfigError, MealError
from mealv2.storage.atomic import TEMPORARY_PREFIX, list_folder, write_atomic
from mealv2.storage.json_format import canonical_json, parse_json, read_json
from mealv2.storage.regular_files import open_regular, read_regular
from mealv2.storage.run_files import CONFIG_NAME as CONFIG_NAME  # public names of this module
from mealv2.storage.run_files import LABELS_NAME as LABELS_NAME
from mealv2.storage.run_files import LOCK_NAME, SUMMARY_NAME
from mealv2.storage.run_files import METRICS_NAME as METRICS_NAME
from mealv2.storage.run_files import REPORT_NAME as REPORT_NAME
from mealv2.storage.run_files import SESSION as SESSION
from mealv2.storage.run_files import WEIGHTS as WEIGHTS
from mealv2.storage.run_files import parse_event as parse_event
from mealv2.storage.weight_files import EXPORT_FOLDER
from pipeline.training.run_lock import RunLock

TRACKERS_NAME = "trackers.json"  # the id of the run for W&B and trackio
SETTINGS_NAME = "archive/settings.json"  # in the zip of a checkpoint; torch wants one folder
_MAX_SETTINGS_BYTES = 1 << 24
# what zipfile raises for a damaged file; another part of the run reports it
_DAMAGED = (
    *(OSError, ValueError, KeyError, RuntimeError, EOFError, OverflowError),
    *(zipfile.BadZipFile, zlib.error, struct.error),
)


def checkpoint_path(run: Path, step: int) -> Path:
    """Return the path of the checkpoint after a step."""
    return run / "checkpoints" / f"step-{step:08d}.pt"


def checkpoint_paths(run: Path) -> list[Path]:
    """Return the checkpoints of a run folder, oldest first."""
    return sorted((run / "checkpoints").glob("step-*.pt"))


def has_checkpoint(run: Path) -> bool:
    """Return whether a run folder has a checkpoint."""
    return bool(checkpoint_paths(run))


def saved_settings(run: Path) -> dict[str, Any] | None:
    """Return the settings in the newest checkpoint that can be read; None without one."""
    for path in reversed(checkpoint_paths(run)):
        try:
            with os.fdopen(open_regular(path), "rb") as file, zipfile.ZipFile(file) as archive:
                if archive.getinfo(SETTINGS_NAME).file_size > _MAX_SETTINGS_BYTES:
                    continue
                value = parse_json(archive.read(SETTINGS_NAME))
        except _DAMAGED:
            continue
        if isinstance(value, dict):
            return value
    return None


class RunFolder:
    """The folder of one run: settings, metrics.jsonl (per event), summary.csv (per epoch).

    labels.json names the labels that the run is made from. The caller holds ``lock``.
    """

    def __init__(self, path: Path, lock: RunLock | None = None) -> None:
        self.path = path
        self._lock = lock
        self._rows: list[dict[str, Any]] = []
        self.num_damaged = 0  # lines of metrics.jsonl that were removed
        # the step of the last event of each kind, or its epoch, also of those that were dropped
        self.logged: dict[str, int] = {}

    @classmethod
    def create(
        cls,
        path: Path,
        config: dict[str, Any],
        *,
        lock: RunLock | None = None,
        labels: dict[str, Any] | None = None,
    ) -> "RunFolder":
        """Fill the folder that ``prepare_folder`` returned; raises ConfigError if it holds a run.

        ``labels`` describes the labels it is made from.
        """
        if has_checkpoint(path):
            raise ConfigError(
                f"{path} already holds a run; continue it with --resume {path}, "
                "or give another --output"
            )
        run = cls(path, lock)
        _remove_temporary_files(path)
        (path / TRACKERS_NAME).unlink(missing_ok=True)  # of an earlier attempt
        run.write_config(config)
        if labels is not None:
            write_atomic(path / LABELS_NAME, canonical_json(labels).encode())
        run.metrics_path.write_bytes(b"")
        return run

    @classmethod
    def reopen(
        cls, path: Path, *, epoch: int, step: int, lock: RunLock | None = None
    ) -> "RunFolder":
        """Open a run folder to continue after ``epoch`` complete epochs and ``step`` steps.

        Log lines after that point are dropped: those steps run again. So are damaged lines.
        """
        run = cls(path, lock)
        _remove_temporary_files(path)
        if run.summary_path.exists():
            run._read_rows(epoch)
        if run.metrics_path.exists():
            lines = read_regular(run.metrics_path).splitlines()
            events = [parse_event(line) for line in lines]
            # half a last line is what kill -9 leaves
            run.num_damaged = sum(event is None for event in events[:-1])
            for event in filter(None, events):
                kind = str(event.get("event"))
                at = event["step"] if "step" in event else event["epoch"]
                run.logged[kind] = max(run.logged.get(kind, -1), at)
            kept = [
                line
                for line, event in zip(lines, events, strict=True)
                if event is not None and _is_before(event, epoch=epoch, step=step)
            ]
            write_atomic(run.metrics_path, b"".join(line + b"\n" for line in kept))
        return run

    def _read_rows(self, epoch: int) -> None:
        """Read summary.csv up to an epoch; raises MealError if it is damaged."""
        try:
            text = read_regular(self.summary_path).decode()
            reader = csv.DictReader(io.StringIO(text, newline=""))
            if "epoch" not in (reader.fieldnames or ()):
                raise ValueError("it has no column epoch")
            rows = [dict(row) for row in reader]
            self._rows = [row for row in rows if int(row["epoch"]) <= epoch]
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            raise MealError(
                f"{self.summary_path} is damaged ({error}); move it away: the run continues "
                "without the rows of its earlier epochs"
            ) from None

    def require_lock(self) -> None:
        """Raise MealError if another process took over the run."""
        if self._lock is not None:
            self._lock.require_held()

    def write_config(self, config: dict[str, Any]) -> None:
        """Write config.json, without the paths of the run: a repeated run gets its own folder."""
        # --auto-resume only found this folder
        config = {**config, "output": None, "resume": None, "auto_resume": False}
        write_atomic(self.path / CONFIG_NAME, canonical_json(config).encode())

    @property
    def metrics_path(self) -> Path:
        """The path of the events, one JSON object a line."""
        return self.path / METRICS_NAME

    @property
    def summary_path(self) -> Path:
        """The path of the table of epochs."""
        return self.path / SUMMARY_NAME

    def log(self, event: str, **figures: Any) -> None:
        """Append one event to metrics.jsonl."""
        line = json.dumps({"event": event, "time": round(time.time(), 3), **figures})
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def start_metrics(self) -> dict[str, Any] | None:
        """Return the validation of the initial weights; None without one."""
        with self.metrics_path.open("rb") as file:
            for line in file:
                event = parse_event(line)
                if event is not None and event.get("event") == "validation":
                    return event if event["epoch"] == 0 else None
        return None

    def report(self) -> dict[str, Any] | None:
        """Return report.json of a finished run; None before."""
        path = self.path / REPORT_NAME
        try:
            return dict(read_json(path)) if path.exists() else None
        except (ValueError, TypeError) as error:
            raise MealError(
                f"{path} is damaged ({error}); remove it: the same command writes it again"
            ) from None

    def remove_report(self) -> None:
        """Remove report.json of a finished run that is lengthened."""
        (self.path / REPORT_NAME).unlink(missing_ok=True)

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

    def write_config(self, config: dict[str, Any]) -> None:
        """Write nothing."""

    def remove_report(self) -> None:
        """Remove nothing."""

    def log_epoch(self, row: Mapping[str, Any]) -> None:
        """Write nothing."""


def prepare_folder(path: Path | None, *, name: str) -> Path:
    """Return the folder for a new run, made under runs/ if it is not named.

    Raises ConfigError for a folder of something else. A run without a checkpoint has nothing to
    lose: its folder is used again.
    """
    if path is None:
        return _new_folder(Path("runs"), f"{name}-{datetime.now():%Y%m%d-%H%M%S}")
    if not has_checkpoint(path):
        _check_is_free(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def _remove_temporary_files(run: Path) -> None:
    """Remove what a killed training of this run was writing; the caller holds the lock."""
    for folder in (run, run / "checkpoints", run / EXPORT_FOLDER):
        for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
            if path.is_file():
                path.unlink(missing_ok=True)


def _check_is_free(path: Path) -> None:
    """Raise ConfigError for a folder of something else, or of a run that lost its checkpoints."""
    if not path.exists():
        return
    if not path.is_dir():
        raise ConfigError(f"{path} is a file; --output is a folder to make")
    names = [name for name in list_folder(path) if name != LOCK_NAME]
    if names and not (CONFIG_NAME in names and METRICS_NAME in names):
        raise ConfigError(
            f"{path} is not empty and has no run ({names[0]}, …); give another --output"
        )
    # the disk may have been full at the first epoch's checkpoint, but then there is no second epoch
    summary = path / SUMMARY_NAME
    epochs = len(read_regular(summary).splitlines()) - 1 if summary.exists() else 0
    if REPORT_NAME in names or epochs > 1:
        raise ConfigError(f"the run in {path} has lost its checkpoints; give another --output")


def _is_before(event: dict[str, Any], *, epoch: int, step: int) -> bool:
    """Return whether an event is of that point or before."""
    return bool(event["step"] <= step if "step" in event else event["epoch"] <= epoch)


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
