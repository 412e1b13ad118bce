"""pipeline.training.label_source: who answers in a distillation, and for which images."""

import csv
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import Result
from mealv2.batches import epoch_order, split_batches
from mealv2.data.folder import ImageFolder
from mealv2.data.pixels import centre_crop, cut, decode
from mealv2.label_set import Appender, LabelSet
from mealv2.losses import discriminator_loss
from mealv2.models import Classifier, create_classifier
from mealv2.models.discriminator import Discriminator
from mealv2.models.ensemble import TeacherEnsemble
from mealv2.storage.weight_files import find_checkpoint
from mealv2.targets import BatchTargets, OnlineTeachers, StoredLabels
from mealv2.views import view_of
from pipeline.config import DistillConfig
from pipeline.runtime.seeds import seed_everything
from pipeline.training.spec import create_student

Run = Callable[..., Result]
Events = Callable[[Path, str], list[dict[str, Any]]]
Weights = Callable[[Path], dict[str, bytes]]

# What differs between two runs that do the same.
TIMING = {"time", "images_per_second", "data_wait_share"}


@pytest.fixture
def own_labels(labels_dir: Path, tmp_path: Path) -> Path:
    """A copy of the label set that a test may append to."""
    return Path(shutil.copytree(labels_dir, tmp_path / "own-labels"))


@pytest.fixture(scope="module")
def online_flags(data_dir: Path, student_dir: Path, teacher_flags: list[str]) -> list[str]:
    """The paper's training on the tree, all but --output; flags given after these win."""
    settings = {
        "--data-dir": data_dir,
        "--model": "test_resnet",
        "--initial-checkpoint": student_dir,
        "--img-size": 32,
        "--view-seed": 7,
        "--epochs": 2,
        "--batch-size": 8,
        "--workers": 0,
        "--log-interval": 1,
    }
    flags = [str(part) for item in settings.items() for part in item]
    return ["distill", "--online", *flags, *teacher_flags]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, int]]]:
    """The (position, view) of every row, batch by batch, that answers were asked for."""
    seen: list[list[tuple[int, int]]] = []

    def record(kind: type) -> None:
        answer = kind.batch

        def recording(
            self: Any, positions: Sequence[int], views: Sequence[int], *images: Any, step: int
        ) -> BatchTargets:
            seen.append(list(zip(positions, views, strict=True)))
            return answer(self, positions, views, *images, step=step)

        monkeypatch.setattr(kind, "batch", recording)

    record(StoredLabels)
    record(OnlineTeachers)
    return seen


