"""Read the folder of a run, finished or not: settings, epochs, validations, sessions, labels."""

import csv
import html
import io
import math
import os
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mealv2.errors import ConfigError, MealError
from mealv2.storage.json_format import read_json
from mealv2.storage.regular_files import read_regular
from mealv2.storage.run_files import (
    CONFIG_NAME,
    LABELS_NAME,
    LOCK_NAME,
    METRICS_NAME,
    REPORT_NAME,
    SESSION,
    SUMMARY_NAME,
    parse_event,
)
from mealv2.storage.weight_files import EXPORT_FOLDER

Row = dict[str, float]
_VALIDATION, _PREFIX = "validation", "val_"
_ALIVE_S = 120.0  # a training touches its lock more often, on network file systems too
_SHOWN = ("top1", "top5", "map", "agreement", "kl", "ece")


@dataclass(frozen=True, eq=False)
class Run:
    """What a run folder has, as of when it was read.

    ``epochs`` are the rows of summary.csv with the figures that they have, ``first_steps`` the
    logged steps of a run whose first epoch is not complete, ``validations`` the metrics by epoch, 0
    for the start. ``report``, ``labels`` and ``student`` are report.json,
    labels.json and student/config.json, None where there is no such file yet.
    """

    path: Path
    config: dict[str, Any]
    epochs: list[Row]
    first_steps: list[Row]
    validations: dict[int, Row]
    sessions: list[dict[str, Any]]
    notes: list[str]
    teachers: dict[str, Row]
    report: dict[str, Any] | None
    labels: dict[str, Any] | None
    student: dict[str, Any] | None
    is_alive: bool

    @property
    def seed(self) -> int | None:
        """The seed of the training."""
        return self.config.get("seed")

    @property
    def num_epochs(self) -> int:
        """The epochs that are complete."""
        return int(self.epochs[-1]["epoch"]) if self.epochs else 0

    @property
    def model(self) -> str:
        """The name of the student."""
        return str((self.report or {}).get("model") or self.config.get("model") or "unknown")

    @property
    def is_finished(self) -> bool:
        """Whether the run has its report."""
        return self.report is not None

    @property
    def metric(self) -> str:
        """What chooses the best epoch: top1, or map for images of several classes."""
        found = next((row for row in self.validations.values()), {})
        return "map" if "map" in found else "top1"

    @property
    def start(self) -> Row | None:
        """The metrics before the first step."""
        return self.validations.get(0)

    @property
    def last(self) -> tuple[int, Row] | None:
        """The last epoch that was validated, and its metrics."""
        epoch = max((epoch for epoch in self.validations if epoch), default=None)
        return None if epoch is None else (epoch, self.validations[epoch])

    @property
    def best(self) -> tuple[int, Row] | None:
        """The best epoch and its metrics; of equal ones the last, as the training chooses."""
        found = [(m[self.metric], e) for e, m in self.validations.items() if e and self.metric in m]
        return (max(found)[1], self.validations[max(found)[1]]) if found else None

    @property
    def state(self) -> str:
        """What has become of the run, in words."""
        planned = self.config.get("epochs")
        done = f"{self.num_epochs} of {planned} epochs" if planned else f"{self.num_epochs} epochs"
        if self.is_finished:
            return f"finished after {self.num_epochs} epochs"
        return f"{'still training' if self.is_alive else 'not finished'}: {done} are done"

    @cached_property
    def seconds(self) -> float:
        """The seconds that its processes trained, validation included."""
        return float(sum(session["seconds"] for session in self.sessions))

    def _repr_html_(self) -> str:
        """Show the run in a notebook."""
        known = {"start": (0, self.start), "last": self.last, "best": self.best}
        rows = {name: pair for name, pair in known.items() if pair is not None and pair[1]}
        names = [n for n in _SHOWN if any(n in (figures or {}) for _, figures in rows.values())]
        head = "".join(f"<th>{name}</th>" for name in ("", "epoch", *names))
        body = "".join(
            f"<tr><th>{title}</th><td>{epoch}</td>"
            + "".join(f"<td>{_cell((figures or {}).get(name))}</td>" for name in names)
            + "</tr>"
            for title, (epoch, figures) in rows.items()
        )
        title = html.escape(f"{self.path}: {self.model}, {self.state}")
        return f"<p>{title}</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def open_run(path: str | os.PathLike[str]) -> Run:
    """Read a run folder of `mealv2 distill`, `finetune` or `transfer`, also while it trains.

    Raises ConfigError for a folder without a run, MealError if one of its files is damaged.
    """
    folder = Path(path)
    missing = [name for name in (CONFIG_NAME, METRICS_NAME) if not (folder / name).is_file()]
    if missing:
        raise ConfigError(f"no run in {folder}: it has no {missing[0]}; give a run folder")
    events = _events(folder / METRICS_NAME)
    texts = [e["text"] for e in events if isinstance(e.get("text"), str)]
    epochs = _epochs(folder / SUMMARY_NAME)
    return Run(
        path=folder,
        config=_json(folder / CONFIG_NAME) or {},
        epochs=epochs,
        first_steps=[] if epochs else _steps(events),
        validations=_validations(folder / SUMMARY_NAME, events),
        sessions=_sessions(events),
        notes=texts,
        teachers=_teachers(events),
        report=_json(folder / REPORT_NAME),
        labels=_json(folder / LABELS_NAME),
        student=_json(folder / EXPORT_FOLDER / CONFIG_NAME),
        is_alive=_is_alive(folder / LOCK_NAME),
    )


