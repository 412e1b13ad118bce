"""mealv2 report reads the images with the data flags of the other commands."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from written_runs import write_run

from mealv2.report.run import open_run
from pipeline.config import ExtraDataConfig
from pipeline.report import per_class
from pipeline.report.label_data import label_data
from pipeline.report.sections import Inputs

Cli = Callable[..., Any]


def test_unlabelled_pictures_of_the_label_set_are_found(
    done: Cli, precompute_flags: list[str], data_dir: Path, tmp_path: Path
) -> None:
    pool, labels = tmp_path / "pool", tmp_path / "labels"
    pool.mkdir()
    shutil.copy(data_dir / "val/ants/00.jpg", pool)
    one_view = ["--num-views", 1, "--val-split", "none"]
    done(*precompute_flags, *one_view, "--extra-data", pool, "--output", labels)
    without = label_data(Inputs((), (), labels, data_dir, tmp_path))
    assert without is not None
    assert "--extra-data" in str(without.no_images)
    found = label_data(
        Inputs((), (), labels, data_dir, tmp_path, ExtraDataConfig(extra_data=(pool,)))
    )
    assert found is not None
    assert found.source is not None
    assert found.no_images is None
    assert "extra/pool/00.jpg" in found.source.keys


def test_the_class_map_orders_the_classes_of_the_validation(data_dir: Path, tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path / "run"))
    names = tmp_path / "names.txt"
    names.write_text("cats\nants\nbees\n")
    plain = per_class.open_validation(run, data_dir, ExtraDataConfig())
    mapped = per_class.open_validation(run, data_dir, ExtraDataConfig(class_map=names))
    assert plain.source.classes == ["ants", "bees", "cats"]
    assert mapped.source.classes == ["cats", "ants", "bees"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--class-map", "x"], "--class-map has no effect without --data-dir"),
        (["--cache-dir", "x"], "--cache-dir has no effect without a URL"),
    ],
)
def test_a_flag_without_its_data_is_refused(
    flags: list[str], message: str, run_cli: Cli, tmp_path: Path
) -> None:
    result = run_cli("report", write_run(tmp_path / "run"), "--output", tmp_path / "out", *flags)
    assert result.code == 2
    assert message in result.stderr
