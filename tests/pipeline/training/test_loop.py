"""pipeline.training: one loop that can be repeated, stopped and continued to the same bit."""

import csv
import json
import os
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cases import mostly_slow
from conftest import ROOT, Result, Spawned
from mealv2.data.folder import ImageFolder
from pipeline.training import run_log

Run = Callable[..., Result]
Events = Callable[[Path, str], list[dict[str, Any]]]
Weights = Callable[[Path], dict[str, bytes]]


def summary(run: Path) -> list[dict[str, str]]:
    with (run / "summary.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(done: Run, distill_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs. Not to be changed."""
    run = tmp_path_factory.mktemp("finished") / "run"
    done(*distill_flags, "--output", run)
    return run


# --- what a run leaves behind -------------------------------------------------------------------


def test_run_folder_holds_config_metrics_summary_checkpoints_and_student(finished: Path) -> None:
    names = {path.relative_to(finished).as_posix() for path in finished.glob("**/*.*")}
    assert names == {
        "checkpoints/step-00000005.pt",
        "checkpoints/step-00000010.pt",
        "config.json",
        "images.json.gz",
        "labels.json",
        "metrics.jsonl",
        "report.json",
        "student/config.json",
        "student/model.safetensors",
        "summary.csv",
    }


def test_every_step_and_every_validation_is_an_event(finished: Path, events: Events) -> None:
    train = events(finished, "train")
    assert [event["step"] for event in train] == list(range(1, 11))
    assert all(event["images_per_second"] > 0 for event in train)
    assert [event["epoch"] for event in events(finished, "validation")] == [0, 1, 2]


def test_log_interval_thins_the_events_to_means(
    done: Run, distill_flags: list[str], run: Path, finished: Path, events: Events
) -> None:
    done(*distill_flags, "--log-interval", 5, "--output", run)
    thin, every = events(run, "train"), events(finished, "train")
    assert [event["step"] for event in thin] == [5, 10]
    images = [8, 8, 8, 8, 4]
    for number, event in enumerate(thin):
        losses = [e["loss"] for e in every[5 * number : 5 * number + 5]]
        mean = sum(n * loss for n, loss in zip(images, losses, strict=True)) / 36
        assert event["loss"] == pytest.approx(mean, rel=1e-6)
        assert float(summary(run)[number]["train_loss"]) == pytest.approx(mean, rel=1e-6)


def test_report_on_stdout_is_the_report_in_the_folder(
    done: Run, distill_flags: list[str], run: Path
) -> None:
    result = done(*distill_flags, "--epochs", 1, "--output", run)
    assert json.loads((run / "report.json").read_text()) == result.report


@pytest.mark.slow
@pytest.mark.parametrize(("interval", "expected"), [(1, [0, 1, 2, 3]), (2, [0, 2, 3])])
def test_val_interval_spaces_the_validations_and_keeps_the_last(
    done: Run,
    distill_flags: list[str],
    run: Path,
    events: Events,
    interval: int,
    expected: list[int],
) -> None:
    done(*distill_flags, "--epochs", 3, "--val-interval", interval, "--output", run)
    assert [event["epoch"] for event in events(run, "validation")] == expected
    assert float(summary(run)[-1]["val_top1"]) >= 0
    assert [row["epoch"] for row in summary(run)] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("keep", "kept"), mostly_slow([(1, ["15"]), (2, ["10", "15"]), (9, ["5", "10", "15"])])
)
def test_newest_checkpoints_are_kept(
    done: Run, distill_flags: list[str], run: Path, keep: int, kept: list[str]
) -> None:
    flags = ["--epochs", 3, "--checkpoint-hist", keep, "--val-split", "none", "--output", run]
    done(*distill_flags, *flags)
    found = sorted(path.stem for path in (run / "checkpoints").iterdir())
    assert found == [f"step-{int(step):08d}" for step in kept]


