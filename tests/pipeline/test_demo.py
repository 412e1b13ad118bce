"""pipeline.demo: the whole story, shortened; what is finished is kept; the interval."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mealv2.data.folder import ImageFolder
from mealv2.errors import ConfigError
from pipeline import demo
from pipeline.config import DemoConfig


@pytest.fixture(scope="module")
def short_demo() -> Iterator[None]:
    """The demo with small teachers, one or two epochs a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "TEACHERS", ("test_efficientnet", "test_resnet"))
        patch.setattr(demo, "TEACHER_EPOCHS", 1)
        patch.setattr(demo, "START_EPOCHS", 1)
        patch.setattr(demo, "EPOCHS", 2)
        yield


@pytest.fixture(scope="module")
def finished(
    short_demo: None, run_cli: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any]:
    """Return (folder, result) of one finished demo."""
    out = tmp_path_factory.mktemp("story") / "demo"
    return out, run_cli("demo", "--output", out)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo.write_digits(tmp_path_factory.mktemp("digits") / "data")


def test_digits_are_the_real_scans_split_without_overlap(digits: Path) -> None:
    splits = [ImageFolder(digits, name) for name in ("teacher-train", "train", "val")]
    assert [len(split) for split in splits] == [1000, 150, 647]
    assert all(split.classes == [str(d) for d in range(10)] for split in splits)
    assert len({Path(key).name for split in splits for key in split.keys}) == 1797


@pytest.mark.slow
def test_story_ends_with_its_table_and_keeps_what_is_finished(
    finished: tuple[Path, Any], run_cli: Callable[..., Any]
) -> None:
    out, first = finished
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


@pytest.mark.slow
def test_arms_share_start_schedule_and_data(finished: tuple[Path, Any]) -> None:
    out, _ = finished
    control, distilled = (
        json.loads((out / "seed-0" / arm / "config.json").read_text())
        for arm in ("hard-labels", "distilled")
    )
    # these the label set says, and the command cannot
    of_labels = {"train_split", "img_size", "view_seed", "exact_pil"}
    assert all(distilled[name] is None for name in of_labels)
    shared = (control.keys() & distilled.keys()) - of_labels
    assert {name for name in shared if control[name] != distilled[name]} == set()
    labels = json.loads((out / "labels" / "plan.json").read_text())
    plan = labels["roles"]["train"]
    assert (control["train_split"], control["img_size"]) == (plan["split"], labels["img_size"])
    assert (control["num_views"], control["view_seed"]) == (2, plan["views"]["seed"])
    assert plan["num_views"] == 2


@pytest.mark.slow
def test_folder_of_another_story_is_refused(
    finished: tuple[Path, Any], run_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "TEACHER_EPOCHS", 3)
    result = run_cli("demo", "--output", finished[0])
    assert result.code == 2
    assert "other settings" in result.stderr


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
