"""A run that continues: the same command, other paths, more epochs, deleted images, other signals.

pipeline.command_line.settings, pipeline.training.resume and image_list.
"""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Result, Spawned
from mealv2.errors import DataError
from pipeline.training import checkpoint, image_list
from pipeline.training.run_folder import saved_settings

Run = Callable[..., Result]
Events = Callable[[Path, str], list[dict[str, Any]]]
Weights = Callable[[Path], dict[str, bytes]]
Contents = Callable[..., dict[str, bytes]]


@pytest.fixture(scope="module")
def finished(
    done: Run, finetune_flags: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished run of two epochs, 6 steps. Not to be changed."""
    run = tmp_path_factory.mktemp("finished") / "run"
    done(*finetune_flags, "--output", run)
    return run


@pytest.fixture
def half(finished: Path, run: Path) -> Path:
    """The same run as it was after its first epoch."""
    shutil.copytree(finished, run)
    max((run / "checkpoints").iterdir()).unlink()
    (run / "report.json").unlink()
    return run


# --- the same command ---------------------------------------------------------------------------


def test_the_same_command_continues_its_own_unfinished_run(
    done: Run, finetune_flags: list[str], half: Path, finished: Path, weights: Weights
) -> None:
    result = done(*finetune_flags, "--workers", 1, "--output", half)
    assert "resuming in epoch 2/2 after 0 of its 3 steps (3 in all)" in result.stderr
    assert weights(half) == weights(finished)


def test_the_same_distillation_continues_its_own_unfinished_run(
    done: Run, distill_flags: list[str], run: Path, weights: Weights
) -> None:
    command = [*distill_flags, "--output", run]
    done(*command)
    expected = weights(run)
    max((run / "checkpoints").iterdir()).unlink()
    (run / "report.json").unlink()
    shutil.rmtree(run / "student")
    assert "resuming in epoch 2/2 after 0 of its " in done(*command).stderr
    assert weights(run) == expected


def test_the_same_command_says_that_its_run_is_finished_and_prints_its_report(
    done: Run, finetune_flags: list[str], finished: Path, run: Path, contents: Contents
) -> None:
    shutil.copytree(finished, run)
    before = contents(run)
    result = done(*finetune_flags, "--output", run)
    assert f"the run is finished after 2 epochs; --resume {run} with more" in result.stderr
    assert result.report == json.loads(before["report.json"])
    assert contents(run) == before


@pytest.mark.parametrize("flags", [["--seed", 1], ["--epochs", 3], ["--data-dir", "COPY"]], ids=str)
def test_a_command_with_other_settings_is_refused_and_named(
    run_cli: Run, finetune_flags: list[str], half: Path, own_data: Path, flags: list[object]
) -> None:
    given = [own_data if flag == "COPY" else flag for flag in flags]
    result = run_cli(*finetune_flags, *given, "--output", half)
    assert (result.code, len(result.stderr.splitlines())) == (2, 1)
    assert f"already holds a run of other settings ({flags[0]}: " in result.stderr
    assert f"--resume {half}" in result.stderr


def test_a_command_that_leaves_out_a_flag_of_the_run_is_another_command(
    run_cli: Run, done: Run, finetune_flags: list[str], run: Path
) -> None:
    done(*finetune_flags, "--epochs", 1, "--lr", 0.5, "--output", run)
    result = run_cli(*finetune_flags, "--epochs", 1, "--output", run)
    assert result.code == 2
    assert "(--lr: 0.5 in the run, 0.01 in this command)" in result.stderr


# --- the settings in the checkpoint -------------------------------------------------------------


def test_a_checkpoint_keeps_the_settings_where_they_are_read_without_torch(finished: Path) -> None:
    newest = max((finished / "checkpoints").iterdir())
    settings = saved_settings(finished)
    assert settings == torch.load(newest, weights_only=True)["args"]
    kept = json.loads((finished / "config.json").read_text())
    free = {"output"}
    assert settings is not None
    assert {n: v for n, v in settings.items() if n not in free} == {
        n: v for n, v in kept.items() if n not in free
    }


def test_a_changed_setting_that_may_change_is_taken_where_the_flag_repeats_it(
    run_cli: Run, done: Run, half: Path
) -> None:
    config = half / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "epochs": 3}))
    refused = run_cli("finetune", "--resume", half)
    assert refused.code == 2
    assert "epochs 2 in the checkpoint, 3 in " in refused.stderr
    assert "or repeat --epochs on the command line" in refused.stderr
    assert done("finetune", "--resume", half, "--epochs", 3).report["epochs"] == 3


# --- paths --------------------------------------------------------------------------------------


def test_a_run_continues_on_moved_images(
    done: Run,
    finetune_flags: list[str],
    own_data: Path,
    run: Path,
    tmp_path: Path,
    finished: Path,
    weights: Weights,
) -> None:
    done(*finetune_flags, "--data-dir", own_data, "--output", run)
    max((run / "checkpoints").iterdir()).unlink()
    (run / "report.json").unlink()
    moved = own_data.rename(tmp_path / "moved")
    result = done("finetune", "--resume", run, "--data-dir", moved)
    assert f"--data-dir was {own_data}, is {moved}" in result.stderr
    assert weights(run) == weights(finished)
    assert json.loads((run / "config.json").read_text())["data_dir"] == str(moved)
    done("finetune", "--resume", run)  # it is the run's own folder now


def test_a_run_continues_with_moved_labels_and_a_moved_start(
    done: Run,
    run_cli: Run,
    distill_flags: list[str],
    labels_dir: Path,
    student_dir: Path,
    run: Path,
    tmp_path: Path,
    weights: Weights,
) -> None:
    labels, start = tmp_path / "labels", tmp_path / "start"
    shutil.copytree(labels_dir, labels)
    shutil.copytree(student_dir, start)
    done(*distill_flags, "--labels", labels, "--initial-checkpoint", start, "--output", run)
    expected = weights(run)
    max((run / "checkpoints").iterdir()).unlink()
    (run / "report.json").unlink()
    labels.rename(tmp_path / "labels-2")
    start.rename(tmp_path / "start-2")
    moved = ["--labels", tmp_path / "labels-2", "--initial-checkpoint", tmp_path / "start-2"]
    assert run_cli("distill", "--resume", run).code in (2, 3)
    done("distill", "--resume", run, *moved)
    assert weights(run) == expected


def test_a_run_does_not_continue_with_other_labels_of_another_path(
    done: Run, run_cli: Run, distill_flags: list[str], labels_of: Callable[..., Path], run: Path
) -> None:
    done(*distill_flags, "--epochs", 1, "--output", run)
    (run / "report.json").unlink()
    other = labels_of("rate")
    result = run_cli("distill", "--resume", run, "--labels", other)
    assert (result.code, len(result.stderr.splitlines())) == (3, 1)
    assert "the labels are not those this run started with (plan " in result.stderr


# --- more epochs --------------------------------------------------------------------------------


def test_more_epochs_lengthen_a_finished_run(
    done: Run, run_cli: Run, finished: Path, run: Path, events: Events
) -> None:
    """The paper's schedule drops the rate at 100/180 of 2 epochs: there it stays."""
    shutil.copytree(finished, run)
    result = done("finetune", "--resume", run, "--epochs", 4)
    assert "--epochs was 2, is 4" in result.stderr
    assert "milestones stay at epoch 1; from epoch 3 on the learning rate is 0.001" in result.stderr
    assert (result.report["epochs"], result.report["steps"]) == (4, 12)
    rates = {event["epoch"]: event["lr"] for event in events(run, "train")}
    assert rates == pytest.approx({0: 0.01, 1: 0.001, 2: 0.001, 3: 0.001})
    assert [event["step"] for event in events(run, "train")] == list(range(1, 13))
    assert json.loads((run / "config.json").read_text())["epochs"] == 4
    assert done("finetune", "--resume", run).report == result.report
    fewer = run_cli("finetune", "--resume", run, "--epochs", 3)
    assert (fewer.code, len(fewer.stderr.splitlines())) == (2, 1)
    assert "a run can only be lengthened" in fewer.stderr


def test_a_run_with_the_old_name_of_its_schedule_continues(
    done: Run, finished: Path, run: Path
) -> None:
    """Runs made before `--opt` have the schedule `step`, and none of the newer settings."""
    shutil.copytree(finished, run)
    last = max((run / "checkpoints").iterdir())
    state = torch.load(last, weights_only=True)
    for settings in (state["args"], config := json.loads((run / "config.json").read_text())):
        settings["sched"] = "step"
        for name in ("opt", "decay_epochs", "sched_on_updates", "warmup_epochs"):
            del settings[name]
    (run / "config.json").write_text(json.dumps(config))
    checkpoint.save(run, state, step=state["total_steps"], keep="all")
    result = done("finetune", "--resume", run, "--epochs", 3, "--sched", "step")
    assert "milestones stay at epoch 1" in result.stderr
    assert "--sched was" not in result.stderr
    assert json.loads((run / "config.json").read_text())["sched"] == "multistep"


def test_a_longer_cosine_ends_later(
    done: Run, finetune_flags: list[str], run: Path, events: Events
) -> None:
    flags = ["--sched", "cosine", "--no-sched-on-updates", "--val-split", "none", "--epochs"]
    done(*finetune_flags, *flags, 1, "--output", run)
    result = done("finetune", "--resume", run, "--epochs", 2)
    assert "the cosine now ends after 2 epochs; from epoch 2 on the learning" in result.stderr
    rates = {event["epoch"]: event["lr"] for event in events(run, "train")}
    assert rates == pytest.approx({0: 0.01, 1: 0.005})


@pytest.mark.slow
def test_a_run_killed_while_it_is_lengthened_continues_with_its_new_epochs(
    spawn: Callable[..., Spawned], finished: Path, run: Path
) -> None:
    shutil.copytree(finished, run)
    process = spawn("finetune", "--resume", run, "--epochs", 500)
    metrics = run / "metrics.jsonl"
    process.until(lambda: '"epoch": 3' in metrics.read_text())
    process.signal(signal.SIGKILL)
    process.process.wait()
    assert not (run / "report.json").exists()
    assert json.loads((run / "config.json").read_text())["epochs"] == 500
    settings = saved_settings(run)
    assert settings is not None
    assert (settings["epochs"], settings["decay_milestones"]) == (500, [1])


def test_a_run_stopped_in_a_shorter_last_pass_is_finished_before_it_is_lengthened(
    run_cli: Run, done: Run, finetune_flags: list[str], run: Path
) -> None:
    flags = ["--epochs", 3, "--views-per-image", 2, "--val-split", "none"]
    done(*finetune_flags, *flags, "--recovery-interval", 1, "--output", run)
    max((run / "checkpoints").iterdir()).unlink()  # it ended its second pass, of one epoch
    (run / "report.json").unlink()
    result = run_cli("finetune", "--resume", run, "--epochs", 5)
    assert (result.code, len(result.stderr.splitlines())) == (2, 1)
    assert "finish its 3 epochs first" in result.stderr
    assert done("finetune", "--resume", run).report["epochs"] == 3


# --- deleted images -----------------------------------------------------------------------------


def test_deleted_images_are_skipped_and_counted_where_the_flag_allows_it(
    done: Run, run_cli: Run, finetune_flags: list[str], own_data: Path, run: Path, events: Events
) -> None:
    done(*finetune_flags, "--data-dir", own_data, "--output", run)
    max((run / "checkpoints").iterdir()).unlink()
    (run / "report.json").unlink()
    for name in ("ants/00.jpg", "cats/03.jpg"):
        (own_data / "train" / name).unlink()
    refused = run_cli("finetune", "--resume", run)
    assert (refused.code, len(refused.stderr.splitlines())) == (1, 1)
    assert "2 missing (ants/00.jpg, cats/03.jpg) (--on-bad-image skip" in refused.stderr

    result = done("finetune", "--resume", run, "--on-bad-image", "skip")
    assert "2 images of " in result.stderr
    assert "deleted since the run started (ants/00.jpg, cats/03.jpg)" in result.stderr
    assert sum(e.get("images_skipped", 0) for e in events(run, "train")) == 2
    assert "  skipped 2  " in result.stderr

    (own_data / "train" / "ants" / "new.jpg").write_bytes(b"new")
    refused = run_cli("finetune", "--resume", run)
    assert (refused.code, len(refused.stderr.splitlines())) == (1, 1)
    assert "1 new (ants/new.jpg)" in refused.stderr


def test_deleted_images_are_skipped_by_a_distillation_too(
    done: Run, distill_flags: list[str], own_data: Path, run: Path, events: Events
) -> None:
    done(*distill_flags, "--data-dir", own_data, "--output", run)
    max((run / "checkpoints").iterdir()).unlink()
    (run / "report.json").unlink()
    (own_data / "train" / "bees" / "01.jpg").unlink()
    done("distill", "--resume", run, "--on-bad-image", "skip")
    assert sum(e.get("images_skipped", 0) for e in events(run, "train")) == 1


def test_a_damaged_list_of_images_is_named(finished: Path, run: Path) -> None:
    run.mkdir()
    path = run / image_list.LIST_NAME
    data = (finished / image_list.LIST_NAME).read_bytes()
    for damaged in (data[:-20], data[:30] + b"\xff" + data[31:], b"", b"[[[["):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"images\.json\.gz is damaged"):
            image_list.read(run)


