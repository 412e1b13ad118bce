"""pipeline.transfer_detection: detectors through the one loop, resumed, stopped, measured."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from coco import draw_coco

from conftest import Result
from mealv2.models.detector import load_detector
from pipeline.config import TransferDetectionConfig
from pipeline.training.optimizer import create_schedule
from pipeline.training.run_folder import checkpoint_paths

Run = Callable[..., Result]
Events = Callable[[Path, str], list[dict[str, Any]]]
Weights = Callable[[Path], dict[str, bytes]]


@pytest.fixture(scope="session")
def coco_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six training and three validation images of shapes, in COCO's format."""
    return draw_coco(tmp_path_factory.mktemp("coco") / "set")


@pytest.fixture(scope="session")
def flags(coco_dir: Path) -> list[object]:
    """`mealv2 transfer-detection` on tiny images, all but the start and --output."""
    words = "--batch-size 4 --img-size 48 --pyramid-channels 8 --workers 0 --iterations 5"
    return ["transfer-detection", "--data-dir", coco_dir, *words.split()]


@pytest.fixture(scope="session")
def start(teacher_dirs: dict[str, Path]) -> list[Any]:
    """``--model`` of a classifier that was trained for some steps."""
    return ["--model", teacher_dirs["test_resnet"]]


def test_defaults_are_detectron2s(config_of: Run, coco_dir: Path) -> None:
    config: Any = config_of("transfer-detection", "--data-dir", coco_dir, "--model", "m")
    assert (config.iterations, config.batch_size, config.lr) == (90_000, 16, 0.01)
    assert (config.opt, config.momentum, config.weight_decay) == ("sgd", 0.9, 1e-4)
    assert (config.decay_steps, config.decay_rate) == ((60_000, 80_000), 0.1)
    assert (config.warmup_steps, config.warmup_factor) == (1000, 0.001)
    assert config.train_sizes == (640, 672, 704, 736, 768, 800)
    assert (config.img_size, config.longest, config.hflip) == (800, 1333, 0.5)
    assert (config.score_threshold, config.nms_threshold, config.max_detections) == (0.05, 0.5, 100)
    assert config.mode == "freeze-first-stage"


def test_the_schedule_follows_iterations_and_image_size(config_of: Run, coco_dir: Path) -> None:
    words = ["--model", "m", "--iterations", 900, "--img-size", 400]
    config: Any = config_of("transfer-detection", "--data-dir", coco_dir, *words)
    assert config.decay_steps == (600, 800)
    assert config.warmup_steps == 90
    assert config.train_sizes == (320, 336, 352, 368, 384, 400)
    assert config.longest == 666


