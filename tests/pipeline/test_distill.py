"""pipeline.distill: the stored labels train the student, and only on the data they are of."""

import csv
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cases import mostly_slow
from conftest import FORMS, Result
from mealv2.data.folder import ImageFolder
from mealv2.data.pixels import centre_crop, cut, decode
from mealv2.label_set import LabelSet, ShardFile
from mealv2.models import create_classifier
from mealv2.models.discriminator import Discriminator
from mealv2.models.ensemble import ONE_SIZE, BySize, TeacherEnsemble
from mealv2.soft_labels import top_k
from mealv2.storage.weight_files import find_checkpoint
from mealv2.targets import BatchTargets, StoredLabels, Targets
from mealv2.task import DistillTask
from mealv2.views import DrawnViews, scheduled_view, view_of
from pipeline.config import DistillConfig
from pipeline.runtime.device import create_runtime
from pipeline.runtime.seeds import seed_everything
from pipeline.training.loop import train
from pipeline.training.spec import TrainingSpec, create_student

Run = Callable[..., Result]
Events = Callable[[Path, str], list[dict[str, Any]]]


# --- stored labels and online teachers are the same targets -------------------------------------


class CuttingTeachers(Targets):
    """Answers like StoredLabels, by cutting the views itself and asking the teachers now."""

    def __init__(self, source: ImageFolder, ensemble: TeacherEnsemble, *, logits: bool) -> None:
        self.source = source
        self.ensemble = ensemble
        self.logits = logits

    def view(self, key: str, epoch: int) -> int:
        return scheduled_view(key, epoch, seed=0, num_views=4)

    def batch(
        self,
        positions: Sequence[int],
        views: Sequence[int],
        images_BCHW: torch.Tensor,
        by_size: BySize = ONE_SIZE,
        *,
        step: int = 1,
    ) -> BatchTargets:
        rows = []
        for position, index in zip(positions, views, strict=True):
            image = decode(self.source.read(position))
            size = {"width": image.shape[1], "height": image.shape[0]}
            rows.append(cut(image, view_of(self.source.keys[position], index, seed=7, **size), 32))
        cut_BCHW = torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2)
        probs_BC, mean_logits_BC = self.ensemble(cut_BCHW)
        return BatchTargets(
            top_k(probs_BC, 3), mean_logits_BC=mean_logits_BC if self.logits else None
        )

    def flush(self) -> None:
        """Nothing to keep."""


def _train_online(
    config: DistillConfig, source: ImageFolder, teacher_dirs: dict[str, Path]
) -> dict[str, Any]:
    """Do what pipeline.distill does, with the teachers in place of the label set."""
    teachers = [
        create_classifier(name, num_classes=3, checkpoint=find_checkpoint(path))
        for name, path in teacher_dirs.items()
    ]
    seed_everything(config.seed)
    student = create_student(config, classes=source.classes, img_size=32)
    discriminator, extra = None, {}
    if config.discriminator != "off":
        discriminator = Discriminator(3, config.discriminator)
        extra = {"discriminator": (discriminator, config.lr)}
    spec = TrainingSpec(
        command="distill",
        task=DistillTask(student, discriminator, discriminator_input=config.discriminator_input),
        student=student,
        source=source,
        positions=list(range(len(source))),
        targets=CuttingTeachers(
            source, TeacherEnsemble(teachers), logits=config.discriminator_input == "logits"
        ),
        img_size=32,
        views=DrawnViews(7),
        resize="torch",
        evaluator=None,
        extra=extra,
    )
    return train(config, create_runtime(config), spec)


