"""Many transfers: base against distilled over sets, modes and seeds; Table 6's form."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from layouts import draw_lists
from safetensors import safe_open
from safetensors.torch import save_file

from conftest import Result
from mealv2.errors import ConfigError
from mealv2.storage.weight_files import find_checkpoint
from pipeline import transfer
from pipeline.comparison.grid import read_sets
from pipeline.comparison.table import Run as TableRun
from pipeline.comparison.table import grid_report, grid_table

Run = Callable[..., Result]


def without(flags: list[str], *names: str) -> list[str]:
    """Return flags without some that have a value."""
    kept = list(flags)
    for name in names:
        place = kept.index(name)
        del kept[place : place + 2]
    return kept


@pytest.fixture(scope="module")
def compared(
    transfer_flags: list[str], teacher_dirs: dict[str, Path], student_dir: Path
) -> list[str]:
    """A comparison of random weights with trained ones, two seeds, with frozen backbones."""
    flags = without(transfer_flags, "--model")
    pair = ["--compare", str(student_dir), f"test_resnet={teacher_dirs['test_resnet']}"]
    return [*flags, *pair, "--mode", "frozen", "--seeds", "2", "--epochs", "1", "--num-views", "1"]


class Finished(NamedTuple):
    """A finished comparison on images and a base of its own; a test that changes them restores."""

    flags: list[str]
    result: Result
    out: Path
    data: Path
    base: Path


@pytest.fixture(scope="module")
def finished(
    done: Run,
    compared: list[str],
    data_dir: Path,
    student_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    data = shutil.copytree(data_dir, folder / "data")
    base = shutil.copytree(student_dir, folder / "base")
    own = {str(data_dir): str(data), str(student_dir): str(base)}
    flags = [own.get(flag, flag) for flag in compared]
    result = done(*flags, "--output", folder / "out")
    return Finished([*flags, "--output", str(folder / "out")], result, folder / "out", data, base)


def test_base_and_distilled_are_trained_with_every_seed_and_compared(
    done: Run, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, out = finished.result, finished.out
    folders = sorted(p.parent.relative_to(out).as_posix() for p in out.glob("**/report.json"))
    assert folders == [f"frozen-{m}/seed-{s}" for m in ("base", "distilled") for s in (0, 1)]
    report = result.report
    base, distilled = report["results"]
    for row, name in ((base, "base"), (distilled, "distilled")):
        paths = [out / f"frozen-{name}" / f"seed-{seed}" for seed in (0, 1)]
        values = [json.loads((path / "report.json").read_text())["top1"] for path in paths]
        assert list(row["values"].values()) == values
        assert row["mean"] == pytest.approx(np.mean(values))
    (difference,) = report["differences"]
    assert difference["mean"] == pytest.approx(distilled["mean"] - base["mean"])
    table = (out / "transfer.md").read_text()
    for words in ("Freeze backbone: Base model", "Freeze backbone: Distilled", "difference", "±"):
        assert words in table
        assert words in result.stdout
    assert json.loads((out / "transfer.json").read_text())["results"] == [base, distilled]

    # the same command again trains nothing
    monkeypatch.setattr(transfer, "train_one", None)
    assert done(*finished.flags).report == report


@pytest.mark.parametrize(
    ("second", "named"),
    [("tset_resnet", "unknown model 'tset_resnet'"), ("o/bse", "no run or model o/bse")],
)
def test_a_mistyped_second_backbone_is_found_before_the_first_run(
    run_cli: Run, compared: list[str], tmp_path: Path, second: str, named: str
) -> None:
    words = list(compared)
    words[words.index("--compare") + 2] = second
    result = run_cli(*words, "--output", tmp_path / "out")
    assert result.code == 2
    assert named in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_stopped_comparison_continues_with_the_same_command(
    done: Run,
    compared: list[str],
    finished: Finished,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train_one, calls = transfer.train_one, []

    def stops(config: Any, runtime: Any) -> Any:
        calls.append(config)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train_one(config, runtime)

    monkeypatch.setattr(transfer, "train_one", stops)
    with pytest.raises(AssertionError, match="same command"):
        done(*compared, "--output", tmp_path / "parts")
    again = done(*compared, "--output", tmp_path / "parts").report
    assert again["results"] == finished.result.report["results"]


def test_all_modes_have_rows_as_in_table_6(done: Run, compared: list[str], tmp_path: Path) -> None:
    words = [*without(compared, "--mode", "--seeds"), "--mode", "all"]
    report = done(*words, "--output", tmp_path / "out").report
    found = [(row["mode"], row["model"]) for row in report["results"]]
    pairs = [(mode, m) for mode in ("fine-tune", "frozen") for m in ("base", "distilled")]
    assert found == [("scratch", "base"), *pairs]
    rates = {
        path.parent.parent.name: json.loads(path.read_text())["lr"]
        for path in (tmp_path / "out").glob("**/config.json")
        if path.parent.name == "seed-0"
    }
    assert rates == {
        "scratch": 0.01,
        "fine-tune-base": 0.01,
        "fine-tune-distilled": 0.01,
        "frozen-base": 0.1,
        "frozen-distilled": 0.1,
    }


def test_many_sets_have_a_mean(
    done: Run, transfer_flags: list[str], start: list[str], tmp_path: Path
) -> None:
    lines = ["# OmniBenchmark's form"]
    for number, name in enumerate(("birds", "cars")):
        folder = draw_lists(tmp_path / name, seed=number)
        lines.append(f"{name} list:{folder.name}/lists={folder.name}")
    (tmp_path / "sets.txt").write_text("\n".join(lines) + "\n")
    words = [*without(transfer_flags, "--data-dir"), *start, "--sets", tmp_path / "sets.txt"]
    more = ["--mode", "frozen", "--epochs", 1, "--num-views", 1]
    result = done(*words, *more, "--output", tmp_path / "out")
    (mean,) = result.report["means"]
    values = [row["mean"] for row in result.report["results"]]
    assert [row["set"] for row in result.report["results"]] == ["birds", "cars"]
    assert mean["mean"] == pytest.approx(np.mean(values))
    header, *_ = result.stdout.splitlines()
    assert header.split() == ["birds", "cars", "mean"]


def test_a_set_that_is_missing_is_found_before_the_first_run(
    run_cli: Run, transfer_flags: list[str], start: list[str], data_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "sets.txt").write_text(f"one {data_dir}\ntwo cub200:nowhere\n")
    words = [*without(transfer_flags, "--data-dir"), *start, "--sets", tmp_path / "sets.txt"]
    result = run_cli(*words, "--mode", "frozen", "--output", tmp_path / "out")
    assert result.code == 2
    (line,) = result.stderr.splitlines()
    assert "no folder" in line
    assert not (tmp_path / "out").exists()


def test_another_command_does_not_continue_the_runs_of_a_folder(
    run_cli: Run, finished: Finished
) -> None:
    result = run_cli(*finished.flags, "--lr", "0.2")
    assert result.code == 2
    assert "lr: 0.1 in the run, 0.2 in this command" in result.stderr.splitlines()[-1]


def test_runs_from_weights_that_changed_since_are_not_those_of_the_comparison(
    run_cli: Run, finished: Finished
) -> None:
    weights = find_checkpoint(finished.base)
    before = weights.read_bytes()
    with safe_open(weights, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = file.metadata()
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, weights, about)
    result = run_cli(*finished.flags)
    weights.write_bytes(before)
    assert result.code == 2
    assert f"the weights of {finished.base} are not those that" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("split", ["train", "val"])
def test_images_that_changed_since_are_not_those_of_the_comparison(
    run_cli: Run, finished: Finished, split: str
) -> None:
    image = next((finished.data / split).glob("*/*.png"))
    before = image.read_bytes()
    image.write_bytes(before + b" ")
    result = run_cli(*finished.flags)
    image.write_bytes(before)
    assert result.code == 2
    assert f"the images of {finished.data} are not those that" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("start", ["base", "./base", "local-dir:base"])
def test_a_folder_can_be_the_model_and_its_run_is_continued_from_anywhere(
    done: Run,
    transfer_flags: list[str],
    teacher_dirs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    start: str,
) -> None:
    folder = shutil.copytree(teacher_dirs["test_resnet"], tmp_path / "base")
    words = [*without(transfer_flags, "--model"), "--model", start, "--mode", "frozen"]
    words += ["--epochs", 1, "--num-views", 1, "--output", tmp_path / "run"]
    monkeypatch.chdir(tmp_path)
    done(*words)
    kept = json.loads((tmp_path / "run/config.json").read_text())
    scheme = "local-dir:" * start.startswith("local-dir:")
    assert (kept["model"], kept["initial_checkpoint"]) == (f"{scheme}{folder}", None)
    done(*words)  # the same command has nothing to do
    monkeypatch.chdir("/")
    done("transfer", "--resume", tmp_path / "run", "--epochs", 2)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--data-dir d --model m --sets {tmp}", "not both"),
        ("--model m", "give --data-dir or --sets"),
        ("--data-dir {data}", "give --model or --compare"),
        ("--data-dir {data} --model m --compare a b --output o", "not both"),
        ("--data-dir {data} --model m --seeds 2", "--output is required"),
        ("--data-dir {data} --compare a b --resume {tmp}", "no run at"),
        ("--data-dir {data} --compare a b --output o --val-split none", "validation split"),
        ("--data-dir {data} --compare a b --output o --pretrained", "--pretrained has no effect"),
        ("--data-dir {data} --model m --seeds 0 --output o", "--seeds"),
    ],
)
def test_a_wrong_flag_is_one_line(
    run_cli: Run, data_dir: Path, tmp_path: Path, words: str, named: str
) -> None:
    result = run_cli("transfer", *words.format(tmp=tmp_path, data=data_dir).split())
    assert result.code == 2
    (line,) = result.stderr.splitlines()
    assert named in line


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "no data set"),
        ("birds\n", "line 1: NAME DATA_DIR"),
        ("a x\na y\n", "line 2: the name a is there twice"),
        ("../a x\n", "plain folder name"),
        (".. x\n", "plain folder name"),
    ],
)
def test_a_wrong_list_of_sets_is_an_error(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "sets.txt"
    path.write_text(text)
    with pytest.raises(ConfigError, match=named):
        read_sets(path)


def test_a_list_of_sets_has_paths_from_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "sets.txt"
    path.write_text("# sets\n\none data/one\ntwo s3://bucket/two\nthree cub200:CUB\n")
    assert read_sets(path) == {
        "one": tmp_path / "data/one",
        "two": "s3://bucket/two",
        "three": tmp_path / "cub200:CUB",
    }


def test_the_table_has_means_intervals_and_paired_differences() -> None:
    figures = {"base": [80.0, 81.0, 82.0], "distilled": [83.0, 83.5, 85.5]}
    runs = [
        TableRun(name, "fine-tune", model, seed, {"top1": value + shift})
        for shift, name in ((0, "CUB"), (-10, "Birdsnap"))
        for model, values in figures.items()
        for seed, value in enumerate(values)
    ]
    t = 4.302653  # t(0.975, 2)
    half = t * np.std(figures["base"], ddof=1) / np.sqrt(3)
    gaps = np.subtract(figures["distilled"], figures["base"])
    gap_half = t * np.std(gaps, ddof=1) / np.sqrt(3)
    low, high = gaps.mean() - gap_half, gaps.mean() + gap_half
    lines = grid_table(runs, as_markdown=True).splitlines()
    assert f"81.00 ± {half:.2f}" in lines[2]
    assert f"71.00 ± {half:.2f}" in lines[2]
    assert f"76.00 ± {half:.2f}" in lines[2]  # the mean of both sets
    assert lines[4].count(f"{gaps.mean():+.2f} [{low:+.2f}, {high:+.2f}]") == 3
    assert grid_report(runs)["differences"][0]["interval_95"] == pytest.approx((low, high))