def test_learning_rates_are_those_of_detectron2(coco_dir: Path) -> None:
    config = TransferDetectionConfig(data_dir=coco_dir, model="m", lr=0.01)
    weights = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weights], lr=0.01)
    per_epoch = 7330  # 117,266 images in batches of 16
    schedule = create_schedule(config, optimizer, updates_per_epoch=per_epoch)
    for step in (0, 1, 500, 999, 1000, 59_999, 60_000, 79_999, 80_000, 89_999):
        schedule.set_lr(step // per_epoch, step % per_epoch)
        alpha = step / 1000
        warmup = 1.0 if step >= 1000 else 0.001 * (1 - alpha) + alpha
        falls = sum(step >= milestone for milestone in (60_000, 80_000))
        found = optimizer.param_groups[0]["lr"]
        assert found == pytest.approx(0.01 * warmup * 0.1**falls, rel=1e-9), step


def test_a_run_has_its_iterations_its_report_and_its_detector(
    done: Run, flags: list[object], start: list[object], run: Path, events: Events
) -> None:
    report = done(*flags, *start, "--log-interval", 1, "--output", run).report
    # 6 images in batches of 4: two steps an epoch, the last epoch ends after one
    assert (report["steps"], report["epochs"]) == (5, 3)
    trained = events(run, "train")
    assert [event["step"] for event in trained] == [1, 2, 3, 4, 5]
    assert {"loss", "classification_loss", "box_loss"} <= trained[0].keys()
    assert report["ap"] >= 0
    assert report == json.loads((run / "report.json").read_text())
    assert len(events(run, "validation")) == 3  # none of the initial weights
    assert "epochs" not in json.loads((run / "config.json").read_text())
    model = load_detector(run)
    assert model.num_classes == 3
    again = done(*flags, *start, "--log-interval", 1, "--output", run, "--auto-resume").report
    assert again == report


@pytest.mark.parametrize("mode", ["fine-tune", "freeze-first-stage"])
def test_a_run_resumed_within_an_epoch_ends_with_the_same_bits(
    done: Run,
    flags: list[object],
    start: list[Any],
    tmp_path: Path,
    weights: Weights,
    mode: str,
) -> None:
    words = ["--mode", mode, "--recovery-interval", 1, "--checkpoint-hist", "all"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    model = shutil.copytree(start[1], tmp_path / "model")
    done(*flags, "--model", model, *words, "--output", whole)
    shutil.rmtree(model)  # a resumed run needs it no more
    shutil.copytree(whole, parts)
    (parts / "report.json").unlink()
    for path in checkpoint_paths(parts)[3:]:  # stopped after step 3, the first of epoch 2
        path.unlink()
    shutil.rmtree(parts / "student")
    report = done("transfer-detection", "--resume", parts).report
    assert report["steps"] == 5
    assert weights(parts) == weights(whole)
    assert len(checkpoint_paths(parts)) == len(checkpoint_paths(whole))


def test_freezing_keeps_the_first_stage_and_fine_tuning_changes_it(
    done: Run, flags: list[object], start: list[object], tmp_path: Path, weights: Weights
) -> None:
    done(*flags, *start, "--lr", 0, "--output", tmp_path / "start")
    before = weights(tmp_path / "start")
    first = {n for n in before if n.startswith(("backbone.body.conv1", "backbone.body.layer1"))}
    trained = {n for n in first if n.endswith(("conv1.0.weight", "conv1.weight"))}
    assert trained
    for mode in ("freeze-first-stage", "fine-tune"):
        done(*flags, *start, "--mode", mode, "--output", tmp_path / mode)
        after = weights(tmp_path / mode)
        changed = {name for name in before if before[name] != after[name]}
        assert {n for n in changed if n.startswith("head.")}
        assert trained & changed == (set() if mode == "freeze-first-stage" else trained)
        assert not {n for n in changed if "bn" in n or "running" in n}


def test_changed_annotations_are_noticed_on_resume(
    done: Run, run_cli: Run, flags: list[object], start: list[object], tmp_path: Path
) -> None:
    folder = draw_coco(tmp_path / "set")
    words = [*flags[:2], folder, *flags[3:]]
    done(*words, *start, "--output", tmp_path / "run")
    path = folder / "annotations/instances_train.json"
    found = json.loads(path.read_text())
    found["annotations"][0]["bbox"][2] -= 1
    path.write_text(json.dumps(found))
    (tmp_path / "run/report.json").unlink()
    result = run_cli("transfer-detection", "--resume", tmp_path / "run")
    assert result.code == 1
    assert "are not those this run started with" in result.stderr


def test_a_bad_image_stops_or_is_skipped(
    done: Run, run_cli: Run, flags: list[object], start: list[object], tmp_path: Path
) -> None:
    folder = draw_coco(tmp_path / "set")
    (folder / "train/000101.png").write_bytes(b"no image")
    (folder / "val/000101.png").write_bytes(b"no image")
    words = [*flags[:2], folder, *flags[3:], *start]
    result = run_cli(*words, "--output", tmp_path / "stops")
    assert result.code == 1
    assert "000101.png" in result.stderr
    skipped = done(*words, "--on-bad-image", "skip", "--output", tmp_path / "skips")
    assert skipped.report["num_images"] == 2


def test_no_validation_is_possible(
    done: Run, flags: list[object], start: list[object], run: Path
) -> None:
    report = done(*flags, *start, "--val-split", "none", "--output", run).report
    assert "ap" not in report


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--epochs 3", "No such option"),
        ("--mixup 0.2", "No such option"),
        ("--sched cosine", "No such option"),
        ("--no-pretrained", "--mode freeze-first-stage freezes trained weights"),
        ("--decay-iterations 5", "--decay-iterations 5 has no effect in 5 iterations"),
        ("--warmup-iterations 5", "--warmup-iterations 5 leaves nothing"),
        ("--warmup-iterations 0 --warmup-factor 0.1", "--warmup-factor has no effect"),
        ("--max-size 40", "--max-size 40 is below --img-size 48"),
        ("--train-size 100", "--train-size must be from 1 to --max-size 80: 100"),
        ("--mode frozen", "'frozen' is not one of"),
        ("--seeds 2", "--output is required"),
        ("--val-split test", "has no split test"),
    ],
)
def test_a_wrong_flag_is_one_line(
    run_cli: Run, flags: list[object], words: str, named: str
) -> None:
    result = run_cli(*flags, "--model", "test_resnet", *words.split())
    assert result.code == 2
    (line,) = result.stderr.splitlines()
    assert named in line


def test_a_fixed_setting_in_a_config_file_is_named(
    run_cli: Run, flags: list[object], tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"mixup": 0.2}')
    result = run_cli(*flags, "--model", "test_resnet", "--config", path)
    assert result.code == 2
    assert "unknown setting 'mixup'" in result.stderr


def test_missing_pycocotools_is_said_first(
    run_cli: Run, flags: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.command_line.paths.find_spec", lambda name: None)
    result = run_cli(*flags, "--model", "test_resnet")
    assert result.code == 2
    assert "pip install pycocotools" in result.stderr


def test_other_categories_of_the_validation_split_are_an_error(
    run_cli: Run, flags: list[object], start: list[object], tmp_path: Path
) -> None:
    folder = draw_coco(tmp_path / "set")
    path = folder / "annotations/instances_val.json"
    path.write_text(path.read_text().replace("triangle", "circle"))
    result = run_cli(*flags[:2], folder, *flags[3:], *start, "--output", tmp_path / "run")
    assert result.code == 2
    assert "has other categories than" in result.stderr


def test_a_detector_is_not_evaluated_as_a_classifier(
    done: Run, run_cli: Run, flags: list[object], start: list[object], run: Path, data_dir: Path
) -> None:
    done(*flags, *start, "--output", run)
    result = run_cli("evaluate", "--data-dir", data_dir, "--checkpoint", run)
    assert result.code == 2
    assert "is a detector of `mealv2 transfer-detection`" in result.stderr


@pytest.mark.slow
def test_shapes_are_learned_by_heart(done: Run, tmp_path: Path, run: Path) -> None:
    folder = draw_coco(tmp_path / "set", splits={"train": 3})
    words = (
        "--model test_resnet --no-pretrained --mode fine-tune --val-split train --hflip 0 "
        "--img-size 96 --train-size 96 --pyramid-channels 64 --batch-size 3 --workers 0 "
        "--opt adamw --lr 0.0005 --iterations 220 --decay-iterations 195 --val-interval 220"
    )
    report = done(
        "transfer-detection", "--data-dir", folder, *words.split(), "--output", run
    ).report
    assert report["ap50"] > 80
