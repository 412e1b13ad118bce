"""distill --method meal: blocks and logits of several teachers, its errors, resume to the bit."""

import json
import random
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Result, Spawned, same_state
from mealv2.meal.teachers import drawn_teachers
from mealv2.storage.atomic import file_sha256
from runs import as_killed_after, assert_same_end, states

Run = Callable[..., Result]
Events = Callable[[Path, str], list[dict[str, Any]]]

IMG_SIZE = 32
# Of equal lists: a stem, four stages, the logits. The others have four stages and the logits.
EQUAL = ("test_resnet", "test_efficientnet", "test_byobnet")
FIVE = (*EQUAL, "test_convnext", "test_mambaout")
# Four stages and the logits, as in MEAL's example of VGG-19.
BLOCKS = ["--out-layer", "1,2,3,4,5", "--out-dims", "64,32,16,8", "--pool", "avg"]
BLOCKS += ["--gamma", "0.001,0.01,0.05,0.1,1", "--eta", "1,1,1,0.5,1"]


@pytest.fixture(scope="session")
def meal_teachers(make_model: Callable[..., Path]) -> dict[str, Path]:
    """Five teachers of random weights, by name. Not to be changed."""
    return {name: make_model(name, seed=seed) for seed, name in enumerate(FIVE, start=1)}


@pytest.fixture(scope="session")
def meal_flags(
    data_dir: Path, student_dir: Path, meal_teachers: dict[str, Path]
) -> Callable[..., list[str]]:
    """A function: `distill --method meal` with some teachers, all but --output."""

    def flags(names: tuple[str, ...], *more: object) -> list[str]:
        settings = {
            "--data-dir": data_dir,
            "--model": "test_resnet",
            "--initial-checkpoint": student_dir,
            "--img-size": IMG_SIZE,
            "--epochs": 2,
            "--batch-size": 8,
            "--workers": 0,
            "--log-interval": 1,
        }
        found = [str(part) for item in settings.items() for part in item]
        for name in names:
            found += ["--teacher", f"{name}={meal_teachers[name]}"]
        return ["distill", "--method", "meal", "--online", *found, *map(str, more)]

    return flags


# --- end to end ---------------------------------------------------------------------------------


def test_blocks_of_several_teachers_train_a_student_with_a_discriminator_of_each(
    done: Run, meal_flags: Callable[..., list[str]], run: Path, events: Events
) -> None:
    flags = [*BLOCKS, "--discriminator", "official"]
    report = done(*meal_flags(EQUAL, *flags, "--output", run)).report
    assert report["steps"] == 10
    assert report["teacher_forwards"] == 15 + 2 * 36  # validation, and every view of two epochs
    assert {"top1", "top5", "agreement"} <= report.keys()
    for event in events(run, "train"):
        blocks = [event[f"block_{number}_loss"] for number in range(5)]
        gammas = (0.001, 0.01, 0.05, 0.1, 1)
        weighted = sum(g * loss for g, loss in zip(gammas, blocks, strict=True))
        assert event["similarity_loss"] == pytest.approx(weighted, rel=1e-4)
        assert event["loss"] == pytest.approx(
            event["similarity_loss"] + event["discriminator_loss"], rel=1e-4
        )
        assert event["discriminator_gradient_ratio"] > 0
    (*_, state) = states(run)
    shapes = [state["extra"]["discriminator"][f"{n}.layers.0.weight"].shape for n in range(5)]
    assert shapes == [(32, 64), (16, 32), (8, 16), (4, 8), (1, 3)]


def test_five_teachers_of_other_depths_train_a_student_by_their_logits(
    done: Run, meal_flags: Callable[..., list[str]], run: Path, events: Events
) -> None:
    flags = ["--discriminator", "adversarial", "--teacher-selection", "round-robin"]
    report = done(*meal_flags(FIVE, *flags, "--output", run)).report
    assert report["steps"] == 10
    losses = [event["similarity_loss"] for event in events(run, "train")]
    assert len(set(losses)) == 10
    assert all("block_0_loss" not in event for event in events(run, "train"))


