"""pipeline.transfer: the three modes of the paper's Table 6 through the one loop."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from conftest import Result

Run = Callable[..., Result]
Events = Callable[[Path, str], list[dict[str, Any]]]
Weights = Callable[[Path], dict[str, bytes]]

THREE_EPOCHS = ["--sched", "constant", "--epochs", 3]


def flags_of(mode: str, start: list[str]) -> list[str]:
    return ["--mode", mode, *([] if mode == "scratch" else start)]


def tensors(folder: Path) -> dict[str, bytes]:
    state = safetensors.torch.load_file(folder / "model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in state.items()}


@pytest.mark.parametrize(("mode", "lr"), [("scratch", 0.01), ("fine-tune", 0.01), ("frozen", 0.1)])
def test_defaults_are_the_papers(config_of: Run, tmp_path: Path, mode: str, lr: float) -> None:
    config: Any = config_of("transfer", "--data-dir", tmp_path, "--model", "m", "--mode", mode)
    assert (config.epochs, config.batch_size, config.lr) == (200, 128, lr)
    assert (config.opt, config.momentum, config.weight_decay) == ("sgd", 0.9, 1e-4)
    assert (config.img_size, config.sched, config.select) == (224, "cosine", None)
    assert not config.selects_best


def test_a_given_rate_is_kept_in_every_mode(config_of: Run, tmp_path: Path) -> None:
    words = ["transfer", "--data-dir", tmp_path, "--model", "m", "--lr", "0.01"]
    config: Any = config_of(*words, "--mode", "frozen")
    assert config.lr == 0.01


@pytest.mark.parametrize("mode", ["scratch", "fine-tune", "frozen"])
def test_every_mode_learns(
    done: Run,
    transfer_flags: list[str],
    start: list[str],
    run: Path,
    events: Events,
    mode: str,
) -> None:
    words = [*flags_of(mode, start), "--epochs", 6, "--lr", 0.1 if mode == "frozen" else 0.05]
    report = done(*transfer_flags, *words, "--output", run).report
    losses = [event["loss"] for event in events(run, "train")]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert report["top1"] >= 60  # chance: 33
    assert json.loads((run / "config.json").read_text())["mode"] == mode


def test_frozen_changes_the_last_layer_only_and_fine_tuning_all(
    done: Run,
    transfer_flags: list[str],
    start: list[str],
    teacher_dirs: dict[str, Path],
    tmp_path: Path,
    weights: Weights,
) -> None:
    before = tensors(teacher_dirs["test_resnet"])
    for mode in ("frozen", "fine-tune"):
        words = [*flags_of(mode, start), "--epochs", 1]
        done(*transfer_flags, *words, "--output", tmp_path / mode)
        after = weights(tmp_path / mode)
        changed = {name for name in before if before[name] != after[name]}
        if mode == "frozen":  # batch statistics too
            assert changed == {"fc.weight", "fc.bias"}
        else:
            assert changed == before.keys()


def test_scratch_uses_no_weights(
    done: Run, transfer_flags: list[str], tmp_path: Path, weights: Weights
) -> None:
    words = ["--mode", "scratch", "--epochs", 1, "--lr", 0]
    done(*transfer_flags, *words, "--output", tmp_path / "scratch")
    finetune = ["finetune", *transfer_flags[1:], "--no-pretrained", "--epochs", 1, "--lr", 0]
    done(*finetune, "--sched", "cosine", "--output", tmp_path / "finetune")
    found = weights(tmp_path / "scratch")
    assert found == weights(tmp_path / "finetune")


@pytest.fixture(scope="module")
def whole(
    done: Run, transfer_flags: list[str], start: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A function: the run of a mode that trained three epochs without a stop. Not to be changed."""

    @functools.cache
    def trained(mode: str) -> Path:
        folder = tmp_path_factory.mktemp("whole") / mode
        done(*transfer_flags, "--mode", mode, *start, *THREE_EPOCHS, "--output", folder)
        return folder

    return trained


@pytest.mark.parametrize("mode", ["fine-tune", "frozen"])
def test_a_resumed_run_ends_with_the_same_bits(
    done: Run,
    transfer_flags: list[str],
    start: list[str],
    whole: Callable[[str], Path],
    run: Path,
    weights: Weights,
    mode: str,
) -> None:
    words = ["--mode", mode, *start, *THREE_EPOCHS, "--epochs", 1]
    done(*transfer_flags, *words, "--output", run)
    done("transfer", "--resume", run, "--epochs", 3)
    assert weights(run) == weights(whole(mode))


def test_a_resumed_run_needs_not_what_it_started_from(
    done: Run,
    transfer_flags: list[str],
    teacher_dirs: dict[str, Path],
    student_dir: Path,
    whole: Callable[[str], Path],
    tmp_path: Path,
    weights: Weights,
) -> None:
    model, run = tmp_path / "model", tmp_path / "run"
    shutil.copytree(teacher_dirs["test_resnet"], model)
    words = ["--model", model, "--mode", "frozen", *THREE_EPOCHS, "--epochs", 1]
    done(*transfer_flags, *words, "--output", run)
    other = shutil.copytree(run, tmp_path / "other")
    model.rename(tmp_path / "moved")
    done("transfer", "--resume", run, "--epochs", 3)
    assert weights(run) == weights(whole("frozen"))
    shutil.copytree(student_dir, model)  # other weights in its place: the backbone is the run's
    done("transfer", "--resume", other, "--epochs", 3)
    assert weights(other) == weights(whole("frozen"))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--mode scratch --pretrained", "--pretrained has no effect with --mode scratch"),
        ("--mode scratch --initial-checkpoint {start}", "--initial-checkpoint has no effect"),
        ("--mode fine-tune --no-pretrained", "leave out --no-pretrained"),
        ("--mode frozen --no-pretrained", "leave out --no-pretrained"),
        ("--mode frozen --drop 0.1", "--drop has no effect with --mode frozen"),
        ("--mode frozen --layer-decay 0.5", "--layer-decay has no effect"),
        ("--mode frozen --torchcompile default", "--torchcompile has no effect"),
        ("--mode frozen --clip-grad 1 --clip-mode agc", "--clip-mode agc"),
        ("--mode linear", "'linear' is not one of"),
    ],
)
def test_a_wrong_flag_is_one_line(
    run_cli: Run,
    transfer_flags: list[str],
    start: list[str],
    run: Path,
    words: str,
    named: str,
) -> None:
    given = words.format(start=start[1]).split()
    result = run_cli(*transfer_flags, *given, "--output", run)
    assert result.code == 2
    (line,) = result.stderr.splitlines()
    assert named in line
    assert not run.exists()
