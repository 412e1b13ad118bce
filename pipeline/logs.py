"""What a person and a machine see of a run: progress, console lines, metrics.jsonl, summary.csv."""

import csv
import io
import itertools
import json
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from mealv2.errors import ConfigError
from mealv2.files import canonical_json, content_of, read_json, write_whole
from pipeline import checkpoint
from pipeline.copies import told
from pipeline.environment import on_terminal
from pipeline.ranks import speaks

T = TypeVar("T")
REPORT_NAME = "report.json"
LABELS_NAME = "labels.json"
_LINE_EVERY_S = 10.0

# tqdm's own lock is shared with forked processes too, and one of them that is killed while it
# writes a line would stop all others for good; only one process talks here
tqdm.set_lock(threading.RLock())


def say(text: str) -> None:
    """Print a line of talk to stderr, around a progress bar if there is one; first rank only."""
    if speaks():
        tqdm.write(told(text), file=sys.stderr)


def progress(
    items: Iterable[T], *, total: int, what: str, unit: str, size: Any = None
) -> Iterator[T]:
    """Yield ``items`` and show how far they are: a bar with rate and ETA on a terminal, else lines.

    ``size(item)`` says how many units an item counts, 1 by default; ``total`` is in units. Of
    several ranks the first one shows.
    """
    if not speaks():
        yield from items
        return
    if on_terminal():
        with tqdm(total=total, desc=what, unit=f" {unit}", file=sys.stderr, leave=False) as bar:
            for item in items:
                yield item
                bar.update(size(item) if size else 1)
        return
    began = last = time.monotonic()
    done = 0
    for item in items:
        yield item
        done += size(item) if size else 1
        now = time.monotonic()
        if now - last >= _LINE_EVERY_S and done < total:
            last = now
            rate = done / (now - began)
            left = duration((total - done) / rate)
            say(f"{what}: {done}/{total} {unit}, {rate:.0f}/s, {left} left")


def duration(seconds: float) -> str:
    """Return seconds as a person says them: 48 s, 3 min 05 s, 2 h 10 min, 3 d 4 h."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def size_of(num_bytes: float) -> str:
    """Return a byte count as a person says it, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:  # what rounds to 1000 is 1 of the next unit
            return f"{num_bytes:.3g} {unit}" if unit != "B" else f"{num_bytes:.0f} B"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def count(number: int, unit: str) -> str:
    """Return a number of things: 1 shard, 2 shards; also of a unit of several words."""
    first, space, rest = unit.partition(" of ")
    return f"{number} {first}{'' if number == 1 else 's'}{space}{rest}"


def table(rows: list[list[str]]) -> str:
    """Return rows as aligned columns, the first row as head, text left and figures right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]])


class RunFolder:
    """The folder of one run: config.json, metrics.jsonl (per event), summary.csv (per epoch).

    labels.json says which labels the run is made from.
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
        """Make a run folder, under runs/ if not named; raises ConfigError if a run is there.

        ``labels`` says which labels it is made from. A run that never came to a checkpoint has
        nothing to lose: its folder is used again.
        """
        if path is None:
            path = _new_folder(Path("runs"), f"{name}-{datetime.now():%Y%m%d-%H%M%S}")
        if checkpoint.exists(path):
            raise ConfigError(
                f"{path} already holds a run; continue it with --resume {path}, "
                "or give another --output"
            )
        _refuse_what_is_no_begun_run(path)
        path.mkdir(parents=True, exist_ok=True)
        # a repeated run makes a folder of its own
        config = {**config, "output": None, "resume": None}
        write_whole(path / "config.json", canonical_json(config).encode())
        if labels is not None:
            write_whole(path / LABELS_NAME, canonical_json(labels).encode())
        run = cls(path)
        run.metrics_path.write_bytes(b"")
        return run

    @classmethod
    def reopen(cls, path: Path, *, epoch: int, step: int) -> "RunFolder":
        """Open a run folder to continue after ``epoch`` whole epochs and ``step`` steps.

        What was logged after that point will be done again and is dropped.
        """
        run = cls(path)
        if run.summary_path.exists():
            with run.summary_path.open(newline="", encoding="utf-8") as file:
                rows = [dict(row) for row in csv.DictReader(file)]
            run._rows = [row for row in rows if int(row["epoch"]) <= epoch]
        if run.metrics_path.exists():
            lines = run.metrics_path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _is_before(line, epoch=epoch, step=step)]
            write_whole(run.metrics_path, "".join(f"{line}\n" for line in kept).encode())
        return run

    @property
    def metrics_path(self) -> Path:
        """Where the events lie, one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def summary_path(self) -> Path:
        """Where the table of epochs lies."""
        return self.path / "summary.csv"

    def log(self, event: str, **figures: Any) -> None:
        """Append one event to metrics.jsonl."""
        line = json.dumps({"event": event, "time": round(time.time(), 3), **figures})
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def report(self) -> dict[str, Any] | None:
        """Return report.json of a run that went to its end; None before."""
        path = self.path / REPORT_NAME
        return dict(read_json(path)) if path.exists() else None

    def finish(self, report: dict[str, Any]) -> None:
        """Write report.json: the run went to its end."""
        write_whole(self.path / REPORT_NAME, canonical_json(report).encode())

    def epoch_row(self, row: Mapping[str, Any]) -> None:
        """Add an epoch to summary.csv (written whole)."""
        self._rows.append(dict(row))
        text = io.StringIO()
        names = list(dict.fromkeys(name for row in self._rows for name in row))
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        write_whole(self.summary_path, text.getvalue().encode())


class OthersFolder(RunFolder):
    """The run folder of a rank that leaves writing to the first one."""

    def log(self, event: str, **figures: Any) -> None:
        """Write nothing."""

    def finish(self, report: dict[str, Any]) -> None:
        """Write nothing."""

    def epoch_row(self, row: Mapping[str, Any]) -> None:
        """Write nothing."""


def _refuse_what_is_no_begun_run(path: Path) -> None:
    """Raise ConfigError for a folder of something else, or of a run without its checkpoints."""
    if not path.exists():
        return
    if not path.is_dir():
        raise ConfigError(f"{path} is a file; --output is a folder to make")
    there = content_of(path)
    if there and not ("config.json" in there and "metrics.jsonl" in there):
        raise ConfigError(
            f"{path} is not empty and holds no run ({there[0]}, …); give another --output"
        )
    # a first epoch may have ended without room for its checkpoint, a second one not
    summary = path / "summary.csv"
    epochs = len(summary.read_bytes().splitlines()) - 1 if summary.exists() else 0
    if REPORT_NAME in there or epochs > 1:
        raise ConfigError(f"the run in {path} has lost its checkpoints; give another --output")


def _is_before(line: str, *, epoch: int, step: int) -> bool:
    """Return whether a line of metrics.jsonl tells of what was done by then (half a line: no)."""
    try:
        event = json.loads(line)
    except ValueError:
        return False
    return int(event["step"]) <= step if "step" in event else int(event["epoch"]) <= epoch


def _new_folder(parent: Path, name: str) -> Path:
    """Make a folder of this name, or with a number behind it where there is one already."""
    parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        path = parent / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise AssertionError("count never ends")
