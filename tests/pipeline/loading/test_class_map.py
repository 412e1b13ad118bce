"""--class-map: class ids by a file, in every command, as timm's class map."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Result
from mealv2.data.tar_splits import read_class_map
from mealv2.errors import ConfigError
from mealv2.label_set import read_plan
from mealv2.models import read_metadata

Run = Callable[..., Result]
ORDER = ["cats", "ants", "dogs", "bees"]  # the data has no dogs


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("map.txt", "cats\nants\ndogs\nbees\n"),
        ("map.json", json.dumps(ORDER)),
        ("map.json", json.dumps({"ants": 1, "bees": 3, "cats": 0, "dogs": 2})),
    ],
)
def test_the_kinds_of_file(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert read_class_map(tmp_path / name) == ORDER


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("map.txt", "cats\ncats\n", "lists the class cats twice"),
        ("map.json", '{"a": 1, "b": 2}', "must be 0 to 1, each once"),
        ("map.json", '{"a": 0, "b": 0}', "must be 0 to 1, each once"),
        ("map.json", '{"a": 0, "b": true}', "must be 0 to 1, each once"),
        ("map.json", '{"a": 0, "b": "1"}', "must be 0 to 1, each once"),
        ("map.json", "[1]", "must be a list of class names"),
        ("map.pkl", "", "must be a .txt file, one class a line"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_class_map(tmp_path / name)


def test_both_stages_and_evaluate_use_its_class_ids(
    done: Run, run_cli: Run, data_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "map.txt").write_text("\n".join(ORDER))
    data = ["--data-dir", data_dir, "--class-map", tmp_path / "map.txt", "--workers", 0]
    small = ["--img-size", 32, "-b", 16]
    words = ["--model", "test_resnet", "--no-pretrained", "--epochs", 1, *small, *data]
    tuned = done("finetune", *words, "--output", tmp_path / "run")
    folder = tmp_path / "run" / "student"
    assert read_metadata(folder)["classes"] == ORDER
    assert "no image of 1 class (dogs)" in tuned.stderr

    evaluated = done("evaluate", *data, "--checkpoint", tmp_path / "run", "--json").report
    assert evaluated["top1"] == tuned.report["top1"]

    teacher = ["--teacher", f"test_resnet={folder}", "--num-views", 2, "--output", tmp_path / "set"]
    done("precompute", *teacher, *small, *data)
    assert read_plan(tmp_path / "set")["classes"] == ORDER

    train = ["--model", "test_resnet", "--no-pretrained", "--epochs", 1, "-b", 16]
    train += ["--labels", tmp_path / "set", "--output", tmp_path / "student"]
    without = run_cli("distill", *train, "--workers", 0, "--data-dir", data_dir)
    assert without.code == 3
    assert "and the --class-map, if it had one" in without.stderr
    done("distill", *train, *data)
    assert read_metadata(tmp_path / "student" / "student")["classes"] == ORDER


def test_a_class_that_it_does_not_list_is_one_line(
    run_cli: Run, data_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "map.txt").write_text("ants\nbees\n")
    words = ["finetune", "--model", "test_resnet", "--no-pretrained", "--data-dir", data_dir]
    result = run_cli(*words, "--class-map", tmp_path / "map.txt", "--output", tmp_path / "run")
    assert result.code == 2
    assert result.stderr.splitlines()[-1].startswith(
        f"mealv2: --class-map {tmp_path / 'map.txt'} does not list cats of {data_dir / 'train'}; "
    )
