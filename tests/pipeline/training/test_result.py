"""pipeline.training.result: the best epoch, early stopping, and the checkpoints that stay."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch

from conftest import Result
from pipeline.config import FinetuneConfig
from pipeline.training.result import is_stopped_early, update_best

Run = Callable[..., Result]
STEPS = 3  # of an epoch


@pytest.fixture(scope="module")
def flags(finetune_flags: list[str], teacher_dirs: dict[str, Path]) -> list[object]:
    """A good start, and a rate that ruins it from the third epoch on."""
    name = "test_efficientnet"
    start = ["--model", name, "--initial-checkpoint", teacher_dirs[name]]
    schedule = ["--lr", 1e-4, "--decay-milestones", 2, "--decay-rate", 20000, "--epochs", 4]
    plain = [flag for flag in finetune_flags if flag != "--no-pretrained"]
    return [*plain, *start, *schedule]


@pytest.fixture(scope="module")
def ruined(done: Run, flags: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of which an early epoch was the best. Not to be changed."""
    run = tmp_path_factory.mktemp("ruined") / "run"
    done(*flags, "--checkpoint-hist", 1, "--output", run)
    return run


def report(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "report.json").read_text())
    return found


def top1(run: Path) -> list[float]:
    """Return the top-1 of every epoch."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    events = [event for event in map(json.loads, lines) if event["event"] == "validation"]
    return [event["top1"] for event in events if event["epoch"] > 0]


def last_of_the_best(values: list[float]) -> int:
    """Return the epoch, counted from 1."""
    return max(range(len(values)), key=lambda i: (values[i], i)) + 1


def kept_steps(run: Path) -> list[int]:
    return sorted(int(path.stem.split("-")[1]) for path in (run / "checkpoints").iterdir())


def student(run: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run / "student" / "model.safetensors")


def weights_at(run: Path, step: int) -> dict[str, torch.Tensor]:
    path = run / "checkpoints" / f"step-{step:08d}.pt"
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_finetune_delivers_the_best_epoch_and_keeps_its_checkpoint(ruined: Path) -> None:
    found, values = report(ruined), top1(ruined)
    best = last_of_the_best(values)
    assert best < 4
    assert values[-1] < values[best - 1]
    assert (found["selected_epoch"], found["best_epoch"], found["epochs"]) == (best, best, 4)
    assert found["top1"] == found["best_top1"] == values[best - 1]
    assert found["last_top1"] == values[-1]
    assert kept_steps(ruined) == [best * STEPS, 4 * STEPS]
    assert same(student(ruined), weights_at(ruined, best * STEPS))
    assert not same(student(ruined), weights_at(ruined, 4 * STEPS))


def test_select_last_delivers_the_last_epoch_and_reports_both(
    done: Run, flags: list[object], run: Path, ruined: Path
) -> None:
    result = done(*flags, "--select", "last", "--checkpoint-hist", 1, "--output", run)
    found, best = report(run), report(ruined)
    assert found["selected_epoch"] == 4
    assert found["top1"] == found["last_top1"] == best["last_top1"]
    assert (found["best_epoch"], found["best_top1"]) == (best["best_epoch"], best["best_top1"])
    assert kept_steps(run) == [4 * STEPS]
    assert same(student(run), weights_at(run, 4 * STEPS))
    lines = [line.split() for line in result.stderr.splitlines() if line.startswith("student, ep")]
    assert [line[:5] for line in lines] == [
        ["student,", "epoch", str(best["best_epoch"]), "(best)", f"{best['best_top1']:.2f}"],
        ["student,", "epoch", "4", "(last)", f"{found['last_top1']:.2f}"],
    ]
    assert f"result {run / 'student'}: {found['model']} after epoch 4, " in result.stderr


def test_best_epoch_of_a_resumed_run_is_the_same_to_the_bit(
    done: Run, ruined: Path, run: Path
) -> None:
    """The best epoch is over when the run is killed, and its exported model is lost."""
    shutil.copytree(ruined, run)
    (run / "report.json").unlink()
    (run / "checkpoints" / f"step-{4 * STEPS:08d}.pt").unlink()
    shutil.rmtree(run / "student")
    done("finetune", "--resume", run)
    assert same(student(run), student(ruined))
    assert (run / "summary.csv").read_text() == (ruined / "summary.csv").read_text()
    one, other = report(run), report(ruined)
    for name in ("seconds", "run"):
        del one[name], other[name]
    assert one == other


def test_a_damaged_checkpoint_of_the_best_epoch_is_named(
    run_cli: Run, ruined: Path, run: Path
) -> None:
    shutil.copytree(ruined, run)
    (run / "report.json").unlink()
    best = run / "checkpoints" / f"step-{report(ruined)['best_epoch'] * STEPS:08d}.pt"
    best.write_bytes(best.read_bytes()[:1000])
    result = run_cli("finetune", "--resume", run)
    assert result.code == 1
    assert f"checkpoint {best} of the best epoch cannot be read" in result.stderr


def test_early_stopping_ends_the_run_some_epochs_after_the_best(
    done: Run, flags: list[object], run: Path, ruined: Path
) -> None:
    best, values = report(ruined)["best_epoch"], top1(ruined)
    patience = best - values.index(max(values))  # an epoch more than its ties take
    result = done(*flags, "--early-stopping", patience, "--output", run)
    assert result.report["epochs"] == best + 1 < 4
    assert result.report["selected_epoch"] == best
    assert same(student(run), student(ruined))
    resumed = done("finetune", "--resume", run)
    assert resumed.report == result.report
    more = done("finetune", "--resume", run, "--epochs", 5)
    assert more.report["epochs"] == best + 1, "no epoch was better in the meantime"
    message = (
        f"stopped early: no better top-1 since epoch {best + 1 - patience}; --resume {run} "
        f"--early-stopping {2 * patience} continues"
    )
    for stderr in (result.stderr, resumed.stderr, more.stderr):
        assert message in stderr.splitlines()
        assert "resuming in" not in stderr
    longer = done("finetune", "--resume", run, "--early-stopping", 9)
    assert f"--early-stopping was {patience}, is 9" in longer.stderr
    assert longer.report["epochs"] == 5
    assert "stopped early" not in longer.stderr
    assert same(student(run), student(ruined))


@pytest.mark.parametrize(
    ("values", "kept", "stops"),
    [
        ([50.0, 50.0, 50.0, 50.0], None, 3),  # a tie is no better one
        ([50.0, 40.0, 50.0], None, 3),
        ([40.0, 50.0, 50.0, 50.0], None, 4),
        ([40.0, 50.0, 60.0, 70.0], None, None),
        ([50.0, 50.0], {"epoch": 0, "step": 0, "metrics": {"top1": 50.0}}, 2),  # an old checkpoint
    ],
)
def test_early_stopping_counts_from_the_last_better_epoch_and_a_tie_is_the_result(
    values: list[float], kept: dict[str, Any] | None, stops: int | None
) -> None:
    """Of equal epochs the later one is the result, also where the patience runs on."""
    config = FinetuneConfig(data_dir=Path("d"), model="m", early_stopping=2)
    progress = SimpleNamespace(epoch=0, step=0, total_steps=0)
    state: Any = SimpleNamespace(best=kept, progress=progress)
    stopped = None
    for epoch, value in enumerate(values, 1):
        progress.epoch = epoch
        update_best(state, {"top1": value})
        assert state.best["epoch"] == last_of_the_best(values[:epoch])
        if stopped is None and is_stopped_early(config, state):
            stopped = epoch
    assert stopped == stops


def test_without_validation_the_last_epoch_is_the_result(
    done: Run, run_cli: Run, flags: list[object], run: Path
) -> None:
    more = ["--val-split", "none", "--epochs", 3]
    found = done(*flags, *more, "--output", run).report
    assert "selected_epoch" not in found
    assert same(student(run), weights_at(run, 3 * STEPS))
    refused = run_cli(*flags, *more, "--select", "best", "--output", run)
    assert (refused.code, len(refused.stderr.splitlines())) == (2, 1)
    assert "--select best needs a validation split" in refused.stderr
