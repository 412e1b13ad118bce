"""pipeline.training.dry_run: estimates what a run takes by its real steps, and writes nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cases import mostly_slow
from conftest import Result
from mealv2.task import DistillTask

Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def short_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.timing.SAMPLE_SECONDS", 0.2)


@pytest.fixture
def distill_flags(data_dir: Path, student_dir: Path) -> list[object]:
    flags = ["distill", "--data-dir", data_dir, "--model", "test_resnet", "--workers", 0]
    return [*flags, "--initial-checkpoint", student_dir, "--epochs", 5, "--batch-size", 8]


@pytest.mark.parametrize("source", mostly_slow(["labels", "online"]))
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
    assert f"limit: {told['limit']}" in result.stderr


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
    (tmp_path / "config.json").write_text('{"data_dir": "d", "labels": "l", "model": "m"}')
    result = run_cli("distill", "--resume", tmp_path, "--dry-run")
    assert result.code == 2
    assert result.stderr.count("\n") == 1
    assert "dry-run" in result.stderr


@pytest.fixture
def seen_rows(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """What the task sees of each micro-batch: how many rows, and whether they are mixed."""
    seen: list[tuple[int, bool]] = []
    forward = DistillTask.forward

    def recording(self: DistillTask, images: Any, targets: Any, mixture: Any = None) -> Any:
        seen.append((len(images), mixture is not None))
        return forward(self, images, targets, mixture)

    monkeypatch.setattr(DistillTask, "forward", recording)
    return seen


def test_dry_run_feeds_the_student_what_the_run_does(
    done: Run,
    distill_flags: list[object],
    labels_dir: Path,
    seen_rows: list[tuple[int, bool]],
) -> None:
    """Memory depends on it: 4 micro-batches of 2 mixed views, not one of 8 that are not."""
    flags = [*distill_flags, "--labels", labels_dir, "--grad-accum-steps", 4, "--epochs", 1]
    flags += ["--cutmix-target", "mixed-labels", "--val-split", "none"]
    done(*flags)
    of_run = set(seen_rows)
    seen_rows.clear()
    done(*flags, "--dry-run")
    assert set(seen_rows) == of_run
    assert (2, True) in of_run


@pytest.mark.parametrize("flag", [["--dry-run"], []])
def test_dry_run_compiles_as_the_run_does(
    done: Run,
    distill_flags: list[object],
    labels_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    flag: list[str],
) -> None:
    sizes: list[int] = []

    def compiled(network: Any, **_: Any) -> Any:
        def call(images: Any) -> Any:
            sizes.append(len(images))
            return network(images)

        return call

    monkeypatch.setattr("torch.compile", compiled)
    flags = [*distill_flags, "--labels", labels_dir, "--grad-accum-steps", 2, "--epochs", 1]
    done(*flags, "--compile", "default", "--val-split", "none", *flag)
    assert set(sizes) == {4}