def _json(path: Path) -> dict[str, Any] | None:
    """Return a JSON object, None without the file; raises MealError."""
    try:
        value = read_json(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise MealError(f"{path} is damaged ({error}); restore it or leave the run out") from None
    if not isinstance(value, dict):
        raise MealError(f"{path} is damaged (no JSON object); restore it or leave the run out")
    return value


def _events(path: Path) -> list[dict[str, Any]]:
    """Return the events of metrics.jsonl; half a last line is what a training is writing."""
    return [event for line in read_regular(path).splitlines() if (event := parse_event(line))]


def _epochs(path: Path) -> list[Row]:
    """Return the rows of summary.csv with their numbers; raises MealError."""
    if not path.exists():
        return []
    try:
        reader = csv.DictReader(io.StringIO(read_regular(path).decode(), newline=""))
        rows = [
            {name: float(text) for name, text in row.items() if name and text} for row in reader
        ]
        return sorted(rows, key=lambda row: row["epoch"])
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise MealError(f"{path} is damaged ({error}); restore it or leave the run out") from None


def _validations(path: Path, events: list[dict[str, Any]]) -> dict[int, Row]:
    """Return metrics by epoch: of summary.csv, and of events for what it does not have."""
    found = {
        event["epoch"]: {name: value for name, value in event.items() if _is_figure(name, value)}
        for event in events
        if event.get("event") == _VALIDATION and type(event.get("epoch")) is int
    }
    for row in _epochs(path):
        metrics = {n.removeprefix(_PREFIX): v for n, v in row.items() if n.startswith(_PREFIX)}
        if metrics:
            epoch = int(row["epoch"])
            found[epoch] = {**found.get(epoch, {}), **metrics}
    return dict(sorted(found.items()))


def _steps(events: list[dict[str, Any]]) -> list[Row]:
    """Return the logged steps of training; of one that was trained again the last."""
    found = {
        event["step"]: {name: value for name, value in event.items() if _is_figure(name, value)}
        for event in events
        if event.get("event") == "train" and type(event.get("step")) is int
    }
    return [found[step] for step in sorted(found)]


def _is_figure(name: str, value: Any) -> bool:
    return name not in ("time", "epoch") and type(value) in (int, float)


def _sessions(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the processes that trained, each with its ``seconds`` up to its last event."""
    found: list[dict[str, Any]] = []
    for event in events:
        if event.get("event") == SESSION:
            found.append({**event, "seconds": 0.0})
        at, began = event.get("time"), found[-1].get("time") if found else None
        if isinstance(at, int | float) and isinstance(began, int | float):
            found[-1]["seconds"] = max(found[-1]["seconds"], at - began)
    return found


def _teachers(events: list[dict[str, Any]]) -> dict[str, Row]:
    """Return the accuracies of teachers and ensemble that the run itself measured or read."""
    of_teachers = [event for event in events if event.get("event") == "teachers"]
    rows = of_teachers[-1].get("accuracies") if of_teachers else None
    return rows if isinstance(rows, dict) else {}


def _is_alive(lock: Path) -> bool:
    """Return whether a training holds the lock: it touches the file while it lives."""
    try:
        return time.time() - lock.stat().st_mtime < _ALIVE_S
    except OSError:
        return False


def _cell(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.2f}"
