"""pipeline.training.summary: the table at the end of a run, and commands that can be run."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from conftest import Result
from mealv2.label_set import LabelSet

Run = Callable[..., Result]


def next_commands(stderr: str) -> list[list[str]]:
    """Return the commands below `next:`, without the word mealv2."""
    lines = stderr.split("next: ")[1].splitlines()
    words = [shlex.split(line) for line in lines]
    assert [line[0] for line in words] == ["mealv2"] * len(words)
    return [line[1:] for line in words]


@pytest.mark.parametrize("flags", [[], ["--val-fraction", 0.25, "--split-seed", 3, "--exact-pil"]])
def test_next_commands_measure_and_export_the_result(
    done: Run,
    finetune_flags: list[str],
    data_dir: Path,
    tmp_path: Path,
    flags: list[object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The folder has a space in its name; with flags it has no val split."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data_dir, "my data", ignore=shutil.ignore_patterns(*["val"] * bool(flags)))
    words = ["--data-dir", "my data", *flags, "--output", "runs/a b"]
    result = done(*finetune_flags, *words)
    evaluate, export = next_commands(result.stderr)
    found = done(*evaluate, "--json", "--workers", 0).report
    for name in ("num_images", "top1", "cross_entropy"):
        assert found[name] == pytest.approx(result.report[name], rel=1e-6)
    assert done(*export).code == 0
    assert (tmp_path / "runs/a b/export/timm").is_dir()


def test_without_validation_there_is_no_table_and_nothing_to_evaluate(
    done: Run, finetune_flags: list[str], run: Path
) -> None:
    said = done(*finetune_flags, "--val-split", "none", "--output", run).stderr
    assert "top-1" not in said
    (export,) = next_commands(said)
    assert export == ["export", str(run), "--to", "timm"]


def test_table_has_start_teachers_ensemble_student_and_size(
    done: Run, distill_flags: list[str], run: Path, labels_dir: Path
) -> None:
    result = done(*distill_flags, "--select", "last", "--output", run)
    end = result.stderr[result.stderr.index("\naccuracy ") :].splitlines()[1:]
    assert end[0].split() == ["accuracy", "top-1", "top-5", "agreement"]
    table: dict[str, list[str]] = {}
    for line in end[2 : next(i for i, line in enumerate(end) if line.startswith("result "))]:
        title, *cells = re.split(r" {2,}", line)
        table[title] = cells
    first, *_, last = (
        event
        for event in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if event["event"] == "validation"
    )
    accuracy = LabelSet.open(labels_dir).manifest["roles"]["val"]["accuracy"]

    def cells(row: dict[str, Any], *names: str) -> list[str]:
        return [f"{row[name]:.2f}" for name in names]

    assert table.pop("student at the start") == cells(first, "top1", "top5", "agreement")
    for teacher in accuracy["teachers"]:
        assert table.pop(f"teacher {teacher['model']}") == cells(teacher, "top1", "top5")
    assert table.pop("ensemble") == cells(accuracy["ensemble"], "top1", "top5")
    (of_last,) = (table[title] for title in table if re.match(r"student, epoch 2 \(last", title))
    assert of_last == cells(last, "top1", "top5", "agreement")
    assert len(table) == 1 + (result.report["best_epoch"] != 2)

    state = safetensors.torch.load_file(run / "student" / "model.safetensors")
    learned = sum(t.numel() for name, t in state.items() if not re.search(r"running_|num_b", name))
    size = (run / "student" / "model.safetensors").stat().st_size
    expected = f"test_resnet after epoch 2, {learned / 1e6:.3g} M parameters, {size / 1e6:.3g} MB; "
    assert f"result {run / 'student'}: {expected}2 epochs, " in result.stderr


def test_a_resumed_run_has_the_start_of_its_log_and_says_that_it_was_resumed(
    done: Run, finetune_flags: list[str], run: Path
) -> None:
    before = done(*finetune_flags, "--epochs", 1, "--output", run).stderr
    after = done("finetune", "--resume", run, "--epochs", 2).stderr
    starts = [re.findall(r"^student at the start +(.*)$", text, re.M) for text in (before, after)]
    assert len(starts[0]) == 1
    assert starts[0] == starts[1]
    assert " since it was resumed" not in before
    assert " since it was resumed" in after
