"""distill --method meal from a label set of each teacher: losses as online, resume, errors."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Result
from runs import as_killed_after, assert_same_end

Run = Callable[..., Result]
Events = Callable[[Path, str], list[dict[str, Any]]]
Flags = Callable[..., list[object]]

FIVE = ("test_resnet", "test_efficientnet", "test_byobnet", "test_convnext", "test_mambaout")
EXACT = ("--topk", "all", "--label-dtype", "float32")
PAD = ("--crop", "pad", "--padding", 4)
SOFT = ("--discriminator", "off")  # needs probabilities alone


@pytest.fixture(scope="module")
def teachers(make_model: Callable[..., Path]) -> list[str]:
    """`--teacher` of five networks of random weights."""
    made = {name: make_model(name, seed=seed) for seed, name in enumerate(FIVE, start=1)}
    return [word for name, path in made.items() for word in ("--teacher", f"{name}={path}")]


@pytest.fixture(scope="module")
def label(data_dir: Path) -> Flags:
    """A function: `precompute` of padded crops, all but teachers and --output."""

    def words(*more: object) -> list[object]:
        settings = {"--data-dir": data_dir, "--img-size": 32, "--num-views": 1, "--view-seed": 3}
        settings |= {"--batch-size": 16, "--workers": 0}
        return ["precompute", *(word for item in settings.items() for word in item), *PAD, *more]

    return words


@pytest.fixture(scope="module")
def sets(
    done: Run, label: Flags, teachers: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A label set of each of five teachers: one view, exact, with logits. Not to be changed."""
    out = tmp_path_factory.mktemp("sets") / "labels"
    words = [*EXACT, "--store-logits", "--store", "per-teacher", *teachers]
    done(*label(*words), "--output", out)
    return out


@pytest.fixture(scope="module")
def train(data_dir: Path, student_dir: Path) -> Flags:
    """A function: `distill --method meal`, all but where its labels come from and --output."""

    def words(*more: object) -> list[object]:
        settings = {"--data-dir": data_dir, "--model": "test_resnet", "--epochs": 1}
        settings |= {"--initial-checkpoint": student_dir, "--batch-size": 8, "--workers": 0}
        settings |= {"--log-interval": 1, "--lr": 0.05}
        given = [word for item in settings.items() for word in item]
        return ["distill", "--method", "meal", *given, *more]

    return words


@pytest.fixture(scope="module")
def online(teachers: list[str]) -> list[object]:
    """The teachers in the loop, on the views of the label sets."""
    return ["--online", *teachers, "--img-size", 32, "--view-seed", 3, *PAD]


