"""pipeline.transfer_detection with --compare: the paper's Table 7, base against distilled."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from coco import draw_coco

from conftest import Result
from pipeline.comparison.table import AVERAGE_PRECISIONS, Run, grid_report, grid_table

Done = Callable[..., Result]
MODES = ("fine-tune", "freeze-first-stage")


def runs() -> list[Run]:
    """Two seeds of each mode and model; no object is large."""
    return [
        Run("", mode, model, seed, {"ap": 30.0 + m + 2 * d + seed, "ap50": 50.0, "ap_small": 10.0})
        for m, mode in enumerate(MODES)
        for d, model in enumerate(("base", "distilled"))
        for seed in (0, 1)
    ]


def test_the_table_has_a_column_for_each_average_precision() -> None:
    lines = grid_table(runs(), AVERAGE_PRECISIONS, as_markdown=True).splitlines()
    assert lines[0] == "|  | AP | AP50 | APSmall |"
    # Student's t of one degree of freedom: 12.706 times the standard error, 0.5
    assert lines[2] == "| Fine-tune: Base model | 30.50 ± 6.35 | 50.00 ± 0.00 | 10.00 ± 0.00 |"
    assert lines[4].startswith("| Fine-tune: difference | +2.00 [+2.00, +2.00] |")
    assert lines[5].startswith("| Freeze first stage: Base model | 31.50 ± 6.35 |")
    assert lines[-1].startswith("COCO's average precision in percent; mean of 2 seeds")


def test_the_report_has_values_by_seed() -> None:
    report = grid_report(runs(), AVERAGE_PRECISIONS)
    assert len(report["results"]) == 12
    first = report["results"][0]
    assert (first["metric"], first["mode"], first["model"]) == ("ap", "fine-tune", "base")
    assert first["values"] == {"0": 30.0, "1": 31.0}
    assert report["differences"][0]["mean"] == 2.0
    assert "means" not in report


def test_figures_that_were_not_measured_are_left_open() -> None:
    some = [*runs(), Run("", "fine-tune", "base", 2, {"ap": 31.0, "ap50": 50.0, "ap_large": 3.0})]
    table = grid_table(some, AVERAGE_PRECISIONS)
    assert "APLarge" in table
    (row,) = [line for line in table.splitlines() if line.startswith("Fine-tune: Distilled")]
    assert row.rstrip().endswith("-")


@pytest.mark.slow
def test_both_modes_and_models_are_trained_and_continued(
    done: Done, teacher_dirs: dict[str, Path], student_dir: Path, tmp_path: Path
) -> None:
    folder = draw_coco(tmp_path / "set")
    words = "--batch-size 3 --img-size 48 --pyramid-channels 8 --workers 0 --iterations 2"
    flags = ["transfer-detection", "--data-dir", folder, *words.split(), "--mode", "all"]
    flags += ["--compare", student_dir, teacher_dirs["test_resnet"], "--output", tmp_path / "out"]
    report = done(*flags).report
    assert {(row["mode"], row["model"]) for row in report["results"]} == {
        (mode, model) for mode in MODES for model in ("base", "distilled")
    }
    runs_of = sorted(path.parent for path in (tmp_path / "out").glob("*/seed-0/report.json"))
    assert len(runs_of) == 4
    config = json.loads((runs_of[0] / "config.json").read_text())
    assert (config["mode"], config["seeds"]) == ("fine-tune", 1)
    before = {path: (path / "report.json").read_bytes() for path in runs_of}
    assert done(*flags).report == report
    assert {path: (path / "report.json").read_bytes() for path in runs_of} == before
    assert (tmp_path / "out/transfer.md").read_text().startswith("|  | AP |")
