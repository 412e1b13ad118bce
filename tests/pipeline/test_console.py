"""pipeline.console: words for a person, files for a machine."""

import csv
import itertools
import json
import os
import subprocess
import sys
import termios
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from mealv2 import text as texts
from mealv2.errors import ConfigError
from pipeline import console
from pipeline.training import checkpoint
from pipeline.training.run_folder import REPORT_NAME, RunFolder, prepare_folder


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.0, "0 s"),
        (0.1234, "0.123 s"),
        (48, "48 s"),
        (59.6, "59.6 s"),
        (185, "3 min 05 s"),
        (3599.7, "1 h 00 min"),
        (7800, "2 h 10 min"),
        (273600, "3 d 4 h"),
    ],
)
def test_duration_is_said_as_a_person_does(seconds: float, said: str) -> None:
    assert console.duration(seconds) == said


@pytest.mark.parametrize(
    ("num_bytes", "said"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (61440, "61.4 kB"),
        (999_600, "1 MB"),
        (7_300_000_000, "7.3 GB"),
        (2.5e12, "2.5 TB"),
    ],
)
def test_size_is_said_as_a_person_does(num_bytes: float, said: str) -> None:
    assert console.size_of(num_bytes) == said


def test_table_aligns_text_left_and_figures_right() -> None:
    shown = console.table([["name", "top-1"], ["a long one", "9.00"], ["b", "100.00"]])
    assert shown.splitlines() == [
        "name         top-1",
        "------------------",
        "a long one    9.00",
        "b           100.00",
    ]


# --- progress -----------------------------------------------------------------------------------


def test_progress_yields_everything_and_is_quiet_when_quick(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert list(console.progress(range(5), total=5, what="x", unit="y")) == [0, 1, 2, 3, 4]
    assert capsys.readouterr() == ("", "")


def test_progress_off_a_terminal_says_plain_lines_with_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "_LINE_EVERY_S", 0.0)
    list(console.progress([3, 3, 4], total=10, what="labelling", unit="views", size=int))
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(",")[0] for line in err.splitlines()] == [
        "labelling: 3/10 views",
        "labelling: 6/10 views",
    ]
    assert all("/s, " in line and line.endswith(" left") for line in err.splitlines())
    assert "\r" not in err


def _loop(items: Iterable[int]) -> None:
    list(console.progress(items, total=3, what="validating", unit="images"))


def _shown_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, *, term: str, loop: Callable[[], None]
) -> str:
    """Run a loop with a real pseudo-terminal as stderr; return what it got."""
    monkeypatch.setenv("TERM", term)
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (25, 100))
    with os.fdopen(slave, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        loop()
        stream.write("\x04")  # the end, so that the reader need not guess
        stream.flush()
        shown = b""
        while not shown.endswith(b"\x04"):
            shown += os.read(master, 65536)
    os.close(master)
    return shown.decode()


def test_progress_on_a_terminal_is_a_moving_bar_with_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = _shown_on_a_terminal(monkeypatch, term="xterm", loop=lambda: _loop(range(3)))
    assert "\rvalidating:   0%" in shown
    assert "images/s" in shown
    assert "<" in shown  # elapsed<left


def test_a_note_takes_the_place_of_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def loop() -> None:
        with console.ProgressBar(3, what="epoch 2/9", unit="images", note=notes.pop) as bar:
            for _ in range(3):
                bar.update(1)

    notes = ["", "loss 0.5, run ETA 03:05"]
    shown = _shown_on_a_terminal(monkeypatch, loop=loop, term="xterm")
    assert notes == [""], "once a second"
    assert "epoch 2/9: " in shown
    assert "images/s, loss 0.5, run ETA 03:05]" in shown
    assert "<" not in shown, "no time of this loop"

    monkeypatch.setattr(console, "_LINE_EVERY_S", 0.0)
    notes = ["loss 0.4, run ETA 02:05", "loss 0.5, run ETA 03:05"]
    loop()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("/s, ")[1] for line in lines] == [
        "loss 0.5, run ETA 03:05",
        "loss 0.4, run ETA 02:05",
    ]


def test_progress_on_a_dumb_terminal_is_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_LINE_EVERY_S", 0.0)
    shown = _shown_on_a_terminal(monkeypatch, term="dumb", loop=lambda: _loop(range(3)))
    assert "validating: 1/3 images" in shown
    assert "%" not in shown


