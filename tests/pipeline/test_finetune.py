"""pipeline.finetune: hard labels teach, and what is learnt is saved with its normalisation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Result
from mealv2.models import create_classifier, read_metadata
from mealv2.storage.weight_files import find_checkpoint
from mealv2.targets import HardLabels, StoredLabels

Run = Callable[..., Result]
Events = Callable[[Path, str], list[dict[str, Any]]]


def test_fine_tuning_learns(
    done: Run, finetune_flags: list[str], run: Path, events: Events
) -> None:
    result = done(*finetune_flags, "--epochs", 6, "--lr", 0.05, "--output", run)
    losses = [event["loss"] for event in events(run, "train")]
    assert sum(losses[-3:]) < 0.3 * sum(losses[:3])
    assert events(run, "validation")[0]["top1"] < 60
    assert result.report["top1"] > 80  # chance: 33
    assert result.report["steps"] == 18


def test_step_0_accuracy_of_the_student_is_said_first(
    done: Run, finetune_flags: list[str], run: Path
) -> None:
    said = done(*finetune_flags, "--output", run).stderr
    assert said.index("student at step 0") < said.index("epoch 1/2")
    assert "teacher" not in said


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Every (image, view) that a run trains on, in order."""
    pairs: list[tuple[int, int]] = []
    for kind in (HardLabels, StoredLabels):

        def recording(
            self: Any,
            positions: Any,
            views: Any,
            *images: Any,
            step: int,
            batch_targets: Any = kind.batch,
        ) -> Any:
            pairs.extend(zip(positions, views, strict=True))
            return batch_targets(self, positions, views, *images, step=step)

        monkeypatch.setattr(kind, "batch", recording)
    return pairs


def test_every_epoch_cuts_a_fresh_view_of_each_image(
    done: Run, finetune_flags: list[str], run: Path, asked: list[tuple[int, int]]
) -> None:
    done(*finetune_flags, "--epochs", 3, "--val-split", "none", "--output", run)
    assert sorted(asked) == [(position, epoch) for position in range(36) for epoch in range(3)]


def test_seed_decides_the_order_of_the_images(
    done: Run, finetune_flags: list[str], tmp_path: Path, asked: list[tuple[int, int]]
) -> None:
    orders = []
    for number, seed in enumerate((3, 3, 4)):
        flags = ["--epochs", 1, "--seed", seed, "--output", tmp_path / str(number)]
        done(*finetune_flags, *flags)
        orders.append([position for position, _ in asked])
        asked.clear()
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert all(sorted(order) == list(range(36)) for order in orders)


def test_with_num_views_it_trains_on_the_views_of_distill_in_the_same_order(
    done: Run,
    finetune_flags: list[str],
    distill_flags: list[str],
    tmp_path: Path,
    asked: list[tuple[int, int]],
) -> None:
    same = ["--epochs", 5, "--batch-size", 8, "--seed", 3, "--val-split", "none"]
    done(*distill_flags, *same, "--output", tmp_path / "distilled")
    by_distill = list(asked)
    asked.clear()
    done(*finetune_flags, *same, "--num-views", 4, "--output", tmp_path / "control")
    assert len(asked) == 5 * 36
    assert asked == by_distill


def test_it_starts_from_the_initial_checkpoint(
    done: Run,
    finetune_flags: list[str],
    student_dir: Path,
    data_dir: Path,
    run: Path,
    events: Events,
) -> None:
    flags = [*finetune_flags, "--initial-checkpoint", student_dir, "--lr", 0.0, "--output", run]
    done(*flags)
    words = ["--data-dir", data_dir, "--checkpoint", student_dir, "--workers", 0, "--json"]
    known = done("evaluate", *words)
    first = events(run, "validation")[0]
    assert first["cross_entropy"] == pytest.approx(known.report["cross_entropy"], rel=1e-6)
    # with --lr 0 the weights stay, to the bit; batch statistics move
    start, end = (
        create_classifier("test_resnet", num_classes=3, checkpoint=find_checkpoint(path))
        for path in (student_dir, run)
    )
    assert all(map(torch.equal, start.parameters(), end.parameters()))


