"""pipeline.demo: the whole story, shortened; what is finished is kept; the interval."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mealv2.errors import ConfigError
from mealv2.images import ImageFolder
from pipeline import demo
from pipeline.config import DemoConfig


@pytest.fixture
def short_story(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same story with small teachers, one epoch a run."""
    monkeypatch.setattr(demo, "TEACHERS", ("test_efficientnet", "test_resnet"))
    for name in ("TEACHER_EPOCHS", "START_EPOCHS"):
        monkeypatch.setattr(demo, name, 1)
    monkeypatch.setattr(demo, "EPOCHS", 2)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo.write_digits(tmp_path_factory.mktemp("digits") / "data")


def test_digits_are_the_real_scans_split_without_overlap(digits: Path) -> None:
    splits = [ImageFolder(digits, name) for name in ("teacher-train", "train", "val")]
    assert [len(split) for split in splits] == [1000, 150, 647]
    assert all(split.classes == [str(d) for d in range(10)] for split in splits)
    assert len({Path(key).name for split in splits for key in split.keys}) == 1797


def test_story_ends_with_its_table_and_keeps_what_is_finished(
    short_story: None, run_cli: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "demo"
    first = run_cli("demo", "--output", out)
    assert first.code == 0, first.stderr
    for row in ("ensemble", "at start", "hard-label control", "distilled", "label set:", "time:"):
        assert row in first.stderr
    runs = {path: path.stat().st_mtime_ns for path in out.rglob("model.safetensors")}

    second = run_cli("demo", "--output", out, "--seeds", 2)

    assert second.code == 0, second.stderr
    assert second.report["distilled"][0] == first.report["distilled"][0]
    assert len(second.report["distilled"]) == len(second.report["control"]) == 2
    assert "teachers kept, labels kept" in second.stderr
    assert {path: path.stat().st_mtime_ns for path in runs} == runs
    low, high = second.report["interval_95"]
    assert low <= second.report["difference"] <= high


def test_arms_share_start_schedule_and_data(
    short_story: None, run_cli: Callable[..., Any], tmp_path: Path
) -> None:
    import json

    out = tmp_path / "demo"
    assert run_cli("demo", "--output", out).code == 0
    control, distilled = (
        json.loads((out / "seed-0" / arm / "config.json").read_text())
        for arm in ("hard-labels", "distilled")
    )
    differing = {k for k in control.keys() & distilled.keys() if control[k] != distilled[k]}
    assert differing == set()


def test_folder_of_another_story_is_refused(
    short_story: None, run_cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "demo"
    assert run_cli("demo", "--output", out).code == 0
    monkeypatch.setattr(demo, "EPOCHS", 3)
    result = run_cli("demo", "--output", out)
    assert result.code in (2, 3)
    assert "another" in result.stderr


def test_interval_is_students_t() -> None:
    values = [0.4, 1.1, -0.2, 0.7, 0.9]
    # mean 0.58, sample sd 0.5070, t(0.975, 4) = 2.776445
    half = 2.776445 * np.std(values, ddof=1) / np.sqrt(5)
    between = demo.interval(values)
    assert between == pytest.approx((0.58 - half, 0.58 + half), rel=1e-5)
    assert demo.interval([1.0]) is None


def test_without_scikit_learn_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match=r"mealv2\[demo\]"):
        demo.run(DemoConfig(output=tmp_path / "demo"))
