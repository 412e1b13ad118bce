"""Flags of the views: what a label set keeps of them, and that everything after it follows."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch

import stored
from conftest import Result
from mealv2 import SoftLabelDataset
from mealv2.label_set import LabelSet
from mealv2.view_recipe import ViewRecipe
from mealv2.views import DrawnViews

Run = Callable[..., Result]

PAD = ("--crop", "pad", "--padding", 3, "--vflip", 0.25, "--interpolation", "bicubic")

ERASED = ("--reprob", 0.5, "--remode", "pixel", "--recount", 2)
AUGMENTED = ("--aa", "rand-m9-n2-mstd0.5-inc1", *ERASED)


@pytest.fixture(scope="module")
def pad_dir(
    done: Run, precompute_flags: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A label set of padded crops. Not to be changed."""
    out = tmp_path_factory.mktemp("pad") / "set"
    done(*precompute_flags, *PAD, "--output", out)
    return out


def test_manifest_has_each_parameter_of_the_views(pad_dir: Path) -> None:
    plan = stored.manifest_of(pad_dir)["plan"]
    assert plan["roles"]["train"]["views"] == {
        "name": "padded-crop",
        "version": 1,
        "hash": "blake2b-512",
        "padding": 3,
        "flip_probability": 0.5,
        "vertical_flip_probability": 0.25,
        "seed": 7,
    }
    assert plan["interpolation"] == "bicubic, antialias (torch)"
    recipe = ViewRecipe(crop="pad", padding=3, vflip=0.25)
    assert LabelSet.open(pad_dir).views() == DrawnViews(7, recipe)


def test_padded_shards_are_byte_equal_for_any_number_of_workers_and_verify(
    done: Run,
    precompute_flags: list[str],
    pad_dir: Path,
    tmp_path: Path,
    contents: Callable[[Path], dict[str, bytes]],
) -> None:
    done(*precompute_flags, *PAD, "--workers", 2, "--output", tmp_path / "set")
    assert contents(tmp_path / "set") == contents(pad_dir)
    done("labels", "verify", pad_dir)


def test_a_set_of_other_views_is_not_continued(
    run_cli: Run, precompute_flags: list[str], pad_dir: Path
) -> None:
    result = run_cli(*precompute_flags, *PAD, "--padding", 2, "--output", pad_dir)
    assert result.code == 3
    assert "padding" in result.stderr


def test_stage_two_takes_the_views_of_the_set(
    done: Run, run_cli: Run, distill_flags: list[str], pad_dir: Path, tmp_path: Path
) -> None:
    words = [*distill_flags, "--labels", pad_dir]
    done(*words, "--output", tmp_path / "whole")
    for flag, value in (("--crop", "pad"), ("--vflip", 0.25), ("--hflip", 0.5)):
        result = run_cli(*words, flag, value, "--output", tmp_path / "run")
        assert result.code == 2
        assert f"{flag} has no effect with --labels" in result.stderr
    result = run_cli(*words, "--interpolation", "bilinear", "--output", tmp_path / "run")
    assert result.code == 2
    assert "were resized with the bicubic filter" in result.stderr