@pytest.mark.parametrize("seed", [0, 1])
def test_seed_decides_the_new_weights(
    done: Run,
    finetune_flags: list[str],
    tmp_path: Path,
    weights: Callable[[Path], dict[str, bytes]],
    seed: int,
) -> None:
    for name, used in (("first", 0), ("second", seed)):
        done(*finetune_flags, "--epochs", 1, "--seed", used, "--output", tmp_path / name)
    same = weights(tmp_path / "first") == weights(tmp_path / "second")
    assert same is (seed == 0)


def test_mean_and_std_are_stored_and_used(
    done: Run, finetune_flags: list[str], data_dir: Path, tmp_path: Path, run: Path
) -> None:
    given = ["--mean", 0.1, 0.2, 0.3, "--std", 0.4, 0.5, 0.6]
    report = done(*finetune_flags, *given, "--output", run).report
    stored = read_metadata(run)
    assert (stored["mean"], stored["std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])

    plain = done(*finetune_flags, "--output", tmp_path / "plain").report
    assert plain["cross_entropy"] != pytest.approx(report["cross_entropy"], rel=1e-3)

    evaluate = ["evaluate", "--data-dir", data_dir, "--checkpoint", run, "--workers", 0, "--json"]
    again = done(*evaluate).report["cross_entropy"]
    assert again == pytest.approx(report["cross_entropy"], rel=1e-6)
    other = done(*evaluate, "--mean", 0.5, 0.5, 0.5, "--std", 0.5, 0.5, 0.5).report
    assert other["cross_entropy"] != pytest.approx(report["cross_entropy"], rel=1e-3)


def test_normalisation_of_the_start_is_kept_by_what_follows(
    done: Run, finetune_flags: list[str], tmp_path: Path
) -> None:
    given = ["--mean", 0.1, 0.2, 0.3, "--std", 0.4, 0.5, 0.6]
    done(*finetune_flags, *given, "--epochs", 1, "--output", tmp_path / "first")
    start = ["--initial-checkpoint", tmp_path / "first"]
    done(*finetune_flags, *start, "--epochs", 1, "--output", tmp_path / "second")
    assert read_metadata(tmp_path / "second")["mean"] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("split", ["train", "val"])
def test_bad_image_stops_training_and_is_named_or_is_skipped(
    run_cli: Run, done: Run, finetune_flags: list[str], own_data: Path, tmp_path: Path, split: str
) -> None:
    bad = own_data / split / "cats" / "01.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    flags = [*finetune_flags, "--data-dir", own_data]
    result = run_cli(*flags, "--output", tmp_path / "stopped")
    assert result.code == 1
    assert str(bad) in result.stderr.splitlines()[-1]

    skipping = ["--on-bad-image", "skip", "--output", tmp_path / "skipped"]
    report = done(*flags, *skipping).report
    assert report["num_images"] == (14 if split == "val" else 15)
    assert report["steps"] == 6


def test_val_split_with_other_classes_is_refused(
    run_cli: Run, finetune_flags: list[str], own_data: Path, run: Path
) -> None:
    (own_data / "val" / "bees").rename(own_data / "val" / "wasps")
    result = run_cli(*finetune_flags, "--data-dir", own_data, "--output", run)
    assert result.code == 2
    assert "training data: wasps; the training data has ants, bees, cats" in result.stderr
    assert not run.exists()


@pytest.mark.parametrize("command", ["finetune", "evaluate"])
def test_split_without_one_readable_image_is_an_error(
    run_cli: Run,
    finetune_flags: list[str],
    own_data: Path,
    student_dir: Path,
    run: Path,
    command: str,
) -> None:
    split = {"finetune": "train", "evaluate": "val"}[command]
    for path in (own_data / split).glob("*/*"):
        path.write_bytes(b"")
    flags = {
        "finetune": [*finetune_flags, "--output", run],
        "evaluate": ["evaluate", "--checkpoint", student_dir, "--workers", 0],
    }[command]
    result = run_cli(*flags, "--data-dir", own_data, "--on-bad-image", "skip")
    assert result.code == 1
    assert result.stderr.splitlines()[-1].startswith("mealv2: ")