# --- signals ------------------------------------------------------------------------------------


def test_a_hangup_saves_as_a_termination_does(
    spawn: Callable[..., Spawned], done: Run, finetune_flags: list[str], run: Path
) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup's children ignore it
    process = spawn(*finetune_flags, "--epochs", 200, "--val-split", "none", "--output", run)
    signal.signal(signal.SIGHUP, before)
    metrics = run / "metrics.jsonl"
    process.until(lambda: metrics.exists() and '"train"' in metrics.read_text())
    process.signal(signal.SIGHUP)
    stopped = process.result()
    assert stopped.code == 4
    assert stopped.stderr.splitlines()[-1].startswith("mealv2: stopped by SIGHUP in epoch ")
    assert list((run / "checkpoints").glob("step-*.pt"))


@pytest.mark.slow
def test_a_training_under_nohup_ignores_a_hangup(
    spawn: Callable[..., Spawned], finetune_flags: list[str], run: Path
) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does; children inherit it
    try:
        process = spawn(*finetune_flags, "--val-split", "none", "--output", run)
        metrics = run / "metrics.jsonl"
        process.until(lambda: metrics.exists())
        os.kill(process.process.pid, signal.SIGHUP)
        assert process.result().code == 0
    finally:
        signal.signal(signal.SIGHUP, before)


