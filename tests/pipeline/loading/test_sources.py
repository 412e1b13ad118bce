"""pipeline.loading.sources: the line of every split, and --strict."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from coco import draw_coco

import cli
from conftest import ROOT, Result
from mealv2.data.folder import ImageFolder
from mealv2.label_set import LabelSet
from pictures import encoded, photo
from pipeline.config.base import StrictConfig
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


@pytest.mark.parametrize("command", ["finetune", "transfer --mode scratch"])
def test_training_on_one_class_is_a_warning(
    data: Path, tmp_path: Path, done: Callable[..., Result], command: str
) -> None:
    shutil.rmtree(data / "train/bee")
    shutil.rmtree(data / "val/bee")
    flags = ["--model", "test_resnet", "--img-size", "32", "--epochs", "1", "--lr", "0", "-b", "2"]
    flags += ["--no-pretrained"] * (command == "finetune")
    words = [*command.split(), *flags, "--data-dir", data, "--output", tmp_path / "run"]
    warning = f"warning: {data}/train has one class (ant): nothing is learned"
    assert warning in done(*words).stderr


# Every command that opens a data set: its arguments without --data-dir, which ends in this place.
COMMANDS: dict[str, str] = {
    "precompute": "precompute --teacher test_resnet --output OUT --data-dir",
    "finetune": "finetune --model test_resnet --no-pretrained --output OUT --data-dir",
    "transfer": "transfer --mode scratch --model test_resnet --output OUT --data-dir",
    "distill": "distill --labels LABELS --model test_resnet --initial-checkpoint START "
    "--output OUT --data-dir",
    "evaluate": "evaluate --val-split train --model test_resnet --data-dir",
    "predict": "predict --model test_resnet",
    "pack": "pack --output OUT --data-dir",
    "pack --to tar": "pack --to tar --output OUT --data-dir",
    "labels verify": "labels verify LABELS --data-dir",
    "labels import": "labels import START --output OUT --data-dir",
    "labels export": "labels export LABELS --to webdataset --output OUT --data-dir",
    "labels add-views": "labels add-views LABELS --num-views 8 TEACHERS --data-dir",
    "labels show": "labels show LABELS KEY --pictures DRAWING --data-dir",
    "bench": "bench --lines loader-1 --teacher test_resnet --model test_resnet --device cpu "
    "--data-dir",
    "slurm precompute": "slurm precompute --teacher test_resnet --output OUT --print --data-dir",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_strict_makes_a_left_out_file_an_error_in_every_command(
    own_data: Path,
    tmp_path: Path,
    run_cli: Callable[..., Result],
    labels_dir: Path,
    student_dir: Path,
    teacher_flags: list[str],
    command: str,
) -> None:
    if command == "pack" and shutil.which("jpegtran") is None:
        pytest.skip("needs jpegtran (Debian: libjpeg-turbo-progs)")
    (own_data / "train/ants/notes.txt").write_text("x")
    labels = shutil.copytree(labels_dir, tmp_path / "labels")
    values = {
        "OUT": [tmp_path / "out"],
        "LABELS": [labels],
        "KEY": [next(iter(LabelSet.open(labels).keys()))],
        "DRAWING": [tmp_path / "views.png"],
        "START": [student_dir],
        "TEACHERS": teacher_flags,
    }
    words = [part for word in COMMANDS[command].split() for part in values.get(word, [word])]
    result = run_cli(*words, own_data, "--strict")
    assert result.code == 2, result.stderr
    assert "--strict: 1 file of " in result.stderr
    assert "ants/notes.txt (.txt)" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("mealv2: --strict")


def test_strict_makes_a_left_out_box_an_error(
    tmp_path: Path, run_cli: Callable[..., Result]
) -> None:
    folder = draw_coco(tmp_path / "set")
    path = folder / "annotations/instances_train.json"
    found = json.loads(path.read_text())
    found["annotations"][0]["bbox"][2] = 0
    path.write_text(json.dumps(found))
    words = ["transfer-detection", "--model", "test_resnet", "--no-pretrained", "--mode"]
    words += ["fine-tune", "--output", tmp_path / "out", "--data-dir", folder, "--strict"]
    result = run_cli(*words)
    assert result.code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"mealv2: --strict: {folder}")
    assert "boxes left out: 1 " in line
    assert not (tmp_path / "out").exists()


def test_no_other_command_opens_a_data_set() -> None:
    with_strict = {
        name for name, config in cli.COMMANDS.items() if issubclass(config, StrictConfig)
    }
    # COCO's format: above; the page is made of what can be read (tests/pipeline/report)
    elsewhere = {"transfer-detection", "report"}
    assert elsewhere < with_strict
    with_strict = with_strict - elsewhere | {"slurm precompute"}
    assert with_strict == {name.partition(" --")[0] for name in COMMANDS}
    silent = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.glob("pipeline/**/*.py")
        if "open_source(" in (text := path.read_text()) and "show_summary(" not in text
    }
    # they open what they wrote themselves
    assert silent == {
        "pipeline/pack/folder.py",
        "pipeline/bench/memory.py",
        "pipeline/bench/loading.py",
    }
