"""mealv2 report without a browser: what the page has, replaced folders, wrong paths; compare."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from written_runs import write_run

Cli = Callable[..., Any]
SECTIONS = ("answer", "curves", "browser", "labels", "classes", "weights", "made")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods of two seeds each, and a run that has not finished."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (1, 2):
        write_run(folder / f"seed-{seed}/soft", seed=seed, best=4)
        write_run(folder / f"seed-{seed}/hard", seed=seed, top1=66.0, is_soft=False)
    write_run(folder / "short", seed=1, epochs=2, planned=9, model="test_vit")
    return folder


@pytest.fixture(scope="module")
def page(runs: Path, done: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("page") / "report"
    soft, hard = ([runs / f"seed-{seed}/{kind}" for seed in (1, 2)] for kind in ("soft", "hard"))
    control = [word for path in hard for word in ("--control", path)]
    done("report", *soft, runs / "short", *control, "--output", output)
    return output


def last_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "summary.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_page_has_every_section_and_says_what_is_missing(page: Path) -> None:
    text = (page / "index.html").read_text()
    assert re.findall(r'<section id="(\w+)"', text) == list(SECTIONS)
    assert "No label set: neither --labels nor a run names one" in text
    assert "still training" not in text
    assert "short is not finished: 2 of 9 epochs are done." in text
    assert "Not logged by any of these runs" not in text


def test_numbers_of_the_page_are_those_of_summary_csv(page: Path, runs: Path) -> None:
    text = (page / "index.html").read_text()
    shown = [float(value) for value in re.findall(r'<data value="([^"]+)"', text)]
    for kind in ("soft", "hard"):
        tables = [last_rows(runs / f"seed-{seed}/{kind}") for seed in (1, 2)]
        for name in ("val_top1", "val_top5"):
            last = sum(float(rows[-1][name]) for rows in tables) / 2
            assert last in shown
    best = (
        sum(
            max(float(row["val_top1"]) for row in last_rows(runs / p))
            for p in ("seed-1/soft", "seed-2/soft")
        )
        / 2
    )
    assert best in shown


def test_every_figure_has_its_files_with_the_numbers_of_summary_csv(page: Path, runs: Path) -> None:
    text = (page / "index.html").read_text()
    names = re.findall(r'<figure id="figure-([a-z0-9-]+)">', text)
    assert {"gain", "loss", "top1", "top5", "agreement", "lr", "discriminator-loss"} <= set(names)
    for name in names:
        assert all(
            (page / f"figures/{name}.{kind}").stat().st_size for kind in ("svg", "pdf", "csv")
        )
    assert len(re.findall(r'<svg role="img" aria-label="[^"]{20,}"', text)) >= len(names)
    with (page / "figures/top1.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["run"].endswith("seed-2/soft")]
    drawn = {int(float(row["epoch"])): float(row["val_top1"]) for row in rows}
    kept = {int(r["epoch"]): float(r["val_top1"]) for r in last_rows(runs / "seed-2/soft")}
    assert drawn == {0: 60.0, **kept}


def test_a_report_replaces_a_report_and_nothing_else(
    page: Path, runs: Path, run_cli: Cli, tmp_path: Path
) -> None:
    output = tmp_path / "report"
    assert run_cli("report", runs / "short", "--output", output).code == 0
    before = json.loads((output / "report.json").read_text())
    assert "index.html" in before["files"]
    assert run_cli("report", runs / "seed-1/soft", "--output", output).code == 0
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".tmp-")]
    (output / "mine.txt").write_text("notes")
    result = run_cli("report", runs / "short", "--output", output)
    assert result.code == 2
    assert "has files that are not of a report (mine.txt, …)" in result.stderr
    assert (output / "mine.txt").read_text() == "notes"


def test_a_report_that_fails_leaves_the_earlier_one(
    runs: Path, run_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "report"
    assert run_cli("report", runs / "short", "--output", output).code == 0
    before = (output / "index.html").read_bytes()
    (tmp_path / "damaged").mkdir()
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / "damaged" / name).write_text("{}")
    (tmp_path / "damaged/summary.csv").write_text("epoch,lr\nx,y\n")
    result = run_cli("report", tmp_path / "damaged", "--output", output)
    assert result.code == 1
    assert "summary.csv is damaged" in result.stderr
    monkeypatch.setattr("pipeline.report.made.section", lambda inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_cli("report", runs / "short", "--output", output)
    assert (output / "index.html").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"report", "damaged"}


@pytest.mark.parametrize("command", ["report", "compare", "curves"])
def test_a_folder_without_a_run_is_named(command: str, run_cli: Cli, tmp_path: Path) -> None:
    output = ["--output", tmp_path / "out"] if command == "report" else []
    result = run_cli(command, tmp_path / "nothing", *output)
    assert result.code == 2
    assert "no run in" in result.stderr


def test_compare_prints_the_table_with_a_paired_test(runs: Path, run_cli: Cli) -> None:
    paths = [runs / f"seed-{seed}/soft" for seed in (1, 2)]
    control = [w for seed in (1, 2) for w in ("--control", runs / f"seed-{seed}/hard")]
    result = run_cli("compare", *paths, *control)
    assert result.code == 0
    assert re.search(r"hard \(control\): last, best +66\.15 ± ", result.stdout)
    assert re.search(r"soft minus hard +\+4\.00 ", result.stdout)
    report = json.loads(run_cli("compare", *paths, *control, "--json").stdout)
    (comparison,) = report["comparisons"]
    assert comparison["differences"] == pytest.approx([4.0, 4.0])


def test_curves_prints_a_line_of_blocks_for_each_curve(runs: Path, run_cli: Cli) -> None:
    result = run_cli("curves", runs / "short")
    assert result.code == 0
    assert re.search(r"Training loss +█▁ +1\.5 +1 ", result.stdout)