@pytest.mark.slow
def test_vgg_resnet_and_preact_of_the_original_teach_a_vgg_by_all_of_their_blocks(
    done: Run, data_dir: Path, make_model: Callable[..., Path], run: Path, events: Events
) -> None:
    names = ("cifar_vgg19_bn", "cifar_resnet18", "cifar_preactresnet18")
    settings = {"--data-dir": data_dir, "--model": "cifar_vgg19_bn", "--img-size": IMG_SIZE}
    settings |= {"--epochs": 1, "--batch-size": 12, "--workers": 0, "--val-split": "none"}
    settings |= {"--out-layer": "0,1,2,3,4", "--out-dims": "64,32,16,8,3", "--log-interval": 1}
    settings |= {"--teacher-selection": "round-robin", "--discriminator": "official"}
    flags = [part for item in settings.items() for part in item]
    for name in names:
        flags += ["--teacher", f"{name}={make_model(name)}"]
    online = ["distill", "--method", "meal", "--online", "--no-pretrained"]
    assert done(*online, *flags, "--output", run).report["steps"] == 3
    events_of_steps = events(run, "train")
    assert len(events_of_steps) == 3
    assert all(event["block_3_loss"] > 0 for event in events_of_steps)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["--amp"],
        ["--cutmix", 1.0],
        ["--mixup", 0.5, "--mixup-target", "teachers"],
        ["--views-per-image", 2, "--teacher-selection", "all"],
        ["--no-align", "--out-layer", "-2,-1"],
    ],
    ids=str,
)
def test_what_other_methods_have_works_with_it(
    done: Run, meal_flags: Callable[..., list[str]], run: Path, events: Events, more: list[object]
) -> None:
    blocks = [] if "--no-align" in more else ["--out-layer", "-3,-1", "--out-dims", 8]
    teachers = ("test_resnet",) if "--no-align" in more else ("test_resnet", "test_byobnet")
    done(*meal_flags(teachers, *blocks, *more, "--val-split", "none", "--output", run))
    assert all(event["block_1_loss"] > 0 for event in events(run, "train"))


@pytest.mark.slow
def test_a_dry_run_does_its_steps_and_writes_nothing(
    done: Run, meal_flags: Callable[..., list[str]], run: Path
) -> None:
    flags = ["--out-layer", "-2,-1", "--out-dims", 8, "--dry-run", "--output", run]
    assert done(*meal_flags(("test_byobnet",), *flags)).report["steps"] == 10
    assert not run.exists()


@pytest.mark.slow
def test_networks_of_other_depths_pair_from_their_ends(
    done: Run, meal_flags: Callable[..., list[str]], run: Path
) -> None:
    flags = ["--out-layer", "-3,-2,-1", "--out-dims", "12,6", "--block-loss", "l2_soft"]
    flags += ["--discriminator", "off", "--teacher-selection", "all", "--epochs", 1]
    done(*meal_flags(("test_convnext", "test_byobnet"), *flags, "--output", run))


