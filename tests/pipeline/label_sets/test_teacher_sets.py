"""precompute --store per-teacher: a label set of each teacher, whose mean is the ensemble's set."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import stored
from conftest import Result
from mealv2.label_set import LabelSet

Run = Callable[..., Result]
DENSE = ("--topk", "all", "--label-dtype", "float32", "--store-logits")


@pytest.fixture(scope="module")
def sets(
    done: Run, label: Callable[..., list[object]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("sets") / "labels"
    report = done(*label(*DENSE, "--store", "per-teacher"), "--output", out).report
    assert [each["labels"] for each in report["teachers"]] == [
        str(out / name) for name in ("teacher-0", "teacher-1")
    ]
    return out


def test_merged_sets_are_the_set_of_the_ensemble(
    done: Run, label: Callable[..., list[object]], sets: Path, tmp_path: Path
) -> None:
    done(*label(*DENSE), "--output", tmp_path / "ensemble")
    done("labels", "merge", sets, "--output", tmp_path / "mean", *DENSE)
    merged, expected = (LabelSet.open(tmp_path / name) for name in ("mean", "ensemble"))
    keys, views = list(stored.rows_of(tmp_path / "mean")), [0]
    keys = sorted({key for key, _ in keys})
    rows, of_ensemble = (each.rows(keys, views * len(keys)) for each in (merged, expected))
    torch.testing.assert_close(rows.labels.to_dense(), of_ensemble.labels.to_dense())
    assert rows.logits is not None
    assert of_ensemble.logits is not None
    # mean logits are float16
    torch.testing.assert_close(
        rows.logits.values_NK.float(), of_ensemble.logits.values_NK.float(), rtol=2e-3, atol=2e-3
    )


def test_each_set_has_one_teacher_and_is_kept_by_a_second_run(
    done: Run, label: Callable[..., list[object]], sets: Path, teacher_dirs: dict[str, Path]
) -> None:
    names = [stored.manifest_of(sets / f"teacher-{n}")["plan"]["teachers"] for n in (0, 1)]
    assert [len(each) for each in names] == [1, 1]
    assert [each[0]["model"].partition(".")[0] for each in names] == list(teacher_dirs)
    report = done(*label(*DENSE, "--store", "per-teacher"), "--output", sets).report
    assert [each["shards_made"] for each in report["teachers"]] == [0, 0]


def test_missing_set_is_noticed_and_made_again(
    run_cli: Run, label: Callable[..., list[object]], sets: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "labels"
    shutil.copytree(sets, copy)
    shutil.rmtree(copy / "teacher-1")
    result = run_cli("labels", "merge", copy, "--output", tmp_path / "mean")
    assert result.code == 3
    assert f"{copy / 'teacher-1'} is missing; run `mealv2 precompute" in result.stderr
    report = run_cli(*label(*DENSE, "--store", "per-teacher"), "--output", copy).report
    assert [each["shards_made"] > 0 for each in report["teachers"]] == [False, True]


def test_folder_of_other_teachers_or_files_is_an_error(
    run_cli: Run,
    label: Callable[..., list[object]],
    sets: Path,
    tmp_path: Path,
    teacher_dirs: dict[str, Path],
) -> None:
    one = label(*DENSE, "--store", "per-teacher", teachers=list(teacher_dirs)[:1])
    result = run_cli(*one, "--output", sets)
    assert result.code == 2
    assert "has the labels of other teachers" in result.stderr
    (tmp_path / "notes.txt").touch()
    result = run_cli(*one, "--output", tmp_path)
    assert result.code == 2
    assert "not empty (notes.txt, …)" in result.stderr


def test_store_per_teacher_needs_a_folder(run_cli: Run, label: Callable[..., list[object]]) -> None:
    result = run_cli(*label("--store", "per-teacher"), "--output", "s3://bucket/labels")
    assert result.code == 2
    assert result.stderr == "mealv2: --store per-teacher needs a local --output\n"


def test_one_set_cannot_be_merged(run_cli: Run, sets: Path, tmp_path: Path) -> None:
    result = run_cli("labels", "merge", sets / "teacher-0", "--output", tmp_path / "mean")
    assert result.code == 2
    assert "give two label sets or more, or a folder of --store per-teacher" in result.stderr


def test_damaged_index_is_an_error(run_cli: Run, sets: Path, tmp_path: Path) -> None:
    copy = tmp_path / "labels"
    shutil.copytree(sets, copy)
    (copy / "teachers.json").write_text('{"teachers": 3}')
    result = run_cli("labels", "merge", copy, "--output", tmp_path / "mean")
    assert result.code == 3
    assert f"{copy / 'teachers.json'} is damaged" in result.stderr