def summary(run: Path) -> list[dict[str, str]]:
    with (run / "summary.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def counts(run: Path, name: str) -> list[str]:
    """Return a count of every epoch, as summary.csv has it."""
    return [row.get(f"train_{name}", "") for row in summary(run)]


def one_line(result: Result) -> bool:
    return len(result.stderr.splitlines()) == 1 and result.stderr.startswith("mealv2: ")


def ensemble_of(teacher_dirs: dict[str, Path]) -> list[Classifier]:
    return [
        create_classifier(name, num_classes=3, checkpoint=find_checkpoint(path)).eval()
        for name, path in teacher_dirs.items()
    ]


def add_images(data: Path, *, count: int = 3) -> list[str]:
    """Copy images under new names into a class; return their keys."""
    for number in range(count):
        shutil.copy(data / "train" / "bees" / "03.jpg", data / "train" / "bees" / f"9{number}.jpg")
    return [f"bees/9{number}.jpg" for number in range(count)]


# --- teachers online ----------------------------------------------------------------------------


def losses_by_hand(
    config: DistillConfig, source: ImageFolder, teachers: list[Classifier]
) -> list[list[float]]:
    """Train as the paper says, written out; return (loss, similarity, discriminator) per step."""
    seed_everything(config.seed)
    student = create_student(config, classes=list(source.classes), img_size=32).train()
    discriminator = Discriminator(3)
    both = [*student.parameters(), *discriminator.parameters()]
    optimizer = torch.optim.SGD(both, lr=config.lr, momentum=0.9)
    losses = []
    for epoch in range(config.epochs):
        optimizer.param_groups[0]["lr"] = config.lr * (0.1 if epoch else 1.0)
        for batch in split_batches(epoch_order(len(source), seed=0, epoch=epoch), 8):
            rows = []
            for position in batch:
                image = decode(source.read(position))
                size = {"width": image.shape[1], "height": image.shape[0]}
                view = view_of(source.keys[position], epoch, seed=7, **size)
                rows.append(torch.from_numpy(cut(image, view, 32).copy()).permute(2, 0, 1))
            images = torch.stack(rows)
            with torch.no_grad():
                logits = torch.stack([teacher(images) for teacher in teachers])
            probs, mean_logits = torch.softmax(logits, -1).mean(0), logits.mean(0)
            said = student(images)
            similarity = -(probs * torch.log_softmax(said, 1)).sum(1).mean()
            adversary, _ = discriminator_loss(discriminator, said, mean_logits)
            loss = similarity + adversary
            losses.append([float(x.detach()) for x in (loss, similarity, adversary)])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return losses


def test_online_losses_are_those_of_a_loop_written_by_hand(
    done: Run,
    online_flags: list[str],
    make_model: Callable[..., Path],
    data_dir: Path,
    teacher_dirs: dict[str, Path],
    events: Events,
    run: Path,
) -> None:
    # without batch normalisation, which makes differences of 1e-7 grow
    student = ["--model", "test_convnext", "--initial-checkpoint", make_model("test_convnext")]
    rates = ["--lr", 0.01, "--discriminator-lr", 0.01]
    done(*online_flags, *student, *rates, "--val-split", "none", "--output", run)
    config = DistillConfig.from_json(json.loads((run / "config.json").read_text()))
    expected = losses_by_hand(config, ImageFolder(data_dir, "train"), ensemble_of(teacher_dirs))
    names = ("loss", "similarity_loss", "discriminator_loss")
    losses = [[event[name] for name in names] for event in events(run, "train")]
    assert len(losses) == 10
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert np.ptp(np.array(losses)[:, 0]) > 0.1, "constant losses would agree by chance"


def test_online_every_label_is_taught_and_no_view_repeats(
    done: Run,
    online_flags: list[str],
    run: Path,
    events: Events,
    asked: list[list[tuple[int, int]]],
) -> None:
    done(*online_flags, "--epochs", 6, "--val-split", "none", "--output", run)
    rows = [row for batch in asked for row in batch]
    assert sorted(rows) == [(position, epoch) for position in range(36) for epoch in range(6)]
    assert [e["labels_online"] for e in events(run, "train")] == [8, 8, 8, 8, 4] * 6
    assert counts(run, "labels_online") == ["36"] * 6
    assert not any("labels_stored" in event for event in events(run, "train"))


def test_online_accuracies_of_the_teachers_are_said_before_training(
    done: Run, online_flags: list[str], run: Path, labels_dir: Path
) -> None:
    """Stage one measured the same teachers on the same crops."""
    start = done(*online_flags, "--output", run).stderr.split("epoch 1/2")[0]
    measured = LabelSet.open(labels_dir).manifest["roles"]["val"]["accuracy"]
    known = {
        **{f"teacher {t['model']}": t for t in measured["teachers"]},
        "ensemble": measured["ensemble"],
    }
    said = {" ".join(line.split()[:-2]): line.split()[-2:] for line in start.splitlines()}
    for name, figures in known.items():
        assert said[name] == [f"{figures['top1']:.2f}", f"{figures['top5']:.2f}"]
    assert "student at step 0" in said


def test_online_agreement_and_kl_are_those_of_the_saved_student_with_the_ensemble(
    done: Run,
    online_flags: list[str],
    run: Path,
    data_dir: Path,
    teacher_dirs: dict[str, Path],
) -> None:
    report = done(*online_flags, "--output", run).report
    student = create_classifier("test_resnet", num_classes=3, checkpoint=find_checkpoint(run))
    crops = [
        centre_crop(decode(path.read_bytes()), 32)
        for path in sorted((data_dir / "val").glob("*/*"))
    ]
    images = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)
    with torch.no_grad():
        teachers = [t(images).double() for t in ensemble_of(teacher_dirs)]
        q = torch.stack([torch.softmax(logits, 1) for logits in teachers]).mean(0)
        log_p = torch.log_softmax(student.eval()(images).double(), 1)
    agreement = (q.argmax(1) == log_p.argmax(1)).double().mean() * 100
    assert report["agreement"] == pytest.approx(float(agreement))
    assert report["kl"] == pytest.approx(float((q * (q.log() - log_p)).sum(1).mean()), rel=1e-4)