# --- the schedule of the learning rate ----------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "rates"),
    mostly_slow(
        [
            (["--lr", 0.5], [0.5, 0.5, 0.05, 0.05]),  # 100/180 of 4 epochs: from epoch 2
            (["--decay-milestones", 1, "--decay-milestones", 3], [0.01, 0.001, 0.001, 0.0001]),
            (["--decay-milestones", 3, "--decay-rate", 0.5], [0.01, 0.01, 0.01, 0.005]),
        ]
    ),
)
def test_learning_rate_of_every_epoch_is_the_schedules(
    done: Run,
    distill_flags: list[str],
    run: Path,
    events: Events,
    flags: list[object],
    rates: list[float],
) -> None:
    done(*distill_flags, *flags, "--epochs", 4, "--val-split", "none", "--output", run)
    assert [float(row["lr"]) for row in summary(run)] == pytest.approx(rates, rel=1e-12)
    used = [event["lr"] for event in events(run, "train")]
    assert used == pytest.approx([rate for rate in rates for _ in range(5)], rel=1e-12)
    state = torch.load(max((run / "checkpoints").iterdir()), weights_only=True)
    group = state["optimizer"]["param_groups"][0]
    assert group["lr"] == pytest.approx(rates[-1], rel=1e-12)
    assert (group["momentum"], group["weight_decay"]) == (0.9, 0.0)


def test_momentum_and_weight_decay_reach_the_optimizer(
    done: Run, finetune_flags: list[str], run: Path, finished: Path
) -> None:
    flags = ["--momentum", 0.5, "--weight-decay", 0.125, "--epochs", 1, "--output", run]
    done(*finetune_flags, *flags)
    state = torch.load(max((run / "checkpoints").iterdir()), weights_only=True)
    (group,) = state["optimizer"]["param_groups"]
    assert (group["momentum"], group["weight_decay"]) == (0.5, 0.125)


# --- repeated from its config -------------------------------------------------------------------


def test_config_of_a_run_repeats_it_to_the_bit(
    done: Run, finished: Path, tmp_path: Path, weights: Weights
) -> None:
    other = tmp_path / "other"
    report = done("distill", "--config", finished / "config.json", "--output", other).report
    assert report["run"] == str(other)
    assert weights(other) == weights(finished)
    assert (other / "config.json").read_bytes() == (finished / "config.json").read_bytes()