@pytest.mark.parametrize(
    ("discriminator", "shown", "tolerance"),
    mostly_slow(
        [
            ("paper", None, 1e-5),
            ("official", None, 1e-5),
            ("off", None, 1e-5),
            ("paper", "logits", 1e-4),  # stored in float16
        ]
    ),
)
def test_losses_of_dense_labels_equal_those_of_online_teachers_for_20_steps(
    done: Run,
    distill_flags: list[str],
    labels_of: Callable[..., Path],
    data_dir: Path,
    teacher_dirs: dict[str, Path],
    events: Events,
    make_model: Callable[..., Path],
    tmp_path: Path,
    discriminator: str,
    shown: str | None,
    tolerance: float,
) -> None:
    stored, online = tmp_path / "stored", tmp_path / "online"
    # a student without batch normalisation, which over 8 images makes 1e-7 grow to 1e-3 in 20 steps
    student = ["--model", "test_convnext", "--initial-checkpoint", make_model("test_convnext")]
    labels = labels_of("all float32", logits=shown == "logits")
    flags = ["--labels", labels, "--discriminator", discriminator, "--epochs", 4]
    flags += ["--discriminator-input", shown] if shown else []
    flags += ["--discriminator-lr", 0.01] if discriminator != "off" else []
    done(*distill_flags, *flags, *student, "--val-split", "none", "--output", stored)
    settings = json.loads((stored / "config.json").read_text())
    config = DistillConfig.from_json({**settings, "output": online})
    _train_online(config, ImageFolder(data_dir, "train"), teacher_dirs)

    parts = ["loss", "similarity_loss"] + ["discriminator_loss"] * (discriminator != "off")
    losses = [
        np.array([[event[part] for part in parts] for event in events(path, "train")])
        for path in (stored, online)
    ]
    assert losses[0].shape == (20, len(parts))
    np.testing.assert_allclose(losses[0], losses[1], rtol=tolerance, atol=0)
    assert np.ptp(losses[0][:, 0]) > 0.1, "constant losses would agree by chance"


# --- every form of labels -----------------------------------------------------------------------


@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("form", mostly_slow(FORMS, fast=2))
def test_every_form_trains_with_every_input_of_the_discriminator_that_it_has(
    done: Run,
    distill_flags: list[str],
    labels_of: Callable[..., Path],
    events: Events,
    tmp_path: Path,
    form: str,
    logits: bool,
) -> None:
    """Each shows it something else, and what is shown unasked is logits where there are any."""
    flags = ["--labels", labels_of(form, logits=logits), "--val-split", "none"]
    flags += ["--epochs", 1, "--batch-size", 18]
    losses = {}
    for shown in (None, "log-probs", "probs", *(["logits"] if logits else [])):
        run = tmp_path / f"run-{shown}"
        asked = ["--discriminator-input", shown] if shown else []
        assert done(*distill_flags, *flags, *asked, "--output", run).report["steps"] == 2
        losses[shown] = [event["discriminator_loss"] for event in events(run, "train")]
        assert np.isfinite(losses[shown]).all()
    assert losses[None] == losses["logits" if logits else "log-probs"]
    assert len({tuple(value) for value in losses.values()}) == len(losses) - 1


def test_logits_that_the_set_lacks_are_refused_naming_the_ways_out(
    run_cli: Run, distill_flags: list[str], run: Path
) -> None:
    result = run_cli(*distill_flags, "--discriminator-input", "logits", "--output", run)
    assert (result.code, _one_line(result)) == (2, True)
    assert "--store-logits" in result.stderr
    assert "--online" in result.stderr
    assert not run.exists()


# --- the schedule of views ----------------------------------------------------------------------


