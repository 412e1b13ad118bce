"""benchmarks/rates.py: what its students differ in, and a short run on drawn pictures."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import rates
from benchmarks.experiments import differences
from mealv2.errors import ConfigError
from pipeline.config import DemoConfig
from pipeline.demo import parts


def test_students_differ_in_their_label_set_only() -> None:
    rows = {row.name: row for row in rates.Demo(Path("demo"), Path("out"), 4).rows()}
    assert rows.keys() == rates.SETS.keys()
    for row in rows.values():
        if row.reference:
            other = rows[row.reference].result(2)
            assert differences(row.result(2), other).keys() == {"labels"}
    assert rows["rate-0.001"].reference == "dense"


def test_the_student_has_the_settings_of_the_demo() -> None:
    mine = rates.Demo(Path("demo"), Path("out"), parts.EPOCHS).rows()[0].result(4).as_json()
    config = DemoConfig(output=Path("demo"), seed=4, seeds=1)
    of_demo = {part.name: part.config for part in parts.plan_parts(config)}
    theirs = of_demo[parts.run_name(4, parts.SOFT)].as_json()
    shown = {"labels", "output", "log_interval", "log_weights", "val_interval", "checkpoint_hist"}
    found = {name for name, value in theirs.items() if mine[name] != value}
    assert found <= shown | {"device", "workers"}


@pytest.fixture
def demo_dir(
    data_dir: Path, make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder as `mealv2 demo` leaves it, with other images and small teachers."""
    teachers = ("test_efficientnet", "test_resnet")
    monkeypatch.setattr(rates, "TEACHERS", teachers)
    folder = tmp_path / "demo"
    (folder / "seed-3").mkdir(parents=True)
    (folder / "data").symlink_to(data_dir)
    for seed, name in enumerate(teachers):
        shutil.copytree(make_model(name, seed=seed, steps=8), folder / f"teacher-{name}")
    shutil.copytree(make_model(parts.STUDENT, seed=9), folder / "seed-3" / "start")
    return folder


def test_a_seed_without_a_start_is_an_error(demo_dir: Path) -> None:
    demo = rates.Demo(demo_dir, Path("out"), 2)
    assert demo.seeds(1) == [3]
    with pytest.raises(ConfigError, match="has the starts of 1 seeds, 2 are needed"):
        demo.seeds(2)


@pytest.mark.slow
def test_drawn_pictures_give_the_tables_of_labels_and_students(
    demo_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [demo_dir, "--output", tmp_path / "out", "--epochs", 2, "--seeds", 1]
    words += ["--rows", "rate-0.001", "top-1", "rate-0.001-logits"]
    printed = []
    for _ in range(2):  # the second time all runs are kept
        rates.main([os.fspath(word) if isinstance(word, Path) else str(word) for word in words])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    lines = (tmp_path / "out" / "rates.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line]
    labels, students = cells[2:7], cells[9:]
    titles = ["dense", "rate 0.001", "top-1", "dense, logits", "rate 0.001, logits"]
    assert [row[0] for row in labels] == [row[0] for row in students] == titles
    assert labels[0][1:] == ["all classes, float32", "12.00", "0.00000", "0.0000"]
    assert float(labels[1][2]) < 12.0
    assert 0.0 < float(labels[1][3]) < float(labels[2][3])
    of_dense, of_rate = students[0], students[1]
    assert (of_dense[3], of_dense[5], of_dense[7]) == ("", "", "")
    assert float(of_rate[7]) == pytest.approx(float(of_rate[6]) - float(of_dense[6]), abs=2e-4)
    assert float(of_rate[7]) != 0.0
