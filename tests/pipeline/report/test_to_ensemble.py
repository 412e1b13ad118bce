"""Students that were not compared with the ensemble are measured when the page is made."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mealv2.report.run import open_run
from pipeline.report import answer
from pipeline.report.sections import Inputs
from pipeline.report.to_ensemble import with_closeness

Cli = Callable[..., Any]
FIGURES = ("agreement", "kl", "ece")

pytest.importorskip("matplotlib", reason="matplotlib is not installed")


@pytest.fixture(scope="module")
def known(done: Cli, distill_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that logged how close it is to the ensemble."""
    run = tmp_path_factory.mktemp("runs") / "known"
    done(*distill_flags, "--epochs", 1, "--output", run)
    return run


@pytest.fixture
def old(known: Path, tmp_path: Path) -> Path:
    """The same run without these figures in its logs."""
    run = tmp_path / "old"
    shutil.copytree(known, run)
    with (run / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name.removeprefix("val_") not in FIGURES]
    with (run / "summary.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    events = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    kept = [{n: v for n, v in event.items() if n not in FIGURES} for event in events]
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in kept))
    return run


def test_measured_figures_are_those_that_the_training_logged(
    known: Path, old: Path, labels_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    first, second = open_run(known), open_run(old)
    assert not set(FIGURES) & second.validations[1].keys()
    inputs = Inputs((second,), (), labels_dir, data_dir, tmp_path)
    (found,), notes = with_closeness(inputs, [second])
    assert notes == []
    for name in FIGURES:
        assert found.validations[1][name] == pytest.approx(first.validations[1][name], rel=1e-4)
    assert found.validations[0] == second.validations[0]
    (same,), _ = with_closeness(inputs, [first])
    assert same is first


def test_what_cannot_be_measured_is_named(
    old: Path, labels_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    run = open_run(old)
    section = answer.section(Inputs((run,), (), labels_dir, None, tmp_path))
    assert "Agreement, KL and ECE that a run did not log are measured with --data-dir." in str(
        section.missing
    )
    run.validations[1]["top1"] += 10
    _, notes = with_closeness(Inputs((run,), (), labels_dir, data_dir, tmp_path), [run])
    assert "on these images its top-1 is" in notes[0]
    assert with_closeness(Inputs((run,), (), None, data_dir, tmp_path), [run]) == ([run], [])