def test_epoch_uses_each_image_once_and_all_views_before_one_repeats(
    done: Run, distill_flags: list[str], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    batch_targets = StoredLabels.batch

    def recording(
        self: StoredLabels,
        positions: Sequence[int],
        views: Sequence[int],
        *images: Any,
        step: int,
    ) -> BatchTargets:
        asked.extend(zip(positions, views, strict=True))
        return batch_targets(self, positions, views, *images, step=step)

    monkeypatch.setattr(StoredLabels, "batch", recording)
    done(*distill_flags, "--epochs", 8, "--val-split", "none", "--output", run)
    epochs = [asked[start : start + 36] for start in range(0, len(asked), 36)]
    assert len(epochs) == 8
    assert all(sorted(position for position, _ in epoch) == list(range(36)) for epoch in epochs)
    for cycle in (epochs[:4], epochs[4:]):
        every = sorted(pair for epoch in cycle for pair in epoch)
        assert every == [(position, view) for position in range(36) for view in range(4)]
    assert epochs[0] != epochs[4]


# --- what a run says ----------------------------------------------------------------------------


def test_accuracies_before_training_are_said_before_the_first_epoch(
    done: Run,
    distill_flags: list[str],
    run: Path,
    labels_dir: Path,
    student_dir: Path,
    data_dir: Path,
) -> None:
    result = done(*distill_flags, "--output", run)
    start = result.stderr.split("epoch 1/2")[0].splitlines()
    said = {" ".join(line.split()[:-2]): line.split()[-2:] for line in start if line.count(".") > 1}
    accuracy = LabelSet.open(labels_dir).manifest["roles"]["val"]["accuracy"]
    expected = {
        **{f"teacher {t['model']}": t for t in accuracy["teachers"]},
        "ensemble": accuracy["ensemble"],
        "student at step 0": done(
            *("evaluate", "--data-dir", data_dir, "--checkpoint", student_dir),
            *("--workers", 0, "--json"),
        ).report,
    }
    assert said == {name: [f"{f['top1']:.2f}", f"{f['top5']:.2f}"] for name, f in expected.items()}


def test_report_and_summary_hold_accuracy_agreement_and_kl(
    done: Run, distill_flags: list[str], run: Path
) -> None:
    result = done(*distill_flags, "--output", run)
    with (run / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    for name in ("top1", "top5", "cross_entropy", "agreement", "kl"):
        assert float(rows[-1][f"val_{name}"]) == result.report[name]
    assert 0 <= result.report["agreement"] <= 100
    assert result.report["kl"] > 0
    assert len(result.stdout.splitlines()) == 1


def test_agreement_and_kl_are_those_of_the_saved_student_with_the_stored_labels(
    done: Run, distill_flags: list[str], run: Path, labels_dir: Path, data_dir: Path
) -> None:
    report = done(*distill_flags, "--output", run).report
    student = create_classifier("test_resnet", num_classes=3, checkpoint=find_checkpoint(run))
    labels = LabelSet.open(labels_dir, split="val")
    kl, agree = [], 0
    for path in sorted((data_dir / "val").glob("*/*")):
        found = labels.lookup([path.relative_to(data_dir / "val").as_posix()], [0])
        rest = 1 - found.probs_NK.astype(float).sum()
        q = np.full(3, max(rest, 0))  # the class not kept
        q[found.indices_NK[0]] = found.probs_NK[0]
        q /= q.sum()
        p = torch.softmax(student.eval()(_centre(path)).double(), dim=1)[0].detach().numpy()
        kl.append(sum(a * np.log(a / b) for a, b in zip(q, p, strict=True) if a > 0))
        agree += int(q.argmax() == p.argmax())
    assert report["agreement"] == pytest.approx(100 * agree / 15)
    # the class not kept has what float16 leaves of 1
    assert report["kl"] == pytest.approx(np.mean(kl), rel=1e-3)


def _centre(path: Path) -> torch.Tensor:
    crop = centre_crop(decode(path.read_bytes()), 32).copy()
    return torch.from_numpy(crop).permute(2, 0, 1)[None]


@pytest.mark.slow
def test_distillation_brings_the_student_nearer_to_the_ensemble(
    done: Run, distill_flags: list[str], run: Path, events: Events
) -> None:
    report = done(*distill_flags, "--epochs", 8, "--lr", 0.05, "--output", run).report
    first = events(run, "validation")[0]
    assert first["epoch"] == 0
    assert report["kl"] < 0.5 * first["kl"]
    assert report["agreement"] > first["agreement"]


def test_labels_without_a_val_role_train_without_agreement(
    done: Run, precompute_flags: list[str], distill_flags: list[str], tmp_path: Path
) -> None:
    labels = tmp_path / "labels"
    done(*precompute_flags, "--val-split", "none", "--output", labels)
    result = done(*distill_flags, "--labels", labels, "--output", tmp_path / "run")
    assert result.report["num_images"] == 15
    assert {"top1", "top5"} < result.report.keys()
    assert not {"agreement", "kl"} & result.report.keys()
    assert "teacher" not in result.stderr


def test_val_split_none_trains_without_figures(
    done: Run, distill_flags: list[str], run: Path
) -> None:
    report = done(*distill_flags, "--val-split", "none", "--output", run).report
    assert not {"top1", "kl"} & report.keys()
    assert report["steps"] == 10


# --- the discriminator --------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_discriminator_logs_its_loss_and_accuracy_and_learns(
    done: Run, distill_flags: list[str], run: Path, events: Events, variant: str
) -> None:
    done(*distill_flags, "--discriminator", variant, "--output", run)
    for event in events(run, "train"):
        parts = event["similarity_loss"] + event["discriminator_loss"]
        assert event["loss"] == pytest.approx(parts, rel=1e-5)
        assert 0 <= event["discriminator_accuracy"] <= 1
    before, after = (
        torch.load(path, weights_only=True)["extra"]["discriminator"]
        for path in sorted((run / "checkpoints").iterdir())
    )
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_without_a_discriminator_the_loss_is_the_similarity(
    done: Run, distill_flags: list[str], run: Path, events: Events
) -> None:
    done(*distill_flags, "--discriminator", "off", "--output", run)
    for event in events(run, "train"):
        assert event["loss"] == event["similarity_loss"]
        assert not {"discriminator_loss", "discriminator_accuracy"} & event.keys()


def test_discriminator_weight_scales_its_term(
    done: Run, distill_flags: list[str], run: Path, events: Events
) -> None:
    done(*distill_flags, "--discriminator-weight", 0.25, "--output", run)
    for event in events(run, "train"):
        parts = event["similarity_loss"] + 0.25 * event["discriminator_loss"]
        assert event["loss"] == pytest.approx(parts, rel=1e-5)


def _group_rates(run: Path) -> list[float]:
    newest = max((run / "checkpoints").iterdir())
    state = torch.load(newest, weights_only=True)
    return [group["lr"] for group in state["optimizer"]["param_groups"]]


@pytest.mark.parametrize(
    ("flags", "rates"),
    mostly_slow(
        [
            ([], [0.001, 1e-5]),  # 3 classes
            (["--discriminator-lr", 0.5], [0.001, 0.05]),
            (["--discriminator-lr", 0.01], [0.001, 0.001]),
            (["--discriminator-lr", 0.0], [0.001, 0.0]),
            (["--discriminator", "off"], [0.001]),
        ],
        fast=2,
    ),
)
def test_discriminator_has_a_learning_rate_of_its_own_with_the_same_milestones(
    done: Run, distill_flags: list[str], run: Path, flags: list[object], rates: list[float]
) -> None:
    done(*distill_flags, *flags, "--output", run)  # 2 epochs: the milestone is epoch 1
    assert _group_rates(run) == pytest.approx(rates, rel=1e-12)


def test_the_default_rate_of_few_classes_is_shown_and_is_the_run_s_own(
    done: Run, run_cli: Run, distill_flags: list[str], run: Path
) -> None:
    shown = done(*distill_flags, "--epochs", 1, "--output", run).stderr
    assert "discriminator at learning rate 0.0001, the default below 100 classes" in shown
    assert json.loads((run / "config.json").read_text())["discriminator_lr"] == 1e-4
    again = done(*distill_flags, "--epochs", 1, "--output", run).stderr  # the same command
    assert "the run is finished" in again
    given = ["--discriminator-lr", 0.05, "--epochs", 1, "--output", run.with_name("given")]
    assert "discriminator at learning rate" not in done(*distill_flags, *given).stderr
    other = run_cli(*distill_flags, *given[2:])
    assert other.code == 2
    assert "(--discriminator-lr: 0.05 in the run, None in this command)" in other.stderr


def test_a_run_from_before_the_rule_continues_at_its_rate(
    done: Run, distill_flags: list[str], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--decay-milestones", 1, "--output", run]
    with monkeypatch.context() as before:
        before.setattr(DistillConfig, "resolved", lambda config, _: config)
        done(*distill_flags, *flags)
    assert json.loads((run / "config.json").read_text())["discriminator_lr"] is None
    shown = done("distill", "--resume", run, "--epochs", 3).stderr
    assert "--discriminator-lr was" not in shown
    assert _group_rates(run) == pytest.approx([0.001, 0.001], rel=1e-12)


# --- labels of other data -----------------------------------------------------------------------


def _remove(data: Path) -> str:
    (data / "train" / "bees" / "03.jpg").unlink()
    return "missing images with labels: 1 (bees/03.jpg)"


def _add(data: Path) -> str:
    shutil.copy(data / "train" / "bees" / "03.jpg", data / "train" / "bees" / "99.jpg")
    return "images without labels: 1 (bees/99.jpg)"


def _grow(data: Path) -> str:
    path = data / "train" / "bees" / "03.jpg"
    path.write_bytes(path.read_bytes() + b"\0")
    return "the same names, but other files"


def _rename_class(data: Path) -> str:
    for split in ("train", "val"):
        (data / split / "bees").rename(data / split / "wasps")
    return "only in one of them: bees, wasps"


def _add_class(data: Path) -> str:
    for split in ("train", "val"):
        shutil.copytree(data / split / "bees", data / split / "wasps")
    return "only in one of them: wasps"


def _change_val(data: Path) -> str:
    (data / "val" / "bees" / "03.jpg").unlink()
    return "val: missing images with labels: 1 (bees/03.jpg)"


@pytest.mark.parametrize("change", [_remove, _add, _grow, _rename_class, _add_class, _change_val])
def test_labels_of_other_data_are_refused_naming_what_differs(
    run_cli: Run,
    distill_flags: list[str],
    own_data: Path,
    run: Path,
    change: Callable[[Path], str],
) -> None:
    named = change(own_data)
    result = run_cli(*distill_flags, "--data-dir", own_data, "--output", run)
    assert result.code == 3
    assert named in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not run.exists()


@pytest.mark.parametrize("name", ["manifest.json", "plan.json", "train-00001.h5", "val-00000.h5"])
@pytest.mark.parametrize("how", ["flipped", "removed", "no longer whole"])
def test_damaged_labels_are_refused_naming_the_file(
    run_cli: Run,
    distill_flags: list[str],
    labels_dir: Path,
    tmp_path: Path,
    flipped_bit: Callable[..., None],
    name: str,
    how: str,
) -> None:
    labels = Path(shutil.copytree(labels_dir, tmp_path / "labels"))
    if how == "flipped":
        flipped_bit(labels / name, 100 if name.endswith("json") else 20)
    elif how == "no longer whole":
        (labels / name).write_bytes((labels / name).read_bytes()[:-1])
    else:
        (labels / name).unlink()
    result = run_cli(*distill_flags, "--labels", labels, "--output", tmp_path / "run")
    if name == "plan.json":  # the manifest repeats it
        assert result.code == 0
    else:
        assert (result.code, len(result.stderr.splitlines())) == (3, 1)
        assert name in result.stderr
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["train", "val"])
def test_damaged_labels_of_an_image_are_refused_when_they_are_read_naming_file_and_image(
    run_cli: Run,
    distill_flags: list[str],
    labels_dir: Path,
    tmp_path: Path,
    flipped_bit: Callable[..., None],
    split: str,
) -> None:
    labels = Path(shutil.copytree(labels_dir, tmp_path / "labels"))
    file = ShardFile(labels / f"{split}-00001.h5")
    flipped_bit(file.path, file.header["columns"]["labels"]["offset"] + 3)
    result = run_cli(*distill_flags, "--labels", labels, "--output", tmp_path / "run")
    assert result.code == 3
    last = result.stderr.splitlines()[-1]
    assert last.startswith("mealv2: ")
    assert str(file.path) in last
    assert repr(file.keys()[0]) in last


def test_unfinished_labels_are_refused(
    run_cli: Run, distill_flags: list[str], labels_dir: Path, tmp_path: Path
) -> None:
    labels = tmp_path / "labels"
    labels.mkdir()
    shutil.copy(labels_dir / "plan.json", labels)
    result = run_cli(*distill_flags, "--labels", labels, "--output", tmp_path / "run")
    assert result.code == 3
    assert "not finished" in result.stderr


# --- nothing to learn from ----------------------------------------------------------------------


def _one_line(result: Result) -> bool:
    return len(result.stderr.splitlines()) == 1 and result.stderr.startswith("mealv2: ")


def test_labels_of_no_image_at_all_are_refused(
    run_cli: Run,
    done: Run,
    precompute_flags: list[str],
    distill_flags: list[str],
    own_data: Path,
    tmp_path: Path,
) -> None:
    for path in (own_data / "train").glob("*/*"):
        path.write_bytes(b"")
    flags = ["--data-dir", own_data, "--on-bad-image", "skip"]
    result = run_cli(*precompute_flags, *flags, "--output", tmp_path / "labels")
    if result.code == 0:  # if stage one lets them pass, stage two may not
        labels = ["--labels", tmp_path / "labels", "--output", tmp_path / "run"]
        result = run_cli(*distill_flags, *flags, *labels)
    assert result.code in (1, 2, 3)
    assert "Traceback" not in result.stderr


def test_one_class_is_refused_with_a_discriminator(
    run_cli: Run,
    done: Run,
    precompute_flags: list[str],
    distill_flags: list[str],
    data_dir: Path,
    make_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    for split in ("train", "val"):
        shutil.copytree(data_dir / split / "ants", tmp_path / "data" / split / "ants")
    teacher, student = (make_model("test_resnet", seed=s, classes=("ants",)) for s in (1, 2))
    flags = ["--data-dir", tmp_path / "data"]
    labels = ["--output", tmp_path / "labels", "--topk", 1, "--teacher", f"test_resnet={teacher}"]
    done(*precompute_flags[:-4], *flags, *labels)
    start = ["--labels", tmp_path / "labels", "--initial-checkpoint", student]
    result = run_cli(*distill_flags, *flags, *start, "--output", tmp_path / "run")
    assert result.code == 2
    assert _one_line(result)
    assert "--discriminator" in result.stderr