def test_online_run_folder_says_who_taught(
    done: Run, online_flags: list[str], run: Path, labels_dir: Path
) -> None:
    done(*online_flags, "--epochs", 1, "--val-split", "none", "--output", run)
    kept = json.loads((run / "labels.json").read_text())
    assert kept["online"] is True
    assert kept["teachers"] == LabelSet.open(labels_dir).manifest["plan"]["teachers"]


def test_online_split_names_the_images_to_train_on(
    done: Run, online_flags: list[str], run: Path, asked: list[list[tuple[int, int]]]
) -> None:
    done(
        *online_flags, "--train-split", "val", "--epochs", 1, "--val-split", "none", "--output", run
    )
    assert sorted(row for batch in asked for row in batch) == [(p, 0) for p in range(15)]


# --- views beyond the stored ones, and images added since ---------------------------------------


def test_teachers_answer_views_beyond_the_stored_ones_and_none_repeats(
    done: Run,
    distill_flags: list[str],
    teacher_flags: list[str],
    run: Path,
    asked: list[list[tuple[int, int]]],
) -> None:
    flags = ["--missing", "teach", *teacher_flags, "--epochs", 6, "--val-split", "none"]
    done(*distill_flags, *flags, "--output", run)
    assert counts(run, "labels_stored") == ["36"] * 4 + ["0"] * 2
    assert counts(run, "labels_online") == ["0"] * 4 + ["36"] * 2
    rows = [row for batch in asked for row in batch]
    assert sorted(rows) == [(position, view) for position in range(36) for view in range(6)]


def test_reused_views_need_no_teachers_for_images_that_the_set_has(
    done: Run, distill_flags: list[str], teacher_flags: list[str], run: Path
) -> None:
    flags = ["--missing", "teach", "--reuse-views", *teacher_flags, "--epochs", 5]
    done(*distill_flags, *flags, "--val-split", "none", "--output", run)
    assert counts(run, "labels_online") == ["0"] * 5


@pytest.mark.parametrize("policy", ["teach", "skip"])
def test_images_added_since_are_taught_or_left_out_and_counted(
    done: Run,
    distill_flags: list[str],
    teacher_flags: list[str],
    own_data: Path,
    run: Path,
    asked: list[list[tuple[int, int]]],
    policy: str,
) -> None:
    new = add_images(own_data)
    keys = ImageFolder(own_data, "train").keys
    flags = ["--missing", policy, *(teacher_flags if policy == "teach" else [])]
    result = done(*distill_flags, "--data-dir", own_data, *flags, "--output", run)
    shown = [keys[position] for batch in asked for position, _ in batch]
    assert counts(run, "labels_stored") == ["36"] * 2
    if policy == "teach":
        assert "3 images are not in the label set; they are labelled online by the teachers" in (
            result.stderr
        )
        assert counts(run, "labels_online") == ["3"] * 2
        assert all(shown.count(key) == 2 for key in keys)
    else:
        assert "3 images are not in the label set; they are skipped" in result.stderr
        assert counts(run, "labels_skipped") == ["3"] * 2
        assert not set(new) & set(shown)
        assert result.report["steps"] == 10


def test_images_added_since_are_refused_naming_both_ways_out(
    run_cli: Run, distill_flags: list[str], own_data: Path, run: Path
) -> None:
    add_images(own_data)
    result = run_cli(*distill_flags, "--data-dir", own_data, "--output", run)
    assert result.code == 3
    assert one_line(result)
    assert "images without labels: 3 (bees/90.jpg, bees/91.jpg, bees/92.jpg)" in result.stderr
    assert "--missing teach" in result.stderr
    assert "--missing skip" in result.stderr