@pytest.mark.slow
def test_micro_batches_have_the_teacher_of_their_step(
    done: Run, meal_flags: Callable[..., list[str]], tmp_path: Path, events: Events
) -> None:
    """test_convnext has no batch normalisation: the mean of micro-batches is that of the batch."""
    losses = []
    for number in (1, 2):
        run = tmp_path / str(number)
        flags = ["--grad-accum-steps", number, "--discriminator", "off", "--epochs", 1]
        flags += ["--val-split", "none", "--lr", 0, "--model", "test_convnext", "--no-pretrained"]
        given = meal_flags(FIVE, *flags, "--output", run)
        place = given.index("--initial-checkpoint")
        done(*given[:place], *given[place + 2 :])
        losses.append([event["loss"] for event in events(run, "train")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# --- errors, before the first step --------------------------------------------------------------


@pytest.mark.parametrize(
    ("teachers", "flags", "parts"),
    [
        (
            ("test_convnext",),
            ["--out-layer", "0,1", "--out-dims", "8,8"],
            ["student test_resnet has 5 blocks", "teacher test_convnext has 4"],
        ),
        (
            ("test_efficientnet",),
            ["--out-layer", "2,-1", "--no-align"],
            ["student test_resnet has 768 values", "teacher test_efficientnet has 512"],
        ),
        (("test_byobnet",), ["--out-layer", "6,-1", "--out-dims", "8"], ["positions 0 to 5"]),
        (("test_byobnet",), ["--out-layer", "5,-1", "--out-dims", "8"], ["names a block twice"]),
        (("test_byobnet",), ["--out-layer", "4,5"], ["--out-dims is needed"]),
        (
            ("test_byobnet",),
            ["--out-layer", "4,5", "--out-dims", "8,10"],
            ["--out-dims 10 at --out-layer 5: the logits are 3"],
        ),
    ],
)
def test_blocks_that_do_not_pair_are_refused_naming_networks_and_sizes(
    run_cli: Run,
    meal_flags: Callable[..., list[str]],
    run: Path,
    teachers: tuple[str, ...],
    flags: list[str],
    parts: list[str],
) -> None:
    result = run_cli(*meal_flags(teachers, *flags, "--output", run))
    assert result.code == 2
    assert all(part in result.stderr.splitlines()[-1] for part in parts), result.stderr
    assert not run.exists()


# --- resume -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(
    done: Run, meal_flags: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run with teachers in train mode, a checkpoint of every step kept. Not to be changed."""
    run = tmp_path_factory.mktemp("finished") / "run"
    flags = [*BLOCKS, "--teacher-mode", "train", "--discriminator", "official", "--lr", 0.05]
    flags += ["--recovery-interval", 1, "--checkpoint-hist", 99]
    done(*meal_flags(EQUAL, *flags, "--output", run))
    return run


@pytest.mark.parametrize("step", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_killed_after_a_checkpoint_it_ends_in_the_same_bits(
    done: Run, finished: Path, run: Path, step: int
) -> None:
    as_killed_after(finished, step, run)
    done("distill", "--resume", run)
    assert_same_end(run, finished)


def test_teachers_in_train_mode_drift_as_often_as_they_are_drawn_and_checkpoints_keep_it(
    finished: Path,
) -> None:
    first, *_, last = (state["targets"] for state in states(finished))
    names = [name for name in last if name.endswith("bn1.num_batches_tracked")]
    counts = {name.split(".")[1]: int(last[name] - first[name]) for name in names}
    drawn = Counter(drawn_teachers(3, "random", seed=0, step=s)[0] for s in range(2, 11))
    assert counts == {number: drawn[int(number)] for number in counts}
    assert len(counts) >= 2
    means = [name for name in last if name.endswith("running_mean")]
    assert any(not torch.equal(first[name], last[name]) for name in means)


def test_teachers_in_eval_mode_leave_nothing_in_a_checkpoint(
    done: Run, meal_flags: Callable[..., list[str]], run: Path
) -> None:
    flags = ["--epochs", 1, "--val-split", "none", "--discriminator", "off"]
    done(*meal_flags(("test_byobnet",), *flags, "--output", run))
    assert [state["targets"] for state in states(run)] == [{}]


def steps_done(run: Path) -> int:
    """Return the last step that the run has logged (half a line counts as none)."""
    path, steps = run / "metrics.jsonl", [0]
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            steps.append(json.loads(line).get("step", 0))
        except ValueError:
            continue
    return max(steps)


@pytest.mark.slow
def test_killed_five_times_at_random_steps_it_ends_in_the_same_bits(
    spawn: Callable[..., Spawned],
    meal_flags: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    left_alone, killed = tmp_path / "left-alone", tmp_path / "killed"
    flags = [*BLOCKS, "--teacher-mode", "train", "--discriminator", "adversarial"]
    flags += ["--epochs", 12, "--recovery-interval", 3, "--val-split", "none", "--model-ema"]
    flags = meal_flags(EQUAL, *flags)
    result = spawn(*flags, "--output", left_alone).result(deadline_s=600)
    assert result.code == 0, result.stderr
    total = result.report["steps"]
    targets = sorted(random.Random(2019).sample(range(1, total - 15), 5))
    for target in targets:
        go_on = ["distill", "--resume", killed]
        process = spawn(*(go_on if steps_done(killed) else [*flags, "--output", killed]))
        process.until(lambda at=target: steps_done(killed) >= at, deadline_s=300)  # type: ignore[misc]
        process.signal(signal.SIGKILL)
        assert process.result().code == -signal.SIGKILL
    assert spawn("distill", "--resume", killed).result(deadline_s=600).code == 0
    weights = Path("student") / "model.safetensors"
    sha256 = {run.name: file_sha256(run / weights) for run in (left_alone, killed)}
    with capsys.disabled():
        print(f"\nkilled at steps {targets} of {total}: {sha256}")
    assert sha256["killed"] == sha256["left-alone"]
    assert same_state(states(killed)[-1], states(left_alone)[-1])
    assert (killed / "summary.csv").read_text() == (left_alone / "summary.csv").read_text()