# --- as online ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "close"),
    [
        ([*SOFT], 1e-6),
        (["--teacher-selection", "round-robin", "--block-loss", "l2_soft", *SOFT], 1e-6),
        # logits are stored in float16
        (["--teacher-selection", "all", "--discriminator", "official", "--eta", 0.5], 2e-4),
        pytest.param(["--block-loss", "l1", "--cutmix", 1.0], 2e-4, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_exact_labels_give_the_losses_of_teachers_in_the_loop(
    done: Run,
    train: Flags,
    online: list[object],
    sets: Path,
    tmp_path: Path,
    events: Events,
    more: list[object],
    close: float,
) -> None:
    more = [*more, "--val-split", "none"]
    done(*train("--labels", sets, *more, "--output", tmp_path / "stored"))
    done(*train(*online, *more, "--output", tmp_path / "online"))
    found, expected = (events(tmp_path / name, "train") for name in ("stored", "online"))
    assert len(found) == len(expected) == 5
    assert found[0]["labels_stored"] == 8
    names = [name for name in expected[0] if name.endswith("loss")]
    assert len(names) == (2 if "off" in more else 3)
    for event, exact in zip(found, expected, strict=True):
        for name in names:
            assert event[name] == pytest.approx(exact[name], rel=close)
    if "all" not in more:
        assert len({round(event["similarity_loss"], 4) for event in found}) >= 4
    weights = [
        torch.load(each / "checkpoints" / "step-00000005.pt", weights_only=True)
        for each in (tmp_path / "stored", tmp_path / "online")
    ]
    for name, value in weights[1]["state_dict"].items():
        torch.testing.assert_close(weights[0]["state_dict"][name], value, rtol=1e-3, atol=1e-4)


def test_five_teachers_train_from_the_command_line_and_their_mean_trains_meal_v2(
    done: Run, train: Flags, sets: Path, tmp_path: Path
) -> None:
    run = tmp_path / "meal"
    result = done(*train("--labels", sets, "--output", run))
    assert "teachers one drawn a batch, from stored labels" in result.stderr
    assert all(f"teacher {name} " in result.stderr for name in FIVE)
    report = result.report
    assert report["teacher_forwards"] == 0
    assert {"top1", "agreement", "kl"} <= report.keys()
    assert [each["model"] for each in report["labels"]["teachers"]] == list(FIVE)
    mean = tmp_path / "mean"
    done("labels", "merge", sets, "--output", mean, *EXACT, "--store-logits")
    words = train("--labels", mean, "--output", tmp_path / "mealv2")
    v2 = done(*(word for word in words if word not in ("--method", "meal"))).report
    assert v2["steps"] == report["steps"] == 5


def test_agreement_is_that_with_the_mean_of_all_teachers(
    done: Run, train: Flags, online: list[object], sets: Path, tmp_path: Path
) -> None:
    """At a learning rate of 0 the student stays what it is."""
    still = ["--lr", 0, *SOFT]
    stored = done(*train("--labels", sets, *still, "--output", tmp_path / "stored")).report
    expected = done(*train(*online, *still, "--output", tmp_path / "online")).report
    for name in ("top1", "agreement", "kl"):
        assert stored[name] == pytest.approx(expected[name], rel=1e-5)


def test_labels_of_a_few_classes_train_too(
    done: Run, label: Flags, train: Flags, teachers: list[str], tmp_path: Path, events: Events
) -> None:
    out = tmp_path / "labels"
    done(
        *label("--topk", 2, "--store-logits", "--store", "per-teacher", *teachers[:4]),
        "--output",
        out,
    )
    done(*train("--labels", out, "--block-loss", "l2", "--output", tmp_path / "run"))
    assert all(event["loss"] > 0 for event in events(tmp_path / "run", "train"))


def test_a_set_of_one_teacher_needs_no_folder_of_sets(
    done: Run, train: Flags, sets: Path, run: Path
) -> None:
    labels = ["--labels", sets / "teacher-0", *SOFT, "--val-split", "none"]
    assert done(*train(*labels, "--output", run)).report["steps"] == 5


def test_a_dry_run_writes_nothing(done: Run, train: Flags, sets: Path, run: Path) -> None:
    report = done(*train("--labels", sets, "--dry-run", "--output", run)).report
    assert (report["dry_run"], report["steps"]) == (True, 5)
    assert not run.exists()


# --- resume -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(done: Run, train: Flags, sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint of every step kept. Not to be changed."""
    run = tmp_path_factory.mktemp("finished") / "run"
    flags = ["--labels", sets, "--discriminator", "adversarial", "--model-ema", "--epochs", 2]
    flags += ["--recovery-interval", 1, "--checkpoint-hist", 99]
    done(*train(*flags, "--output", run))
    return run


@pytest.mark.parametrize("step", [3, pytest.param(7, marks=pytest.mark.slow)])
def test_killed_after_a_checkpoint_it_ends_in_the_same_bits(
    done: Run, finished: Path, run: Path, step: int
) -> None:
    as_killed_after(finished, step, run)
    done("distill", "--resume", run)
    assert_same_end(run, finished)


def test_a_resumed_run_refuses_the_labels_of_other_teachers(
    done: Run,
    run_cli: Run,
    train: Flags,
    label: Flags,
    teachers: list[str],
    sets: Path,
    tmp_path: Path,
) -> None:
    own, run = Path(shutil.copytree(sets, tmp_path / "own")), tmp_path / "finished"
    flags = ["--recovery-interval", 1, "--checkpoint-hist", 99, "--val-split", "none"]
    done(*train("--labels", own, *flags, "--output", run))
    resumed = tmp_path / "run"
    as_killed_after(run, 3, resumed)
    other = own / "teacher-1"
    shutil.rmtree(other)
    done(*label(*EXACT, "--store-logits", *teachers[2:4], "--view-seed", 3), "--output", other)
    shutil.copytree(other, own / "new")
    shutil.rmtree(own / "teacher-0")
    (own / "new").rename(own / "teacher-0")
    result = run_cli("distill", "--resume", resumed)
    assert result.code == 3
    assert "labels are not those this run started with" in result.stderr


# --- missing labels -----------------------------------------------------------------------------


@pytest.fixture
def more_images(data_dir: Path, tmp_path: Path) -> Path:
    """The tree with three images that no set labels."""
    own = Path(shutil.copytree(data_dir, tmp_path / "own-data"))
    for number in range(3):
        shutil.copy(own / "train/bees/03.jpg", own / f"train/bees/9{number}.jpg")
    return own


def test_images_without_labels_stop_the_run_or_are_skipped(
    done: Run, run_cli: Run, train: Flags, sets: Path, more_images: Path, run: Path, events: Events
) -> None:
    flags = ["--labels", sets, "--data-dir", more_images, *SOFT, "--output", run]
    result = run_cli(*train(*flags))
    assert result.code == 3
    assert "images without labels: 3" in result.stderr
    assert "choose what to do with them: --missing skip" in result.stderr
    result = done(*train(*flags, "--missing", "skip"))
    assert "3 images are not in the label set; they are skipped" in result.stderr
    assert sum(event["labels_stored"] for event in events(run, "train")) == 36


# --- errors, before the first step --------------------------------------------------------------


@pytest.fixture(scope="module")
def soft_sets(
    done: Run, label: Flags, teachers: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Label sets of two teachers without logits, of the val split of nothing. Not to be changed."""
    out = tmp_path_factory.mktemp("soft") / "labels"
    words = [*EXACT, "--store", "per-teacher", "--val-split", "none", *teachers[:4]]
    done(*label(*words), "--output", out)
    return out


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        ([], ["--discriminator official needs logits", "--store-logits", "--discriminator off"]),
        (
            ["--block-loss", "l1", *SOFT],
            ["--block-loss l1 needs logits", "or use --block-loss l1_soft"],
        ),
        (
            ["--block-loss", "l2"],
            [
                "--discriminator official and --block-loss l2 need logits",
                "off and --block-loss l2_so",
            ],
        ),
    ],
)
def test_labels_without_logits_are_refused_by_losses_that_need_them(
    run_cli: Run, train: Flags, soft_sets: Path, run: Path, more: list[object], parts: list[str]
) -> None:
    result = run_cli(*train("--labels", soft_sets, *more, "--output", run))
    assert result.code == 2
    assert all(part in result.stderr.splitlines()[-1] for part in parts), result.stderr
    assert not run.exists()


def test_labels_without_logits_train_by_probabilities(
    done: Run, train: Flags, soft_sets: Path, run: Path
) -> None:
    flags = ["--labels", soft_sets, *SOFT, "--val-split", "none", "--output", run]
    assert done(*train(*flags)).report["steps"] == 5


def test_the_mean_of_teachers_is_refused(
    done: Run, run_cli: Run, train: Flags, soft_sets: Path, tmp_path: Path
) -> None:
    done("labels", "merge", soft_sets, "--output", tmp_path / "mean")
    result = run_cli(*train("--labels", tmp_path / "mean", *SOFT, "--output", tmp_path / "run"))
    assert result.code == 2
    assert "has the mean of 2 teachers" in result.stderr
    assert "precompute --store per-teacher" in result.stderr


def test_other_commands_ask_for_the_mean_of_the_sets(
    run_cli: Run, train: Flags, soft_sets: Path, run: Path
) -> None:
    words = train("--labels", soft_sets, "--output", run)
    for command in (
        [word for word in words if word not in ("--method", "meal")],
        ["labels", "info", soft_sets],
    ):
        result = run_cli(*command)
        assert result.code == 2
        assert f"mealv2 labels merge {soft_sets} --output" in result.stderr.splitlines()[-1]
        assert "has a label set of each of 2 teachers" in result.stderr


def test_a_missing_set_is_named(
    run_cli: Run, train: Flags, soft_sets: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(soft_sets, tmp_path / "own"))
    shutil.rmtree(own / "teacher-1")
    result = run_cli(*train("--labels", own, *SOFT, "--output", tmp_path / "run"))
    assert result.code == 3
    assert f"{own / 'teacher-1'} is missing" in result.stderr


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--view-seed", 4], "different train view seed (3 and 4)"),
        (["--num-views", 2], "different num_views (1 and 2)"),
        (["--hflip", 0], "different train view"),
        (["--val-split", "val"], "different val split (None and val)"),
    ],
    ids=str,
)
def test_sets_of_other_views_are_refused_naming_the_difference(
    done: Run,
    run_cli: Run,
    train: Flags,
    label: Flags,
    teachers: list[str],
    soft_sets: Path,
    tmp_path: Path,
    more: list[object],
    named: str,
) -> None:
    own = Path(shutil.copytree(soft_sets, tmp_path / "own"))
    shutil.rmtree(own / "teacher-1")
    words = [*EXACT, "--val-split", "none", *more, *teachers[2:4]]
    done(*label(*words), "--output", own / "teacher-1")
    result = run_cli(*train("--labels", own, *SOFT, "--output", tmp_path / "run"))
    assert result.code == 3
    assert named in result.stderr.splitlines()[-1]
    assert f"{own / 'teacher-0'} and {own / 'teacher-1'}" in result.stderr


def test_sets_of_other_pictures_of_the_same_names_are_refused(
    done: Run,
    run_cli: Run,
    train: Flags,
    label: Flags,
    teachers: list[str],
    data_dir: Path,
    soft_sets: Path,
    tmp_path: Path,
) -> None:
    own = Path(shutil.copytree(soft_sets, tmp_path / "own"))
    data = Path(shutil.copytree(data_dir, tmp_path / "data"))
    changed = data / "train/ants/00.jpg"
    changed.write_bytes(changed.read_bytes()[:-3] + b"\0\xff\xd9")  # same size, another file
    shutil.rmtree(own / "teacher-1")
    words = [*EXACT, "--val-split", "none", "--data-dir", data, *teachers[2:4]]
    done(*label(*words), "--output", own / "teacher-1")
    result = run_cli(*train("--labels", own, *SOFT, "--output", tmp_path / "run"))
    assert result.code == 3
    assert "different pictures of the same names (ants/00.jpg)" in result.stderr


def test_a_choice_between_one_teacher_has_no_effect(
    run_cli: Run, train: Flags, soft_sets: Path, run: Path
) -> None:
    flags = ["--labels", soft_sets / "teacher-0", "--teacher-selection", "all", *SOFT]
    result = run_cli(*train(*flags, "--output", run))
    assert result.code == 2
    assert "--teacher-selection has no effect with labels of one teacher" in result.stderr
