"""benchmarks/rates.py, shortened: its tables, and that they come out the same again."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import rates
from pipeline.demo import parts


@pytest.fixture
def demo_dir(
    data_dir: Path, make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder as `mealv2 demo` leaves it, with other images and small teachers."""
    teachers = ("test_efficientnet", "test_resnet")
    monkeypatch.setattr(rates, "TEACHERS", teachers)
    folder = tmp_path / "demo"
    (folder / "seed-0").mkdir(parents=True)
    (folder / "data").symlink_to(data_dir)
    for seed, name in enumerate(teachers):
        shutil.copytree(make_model(name, seed=seed, steps=8), folder / f"teacher-{name}")
    shutil.copytree(make_model(parts.STUDENT, seed=9), folder / "seed-0" / "start")
    return folder


def rows(text: str) -> list[list[str]]:
    """Return the cells of the tables that were printed, heads and rules left out."""
    lines = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


@pytest.mark.slow
def test_quick_run_prints_every_table_and_the_same_again(
    demo_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = ["dense", "rate-0.001", "dense-float16", "rate-0.001-logits", "top-3-d-off"]
    printed = []
    for name in ("first", "second"):
        words = ["--demo", demo_dir, "--out", tmp_path / name, "--quick", "--arms", *arms]
        rates.main([os.fspath(word) for word in words])
        printed.append(rows(capsys.readouterr().out))

    found = printed[0]
    assert found == printed[1]
    head, dense, rate, rounded, dense_logits, rate_logits = found[:6]
    assert head[:3] == ["labels", "bytes a view", "mean k"]
    assert dense[0] == "all classes, float32"
    assert " ".join(dense[1:]) == "12.00 3.00 100.0 0.00000 0.0000 0.00000"
    assert dense_logits == ["all classes, float32, with logits", "18.00", *dense[2:]]
    assert (rate[0], rate_logits[0]) == ("rate 0.001", "rate 0.001, with logits")
    assert float(rate[1]) < 12.0
    assert 0.0 < float(rate[4]) < 0.1
    assert rounded[:3] == ["all classes, float16", "6.00", "3.00"]
    assert found[6][0] == "top-3, curve"
    titles = [row[0] for row in found[1:6]]
    students = [*titles, "all classes, float32; D off", "top-3, curve; D off"]
    assert [row[0] for row in found[8:15]] == students
    assert [row[-1] for row in found[8:15]][-2:] == ["", ""]
    assert [row[0] for row in found[16:]] == [rate[0], rounded[0], rate_logits[0], students[-1]]