@pytest.mark.parametrize("policy", ["teach", "skip"])
@pytest.mark.parametrize("also_added", [False, True])
@pytest.mark.parametrize("change", ["removed", "changed"])
def test_removed_and_changed_images_are_refused_all_the_same(
    run_cli: Run,
    distill_flags: list[str],
    teacher_flags: list[str],
    own_data: Path,
    run: Path,
    policy: str,
    also_added: bool,
    change: str,
) -> None:
    path = own_data / "train" / "bees" / "03.jpg"
    if also_added:
        add_images(own_data)
    if change == "removed":
        path.unlink()
        named = "missing images with labels: 1 (bees/03.jpg)"
    else:
        path.write_bytes(path.read_bytes() + b"\0")
        named = "the same names, but other files"
    flags = ["--missing", policy, *(teacher_flags if policy == "teach" else [])]
    result = run_cli(*distill_flags, "--data-dir", own_data, *flags, "--output", run)
    assert result.code == 3
    assert one_line(result)
    assert named in result.stderr
    assert "without labels" not in result.stderr, "those would be allowed"
    assert not run.exists()


def test_without_teachers_the_stored_views_must_last(
    run_cli: Run, distill_flags: list[str], run: Path
) -> None:
    flags = [*distill_flags, "--no-reuse-views", "--output", run]
    result = run_cli(*flags, "--epochs", 5)
    assert (result.code, one_line(result)) == (2, True)
    assert "--no-reuse-views: 5 epochs need as many views" in result.stderr
    assert run_cli(*flags, "--epochs", 4).code == 0


# --- the right teachers -------------------------------------------------------------------------


def test_own_checkpoints_must_be_given(run_cli: Run, distill_flags: list[str], run: Path) -> None:
    result = run_cli(*distill_flags, "--missing", "teach", "--output", run)
    assert (result.code, one_line(result)) == (2, True)
    assert "--teacher test_resnet=RUN" in result.stderr


def test_teachers_with_other_weights_are_refused(
    run_cli: Run,
    distill_flags: list[str],
    teacher_dirs: dict[str, Path],
    make_model: Callable[..., Path],
    run: Path,
) -> None:
    other = make_model("test_efficientnet", seed=77)
    given = [
        *("--teacher", f"test_resnet={teacher_dirs['test_resnet']}"),
        *("--teacher", f"test_efficientnet={other}"),
    ]
    result = run_cli(*distill_flags, "--missing", "teach", *given, "--output", run)
    assert (result.code, one_line(result)) == (3, True)
    assert "other weights or normalisation than test_efficientnet" in result.stderr
    assert not run.exists()


def test_one_of_two_teachers_is_refused(
    run_cli: Run, distill_flags: list[str], teacher_flags: list[str], run: Path
) -> None:
    flags = ["--missing", "teach", *teacher_flags[:2], "--output", run]
    result = run_cli(*distill_flags, *flags)
    assert (result.code, one_line(result)) == (3, True)
    assert "test_resnet, test_efficientnet" in result.stderr


def test_teachers_may_be_given_in_any_order(
    done: Run, distill_flags: list[str], teacher_flags: list[str], run: Path
) -> None:
    turned = [*teacher_flags[2:], *teacher_flags[:2]]
    done(*distill_flags, "--missing", "teach", *turned, "--epochs", 1, "--output", run)


# --- answers that are kept ------------------------------------------------------------------------


def test_written_back_answers_are_stored_labels_for_the_next_job(
    done: Run,
    distill_flags: list[str],
    teacher_flags: list[str],
    own_labels: Path,
    own_data: Path,
    tmp_path: Path,
    contents: Callable[..., dict[str, bytes]],
) -> None:
    add_images(own_data)
    before = contents(own_labels)
    flags = ["--data-dir", own_data, "--labels", own_labels, "--missing", "teach", *teacher_flags]
    flags += ["--epochs", 6, "--val-split", "none"]
    done(*distill_flags, *flags, "--write-back", "--output", tmp_path / "first")
    assert counts(tmp_path / "first", "labels_online") == ["3"] * 4 + ["39"] * 2
    after = contents(own_labels)
    assert {name: after[name] for name in before} == before
    appended = sorted(after.keys() - before.keys())
    assert all(re.fullmatch(r"train-more-[0-9a-f]{16}\.h5", name) for name in appended)
    assert len(appended) == 6, "one for every checkpoint"

    done(*distill_flags, *flags, "--output", tmp_path / "second")
    assert counts(tmp_path / "second", "labels_online") == ["0"] * 6
    assert counts(tmp_path / "second", "labels_stored") == ["39"] * 6
    assert json.loads((tmp_path / "second" / "labels.json").read_text())["appended"] == appended
    assert contents(own_labels) == after