# --- the run folder -----------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(
        prepare_folder(tmp_path / "run", name="x"), {"lr": 0.1, "output": "here"}
    )


def test_run_folder_keeps_the_config_without_its_own_place(run: RunFolder) -> None:
    config = json.loads((run.path / "config.json").read_text())
    assert config["lr"] == 0.1
    assert config["output"] is None


def test_folder_with_a_checkpoint_is_not_used_again(run: RunFolder) -> None:
    checkpoint.save(run.path, {}, step=1, keep=1)
    with pytest.raises(ConfigError, match=r"already holds a run.*--resume"):
        RunFolder.create(run.path, {})


def test_unnamed_folders_are_made_under_runs_one_for_each_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = [prepare_folder(None, name="distill-m") for _ in range(3)]
    assert len(set(paths)) == 3, "runs that begin in the same second share a folder"
    assert all(path.parent == Path("runs") and path.is_dir() for path in paths)
    assert all(path.name.startswith("distill-m-") for path in paths)


def test_events_are_json_lines(run: RunFolder) -> None:
    run.log("train", step=1, loss=0.5)
    run.log("validation", top1=99.0)
    lines = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["train", "validation"]
    assert (lines[0]["step"], lines[0]["loss"], lines[1]["top1"]) == (1, 0.5, 99.0)


def _rows(run: RunFolder) -> list[dict[str, Any]]:
    with run.summary_path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_summary_has_a_row_for_each_epoch_and_takes_new_columns(run: RunFolder) -> None:
    run.log_epoch({"epoch": 1, "loss": 2.0})
    run.log_epoch({"epoch": 2, "loss": 1.0, "kl": 0.1})
    assert _rows(run) == [
        {"epoch": "1", "loss": "2.0", "kl": ""},
        {"epoch": "2", "loss": "1.0", "kl": "0.1"},
    ]


def test_reopened_folder_forgets_the_rows_that_will_be_made_again(run: RunFolder) -> None:
    """``epoch`` counts finished epochs: rows 1..epoch stay."""
    for epoch in (1, 2, 3):
        run.log_epoch({"epoch": epoch})
    again = RunFolder.reopen(run.path, epoch=2, step=20)
    again.log_epoch({"epoch": 3})
    assert [row["epoch"] for row in _rows(again)] == ["1", "2", "3"]


def test_report_is_written_when_the_run_ends(run: RunFolder) -> None:
    assert not (run.path / REPORT_NAME).exists()
    run.write_report({"top1": 50.0})
    assert json.loads((run.path / REPORT_NAME).read_text()) == {"top1": 50.0}


def test_progress_does_not_ask_for_more_than_it_yields() -> None:
    items = itertools.count()
    assert list(console.progress(itertools.islice(items, 3), total=3, what="x", unit="y")) == [
        0,
        1,
        2,
    ]
    assert next(items) == 3


_KILLED_WHILE_IT_TALKS = """
import os, signal
from pipeline import console as logs
logs.info("before")
child = os.fork()
if not child:
    logs.tqdm.get_lock().acquire()
    os.kill(os.getpid(), signal.SIGKILL)
os.waitpid(child, 0)
signal.alarm(10)
logs.info("after")
"""


@pytest.mark.slow
def test_process_that_is_killed_while_it_talks_does_not_silence_its_parent() -> None:
    said = subprocess.run(
        [sys.executable, "-c", _KILLED_WHILE_IT_TALKS],
        cwd=Path(console.__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (said.returncode, said.stderr) == (0, "before\nafter\n")


def test_a_copy_goes_by_what_it_is_a_copy_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "_display_names", {})
    texts.set_display_name(Path("/cache/s3/b/labels"), "s3://b/labels")
    for text, told in {
        "/cache/s3/b/labels: no": "s3://b/labels: no",
        "see /cache/s3/b/labels/a.h5.": "see s3://b/labels/a.h5.",
        "in /cache/s3/b/labels.": "in s3://b/labels.",
        "/cache/s3/b/labels-2, /cache/s3/b/labels.old": None,
    }.items():
        assert texts.use_display_names(text) == (told or text)


def test_one_thing_has_no_plural() -> None:
    said = [console.count(n, "shard") for n in (0, 1, 2)] + [console.count(1, "file of jobs")]
    assert said == ["0 shards", "1 shard", "2 shards", "1 file of jobs"]
    assert console.count(3, "file of jobs") == "3 files of jobs"
