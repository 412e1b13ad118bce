"""mealv2.batches: several views of an image in a batch, mixed batches."""

import csv
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import mealv2.batches
from conftest import Result
from mealv2.batches import BatchSampler, epoch_order
from mealv2.cutmix import draw_mix
from mealv2.data.folder import ImageFolder
from mealv2.data.loader import read_views
from mealv2.data.requests import centre_requests
from mealv2.data.view_reader import ViewReader
from mealv2.targets import BatchTargets, HardLabels, OnlineTeachers, StoredLabels, Targets
from mealv2.task import DistillTask, HardLabelTask
from pipeline.config import FinetuneConfig

Run = Callable[..., Result]
Events = Callable[[Path, str], list[dict[str, Any]]]
Weights = Callable[[Path], dict[str, bytes]]


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[tuple[int, int]], torch.Tensor]]:
    """What answers were asked for, batch by batch: ((position, view) of every row, pixels)."""
    seen: list[tuple[list[tuple[int, int]], torch.Tensor]] = []

    def record(kind: type) -> None:
        answer = kind.batch

        def recording(
            self: Any,
            positions: Sequence[int],
            views: Sequence[int],
            images: torch.Tensor,
            by_size: Any,
            *,
            step: int,
        ) -> BatchTargets:
            seen.append((list(zip(positions, views, strict=True)), images.clone()))
            return answer(self, positions, views, images, by_size, step=step)

        monkeypatch.setattr(kind, "batch", recording)

    record(StoredLabels)
    record(OnlineTeachers)
    return seen


@pytest.fixture
def learned(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, Any]]:
    """What the task was given, batch by batch: (pixels, the mixture or None)."""
    seen: list[tuple[torch.Tensor, Any]] = []
    forward = DistillTask.forward

    def recording(
        self: DistillTask, images: torch.Tensor, answer: BatchTargets, mixture: Any = None
    ) -> Any:
        seen.append((images.clone(), mixture))
        return forward(self, images, answer, mixture)

    monkeypatch.setattr(DistillTask, "forward", recording)
    return seen


# --- the requests of a pass ---------------------------------------------------------------------


class Leaving(Targets):
    """View e in epoch e, but every third image has none in odd epochs."""

    def view(self, key: str, epoch: int) -> int | None:
        return None if epoch % 2 and int(key[-6:-4]) % 3 == 0 else epoch


def sampler(data_dir: Path, targets: Targets, **values: Any) -> BatchSampler:
    source = ImageFolder(data_dir, "train")
    config = FinetuneConfig(data_dir=data_dir, model="m", **values)
    return BatchSampler(config, source, range(len(source)), targets)


@pytest.mark.parametrize(("views", "epochs"), [(1, 5), (2, 5), (3, 5), (4, 4), (4, 7)])
def test_every_image_is_shown_as_many_views_as_there_are_epochs(
    data_dir: Path, views: int, epochs: int
) -> None:
    made = sampler(
        data_dir, HardLabels([0] * 36), epochs=epochs, batch_size=12, views_per_image=views
    )
    rows = [(p, v) for request in made.batches_from(0) for p, shown in request for v in shown]
    assert sorted(rows) == [(p, e) for p in range(36) for e in range(epochs)]


def test_passes_cover_the_epochs_and_the_last_may_be_narrower(data_dir: Path) -> None:
    made = sampler(data_dir, HardLabels([0] * 36), epochs=5, batch_size=12, views_per_image=2)
    assert [made.num_epochs(epoch) for epoch in (0, 2, 4)] == [2, 2, 1]
    requests = [made.batches(epoch) for epoch in (0, 2, 4)]
    assert list(made.batches_from(0)) == [r for one in requests for r in one]
    assert list(made.batches_from(2)) == [r for one in requests[1:] for r in one]
    shown = [{len(views) for request in one for _, views in request} for one in requests]
    assert shown == [{2}, {2}, {1}]
    rows = [[sum(len(views) for _, views in request) for request in one] for one in requests]
    assert rows == [[12] * 6, [12] * 6, [12] * 3], "a batch has as many rows in every pass"