def test_without_write_back_nothing_is_appended(
    done: Run,
    distill_flags: list[str],
    teacher_flags: list[str],
    own_labels: Path,
    run: Path,
    contents: Callable[..., dict[str, bytes]],
) -> None:
    before = contents(own_labels)
    flags = ["--labels", own_labels, "--missing", "teach", *teacher_flags, "--epochs", 5]
    done(*distill_flags, *flags, "--val-split", "none", "--output", run)
    assert contents(own_labels) == before


def _lie(labels: Path) -> None:
    """Append wrong answers for views to come, as a job with other teachers never could."""
    opened = LabelSet.open(labels)
    keys = list(opened.keys())
    appender = Appender(opened)
    for view in (4, 5):
        wrong = opened.encoding.encode(torch.full((len(keys), 3), 1 / 3))
        appender.add(keys, [view] * len(keys), wrong)
    assert appender.flush() is not None


def test_stopped_and_continued_with_write_back_it_ends_in_the_same_bits(
    run_cli: Run,
    done: Run,
    distill_flags: list[str],
    teacher_flags: list[str],
    labels_dir: Path,
    tmp_path: Path,
    weights: Weights,
    events: Events,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever was appended meanwhile: a run goes on with the labels it began with."""
    flags = ["--missing", "teach", *teacher_flags, "--write-back", "--epochs", 6]
    flags += ["--val-split", "none"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    copies = [shutil.copytree(labels_dir, tmp_path / f"labels-{n}") for n in "ab"]
    done(*distill_flags, *flags, "--labels", copies[0], "--output", whole)

    reads, read = 0, ImageFolder.read

    def interrupted(self: ImageFolder, position: int) -> bytes:
        nonlocal reads
        reads += 1
        if reads == 4 * 36 + 20:  # third step of the epoch in which the teachers begin to answer
            os.kill(os.getpid(), signal.SIGINT)
        return read(self, position)

    with monkeypatch.context() as patch:
        patch.setattr(ImageFolder, "read", interrupted)
        read_again = ["--cache-images", "off"]
        result = run_cli(
            *distill_flags, *flags, *read_again, "--labels", copies[1], "--output", parts
        )
    assert result.code == 4
    assert len(list(copies[1].glob("*more*"))) == 1, "what the teachers answered is not lost"
    _lie(copies[1])
    done("distill", "--resume", parts)

    assert json.loads((parts / "labels.json").read_text())["appended"] == []
    assert weights(parts) == weights(whole)
    assert summary(parts) == summary(whole)
    told = [
        [{k: v for k, v in e.items() if k not in TIMING} for e in events(path, "train")]
        for path in (parts, whole)
    ]
    assert told[0] == told[1]


@pytest.mark.slow
def test_continued_run_uses_the_first_views_though_more_were_labelled_meanwhile(
    run_cli: Run,
    done: Run,
    distill_flags: list[str],
    own_labels: Path,
    labels_dir: Path,
    add_views: Callable[..., Any],
    tmp_path: Path,
    weights: Weights,
    asked: list[list[tuple[int, int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = ["--epochs", 6, "--val-split", "none"]
    whole, parts, later = tmp_path / "whole", tmp_path / "parts", tmp_path / "later"
    done(*distill_flags, *flags, "--labels", labels_dir, "--output", whole)

    reads, read = 0, ImageFolder.read

    def interrupted(self: ImageFolder, position: int) -> bytes:
        nonlocal reads
        reads += 1
        if reads == 2 * 36 + 20:
            os.kill(os.getpid(), signal.SIGINT)
        return read(self, position)

    with monkeypatch.context() as patch:
        patch.setattr(ImageFolder, "read", interrupted)
        read_again = ["--cache-images", "off"]
        result = run_cli(
            *distill_flags, *flags, *read_again, "--labels", own_labels, "--output", parts
        )
    assert result.code == 4
    add_views(own_labels, (4, 5))
    assert LabelSet.open(own_labels).num_views == 6
    asked.clear()
    done("distill", "--resume", parts)
    assert {view for batch in asked for _, view in batch} == {0, 1, 2, 3}
    assert json.loads((parts / "labels.json").read_text())["num_views"] == 4
    assert weights(parts) == weights(whole)
    assert summary(parts) == summary(whole)

    asked.clear()
    done(*distill_flags, *flags, "--labels", own_labels, "--output", later)
    assert {view for batch in asked for _, view in batch} == {0, 1, 2, 3, 4, 5}


def test_run_whose_added_views_vanished_is_not_continued_without_them(
    run_cli: Run,
    done: Run,
    distill_flags: list[str],
    own_labels: Path,
    labels_dir: Path,
    add_views: Callable[..., Any],
    run: Path,
) -> None:
    add_views(own_labels, (4, 5))
    done(*distill_flags, "--labels", own_labels, "--epochs", 1, "--output", run)
    shutil.copy(labels_dir / "manifest.json", own_labels)
    result = run_cli("distill", "--resume", run)
    assert (result.code, one_line(result)) == (3, True)
    assert "holds 4 views of each image, but 6 are needed" in result.stderr


def test_run_whose_appended_labels_vanished_is_not_continued_without_them(
    run_cli: Run,
    done: Run,
    distill_flags: list[str],
    own_labels: Path,
    run: Path,
) -> None:
    _lie(own_labels)
    (appended,) = own_labels.glob("*more*")
    done(*distill_flags, "--labels", own_labels, "--epochs", 1, "--output", run)
    appended.unlink()
    result = run_cli("distill", "--resume", run)
    assert (result.code, one_line(result)) == (3, True)
    assert f"{appended.name} is missing" in result.stderr


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"appended": 3}'])
def test_damaged_labels_json_is_named(
    run_cli: Run, done: Run, distill_flags: list[str], run: Path, text: str
) -> None:
    done(*distill_flags, "--epochs", 1, "--val-split", "none", "--output", run)
    (run / "labels.json").write_text(text)
    result = run_cli("distill", "--resume", run)
    assert (result.code, one_line(result)) == (2, True)
    assert f"{run / 'labels.json'} is damaged" in result.stderr


def test_label_set_that_cannot_be_appended_to_is_refused_before_the_teachers_work(
    run_cli: Run,
    distill_flags: list[str],
    teacher_flags: list[str],
    labels_dir: Path,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Root may write anywhere, so that the answer of the system is put in its mouth."""
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != labels_dir and may(path, mode))
    flags = ["--missing", "teach", *teacher_flags, "--output", run]
    result = run_cli(*distill_flags, *flags, "--write-back")
    assert (result.code, one_line(result)) == (3, True)
    assert "leave out --write-back" in result.stderr
    assert not run.exists()


def test_damaged_appended_file_is_named(
    run_cli: Run, distill_flags: list[str], own_labels: Path, run: Path
) -> None:
    _lie(own_labels)
    (appended,) = own_labels.glob("*more*")
    appended.write_bytes(appended.read_bytes()[:-100])
    result = run_cli(*distill_flags, "--labels", own_labels, "--output", run)
    assert (result.code, one_line(result)) == (3, True)
    assert appended.name in result.stderr


def test_ensemble_is_asked_for_lacking_rows_alone(
    done: Run,
    distill_flags: list[str],
    teacher_flags: list[str],
    own_data: Path,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add_images(own_data)
    sizes: list[int] = []
    forward = TeacherEnsemble.forward

    def recording(self: TeacherEnsemble, images_BCHW: torch.Tensor, *others: Any) -> Any:
        sizes.append(len(images_BCHW))
        return forward(self, images_BCHW, *others)

    monkeypatch.setattr(TeacherEnsemble, "forward", recording)
    flags = ["--data-dir", own_data, "--missing", "teach", *teacher_flags]
    done(*distill_flags, *flags, "--epochs", 2, "--val-split", "none", "--output", run)
    assert sum(sizes) == 6
