"""Data sets without a validation split, or with fewer classes in it, from finetune to evaluate."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import Result
from mealv2.data.folder import ImageFolder
from mealv2.data.held_out import HeldOut
from mealv2.label_set import LabelSet, read_plan

Run = Callable[..., Result]
FRACTION = ["--val-fraction", "0.25"]


@pytest.fixture(scope="module")
def classes_only(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders without splits: 3 classes of 12 images. Not to be changed."""
    return Path(shutil.copytree(data_dir / "train", tmp_path_factory.mktemp("own") / "pictures"))


@pytest.fixture(scope="module")
def held_out_labels(
    done: Run,
    precompute_flags: list[str],
    classes_only: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A label set of ``classes_only`` with a quarter held out. Not to be changed."""
    out = tmp_path_factory.mktemp("labels") / "set"
    done(*on(classes_only, precompute_flags), *FRACTION, "--output", out)
    return out


def on(data_dir: Path, flags: list[str]) -> list[str]:
    """Return flags with another --data-dir."""
    at = flags.index("--data-dir") + 1
    return [*flags[:at], str(data_dir), *flags[at + 1 :]]


def test_every_command_holds_out_the_same_images(
    done: Run,
    finetune_flags: list[str],
    distill_flags: list[str],
    classes_only: Path,
    held_out_labels: Path,
    tmp_path: Path,
) -> None:
    source = ImageFolder(classes_only, "train")
    train, val = (HeldOut(0.25).part(source, split) for split in ("train", "val"))
    assert set(LabelSet.open(held_out_labels).keys()) == set(train.keys)
    assert set(LabelSet.open(held_out_labels, split="val").keys()) == set(val.keys)

    tuned = done(*on(classes_only, finetune_flags), *FRACTION, "--output", tmp_path / "tuned")
    settings = json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert (settings["val_fraction"], settings["split_seed"]) == (0.25, 0)
    distilled = done(
        *on(classes_only, distill_flags), "--labels", held_out_labels, "--output", tmp_path / "run"
    )
    for report, run in ((tuned.report, "tuned"), (distilled.report, "run")):
        words = ["--data-dir", classes_only, "--checkpoint", tmp_path / run, "--workers", 0]
        evaluated = done("evaluate", *words, *FRACTION, "--json").report
        for name in ("num_images", "top1", "cross_entropy"):
            assert evaluated[name] == pytest.approx(report[name])
        rest = done("evaluate", *words, *FRACTION, "--val-split", "train", "--json").report
        assert (evaluated["num_images"], rest["num_images"]) == (9, 27)
        other = done("evaluate", *words, *FRACTION, "--split-seed", 1).stderr
        assert "was trained with --val-fraction 0.25: --val-fraction 0.25 --split-seed 1" in other


def test_the_plan_names_the_choice_only_where_there_is_one(
    held_out_labels: Path, labels_dir: Path
) -> None:
    entry = {"version": 1, "fraction": 0.25, "seed": 0, "of": "train", "name": "val"}
    roles = read_plan(held_out_labels)["roles"]
    assert [roles[name]["held_out"] for name in ("train", "val")] == [entry, entry]
    assert not any("held_out" in role for role in read_plan(labels_dir)["roles"].values())


def test_label_set_commands_open_the_parts_that_the_plan_names(
    done: Run, teacher_flags: list[str], classes_only: Path, held_out_labels: Path, tmp_path: Path
) -> None:
    labels = shutil.copytree(held_out_labels, tmp_path / "labels")
    words = ["--data-dir", classes_only, *teacher_flags, "--workers", 0]
    done("labels", "add-views", labels, *words, "--num-views", 5)
    checked = done("labels", "verify", labels, *words, "--relabel", 3).report
    assert (checked["images"], checked["images_compared"]) == (36, 36)
    out = tmp_path / "tars"
    words = ["--to", "webdataset", "--split", "val", "--data-dir", classes_only, "--output", out]
    assert done("labels", "export", labels, *words).report["images"] == 9


@pytest.mark.parametrize("flags", [["--val-fraction", "0.3"], [*FRACTION, "--split-seed", "1"]])
def test_flags_that_contradict_the_label_set_are_an_error(
    run_cli: Run,
    distill_flags: list[str],
    classes_only: Path,
    held_out_labels: Path,
    tmp_path: Path,
    flags: list[str],
) -> None:
    words = [*on(classes_only, distill_flags), "--output", tmp_path / "run"]
    result = run_cli(*words, "--labels", held_out_labels, *flags)
    assert result.code == 2
    assert "which was made with --val-fraction 0.25 --split-seed 0; leave it out" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_label_set_of_all_images_contradicts_a_fraction(
    run_cli: Run, distill_flags: list[str], data_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(data_dir / "train", tmp_path / "data" / "train")
    words = [*on(tmp_path / "data", distill_flags), "--output", tmp_path / "run"]
    result = run_cli(*words, *FRACTION)
    assert result.code == 2
    assert "which was made without --val-fraction" in result.stderr


def test_online_teachers_validate_on_the_held_out_images(
    done: Run, distill_flags: list[str], teacher_flags: list[str], classes_only: Path, run: Path
) -> None:
    words = on(classes_only, distill_flags)
    at = words.index("--labels")
    online = [*words[:at], *words[at + 2 :], "--online", *teacher_flags, "--img-size", 32]
    report = done(*online, *FRACTION, "--epochs", 1, "--output", run).report
    assert report["num_images"] == 9


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--val-fraction 0.2"),
        (["--val-fraction", "1"], "--val-fraction must be below 1"),
        ([*FRACTION, "--val-split", "none"], "leave out --val-split none"),
        (["--split-seed", "1"], "--split-seed has no effect without --val-fraction"),
        ([*FRACTION, "--val-split", "train"], "--val-split train is the split that"),
    ],
)
def test_a_wrong_split_is_one_line_that_names_the_flag(
    run_cli: Run, finetune_flags: list[str], classes_only: Path, flags: list[str], message: str
) -> None:
    result = run_cli(*on(classes_only, finetune_flags), *flags)
    assert (result.code, result.stderr.count("\n")) == (2, 1)
    assert message in result.stderr


def test_a_fraction_beside_a_validation_split_is_an_error(
    run_cli: Run, finetune_flags: list[str]
) -> None:
    result = run_cli(*finetune_flags, *FRACTION)
    assert (result.code, result.stderr.count("\n")) == (2, 1)
    assert "has a split val, which --val-fraction would not use" in result.stderr


# --- a validation split with fewer classes ----------------------------------------------------


@pytest.fixture
def fewer(own_data: Path) -> Path:
    """A tree whose validation split has no image of the first class."""
    shutil.rmtree(own_data / "val" / "ants")
    return own_data


def test_a_validation_split_may_have_fewer_classes(
    done: Run,
    finetune_flags: list[str],
    precompute_flags: list[str],
    distill_flags: list[str],
    fewer: Path,
    teacher_dirs: dict[str, Path],
    tmp_path: Path,
    data_dir: Path,
) -> None:
    words = ["--checkpoint", teacher_dirs["test_resnet"], "--workers", 0]
    table: Any = tmp_path / "classes.json"
    part = done("evaluate", "--data-dir", fewer, *words, "--results-file", table)
    assert "warning: split val of " in part.stderr
    assert "no image of 1 class (ants)" in part.stderr
    found = {row["class"]: row for row in json.loads(table.read_text())["per_class"]}
    done("evaluate", "--data-dir", data_dir, *words, "--results-file", table)
    whole = {row["class"]: row for row in json.loads(table.read_text())["per_class"]}
    assert found == whole | {"ants": whole["ants"] | {"images": 0, "correct": 0, "top1": 0.0}}

    done(*on(fewer, finetune_flags), "--output", tmp_path / "tuned")
    labels = tmp_path / "labels"
    done(*on(fewer, precompute_flags), "--output", labels)
    done("labels", "verify", labels, "--data-dir", fewer)
    report = done(*on(fewer, distill_flags), "--labels", labels, "--output", tmp_path / "run")
    assert report.report["num_images"] == 10
    assert "agreement" in report.report  # with the teachers' labels, so the ids agree


def test_a_class_that_training_does_not_have_is_an_error(
    run_cli: Run, finetune_flags: list[str], own_data: Path
) -> None:
    shutil.rmtree(own_data / "train" / "bees")
    result = run_cli(*on(own_data, finetune_flags))
    assert result.code == 2
    assert "different classes from the training data: bees; the training data has ants, cats" in (
        result.stderr
    )


# --- a table --------------------------------------------------------------------------------------


@pytest.fixture
def table(own_data: Path) -> Path:
    """A table of the training images, without a column of splits."""
    source = ImageFolder(own_data, "train")
    lines = [f"train/{key},{key.split('/')[0]}\n" for key in source.keys]
    (own_data / "list.csv").write_text("".join(["path,class\n", *lines]))
    return own_data / "list.csv"


def test_a_table_is_labelled_and_learned(
    done: Run, precompute_flags: list[str], distill_flags: list[str], table: Path, tmp_path: Path
) -> None:
    labels = tmp_path / "labels"
    done(*on(table, precompute_flags), *FRACTION, "--output", labels)
    report = done(
        *on(table, distill_flags), "--labels", labels, "--output", tmp_path / "run"
    ).report
    assert report["num_images"] == 9


def test_an_image_in_both_splits_of_a_table_is_an_error(
    run_cli: Run, finetune_flags: list[str], own_data: Path
) -> None:
    rows = [f"train/ants/{n:02d}.jpg,ants,{split}\n" for n in (0, 1) for split in ("train", "val")]
    (own_data / "list.csv").write_text("".join(["path,class,split\n", *rows]))
    result = run_cli(*on(own_data / "list.csv", finetune_flags))
    assert result.code == 2
    assert "lists 2 images for train and for val, which would" in result.stderr


def test_a_wrong_table_is_one_line(
    run_cli: Run, finetune_flags: list[str], table: Path, tmp_path: Path
) -> None:
    with table.open("a") as file:
        file.write("../x.jpg,ants\n")
    for path, flags, message in (
        (table, FRACTION, "line 38: '../x.jpg' is not a path in"),
        (table, [], "no row of the split val (splits: train); hold out"),
        (table, [*FRACTION, "--val-split", "x", "--train-split", "y"], "no row of the split y"),
        (tmp_path / "none.csv", [], "no file"),
    ):
        result = run_cli(*on(path, finetune_flags), *flags)
        assert (result.code, result.stderr.count("\n")) == (2, 1), result.stderr
        assert message in result.stderr