@pytest.fixture(scope="module")
def augmented_dir(
    done: Run, precompute_flags: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A label set with RandAugment and random erasing. Not to be changed."""
    out = tmp_path_factory.mktemp("augmented") / "set"
    done(*precompute_flags, *AUGMENTED, "--output", out)
    return out


def test_augmented_shards_are_byte_equal_for_any_number_of_workers_and_verify(
    done: Run,
    precompute_flags: list[str],
    labels_dir: Path,
    augmented_dir: Path,
    tmp_path: Path,
    contents: Callable[[Path], dict[str, bytes]],
) -> None:
    for workers in (1, 2):
        out = tmp_path / str(workers)
        done(*precompute_flags, *AUGMENTED, "--workers", workers, "--output", out)
        assert contents(out) == contents(augmented_dir)
    done("labels", "verify", augmented_dir)
    assert stored.rows_of(augmented_dir) != stored.rows_of(labels_dir)
    entry = stored.manifest_of(augmented_dir)["plan"]["roles"]["train"]["views"]
    text = "rand-m9-n2-mstd0.5-inc1"
    parameters = {"m": 9, "n": 2, "p": 0.5, "mstd": 0.5, "mmax": 10, "inc": 1}
    assert entry["rand_augment"] == {"text": text, **parameters}
    erasing = {"probability": 0.5, "mode": "pixel", "max_count": 2}
    assert entry["random_erasing"].items() >= erasing.items()
    assert "color_jitter" not in entry


def test_training_on_augmented_views_resumes_to_the_bit(
    done: Run,
    distill_flags: list[str],
    augmented_dir: Path,
    tmp_path: Path,
    weights: Callable[[Path], dict[str, bytes]],
) -> None:
    words = [*distill_flags, "--labels", augmented_dir, "--val-split", "none"]
    words += ["--sched", "constant"]
    done(*words, "--epochs", 2, "--output", tmp_path / "straight")
    done(*words, "--epochs", 1, "--output", tmp_path / "resumed")
    assert weights(tmp_path / "resumed") != weights(tmp_path / "straight")
    done("distill", "--resume", tmp_path / "resumed", "--epochs", 2)
    assert weights(tmp_path / "resumed") == weights(tmp_path / "straight")


def test_augmented_views_are_those_that_were_labelled(
    data_dir: Path, labels_dir: Path, augmented_dir: Path
) -> None:
    dataset, plain = (SoftLabelDataset(folder, data_dir) for folder in (augmented_dir, labels_dir))
    assert dataset.notes == []
    differ = [
        not torch.equal(dataset[i, view][0], plain[i, view][0])
        for i in range(len(dataset))
        for view in range(dataset.label_set.num_views)
    ]
    # a half is erased, and three quarters of the others have at least one operation
    assert 0.6 < sum(differ) / len(differ) < 1


def test_other_pixels_of_another_library_are_named(
    done: Run,
    run_cli: Run,
    precompute_flags: list[str],
    distill_flags: list[str],
    augmented_dir: Path,
    tmp_path: Path,
) -> None:
    other = Path(shutil.copytree(augmented_dir, tmp_path / "other"))
    stored.signed_again(other, lambda plan, splits: plan.update(operations_sha256="0" * 64))
    result = done(*distill_flags, "--labels", other, "--output", tmp_path / "run")
    assert f"the pixels of the views of {other} were changed by timm " in result.stderr
    result = run_cli(*precompute_flags, *AUGMENTED, "--output", other)
    assert result.code == 3
    assert "another version of timm or Pillow" in result.stderr
    result = run_cli("labels", "merge", augmented_dir, other, "--output", tmp_path / "merged")
    assert result.code == 3
    assert "operations_sha256" in result.stderr


def test_other_views_train_online_and_from_class_ids(
    done: Run,
    data_dir: Path,
    student_dir: Path,
    teacher_flags: list[str],
    tmp_path: Path,
    weights: Callable[[Path], dict[str, bytes]],
) -> None:
    small: list[object] = ["--data-dir", data_dir, "--img-size", 32, "--workers", 0]
    start: list[object] = ["--model", "test_resnet", "--initial-checkpoint", student_dir]
    train = [*small, *start, "--epochs", 1, "--batch-size", 12]
    found = set()
    for number, flags in enumerate([(), PAD, ("--color-jitter", 0.4, *ERASED)]):
        for command in (["finetune"], ["distill", "--online", *teacher_flags]):
            run = tmp_path / f"{command[0]}-{number}"
            done(*command, *train, *flags, "--output", run)
            found.add(b"".join(weights(run).values()))
    assert len(found) == 6


def test_padded_views_are_exported_without_boxes_and_not_to_fkd(
    done: Run, run_cli: Run, pad_dir: Path, tmp_path: Path
) -> None:
    words = ["labels", "export", pad_dir, "--to"]
    done(*words, "parquet", "--output", tmp_path / "table")
    names = pyarrow.parquet.read_schema(next((tmp_path / "table").glob("*.parquet"))).names
    assert "key" in names
    assert not [name for name in names if name.startswith("box_")]
    flags = ("--label-type", "marginal_smoothing_k2", "--output", tmp_path / "fkd")
    result = run_cli(*words, "fkd", *flags)
    assert result.code == 3
    assert "more than a box and a left-right flip (padded-crop)" in result.stderr


def test_a_damaged_recipe_is_one_line(
    run_cli: Run, distill_flags: list[str], pad_dir: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(pad_dir, tmp_path / "other"))

    def damage(plan: dict[str, Any], splits: Any) -> None:
        plan["roles"]["train"]["views"]["padding"] = [1, {"a": 2}]

    stored.signed_again(other, damage)
    result = run_cli(*distill_flags, "--labels", other, "--output", tmp_path / "run")
    assert result.code == 3
    assert result.stderr.splitlines()[-1].startswith(f"mealv2: {other} labels views of the recipe")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--crop", "pad", "--scale", 0.5, 1), "--scale has no effect with --crop pad"),
        (("--padding", 4), "--padding has no effect without --crop pad"),
        (("--scale", 0.5, 0.1), "--scale must be 0 < MIN <= MAX <= 1, got 0.5 0.1"),
        (("--aa", "v0"), "--aa must be like rand-m9-n2-mstd0.5, got 'v0': of timm's policies only"),
        (("--aa", "rand-m9-n99"), "n 1 to 16"),
        (("--color-jitter", -1), "--color-jitter must be 0 to 10, got -1"),
        (("--aa", "rand-m9", "--color-jitter", 0.4), "--color-jitter has no effect with --aa"),
        (("--remode", "pixel"), "--remode has no effect without --reprob"),
        (("--reprob", 0.5, "--recount", 0), "--recount must be 1 to 16, got 0"),
        (("--hflip", 2), "--hflip must be 0 to 1, got 2"),
        (("--crop", "center", "--hflip", 0), "all views of an image are equal"),
    ],
)
def test_view_flags_that_cannot_be_are_refused(
    run_cli: Run, precompute_flags: list[str], tmp_path: Path, flags: Any, message: str
) -> None:
    result = run_cli(*precompute_flags, *flags, "--output", tmp_path / "set")
    assert result.code == 2
    assert message in result.stderr


def test_small_images_get_a_proposal_and_nothing_else_changes(
    done: Run,
    finetune_flags: list[str],
    tmp_path: Path,
    weights: Callable[[Path], dict[str, bytes]],
) -> None:
    words = [*finetune_flags, "--epochs", 1]
    plain = done(*words, "--output", tmp_path / "plain")
    (line,) = (line for line in plain.stderr.splitlines() if "--crop pad" in line)
    assert line.startswith("image ")
    chosen = done(*words, "--crop", "rrc", "--output", tmp_path / "chosen")
    assert "--crop pad" not in chosen.stderr
    assert weights(tmp_path / "chosen") == weights(tmp_path / "plain")
