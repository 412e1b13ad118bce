"""pipeline.loading.sources: the line of every split, and --strict."""

from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Result
from mealv2.data.folder import ImageFolder
from pictures import encoded, photo
from pipeline.loading.sources import summary

PNG = encoded(photo(40, 40), "PNG")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data set with a file that is left out in train only."""
    for name in (
        "train/ant/1.png",
        "train/ant/2.png",
        "train/bee/1",
        "val/ant/1.png",
        "val/bee/1.png",
    ):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PNG)
    (tmp_path / "data/train/ant/notes.txt").write_text("x")
    return tmp_path / "data"


def test_the_line_counts_images_classes_and_what_is_left_out(data: Path) -> None:
    assert summary(ImageFolder(data, "train")) == (
        f"data {data}/train: 3 images of 2 classes, from 1 (bee) to 2 (ant); "
        "left out 1 file: 1 .txt"
    )
    assert summary(ImageFolder(data, "val")) == f"data {data}/val: 2 images of 2 classes, 1 each"


def test_a_command_says_it_once_for_each_split(
    data: Path, tmp_path: Path, done: Callable[..., Result]
) -> None:
    flags = ("--model", "test_resnet", "--no-pretrained", "--img-size", 32, "--epochs", 1, "-b", 2)
    result = done("finetune", "--data-dir", data, *flags, "--output", tmp_path / "run")
    assert [line.split(":")[0] for line in result.data_lines] == [
        f"data {data}/train",
        f"data {data}/val",
    ]


@pytest.mark.parametrize("command", ["finetune", "precompute", "pack", "predict", "evaluate"])
def test_strict_makes_a_left_out_file_an_error(
    data: Path, tmp_path: Path, run_cli: Callable[..., Result], command: str
) -> None:
    out = ("--output", tmp_path / "out")
    arguments: dict[str, tuple[object, ...]] = {
        "finetune": ("--data-dir", data, "--model", "test_resnet", "--no-pretrained", *out),
        "precompute": ("--data-dir", data, "--teacher", "test_resnet", *out),
        "pack": ("--data-dir", data, "--to", "tar", *out),
        "predict": (data / "train", "--model", "test_resnet"),
        "evaluate": ("--data-dir", data, "--val-split", "train", "--model", "test_resnet"),
    }
    result = run_cli(command, *arguments[command], "--strict")
    assert result.code == 2
    assert "--strict: 1 file of " in result.stderr
    assert "ant/notes.txt (.txt)" in result.stderr
    assert result.stderr.count("\n") == 1
