"""Top-1 and top-5 in training: means over the views of an epoch, where each has one hard label."""

import csv
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import Result
from pipeline.training.step import TrainStep
from runs import as_killed_after

Run = Callable[..., Result]


def summary(run: Path) -> list[dict[str, str]]:
    with (run / "summary.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[np.ndarray, np.ndarray]]:
    """The float64 logits and the class ids of every micro-batch that is trained on."""
    found: list[tuple[np.ndarray, np.ndarray]] = []
    forward, forward_backward = TrainStep._forward, TrainStep._forward_backward
    logits: list[np.ndarray] = []

    def keep_logits(self: TrainStep, *args: Any) -> Any:
        result = forward(self, *args)
        logits.append(result["output"].detach().double().numpy())
        return result

    def keep_classes(self: TrainStep, batch: Any, *args: Any) -> Any:
        output = forward_backward(self, batch, *args)
        found.append(
            (logits.pop(), np.array([self.spec.source.labels[p] for p in batch.positions]))
        )
        return output

    monkeypatch.setattr(TrainStep, "_forward", keep_logits)
    monkeypatch.setattr(TrainStep, "_forward_backward", keep_classes)
    return found


@pytest.mark.parametrize("command", ["finetune", "distill"])
def test_training_accuracy_is_that_of_the_logits_of_the_steps(
    command: str,
    done: Run,
    finetune_flags: list[str],
    distill_flags: list[str],
    run: Path,
    seen: list[tuple[np.ndarray, np.ndarray]],
) -> None:
    flags = finetune_flags if command == "finetune" else distill_flags
    done(*flags, "--grad-accum-steps", 2, "--val-split", "none", "--output", run)
    rows = summary(run)
    in_epoch = len(seen) // len(rows)
    for number, row in enumerate(rows):
        batches = seen[number * in_epoch : (number + 1) * in_epoch]
        hits = [logits.argmax(1) == classes for logits, classes in batches]
        assert sum(map(len, hits)) == 36
        assert float(row["train_top1"]) == pytest.approx(100 * np.concatenate(hits).mean())
        assert float(row["train_top5"]) == 100.0, "there are three classes"


def test_top5_counts_the_label_among_the_five_highest_logits() -> None:
    logits_BC = torch.randn(64, 20, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 20, (100,), generator=torch.Generator().manual_seed(1)).tolist()
    positions = list(range(90, 26, -1))
    source = types.SimpleNamespace(labels=labels)
    step = types.SimpleNamespace(_has_accuracy=True, spec=types.SimpleNamespace(source=source))
    found = TrainStep._accuracy(step, logits_BC, positions)  # type: ignore[arg-type]
    classes_B = np.array(labels)[positions]
    logits = logits_BC.double().numpy()
    rank_B = (logits > logits[np.arange(64), classes_B][:, None]).sum(axis=1)
    for k in (1, 5):
        assert float(found[f"top{k}"]) == pytest.approx(100 * (rank_B < k).mean())


def test_a_run_that_was_killed_inside_an_epoch_has_the_same_training_accuracy(
    done: Run, finetune_flags: list[str], tmp_path: Path
) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    kept = ["--recovery-interval", 1, "--checkpoint-hist", 9, "--val-split", "none"]
    done(*finetune_flags, *kept, "--output", whole)
    as_killed_after(whole, 4, again)
    done("finetune", "--resume", again)
    assert "train_top1" in summary(whole)[0]
    assert summary(again) == summary(whole)


@pytest.mark.parametrize(
    "flags", [["--cutmix", 1.0, "--cutmix-target", "mixed-labels"], ["--mixup", 0.5]]
)
def test_mixed_views_have_no_training_accuracy(
    flags: list[object], done: Run, distill_flags: list[str], run: Path
) -> None:
    done(*distill_flags, "--epochs", 1, *flags, "--val-split", "none", "--output", run)
    assert not {"train_top1", "train_top5"} & summary(run)[0].keys()