# --- old checkpoints, damaged logs --------------------------------------------------------------


def test_a_finished_run_says_what_its_checkpoints_take_and_how_to_remove_them(
    done: Run, finished: Path, run: Path
) -> None:
    shutil.copytree(finished, run)
    said = done("finetune", "--resume", run).stderr.splitlines()[-1]
    assert said.startswith("2 checkpoints (")
    command = f"--resume {run} --checkpoint-hist 1"
    assert said.endswith(f"are kept; {command} keeps only the last and the best")
    done("finetune", "--resume", run, "--keep-checkpoints", 1)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000006.pt"]


def test_all_checkpoints_are_kept_on_request(
    done: Run, finetune_flags: list[str], run: Path
) -> None:
    flags = ["--recovery-interval", 1, "--checkpoint-hist", "all", "--val-split", "none"]
    done(*finetune_flags, *flags, "--output", run)
    assert len(list((run / "checkpoints").iterdir())) == 6


@pytest.mark.parametrize(
    "damage", [b'{"event": "train", "step": 1\xff}', b"[" * 100_000, b'{"step": 1e18}', b"[]"]
)
def test_damaged_lines_of_the_log_are_removed_and_counted(
    done: Run, half: Path, events: Events, damage: bytes
) -> None:
    metrics = half / "metrics.jsonl"
    metrics.write_bytes(damage[:100_001] + b"\n" + metrics.read_bytes())
    result = done("finetune", "--resume", half)
    assert f"{metrics}: 1 damaged line removed" in result.stderr
    assert [event["step"] for event in events(half, "train")] == list(range(1, 7))


@pytest.mark.parametrize("name", ["summary.csv", "report.json", "config.json"])
@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 100_000, b"epoch\nx\n"], ids=range(3))
def test_a_damaged_file_of_a_run_is_named_in_one_line(
    run_cli: Run, finished: Path, run: Path, name: str, content: bytes
) -> None:
    shutil.copytree(finished, run)
    (run / name).write_bytes(content)
    result = run_cli("finetune", "--resume", run)
    assert result.code in (1, 2)
    last = result.stderr.splitlines()[-1]
    assert last.startswith("mealv2: ")
    assert name in last
    assert "Traceback" not in result.stderr