def test_config_without_output_makes_a_new_folder_under_runs(
    done: Run, finished: Path, tmp_path: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    report = done("distill", "--config", finished / "config.json").report
    (made,) = (tmp_path / "runs").iterdir()
    assert report["run"] == f"runs/{made.name}"
    assert made.name.startswith("distill-test_resnet-")
    assert weights(made) == weights(finished)


def test_config_with_triples_and_milestones_repeats_a_finetune(
    done: Run, finetune_flags: list[str], tmp_path: Path, weights: Weights
) -> None:
    special = [
        *("--mean", 0.1, 0.2, 0.3, "--std", 0.4, 0.5, 0.6),
        *("--decay-milestones", 1, "--decay-milestones", 2, "--epochs", 3),
    ]
    done(*finetune_flags, *special, "--output", tmp_path / "first")
    flags = ["--config", tmp_path / "first" / "config.json", "--output", tmp_path / "second"]
    done("finetune", *flags)
    assert weights(tmp_path / "first") == weights(tmp_path / "second")


def test_flags_go_before_the_config(done: Run, finished: Path, run: Path, weights: Weights) -> None:
    flags = ["--config", finished / "config.json", "--seed", 5, "--epochs", 1]
    assert done("distill", *flags, "--output", run).report["epochs"] == 1
    assert json.loads((run / "config.json").read_text())["seed"] == 5
    assert weights(run) != weights(finished)


def test_workers_do_not_change_the_weights(
    done: Run, distill_flags: list[str], run: Path, finished: Path, weights: Weights
) -> None:
    done(*distill_flags, "--workers", 2, "--output", run)
    assert weights(run) == weights(finished)


def test_folder_of_another_run_is_refused_untouched(
    run_cli: Run, distill_flags: list[str], finished: Path, contents: Callable[..., Any]
) -> None:
    before = contents(finished)
    result = run_cli(*distill_flags, "--lr", 0.5, "--output", finished)
    assert (result.code, len(result.stderr.splitlines())) == (2, 1)
    assert "(--lr: 0.01 in the run, 0.5 in this command)" in result.stderr
    assert f"--resume {finished}" in result.stderr
    assert contents(finished) == before


# --- stopped and continued ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_finished(
    done: Run, distill_flags: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An uninterrupted run of ten epochs, 50 steps. Not to be changed."""
    run = tmp_path_factory.mktemp("long") / "run"
    done(*distill_flags, "--epochs", 10, "--output", run)
    return run


@pytest.mark.parametrize(
    ("number", "workers"),
    mostly_slow([(signal.SIGINT, 1), (signal.SIGTERM, 0), (signal.SIGTERM, 1)]),
)
def test_stopped_by_a_signal_and_continued_it_ends_in_the_same_bits(
    spawn: Callable[..., Spawned],
    done: Run,
    distill_flags: list[str],
    long_finished: Path,
    run: Path,
    weights: Weights,
    events: Events,
    number: signal.Signals,
    workers: int,
) -> None:
    process = spawn(*distill_flags, "--epochs", 10, "--workers", workers, "--output", run)
    metrics = run / "metrics.jsonl"
    process.until(lambda: metrics.exists() and metrics.read_text().count('"train"') >= 7)
    process.signal(number)
    stopped = process.result()

    assert stopped.code == 4
    assert stopped.stdout == ""
    last = stopped.stderr.splitlines()[-1]
    assert last.startswith(f"mealv2: stopped by {number.name} ")
    assert "Traceback" not in stopped.stderr
    assert not (run / "report.json").exists(), "it was stopped too late to show anything"
    steps_done = events(run, "train")[-1]["step"]
    assert max((run / "checkpoints").iterdir()).name == f"step-{steps_done:08d}.pt"
    assert 7 <= steps_done < 50

    command = shlex.split(last.split("continue with: ")[1])
    assert command == ["mealv2", "distill", "--resume", str(run)]
    resumed = done(*command[1:], "--workers", 0)
    assert (resumed.report["epochs"], resumed.report["steps"]) == (10, 50)
    assert weights(run) == weights(long_finished)
    assert [event["step"] for event in events(run, "train")] == list(range(1, 51))
    rows, expected = summary(run), summary(long_finished)
    assert [row["epoch"] for row in rows] == [row["epoch"] for row in expected]
    assert [row["val_kl"] for row in rows] == [row["val_kl"] for row in expected]


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """A function: send SIGINT to this process when the n-th image of a split is read, once."""

    def arm(split: str, count: int) -> None:
        reads = 0
        read = ImageFolder.read

        def interrupted(self: ImageFolder, position: int) -> bytes:
            nonlocal reads
            if self.split == split:
                reads += 1
                if reads == count:
                    os.kill(os.getpid(), signal.SIGINT)
            return read(self, position)

        monkeypatch.setattr(ImageFolder, "read", interrupted)

    return arm


# 36 images and 15 of val; batches of 8, so steps begin at images 1, 9, 17, 25, 33, 37, ...
@pytest.mark.parametrize(
    ("split", "image", "steps"),
    mostly_slow(
        [
            pytest.param("val", 1, 0, id="validation at step 0"),
            pytest.param("train", 1, 1, id="first step"),
            pytest.param("train", 20, 3, id="third step"),
            pytest.param("train", 36, 5, id="last step of an epoch"),
            pytest.param("val", 16, 5, id="validation of an epoch"),
            pytest.param("train", 72, 10, id="last step of all"),
            pytest.param("val", 31, 10, id="last validation"),
        ],
        fast=3,
    ),
)
def test_stopped_anywhere_and_continued_it_ends_in_the_same_bits(
    run_cli: Run,
    done: Run,
    distill_flags: list[str],
    finished: Path,
    run: Path,
    weights: Weights,
    events: Events,
    interrupt: Callable[[str, int], None],
    split: str,
    image: int,
    steps: int,
) -> None:
    interrupt(split, image)
    # every epoch reads the files, so that their reading marks the steps
    stopped = run_cli(*distill_flags, "--cache-images", "off", "--output", run)
    assert stopped.code == 4
    assert "stopped by SIGINT" in stopped.stderr
    assert max((run / "checkpoints").iterdir()).name == f"step-{steps:08d}.pt"
    assert not (run / "report.json").exists()
    resumed = done("distill", "--resume", run)
    assert resumed.report["steps"] == 10
    where = [line for line in resumed.stderr.splitlines() if line.startswith("resuming in")]
    assert (
        where
        == {
            0: [],
            1: ["resuming in epoch 1/2 after 1 of its 5 steps (1 in all)"],
            3: ["resuming in epoch 1/2 after 3 of its 5 steps (3 in all)"],
            5: ["resuming in epoch 1/2 after 5 of its 5 steps (5 in all)"],
            10: ["resuming in epoch 2/2 after 5 of its 5 steps (10 in all)"],
        }[steps]
    )
    assert weights(run) == weights(finished)
    assert [row["epoch"] for row in summary(run)] == ["1", "2"]
    assert [row["val_kl"] for row in summary(run)] == [row["val_kl"] for row in summary(finished)]
    assert [event["step"] for event in events(run, "train")] == list(range(1, 11))
    assert [event["epoch"] for event in events(run, "validation")] == [0, 1, 2]


def test_run_continues_from_any_kept_checkpoint_to_the_same_bits(
    done: Run, finished: Path, run: Path, weights: Weights
) -> None:
    shutil.copytree(finished, run)
    (run / "checkpoints" / "step-00000010.pt").unlink()
    (run / "report.json").unlink()
    report = done("distill", "--resume", run).report
    assert report["steps"] == 10
    assert weights(run) == weights(finished)
    assert summary(run) == summary(finished)


def test_step_that_is_done_again_stands_in_the_metrics_once(
    done: Run, finished: Path, run: Path, events: Events
) -> None:
    """As after a kill -9: events were written after the newest checkpoint."""
    shutil.copytree(finished, run)
    (run / "checkpoints" / "step-00000010.pt").unlink()
    done("distill", "--resume", run)
    assert [event["step"] for event in events(run, "train")] == list(range(1, 11))
    assert [event["epoch"] for event in events(run, "validation")] == [0, 1, 2]


def test_half_a_line_of_metrics_does_not_stop_a_resumed_run(
    done: Run, finished: Path, run: Path, events: Events
) -> None:
    """As after a kill -9 or a full disk."""
    shutil.copytree(finished, run)
    (run / "checkpoints" / "step-00000010.pt").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "st')
    done("distill", "--resume", run)
    assert [event["step"] for event in events(run, "train")] == list(range(1, 11))


def test_run_without_a_checkpoint_starts_again(
    done: Run, finished: Path, run: Path, weights: Weights, events: Events
) -> None:
    run.mkdir()
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(finished / name, run)
    done("distill", "--resume", run)
    assert weights(run) == weights(finished)
    assert [event["step"] for event in events(run, "train")] == list(range(1, 11))


def test_finished_run_is_reported_again(
    done: Run, finished: Path, run: Path, contents: Callable[..., Any]
) -> None:
    shutil.copytree(finished, run)
    first = json.loads((finished / "report.json").read_text())
    again = done("distill", "--resume", run).report
    assert {name: again[name] for name in first if name not in ("run", "seconds")} == {
        name: first[name] for name in first if name not in ("run", "seconds")
    }
    assert contents(run, "summary.csv") == contents(finished, "summary.csv")
    assert contents(run, "config.json") == contents(finished, "config.json")


@pytest.mark.parametrize(
    "flags",
    [
        ["--lr", 0.5],
        ["--epochs", 1],
        ["--seed", 1],
        ["--batch-size", 9],
        ["--discriminator", "official"],
        ["--model", "test_vit"],
        ["--amp"],
        ["--decay-milestones", 1],
        ["--output", "elsewhere"],
    ],
    ids=lambda flags: flags[0],
)
def test_flag_that_contradicts_the_resumed_run_is_refused_by_name(
    run_cli: Run, finished: Path, contents: Callable[..., Any], flags: list[object]
) -> None:
    before = contents(finished)
    result = run_cli("distill", "--resume", finished, *flags)
    assert result.code == 2
    assert result.stderr.startswith(f"mealv2: {flags[0]} ")
    assert len(result.stderr.splitlines()) == 1
    assert contents(finished) == before


def test_config_beside_resume_is_refused_as_it_has_no_effect(
    run_cli: Run, finished: Path, run: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, run)
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"lr": 0.5}))
    result = run_cli("distill", "--resume", run, "--config", other)
    assert result.code == 2
    assert "--config" in result.stderr


def test_flags_that_agree_or_concern_the_machine_are_allowed_with_resume(
    done: Run, finished: Path, run: Path, data_dir: Path
) -> None:
    shutil.copytree(finished, run)
    agreeing = ["--lr", 0.01, "--data-dir", os.path.relpath(data_dir), "--no-amp"]
    runtime = ["--workers", 1, "--log-interval", 2, "--checkpoint-hist", 1, "--device", "cpu"]
    assert done("distill", "--resume", run, *agreeing, *runtime).report["steps"] == 10


def test_run_of_another_command_is_not_resumed(
    run_cli: Run, done: Run, finetune_flags: list[str], run: Path
) -> None:
    done(*finetune_flags, "--epochs", 1, "--output", run)
    result = run_cli("distill", "--resume", run)
    assert result.code == 2
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("mealv2: ")


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def test_torn_newest_checkpoint_is_named_and_the_one_before_serves(
    done: Run, finished: Path, run: Path, weights: Weights
) -> None:
    shutil.copytree(finished, run)
    newest = run / "checkpoints" / "step-00000010.pt"
    _truncate(newest)
    result = done("distill", "--resume", run)
    assert f"checkpoint {newest} is damaged" in result.stderr
    assert "resuming from the one before, step-00000005.pt" in result.stderr
    assert weights(run) == weights(finished)
    assert result.report["epochs"] == 2


def test_without_a_whole_checkpoint_nothing_is_overwritten(
    run_cli: Run, finished: Path, run: Path, contents: Callable[..., dict[str, bytes]]
) -> None:
    shutil.copytree(finished, run)
    for path in (run / "checkpoints").iterdir():
        _truncate(path)
    before = contents(run)
    result = run_cli("distill", "--resume", run)
    assert result.code == 1
    assert len(result.stderr.splitlines()) == 1
    assert "no other is whole" in result.stderr
    assert contents(run) == before


def test_checkpoint_of_another_run_is_named(run_cli: Run, finished: Path, run: Path) -> None:
    shutil.copytree(finished, run)
    newest = run / "checkpoints" / "step-00000010.pt"
    torch.save({"step": 1}, newest)
    result = run_cli("distill", "--resume", run)
    assert result.code == 1
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f"mealv2: checkpoint {newest} is of another run")


def test_run_is_not_continued_on_other_images(
    done: Run, run_cli: Run, finetune_flags: list[str], own_data: Path, run: Path
) -> None:
    done(*finetune_flags, "--data-dir", own_data, "--output", run)
    (run / "report.json").unlink()
    gone = own_data / "train" / "ants" / "00.jpg"
    shutil.move(gone, gone.with_name("new.jpg"))
    (own_data / "train" / "bees" / "00.jpg").write_bytes(b"another")
    result = run_cli("finetune", "--resume", run)
    assert (result.code, len(result.stderr.splitlines())) == (1, 1)
    assert (
        "are not those this run started with: 1 missing (ants/00.jpg), 1 new (ants/new.jpg), "
        "1 changed (bees/00.jpg); restore" in result.stderr
    )


def test_run_is_not_continued_on_labels_made_anew(
    done: Run, run_cli: Run, precompute_flags: list[str], distill_flags: list[str], tmp_path: Path
) -> None:
    labels, run = tmp_path / "labels", tmp_path / "run"
    done(*precompute_flags, "--output", labels)
    done(*distill_flags, "--labels", labels, "--output", run)
    (run / "report.json").unlink()
    shutil.rmtree(labels)
    done(*precompute_flags, "--view-seed", 99, "--output", labels)
    result = run_cli("distill", "--resume", run)
    assert (result.code, len(result.stderr.splitlines())) == (3, 1)
    assert "the labels are not those this run started with" in result.stderr


def test_finished_run_keeps_its_report_and_its_metrics(
    done: Run, finished: Path, run: Path, contents: Callable[..., dict[str, bytes]]
) -> None:
    shutil.copytree(finished, run)
    before = contents(run)
    assert done("distill", "--resume", run).report == json.loads(before["report.json"])
    assert contents(run) == before


def test_teachers_given_by_a_relative_path_are_found_from_another_folder(
    done: Run,
    distill_flags: list[str],
    teacher_dirs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, folder = next(iter(teacher_dirs.items()))
    (tmp_path / "a" / "b").mkdir(parents=True)
    place = distill_flags.index("--labels")
    flags = [*distill_flags[:place], *distill_flags[place + 2 :], "--online", "--img-size", 32]
    monkeypatch.chdir(tmp_path / "a")
    (tmp_path / "a" / "mine").symlink_to(folder)
    done(*flags, "--teacher", f"{name}=mine", "--output", tmp_path / "run")
    (tmp_path / "run" / "report.json").unlink()
    monkeypatch.chdir(tmp_path / "a" / "b")
    done("distill", "--resume", tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("batch_size", 2, 8),
        ("seed", 1, 0),
        ("epochs", 3, 2),
        ("hard_label_weight", 0.1, 0.0),
        ("data_dir", "/elsewhere", None),
        ("epochs", "ten", 2),
        ("cutmix_target", "zzz", None),
        ("amp", 3, False),
        ("teacher", "x", []),
    ],
)
def test_settings_of_a_run_that_were_changed_by_hand_are_named(
    run_cli: Run,
    finished: Path,
    run: Path,
    contents: Callable[..., dict[str, bytes]],
    name: str,
    value: object,
    kept: object,
) -> None:
    shutil.copytree(finished, run)
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**settings, name: value}))
    before = contents(run)
    kept = settings[name] if name == "data_dir" else kept
    result = run_cli("distill", "--resume", run)
    assert (result.code, len(result.stderr.splitlines())) == (2, 1)
    assert f"{name} {kept} in the checkpoint, {value} in {run}/config.json" in result.stderr
    assert contents(run) == before


def test_weights_that_are_not_finite_never_replace_good_ones(
    run_cli: Run, finetune_flags: list[str], run: Path
) -> None:
    flags = ["--lr", 1e30, "--recovery-interval", 1, "--log-interval", 50, "--val-split", "none"]
    result = run_cli(*finetune_flags, *flags, "--output", run)
    assert result.code == 1
    assert "lower --lr" in result.stderr
    for path in (run / "checkpoints").glob("*.pt"):
        state = torch.load(path, weights_only=True)
        assert all(torch.isfinite(t).all() for t in state["meters"][1]["sums"].values())


def test_batch_of_one_image_is_refused_where_it_cannot_learn(
    run_cli: Run, finetune_flags: list[str], run: Path
) -> None:
    result = run_cli(*finetune_flags, "--batch-size", 1, "--output", run)
    assert result.code == 1
    assert "Traceback" not in result.stderr
    assert "use a larger --batch-size" in result.stderr.splitlines()[-1]


def test_finished_run_that_lost_its_checkpoints_is_not_trained_over(
    run_cli: Run, finished: Path, run: Path, contents: Callable[..., dict[str, bytes]]
) -> None:
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoints")
    for gone in ("", "report.json"):
        (run / (gone or "nothing")).unlink(missing_ok=True)
        before = contents(run)
        result = run_cli("distill", "--resume", run)
        assert (result.code, len(result.stderr.splitlines())) == (2, 1)
        assert "has lost its checkpoints" in result.stderr
        assert contents(run) == before


def test_folder_of_something_else_is_no_place_for_a_run(
    run_cli: Run, distill_flags: list[str], labels_dir: Path, own_data: Path, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for place in (labels_dir, own_data / "train", file):
        before = sorted(place.glob("**/*"))
        result = run_cli(*distill_flags, "--output", place)
        assert (result.code, len(result.stderr.splitlines())) == (2, 1)
        assert str(place) in result.stderr
        assert sorted(place.glob("**/*")) == before


# a step that never ends
STUCK = """
import sys, threading
sys.path.insert(0, {root!r})
import cli
from pipeline.training.step import TrainStep
def update(*args):
    print("in a step", file=sys.stderr, flush=True)
    threading.Event().wait()
TrainStep.update = update
cli.main()
"""


@pytest.mark.slow
def test_second_signal_quits_at_once(
    spawn: Callable[..., Spawned], finetune_flags: list[str], run: Path, tmp_path: Path
) -> None:
    program = tmp_path / "stuck.py"
    program.write_text(STUCK.format(root=os.fspath(ROOT)))
    process = spawn(*finetune_flags, "--val-split", "none", "--output", run, program=program)
    process.until(lambda: "in a step" in process.stderr)
    process.signal(signal.SIGINT)
    process.until(lambda: "a second signal quits at once" in process.stderr)
    process.signal(signal.SIGINT)
    assert process.result().code == 128 + signal.SIGINT


# --- a loss that is lost ------------------------------------------------------------------------


@pytest.mark.parametrize("val_split", ["val", "none"])
def test_loss_that_is_not_finite_stops_the_run_with_advice(
    run_cli: Run, finetune_flags: list[str], run: Path, val_split: str
) -> None:
    flags = ["--lr", 1e30, "--val-split", val_split, "--log-interval", 1000, "--output", run]
    result = run_cli(*finetune_flags, *flags)
    assert result.code == 1
    assert "lower --lr" in result.stderr.splitlines()[-1]
    assert not (run / "checkpoints").exists()


# --- lines for the user -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch_size", "line"),
    [
        (8, None),
        (12, "36 images at --batch-size 12: 3 steps an epoch, 3 in all"),
        (512, "36 images at --batch-size 512: 1 step an epoch, 1 in all"),
    ],
)
def test_few_steps_an_epoch_are_reported(
    done: Run, distill_flags: list[str], run: Path, batch_size: int, line: str | None
) -> None:
    flags = ["--epochs", 1, "--val-split", "none", "--batch-size", batch_size, "--output", run]
    said = done(*distill_flags, *flags).stderr
    assert said.count(" an epoch, ") == (line is not None)
    assert line is None or line in said


def test_a_discriminator_that_wins_is_reported_once(
    done: Run,
    distill_flags: list[str],
    finished: Path,
    run: Path,
    events: Events,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It does not win here: the limits are lowered."""
    assert events(finished, "discriminator") == []
    rows = summary(finished)
    limits = [
        min(float(row[f"train_discriminator_{name}"]) for row in rows) - 1e-6
        for name in ("accuracy", "gradient_ratio")
    ]
    monkeypatch.setattr(run_log, "MAX_ACCURACY", limits[0])
    monkeypatch.setattr(run_log, "MAX_GRADIENT_RATIO", limits[1])
    said = done(*distill_flags, "--output", run).stderr
    assert said.count("the discriminator wins: accuracy ") == 1
    assert "use --discriminator off" in said  # its rate is 1e-4 by default
    (event,) = events(run, "discriminator")
    assert event["epoch"] == 1
    monkeypatch.setattr(run_log, "MAX_ACCURACY", 0.0)
    monkeypatch.setattr(run_log, "MAX_GRADIENT_RATIO", 0.0)
    high = ["--discriminator-lr", 0.01, "--epochs", 1, "--output", run.with_name("high")]
    assert "use --discriminator-lr 1e-4" in done(*distill_flags, *high).stderr
    monkeypatch.setattr(run_log, "MAX_ACCURACY", 1.0)
    again = done(*distill_flags, "--output", run.with_name("again")).stderr
    assert "the discriminator wins" not in again
