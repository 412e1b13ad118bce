"""pipeline.training: what a run keeps between steps: averages, checkpoints, meters."""

import csv
import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from cases import mostly_slow
from conftest import Result, Spawned
from mealv2.data.folder import ImageFolder
from mealv2.models import create_classifier
from mealv2.storage.weight_files import find_checkpoint
from runs import as_killed_after

Run = Callable[..., Result]
Events = Callable[[Path, str], list[dict[str, Any]]]
Weights = Callable[[Path], dict[str, bytes]]

# What differs between two runs that do the same.
TIMING = {"time", "images_per_second", "data_wait_share"}


def summary(run: Path) -> list[dict[str, str]]:
    with (run / "summary.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def without_timing(told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: v for name, v in event.items() if name not in TIMING} for event in told]


def states(run: Path) -> list[dict[str, Any]]:
    """Return every checkpoint that is there, the oldest first."""
    return [torch.load(path, weights_only=True) for path in sorted((run / "checkpoints").iterdir())]


def student(run: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run / "student" / "model.safetensors")


def steps_kept(run: Path) -> list[int]:
    found = sorted((run / "checkpoints").glob("step-*.pt"))
    return [int(path.stem.split("-")[1]) for path in found]


# --- the schedule -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("views", "passes"), [(1, [0, 1, 2, 3]), (2, [0, 2])])
def test_cosine_rates_of_every_epoch_reach_both_groups(
    done: Run, distill_flags: list[str], run: Path, events: Events, views: int, passes: list[int]
) -> None:
    flags = ["--sched", "cosine", "--epochs", 4, "--lr", 0.5, "--discriminator-lr", 0.25]
    flags += ["--views-per-image", views, "--checkpoint-hist", 9, "--val-split", "none"]
    done(*distill_flags, *flags, "--output", run)
    rates = {event["epoch"]: event["lr"] for event in events(run, "train")}
    factors = [0.5 * (1 + math.cos(math.pi * epoch / 4)) for epoch in passes]
    assert rates == {e: pytest.approx(0.5 * f) for e, f in zip(passes, factors, strict=True)}
    groups = [[g["lr"] for g in s["optimizer"]["param_groups"]] for s in states(run)]
    assert groups == [pytest.approx([0.5 * f, 0.25 * f]) for f in factors]


# --- the moving average -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def averaged(done: Run, distill_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with an average, a checkpoint of every step kept. Not to be changed."""
    run = tmp_path_factory.mktemp("averaged") / "run"
    flags = ["--model-ema", "--model-ema-decay", 0.75]
    flags += ["--recovery-interval", 1, "--checkpoint-hist", 99, "--lr", 0.1]
    done(*distill_flags, *flags, "--output", run)
    return run


def test_result_is_the_average_of_the_students_weights_over_the_steps(
    averaged: Path, student_dir: Path
) -> None:
    """ema <- d ema + (1 - d) student after step t, in float64; d = 1 - t^(-2/3), at most 0.75."""
    start = create_classifier(
        "test_resnet", num_classes=3, checkpoint=find_checkpoint(student_dir)
    ).backbone.state_dict()
    kept = states(averaged)
    assert [state["total_steps"] for state in kept] == list(range(1, 11))
    for name, value in student(averaged).items():
        if not value.is_floating_point():
            assert torch.equal(value, kept[-1]["state_dict"][name])
            continue
        average = start[name].double().numpy()
        for step, state in enumerate(kept, start=1):
            decay = min(0.75, 1.0 - step ** (-2 / 3))
            average = decay * average + (1 - decay) * state["state_dict"][name].double().numpy()
        np.testing.assert_allclose(value.double().numpy(), average, rtol=1e-4, atol=1e-6)
        assert torch.equal(value, kept[-1]["state_dict_ema"][name])
    changed = [
        name
        for name, value in student(averaged).items()
        if not torch.allclose(value, kept[-1]["state_dict"][name])
    ]
    assert changed, "the average differs from the student"


def test_average_does_not_change_what_the_student_learns(
    done: Run, distill_flags: list[str], averaged: Path, run: Path
) -> None:
    done(*distill_flags, "--lr", 0.1, "--val-split", "none", "--output", run)
    plain, beside = states(run)[-1]["state_dict"], states(averaged)[-1]["state_dict"]
    assert all(torch.equal(plain[name], beside[name]) for name in plain)


def test_average_that_forgets_at_once_is_the_student(
    done: Run, distill_flags: list[str], run: Path, averaged: Path
) -> None:
    flags = ["--model-ema", "--model-ema-decay", 0.0, "--lr", 0.1, "--val-split", "none"]
    done(*distill_flags, *flags, "--output", run)
    last = states(averaged)[-1]["state_dict"]
    assert all(torch.equal(value, last[name]) for name, value in student(run).items())


@pytest.mark.slow
def test_accuracies_of_the_average_and_of_the_student_are_reported(
    done: Run,
    distill_flags: list[str],
    data_dir: Path,
    run: Path,
    tmp_path: Path,
    events: Events,
) -> None:
    """An average over all steps lags far behind a student that learns fast."""
    flags = ["--model-ema", "--model-ema-decay", 0.99, "--epochs", 6, "--lr", 0.05]
    report = done(*distill_flags, *flags, "--output", run).report
    said = events(run, "validation")
    assert [event["epoch"] for event in said] == list(range(7))
    assert (report["top1"], report["student_top1"]) == (said[-1]["top1"], said[-1]["student_top1"])
    row = summary(run)[-1]
    assert float(row["val_student_top1"]) == report["student_top1"]

    own = tmp_path / "own"
    shutil.copytree(run / "student", own)
    with safetensors.safe_open(own / "model.safetensors", "pt") as file:
        kept = json.loads(file.metadata()["mealv2"])
    del kept["weights_sha256"]  # which notices that these are others
    metadata = {"mealv2": json.dumps(kept)}
    state = states(run)[-1]["state_dict"]
    last = {name: tensor.contiguous() for name, tensor in state.items()}  # it is channels-last
    safetensors.torch.save_file(last, own / "model.safetensors", metadata=metadata)
    for folder, name in ((run, "top1"), (own, "student_top1")):
        flags = ["--data-dir", data_dir, "--checkpoint", folder, "--workers", 0]
        assert done("evaluate", *flags, "--json").report["top1"] == report[name]
    assert report["top1"] != report["student_top1"]


@pytest.mark.parametrize("step", mostly_slow([3, 5, 8]))
def test_average_survives_a_kill_to_the_bit(
    done: Run, averaged: Path, run: Path, weights: Weights, step: int
) -> None:
    as_killed_after(averaged, step, run)
    done("distill", "--resume", run)
    assert weights(run) == weights(averaged)
    assert summary(run) == summary(averaged)


# --- checkpoints between the ends of epochs, and meters -----------------------------------------


@pytest.fixture(scope="module")
def finished(done: Run, distill_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, a checkpoint of every second step kept. Not to be changed."""
    run = tmp_path_factory.mktemp("finished") / "run"
    flags = ["--recovery-interval", 2, "--checkpoint-hist", 99, "--log-interval", 3]
    done(*distill_flags, *flags, "--output", run)
    return run


def test_every_so_many_steps_and_the_end_of_an_epoch_have_a_checkpoint(finished: Path) -> None:
    assert steps_kept(finished) == [2, 4, 5, 6, 8, 10]


def test_checkpoints_between_do_not_change_the_run(
    done: Run, distill_flags: list[str], finished: Path, run: Path, weights: Weights
) -> None:
    done(*distill_flags, "--log-interval", 3, "--output", run)
    assert steps_kept(run) == [5, 10]
    assert weights(run) == weights(finished)
    assert summary(run) == summary(finished)


@pytest.mark.parametrize("step", mostly_slow([2, 4, 5, 6, 8, 10], fast=3))
def test_killed_after_any_checkpoint_it_ends_in_the_same_bits_and_the_same_log(
    done: Run, finished: Path, run: Path, weights: Weights, events: Events, step: int
) -> None:
    """Log lines are means over 3 steps and rows over 5: the meters are kept in the checkpoint."""
    as_killed_after(finished, step, run)
    done("distill", "--resume", run)
    assert weights(run) == weights(finished)
    assert summary(run) == summary(finished)
    told, expected = (without_timing(events(path, "train")) for path in (run, finished))
    assert told == expected
    assert [event["step"] for event in told] == [3, 6, 9]


def test_stopped_by_a_signal_the_log_goes_on_as_if_it_had_not_been(
    run_cli: Run,
    done: Run,
    distill_flags: list[str],
    finished: Path,
    run: Path,
    events: Events,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads, read = 0, ImageFolder.read

    def interrupted(self: ImageFolder, position: int) -> bytes:
        nonlocal reads
        reads += self.split == "train"
        if reads == 30:
            os.kill(os.getpid(), signal.SIGINT)
        return read(self, position)

    flags = ["--log-interval", 3, "--output", run]
    with monkeypatch.context() as patch:
        patch.setattr(ImageFolder, "read", interrupted)
        assert run_cli(*distill_flags, *flags).code == 4
    assert steps_kept(run) == [4]
    done("distill", "--resume", run)
    assert summary(run) == summary(finished)
    assert without_timing(events(run, "train")) == without_timing(events(finished, "train"))


@pytest.mark.slow
def test_a_real_kill_between_checkpoints_costs_the_steps_since_and_no_bit(
    spawn: Callable[..., Spawned],
    done: Run,
    distill_flags: list[str],
    run: Path,
    tmp_path: Path,
    weights: Weights,
) -> None:
    flags = ["--recovery-interval", 2, "--epochs", 10, "--val-split", "none"]
    done(*distill_flags, *flags, "--output", tmp_path / "whole")
    process = spawn(*distill_flags, *flags, "--output", run)
    folder = run / "checkpoints"
    process.until(lambda: folder.exists() and max(steps_kept(run), default=0) >= 8)
    process.signal(signal.SIGKILL)
    process.process.wait()
    assert not (run / "report.json").exists(), "it was killed too late to show anything"
    done("distill", "--resume", run)
    assert weights(run) == weights(tmp_path / "whole")
    assert summary(run) == summary(tmp_path / "whole")


def test_dead_discriminator_is_told_once_and_not_again_after_a_kill(
    done: Run,
    distill_flags: list[str],
    run: Path,
    tmp_path: Path,
    events: Events,
    weights: Weights,
) -> None:
    """The official widths at 3 classes die so often that one of a few seeds shows it."""
    for seed in range(10):
        whole = tmp_path / f"whole-{seed}"
        flags = ["--discriminator", "official", "--seed", seed, "--epochs", 1]
        flags += ["--recovery-interval", 2, "--checkpoint-hist", 99, "--val-split", "none"]
        result = done(*distill_flags, *flags, "--output", whole)
        if told := events(whole, "prepared"):
            break
    (event,) = told
    assert event["step"] == 1
    assert event["text"] in result.stderr
    assert event["text"].endswith("kept, as the official code does")

    as_killed_after(whole, 2, run)
    assert event["text"] not in done("distill", "--resume", run).stderr
    assert events(run, "prepared") == told
    assert weights(run) == weights(whole)


def test_gradient_ratio_and_plateaus_are_in_the_log(
    done: Run, distill_flags: list[str], run: Path, events: Events
) -> None:
    flags = ["--discriminator", "official", "--val-split", "none", "--output", run]
    said = done(*distill_flags, *flags).stderr
    assert said.count("0.693 dead, 0.520 half dead, 0.347 floor") == 1
    for event in events(run, "train"):
        assert 0 <= event["discriminator_gradient_ratio"] < math.inf
    assert all(float(row["train_discriminator_gradient_ratio"]) >= 0 for row in summary(run))


# --- the optimizer ------------------------------------------------------------------------------


def _after_steps(device: str, **how: bool) -> tuple[list[torch.Tensor], torch.optim.SGD]:
    """Return the weights of a network after steps of SGD in one of its forms."""
    torch.manual_seed(0)
    network = create_classifier("test_resnet", num_classes=3).to(device)
    network = network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4, **how
    )
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for parameter in network.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.grad = torch.empty_like(parameter).copy_(drawn)  # as autograd lays it out
        optimizer.step()
    return [parameter.detach() for parameter in network.parameters()], optimizer


def _forms_agree(device: str) -> None:
    with torch.random.fork_rng(devices=[]):
        plain, _ = _after_steps(device, foreach=False)
        fused, _ = _after_steps(device, fused=True)
    assert max(float((a - b).abs().max()) for a, b in zip(plain, fused, strict=True)) < 1e-6


def test_one_kernel_steps_as_the_plain_loop_does() -> None:
    _forms_agree("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_kernel_steps_as_the_plain_loop_does_on_a_gpu() -> None:
    _forms_agree("cuda")


def test_a_checkpoint_does_not_decide_how_the_optimizer_computes(
    done: Run, distill_flags: list[str], run: Path, weights: Weights, tmp_path: Path
) -> None:
    """One from where there was no fused kernel, and tensors lay otherwise, goes on just so."""
    done(*distill_flags, "--checkpoint-hist", 9, "--output", run)
    (first, last) = sorted((run / "checkpoints").iterdir())
    expected = weights(run)
    state = torch.load(first, weights_only=True)
    assert [group["fused"] for group in state["optimizer"]["param_groups"]] == [True, True]
    for group in state["optimizer"]["param_groups"]:
        group["fused"] = None
    for kept in state["optimizer"]["state"].values():
        kept["momentum_buffer"] = kept["momentum_buffer"].contiguous()
    torch.save(state, first)
    last.unlink()
    (run / "report.json").unlink()
    done("distill", "--resume", run)
    (_, last) = sorted((run / "checkpoints").iterdir())
    groups = torch.load(last, weights_only=True)["optimizer"]["param_groups"]
    assert [group["fused"] for group in groups] == [True, True]
    assert weights(run) == expected
