"""pipeline.foresight: `distill --dry-run` says what a run takes, and writes nothing."""

from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Result

Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def short_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.measuring.SAMPLE_SECONDS", 0.2)


@pytest.fixture
def distill_flags(data_dir: Path, student_dir: Path) -> list[object]:
    flags = ["distill", "--data-dir", data_dir, "--model", "test_resnet", "--workers", 0]
    return [*flags, "--initial-checkpoint", student_dir, "--epochs", 5, "--batch-size", 8]


@pytest.mark.parametrize("source", ["labels", "online"])
@pytest.mark.parametrize("views_per_image", [1, 2])
def test_dry_run_says_the_steps_of_the_run_and_writes_nothing(
    done: Run,
    distill_flags: list[object],
    labels_dir: Path,
    teacher_flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    views_per_image: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    who = ["--labels", labels_dir]
    if source == "online":
        who = ["--online", *teacher_flags, "--img-size", 32]
    flags = [*distill_flags, *who, "--views-per-image", views_per_image]

    result = done(*flags, "--dry-run")

    assert list(tmp_path.iterdir()) == []
    told = result.report
    assert told["dry_run"] is True
    assert told["steps"] == done(*flags, "--val-split", "none").report["steps"]
    assert told["seconds"] == pytest.approx(told["steps"] * told["seconds_per_step"], abs=0.1)
    assert told["peak_bytes"] > 0
    assert told["limit"] in ("reading images", "the networks")
    assert f"{told['steps']} steps of 8 views, about " in result.stderr
    assert f"{told['limit']} limits it" in result.stderr


def test_dry_run_leaves_a_label_set_alone_that_teachers_would_add_to(
    done: Run,
    distill_flags: list[object],
    labels_dir: Path,
    teacher_flags: list[str],
    contents: Callable[[Path], dict[str, bytes]],
) -> None:
    before = contents(labels_dir)
    taught = ["--missing", "teach", *teacher_flags, "--write-back"]
    done(*distill_flags, "--labels", labels_dir, *taught, "--dry-run")
    assert contents(labels_dir) == before


def test_dry_run_of_a_run_to_resume_is_refused(run_cli: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    result = run_cli("distill", "--resume", tmp_path, "--dry-run")
    assert result.code == 2
    assert result.stderr.count("\n") == 1
    assert "dry-run" in result.stderr