def test_views_that_the_targets_leave_out_are_in_no_batch_and_are_counted(data_dir: Path) -> None:
    made = sampler(data_dir, Leaving(), epochs=2, batch_size=8)
    even, odd = made.batches(0), made.batches(1)
    assert sum(map(len, even)) == 36
    assert sum(map(len, odd)) == 24
    assert [made.num_skipped(e) for e, r in enumerate((even, odd))] == [0, 12]
    both = sampler(data_dir, Leaving(), epochs=2, batch_size=8, views_per_image=2)
    requests = both.batches(0)
    assert sum(len(views) for request in requests for _, views in request) == 60
    assert both.num_skipped(0) == 12


def test_order_of_a_pass_is_new_every_pass_and_the_same_every_time(data_dir: Path) -> None:
    first, again = (
        sampler(data_dir, HardLabels([0] * 36), epochs=2, batch_size=8) for _ in range(2)
    )
    assert list(first.batches(1)) == list(again.batches(1))
    positions = [[p for request in first.batches(e) for p, _ in request] for e in (0, 1)]
    assert positions[0] != positions[1]


class Grouped(ImageFolder):
    """A source that says which images should be read together, and hears what will be."""

    groups = (0, 7, 12, 13, 24, 30)

    def __init__(self, data_dir: Path) -> None:
        super().__init__(data_dir, "train")
        self.told: list[list[int]] = []

    def announce(self, groups: Sequence[int]) -> None:
        self.told.append(list(groups))


def grouped(
    data_dir: Path, positions: Sequence[int], **values: Any
) -> tuple[Grouped, BatchSampler]:
    source = Grouped(data_dir)
    config = FinetuneConfig(data_dir=data_dir, model="m", **values)
    return source, BatchSampler(config, source, positions, HardLabels([0] * 36))


def test_a_batch_of_a_source_with_groups_is_in_the_order_of_the_source(data_dir: Path) -> None:
    _, made = grouped(data_dir, range(36), epochs=3, batch_size=8)
    batches = [[p for p, _ in request] for request in made.batches_from(0)]
    assert all(batch == sorted(batch) for batch in batches)
    for epoch in range(3):
        part = batches[5 * epoch : 5 * epoch + 5]
        assert sorted(p for batch in part for p in batch) == list(range(36))
    assert batches[:5] != batches[5:10]


def test_a_source_is_told_which_groups_a_pass_reads_in_the_order_of_their_use(
    data_dir: Path,
) -> None:
    positions = [p for p in range(36) if not 7 <= p < 12]  # none of the second group
    source, made = grouped(data_dir, positions, epochs=2, batch_size=8)
    requests = list(made.batches_from(0, 2))

    def used(some: Sequence[Any]) -> list[int]:
        numbers = [bisect_right(source.groups, p) - 1 for request in some for p, _ in request]
        return list(dict.fromkeys(numbers))

    assert source.told == [used(requests[:2]), used(requests[2:])]
    assert set(source.told[1]) == {0, 2, 3, 4, 5}
    assert requests == [*made.batches(0)[2:], *made.batches(1)]


def test_a_share_of_each_batch_is_read_and_told(data_dir: Path) -> None:
    source, made = grouped(data_dir, range(36), epochs=1, batch_size=9)
    requests = list(made.batches_from(0, local=lambda request: request[:2]))
    assert requests == [request[:2] for request in made.batches(0)]
    (told,) = source.told
    assert told[0] == bisect_right(source.groups, requests[0][0][0]) - 1
    assert len(told) < 6


def test_lists_of_requests_are_told_as_they_are_read(data_dir: Path) -> None:
    source = Grouped(data_dir)
    loader = read_views(ViewReader(source, img_size=8), centre_requests([1, 8, 35, 2], 3))
    assert source.told == []
    for _ in range(2):
        assert sum(len(pixels.positions) for pixels in loader) == 4
    assert source.told == [[0, 1, 5], [0, 1, 5]]


