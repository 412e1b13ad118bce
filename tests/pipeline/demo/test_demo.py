"""`mealv2 demo`, shortened: its table, what it keeps, and how it ends early."""

import multiprocessing
import os
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from screenshots import CHROMIUM

from conftest import ROOT, Result, Spawned
from mealv2.errors import MealError, StoppedError
from pipeline import demo
from pipeline.config import DemoConfig
from pipeline.demo import parts, pictures, workers
from pipeline.demo.workers import run_parts
from pipeline.training.run_folder import has_checkpoint

# fewer pictures, fewer epochs, the smallest teacher twice as small: seconds instead of minutes
SHORT = {
    "pictures.SPLITS": {"teacher-train": 4, "train": 2, "unlabelled": 3, "val": 2},
    "parts.TEACHERS": ("test_byobnet", "test_efficientnet"),
    "parts.TEACHER": {"epochs": 1, "batch_size": 20, "lr": 0.05},
    "parts.START_EPOCHS": 1,
    "parts.EPOCHS": 2,
    "parts.EXTRA_EPOCHS": 1,
}
PROGRAM = """
import sys

sys.path.insert(0, {root!r})
import cli
from pipeline.demo import parts, pictures

{changes}

if __name__ == "__main__":
    cli.main()
"""


@pytest.fixture(scope="module")
def short_demo() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SHORT.items():
            module, _, constant = name.partition(".")
            patch.setattr({"parts": parts, "pictures": pictures}[module], constant, value)
        yield


@pytest.fixture(scope="module")
def finished(
    short_demo: None, run_cli: Callable[..., Result], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Result]:
    """Return (folder, result) of one finished demo."""
    out = tmp_path_factory.mktemp("short") / "demo"
    return out, run_cli("demo", "--output", out, "--seeds", 1, "--num-procs", 2)


def run_one(part: parts.Part, logs: Path, *, on_poll: Callable[[], None]) -> None:
    """Run a part in one process."""
    run_parts([part], kept=set(), num_procs=1, logs=logs, on_done=lambda *_: None, on_poll=on_poll)


def models(out: Path) -> dict[Path, int]:
    """Return when each model was written."""
    return {path: path.stat().st_mtime_ns for path in out.rglob("model.safetensors")}


@pytest.mark.slow
def test_demo_ends_with_one_table(finished: tuple[Path, Result]) -> None:
    out, result = finished
    assert result.code == 0, result.stderr
    lines = result.stderr.splitlines()
    numbered = [line for line in lines if line.startswith("[")]
    assert [line.split("]")[0] for line in numbered] == [f"[{n}/9" for n in range(1, 10)]
    assert all("top-1 " in line or "ensemble " in line for line in numbered)
    # what the commands print is in the logs, not between these lines
    assert not [line for line in lines if "epoch" in line or "run folder" in line]
    logs = {path.stem: path.read_text() for path in (out / "logs").iterdir()}
    assert len([name for name in logs if not name.startswith("seed-1")]) == 9
    assert "epoch 2/2" in logs["seed-0-hard-labels"]
    report = result.report
    assert len(report["students"]["soft-labels"]["top1"]) == 1
    (difference,) = report["gains"]["soft-labels-extra"]["differences"]
    top1 = {arm: figures["top1"][0] for arm, figures in report["students"].items()}
    assert difference == pytest.approx(top1["soft-labels-extra"] - top1["hard-labels"])
    assert [teacher["model"] for teacher in report["teachers"]] == list(parts.TEACHERS)
    assert report["page"] == str(out / "report/index.html")
    assert Path(report["page"]).is_file()
    assert f"report {out}/report/index.html (" in result.stderr
    for row in ("ensemble of the teachers", "hard labels: the control", "(a) ", "(b) "):
        assert row in result.stderr


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="Debian's chromium is not installed")
@pytest.mark.parametrize("size", [(1280, 900), (390, 844)])
def test_the_page_has_all_sections_and_its_browser_is_filtered(
    finished: tuple[Path, Result], size: tuple[int, int]
) -> None:
    pages = pytest.importorskip("pages", reason="Playwright is not installed")
    out, result = finished
    assert result.code == 0, result.stderr
    with pages.opened(out / "report", size=size) as tab:
        assert pages.sections_of(tab) == pages.SECTIONS
        assert tab.locator("#weights figure svg").count() == 4  # histograms, and percentiles
        assert pages.serious_findings(tab) == []
        titles = tab.locator("#browser-images h4")
        key = titles.first.text_content()
        tab.locator("[name=text]").fill(key)
        assert titles.all_text_contents() == [key]
        tab.locator("[name=text]").fill("no image has this name")
        assert titles.count() == 0


