"""pipeline.training: between two log lines the host never waits for the device."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cases import mostly_slow
from conftest import Result
from pipeline.training.meters import Meter
from syncs import recorded_syncs

Run = Callable[..., Result]

# What may be done on the CPU before labels are on the device, and once before the first step.
ALLOWED = {"rows", "_prepare"}
STEP = {"update", "add", "waiting", "count", "_log_metrics"}


def _waits(run: Callable[[], object]) -> list[list[str]]:
    """Return the waits within steps, each as the names of the functions it was in."""
    with recorded_syncs() as syncs:
        run()
    in_steps = [sync for sync in syncs if "_train_pass" in sync and STEP & {*sync}]
    return [sync for sync in in_steps if not ALLOWED & {*sync}]


CASES = {
    "paper": ("rate", []),
    "exact values, official": ("float16", ["--discriminator", "official"]),
    "mixed labels": ("rate", ["--cutmix-target", "mixed-labels"]),
    "average, bfloat16": ("rate", ["--model-ema", "--amp", "--discriminator-input", "probs"]),
    "tempered, weighted": ("rate", ["--label-temperature", 2, "--hard-label-weight", 0.5]),
}


@pytest.mark.parametrize("case", mostly_slow(CASES, fast=2))
def test_no_step_waits_but_where_it_logs(
    done: Run,
    distill_flags: list[str],
    labels_of: Callable[..., Path],
    run: Path,
    case: str,
) -> None:
    form, extra = CASES[case]
    flags = [*distill_flags, "--labels", labels_of(form), "--val-split", "none", "--epochs", 1]

    def distil() -> None:
        done(*flags, *extra, "--log-interval", 3, "--output", run)

    waits = _waits(distil)
    assert {sync[-1] for sync in waits if "_log_metrics" not in sync} == set()
    assert any("_log_metrics" in sync for sync in waits), "the log line has to wait"


def test_steps_of_online_teachers_and_of_hard_labels_do_not_wait_either(
    done: Run,
    data_dir: Path,
    student_dir: Path,
    teacher_flags: list[str],
    finetune_flags: list[str],
    tmp_path: Path,
) -> None:
    online = ["distill", "--online", *teacher_flags, "--data-dir", data_dir, "--img-size", 32]
    online += ["--model", "test_resnet", "--initial-checkpoint", student_dir, "--batch-size", 12]
    online += ["--cutmix-target", "teachers", "--val-split", "none", "--workers", 0]
    for name, flags in (("online", online), ("hard", [*finetune_flags, "--val-split", "none"])):
        rest = ["--epochs", 1, "--log-interval", 99, "--output", tmp_path / name]
        assert _waits(lambda flags=flags, rest=rest: done(*flags, *rest)) == []


def test_a_wait_in_a_step_would_be_found(
    done: Run, finetune_flags: list[str], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Meter.add

    def waiting(self: Meter, num_images: int, parts: dict[str, torch.Tensor]) -> None:
        assert bool(torch.isfinite(parts["loss"]))
        add(self, num_images, parts)

    monkeypatch.setattr(Meter, "add", waiting)
    flags = [*finetune_flags, "--val-split", "none", "--epochs", 1, "--log-interval", 99]
    waits = _waits(lambda: done(*flags, "--output", run))
    assert [sync[-1] for sync in waits] == ["waiting"] * 6  # of 3 steps and 2 meters