def test_batches_of_a_pass_are_a_sequence(data_dir: Path) -> None:
    made = sampler(data_dir, Leaving(), epochs=2, batch_size=8, views_per_image=2).batches(0)
    every = list(made)
    assert len(every) == len(made) == 9
    assert [made[i] for i in range(-9, 9)] == every * 2
    assert list(made[3:5]) == every[3:5]
    with pytest.raises(IndexError):
        made[9]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_order_of_a_pass_is_drawn_once(
    done: Run, finetune_flags: list[str], run: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    drawn: list[int] = []

    def noted(*args: Any, epoch: int, **values: Any) -> Any:
        drawn.append(epoch)
        return epoch_order(*args, epoch=epoch, **values)

    monkeypatch.setattr(mealv2.batches, "epoch_order", noted)
    flags = ["--epochs", 3, "--workers", workers, "--val-split", "none", "--output", run]
    assert done(*finetune_flags, *flags).report["steps"] == 9
    assert drawn == [0, 1, 2]


# --- --views-per-image --------------------------------------------------------------------------


def test_two_views_of_each_image_stand_in_a_batch_and_count_as_two_epochs(
    done: Run,
    distill_flags: list[str],
    run: Path,
    answered: list[tuple[list[tuple[int, int]], torch.Tensor]],
    events: Events,
) -> None:
    flags = ["--views-per-image", 2, "--epochs", 4, "--output", run]
    report = done(*distill_flags, *flags).report
    assert (report["epochs"], report["steps"]) == (4, 18)
    for rows, images in answered:
        assert len(rows) == len(images) == 8
        positions = [position for position, _ in rows]
        assert positions[::2] == positions[1::2]
        assert len(set(positions)) == 4
        assert all(rows[i][1] != rows[i + 1][1] for i in range(0, 8, 2))
    rows = [row for batch, _ in answered for row in batch]
    assert sorted(rows) == [(position, view) for position in range(36) for view in range(4)]
    with (run / "summary.csv").open(newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["2", "4"]
    assert [event["epoch"] for event in events(run, "validation")] == [0, 2, 4]


def test_a_last_narrower_pass_shows_no_view_too_many(
    done: Run,
    distill_flags: list[str],
    run: Path,
    answered: list[tuple[list[tuple[int, int]], torch.Tensor]],
) -> None:
    flags = ["--views-per-image", 2, "--epochs", 3, "--val-split", "none", "--output", run]
    report = done(*distill_flags, *flags).report
    rows = [row for batch, _ in answered for row in batch]
    assert len(rows) == 3 * 36
    assert report["epochs"] == 3
    assert all(sum(position == p for position, _ in rows) == 3 for p in range(36))
    assert len(set(rows)) == len(rows)


def test_a_batch_of_one_image_with_all_its_views_is_enough_for_every_pass(
    done: Run, distill_flags: list[str], run: Path
) -> None:
    """A last pass of one view with one image in a batch would be too little to normalise."""
    flags = ["--views-per-image", 2, "--batch-size", 2, "--epochs", 3, "--val-split", "none"]
    assert done(*distill_flags, *flags, "--output", run).report["steps"] == 36 + 18


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [3, 4])
def test_two_views_stopped_in_the_middle_end_in_the_same_bits(
    done: Run, distill_flags: list[str], tmp_path: Path, weights: Weights, epochs: int
) -> None:
    flags = ["--views-per-image", 2, "--epochs", epochs, "--val-split", "none"]
    flags += ["--recovery-interval", 4, "--checkpoint-hist", 99, "--output", tmp_path / "run"]
    done(*distill_flags, *flags)
    whole = weights(tmp_path / "run")
    for path in sorted((tmp_path / "run" / "checkpoints").iterdir())[1:]:
        path.unlink()
    done("distill", "--resume", tmp_path / "run")
    assert weights(tmp_path / "run") == whole


# --- CutMix -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def online(data_dir: Path, student_dir: Path, teacher_flags: list[str]) -> list[str]:
    flags = [
        *("--data-dir", str(data_dir), "--model", "test_resnet"),
        *("--initial-checkpoint", str(student_dir), "--img-size", "32", "--view-seed", "7"),
        *("--epochs", "1", "--batch-size", "8", "--workers", "0", "--log-interval", "1"),
    ]
    return ["distill", "--online", *flags, *teacher_flags, "--val-split", "none"]


def test_with_target_teachers_they_see_what_the_student_sees(
    done: Run,
    online: list[str],
    run: Path,
    tmp_path: Path,
    answered: list[tuple[list[tuple[int, int]], torch.Tensor]],
    learned: list[tuple[torch.Tensor, Any]],
    weights: Weights,
) -> None:
    done(*online, "--output", tmp_path / "plain")
    plain = list(answered)
    answered.clear()
    learned.clear()
    done(*online, "--cutmix-target", "teachers", "--output", run)
    assert [rows for rows, _ in answered] == [rows for rows, _ in plain], "the same views"
    assert all(torch.equal(a, b) for (_, a), (b, _) in zip(answered, learned, strict=True))
    assert all(mixture is None for _, mixture in learned)
    differ = [not torch.equal(a, b) for (_, a), (_, b) in zip(answered, plain, strict=True)]
    assert sum(differ) >= len(differ) - 1, "all but an empty box"
    # outside the box an image is its own; inside it is another of the batch
    for (_, mixed), (_, own) in zip(answered, plain, strict=True):
        taken = (mixed[:, None] == own[None]).all(2).any(1)  # some image of the batch has it
        assert bool(taken.all())
    assert weights(run) != weights(tmp_path / "plain")


@pytest.mark.parametrize("source", ["labels", "online"])
def test_with_target_mixed_labels_the_unmixed_images_are_labelled_and_weighed_by_area(
    done: Run,
    online: list[str],
    distill_flags: list[str],
    tmp_path: Path,
    answered: list[tuple[list[tuple[int, int]], torch.Tensor]],
    learned: list[tuple[torch.Tensor, Any]],
    weights: Weights,
    source: str,
) -> None:
    flags = online if source == "online" else [*distill_flags, "--epochs", 1]
    flags = [*flags, "--val-split", "none"]
    done(*flags, "--output", tmp_path / "plain")
    plain = [images for _, images in answered]
    answered.clear()
    learned.clear()
    done(*flags, "--cutmix-target", "mixed-labels", "--output", tmp_path / "mixed")
    own = [images for _, images in answered]
    assert all(torch.equal(a, b) for a, b in zip(own, plain, strict=True))
    for (mixed, mixture), images in zip(learned, own, strict=True):
        kept = (mixed == images).all(1).float().mean((1, 2))
        assert mixture is not None
        # a pasted pixel may by chance, or as its own partner, be equal
        assert float(kept.min()) >= mixture["lam"] - 1e-6
        assert float(kept.min()) == pytest.approx(mixture["lam"], abs=0.02)
    assert weights(tmp_path / "mixed") != weights(tmp_path / "plain")


def test_a_mix_is_drawn_from_seed_epoch_and_step_alone(
    done: Run, distill_flags: list[str], run: Path, learned: list[tuple[torch.Tensor, Any]]
) -> None:
    flags = ["--cutmix-target", "mixed-labels", "--cutmix-beta", 0.5, "--cutmix-prob", 0.6]
    done(*distill_flags, *flags, "--seed", 3, "--val-split", "none", "--output", run)
    settings = {"cutmix": 0.5, "probability": 0.6}
    expected = [
        draw_mix(8 if step < 5 else 4, 32, seed=(3, epoch, step), **settings)
        for epoch in (0, 1)
        for step in (1, 2, 3, 4, 5)
    ]
    shares = [mixture and mixture["lam"] for _, mixture in learned]
    assert shares == [mix and mix.lam(32) for mix in expected]
    assert None in shares
    assert len(set(shares)) > 4


@pytest.mark.parametrize("source", ["labels", "teachers"])
def test_mixup_blends_images_and_labels(
    done: Run,
    online: list[str],
    distill_flags: list[str],
    tmp_path: Path,
    answered: list[tuple[list[tuple[int, int]], torch.Tensor]],
    learned: list[tuple[torch.Tensor, Any]],
    source: str,
) -> None:
    flags = [*distill_flags, "--epochs", 1, "--val-split", "none"]
    if source != "labels":
        flags = list(online)
    done(*flags, "--output", tmp_path / "plain")
    plain = [images for _, images in answered]
    answered.clear()
    learned.clear()
    target = ("--mixup-target", "teachers") if source == "teachers" else ()
    done(*flags, "--mixup", 0.4, *target, "--seed", 0, "--output", tmp_path / "mixed")
    assert len(learned) == len(plain) == 5
    for step, ((mixed, mixture), (_, seen), own) in enumerate(
        zip(learned, answered, plain, strict=True), 1
    ):
        blend = draw_mix(len(own), 32, mixup=0.4, seed=(0, 0, step))
        assert blend is not None
        assert torch.equal(mixed, blend.apply(own))
        assert torch.equal(seen, mixed if source == "teachers" else own)
        assert (mixture and mixture["lam"]) == (None if source == "teachers" else blend.lam(32))


def test_mixed_hard_labels_stop_at_the_off_epoch_and_resume_to_the_bit(
    done: Run,
    finetune_flags: list[str],
    tmp_path: Path,
    weights: Weights,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[bool] = []
    forward = HardLabelTask.forward

    def recording(self: Any, images: torch.Tensor, targets: Any, mixture: Any = None) -> Any:
        seen.append(mixture is not None)
        return forward(self, images, targets, mixture)

    monkeypatch.setattr(HardLabelTask, "forward", recording)
    words = [*finetune_flags, "--mixup", 0.2, "--cutmix", 1, "--mixup-off-epoch", 2]
    words += ["--smoothing", 0.1, "--epochs", 3]
    words += ["--val-split", "none", "--recovery-interval", 2, "--checkpoint-hist", 99]
    done(*words, "--output", tmp_path / "run")
    assert seen == [True] * 6 + [False] * 3
    whole = weights(tmp_path / "run")
    for path in sorted((tmp_path / "run" / "checkpoints").iterdir())[1:]:
        path.unlink()
    done("finetune", "--resume", tmp_path / "run")
    assert weights(tmp_path / "run") == whole


def test_mixing_no_batch_changes_nothing(
    done: Run, distill_flags: list[str], tmp_path: Path, weights: Weights
) -> None:
    flags = [*distill_flags, "--epochs", 1, "--val-split", "none"]
    done(*flags, "--output", tmp_path / "plain")
    mixed = ["--cutmix", 1, "--mixup", 0.5, "--mixup-prob", 0.0]
    done(*flags, *mixed, "--output", tmp_path / "never")
    assert weights(tmp_path / "plain") == weights(tmp_path / "never")


@pytest.mark.parametrize(
    "mixing",
    [
        ["--cutmix-target", "mixed-labels", "--cutmix-prob", 0.7],
        ["--mixup", 0.4, "--cutmix", 1, "--mixup-switch-prob", 0.4, "--mixup-prob", 0.8],
    ],
)
def test_mixing_stopped_in_the_middle_ends_in_the_same_bits(
    done: Run, distill_flags: list[str], run: Path, weights: Weights, mixing: list[object]
) -> None:
    flags = [*mixing, "--val-split", "none"]
    flags += ["--recovery-interval", 3, "--checkpoint-hist", 99, "--output", run]
    done(*distill_flags, *flags)
    whole = weights(run)
    for path in sorted((run / "checkpoints").iterdir())[1:]:
        path.unlink()
    done("distill", "--resume", run)
    assert weights(run) == whole