@pytest.mark.slow
def test_second_call_keeps_what_is_finished(
    finished: tuple[Path, Result], run_cli: Callable[..., Result]
) -> None:
    out, first = finished
    before = models(out)

    second = run_cli("demo", "--output", out, "--seeds", 2)

    assert second.code == 0, second.stderr
    assert "14 parts, 9 of them kept" in second.stderr
    assert {path: time for path, time in models(out).items() if path in before} == before
    for arm, figures in second.report["students"].items():
        assert figures["top1"][0] == first.report["students"][arm]["top1"][0]
    gain = second.report["gains"]["soft-labels"]
    low, high = gain["interval_95"]
    assert low <= gain["mean"] <= high


@pytest.mark.slow
def test_folder_of_other_settings_is_an_error(
    finished: tuple[Path, Result], run_cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "LR", 0.5)
    result = run_cli("demo", "--output", finished[0], "--seeds", 1)
    assert result.code == 2
    assert "other settings" in result.stderr


@pytest.mark.slow
def test_error_of_a_part_is_one_line_with_its_exit_code(
    short_demo: None, run_cli: Callable[..., Result], tmp_path: Path
) -> None:
    data = pictures.write_pictures(tmp_path / "demo" / "data")
    damaged = next((data / "teacher-train" / "3").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:60])

    result = run_cli("demo", "--output", tmp_path / "demo", "--seeds", 1, "--num-procs", 2)

    assert result.code == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("mealv2:")]
    assert len(errors) == 1
    assert errors[0].startswith("mealv2: teacher test_")
    assert damaged.name in errors[0]
    assert "Traceback" not in result.stderr
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_process_that_is_killed_is_named_with_its_log(short_demo: None, tmp_path: Path) -> None:
    config = DemoConfig(output=tmp_path, seeds=1)
    pictures.write_pictures(tmp_path / "data")
    teacher = parts.plan_parts(config)[0]
    endless = replace(teacher, config=replace(teacher.config, epochs=100_000))

    def kill() -> None:
        if (tmp_path / "logs" / f"{teacher.name}.log").exists():
            for process in multiprocessing.active_children():
                os.kill(process.pid or 0, signal.SIGKILL)

    with pytest.raises(MealError, match=r"byobnet: its process ended \(SIGKILL\).*; run the same"):
        run_one(endless, tmp_path / "logs", on_poll=kill)


@pytest.mark.slow
def test_ctrl_c_saves_and_keeps_what_is_finished(
    short_demo: None, spawn: Callable[..., Spawned], tmp_path: Path
) -> None:
    changes = SHORT | {"parts.START_EPOCHS": 100_000}
    program = tmp_path / "short_demo.py"
    lines = "\n".join(f"{name} = {value!r}" for name, value in changes.items())
    program.write_text(PROGRAM.format(root=os.fspath(ROOT), changes=lines))
    out = tmp_path / "demo"
    process = spawn("demo", "--output", out, "--seeds", 2, "--num-procs", 2, program=program)
    running = [out / "seed-0" / "start", out / "seed-1" / "start"]
    process.until(lambda: all(map(has_checkpoint, running)), deadline_s=300)

    process.signal(signal.SIGINT)

    result = process.result(deadline_s=90)
    assert result.code == 4, result.stderr
    assert "finished parts are kept" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    for name in ("teacher-test_byobnet/report.json", "labels/manifest.json"):
        assert (out / name).exists()
    for folder in running:  # they ended in order
        log = (out / "logs" / f"{folder.parent.name}-start.log").read_text()
        assert "saving and stopping" in log
        assert "Traceback" not in log


def test_ctrl_c_while_processes_start_stops_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, processes = workers._Worker.__init__, []

    def start_and_stop(worker: workers._Worker, logs: Path) -> None:
        start(worker, logs)
        processes.append(worker._process)
        os.kill(worker._process.pid or 0, signal.SIGINT)  # of a terminal: to both
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(workers._Worker, "__init__", start_and_stop)
    teacher = parts.plan_parts(DemoConfig(output=tmp_path))[0]
    with pytest.raises(StoppedError, match="stopped by SIGINT"):
        run_one(teacher, tmp_path / "logs", on_poll=lambda: None)
    assert [process.exitcode for process in processes] == [-signal.SIGTERM]  # not by Ctrl-C
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.slow
def test_longer_distillation_of_the_page_runs(
    finished: tuple[Path, Result], run_cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs/tutorial/demo.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^mealv2 (distill --config demo/.*)$", page, flags=re.MULTILINE)
    monkeypatch.chdir(finished[0].parent)  # it ends with demo
    result = run_cli(*line.replace("240", "4").split())  # (a) of the fixture has 2 epochs
    assert result.code == 0, result.stderr
    assert result.report["epochs"] == 4


def test_processes_are_those_of_the_user_or_as_many_as_the_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for cores, given, expected in ((2, None, 2), (64, None, 4), (2, 6, 6)):
        monkeypatch.setattr("pipeline.runtime.env.num_cores", lambda cores=cores: cores)
        assert demo.num_procs_of(DemoConfig(num_procs=given)) == expected
