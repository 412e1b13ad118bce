"""pipeline.evaluate: the figures of a run again, in total and per class."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

import reference
from conftest import Result

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def trained(
    done: Run, finetune_flags: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A run, and its report."""
    run = tmp_path_factory.mktemp("trained") / "run"
    report = done(*finetune_flags, "--epochs", 1, "--lr", 0.05, "--output", run).report
    return run, report


@pytest.fixture(scope="module")
def weak(make_model: Callable[..., Path]) -> Path:
    """A model that is not perfect."""
    return make_model("test_resnet", seed=1, steps=4)


@pytest.fixture
def evaluate(data_dir: Path) -> list[object]:
    return ["evaluate", "--data-dir", data_dir, "--workers", 0, "--json"]


@pytest.mark.parametrize("batch_size", [256, 4])
@pytest.mark.parametrize("place", ["", "student", "student/model.safetensors"])
def test_a_run_is_reproduced_from_its_folder_model_or_file(
    done: Run,
    evaluate: list[object],
    trained: tuple[Path, dict[str, Any]],
    batch_size: int,
    place: str,
) -> None:
    run, report = trained
    found = done(*evaluate, "--checkpoint", run / place, "--batch-size", batch_size).report
    for name in ("num_images", "top1", "top5"):
        assert found[name] == report[name]
    assert found["cross_entropy"] == pytest.approx(report["cross_entropy"], rel=1e-6)
    assert found["ece"] == pytest.approx(report["ece"], rel=1e-5)
    assert (found["model"], found["img_size"]) == ("test_resnet", 32)


def test_evaluation_is_the_same_again_to_the_bit(
    done: Run, evaluate: list[object], trained: tuple[Path, dict[str, Any]]
) -> None:
    flags = [*evaluate, "--checkpoint", trained[0]]
    assert done(*flags).stdout == done(*flags).stdout


@pytest.mark.parametrize("suffix", ["json", "csv"])
def test_classes_sum_up_to_the_total(
    done: Run,
    evaluate: list[object],
    trained: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    suffix: str,
) -> None:
    path = tmp_path / f"classes.{suffix}"
    report = done(*evaluate, "--checkpoint", trained[0], "--results-file", path).report
    if suffix == "json":
        whole = json.loads(path.read_text())
        rows = whole.pop("per_class")
        assert whole == report
    else:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["ants", "bees", "cats"]
    assert [int(row["images"]) for row in rows] == [5, 5, 5]
    correct = [int(row["correct"]) for row in rows]
    assert 100 * sum(correct) / 15 == report["top1"]
    assert [float(row["top1"]) for row in rows] == [100 * right / 5 for right in correct]


def test_output_folder_has_confusion_and_calibration(
    done: Run,
    evaluate: list[object],
    weak: Path,
    data_dir: Path,
    tmp_path: Path,
) -> None:
    """The predictions are those of `mealv2 predict`."""
    folder = tmp_path / "new" / "evaluation"
    report = done(*evaluate, "--checkpoint", weak, "--output", folder).report
    flags = ["--checkpoint", weak, "--workers", 0, "--json"]
    shown = done("predict", data_dir / "val", *flags).report["predictions"]
    names = ["ants", "bees", "cats"]
    expected, probs, labels = np.zeros((3, 3), dtype=int), [], []
    for prediction in shown:
        labels.append(names.index(Path(prediction["image"]).parent.name))
        expected[labels[-1], prediction["best"][0]["class_id"]] += 1
        of_class = {row["class_id"]: row["prob"] for row in prediction["best"]}
        probs.append([of_class[c] for c in range(3)])

    kept = json.loads((folder / "evaluation.json").read_text())
    assert {(a, b): n for a, b, n in kept["confusion"]} == {
        (a, b): expected[a, b] for a, b in zip(*expected.nonzero(), strict=True)
    }
    with (folder / "confusion-matrix.csv").open(newline="") as file:
        head, *rows = list(csv.reader(file))
    assert head == ["class", *names]
    assert [row[0] for row in rows] == names
    assert [[int(cell) for cell in row[1:]] for row in rows] == expected.tolist()
    error, sizes = reference.calibration_error(np.array(probs), np.array(labels))
    assert kept["calibration"]["num_images"] == sizes
    assert kept["ece"] == report["ece"] == pytest.approx(100 * error, abs=1e-4)
    assert {name: kept[name] for name in report} == report
    with (folder / "per-class.csv").open(newline="") as file:
        of_classes = [row["correct"] for row in csv.DictReader(file)]
    assert of_classes == [str(expected[c, c]) for c in range(3)]


def test_text_has_the_total_and_the_most_confused_pairs(
    done: Run, evaluate: list[object], weak: Path, tmp_path: Path
) -> None:
    flags = [*evaluate, "--checkpoint", weak]
    report = done(*flags, "--output", tmp_path).report
    lines = done(*flags, "--no-json").stdout.splitlines()
    assert lines[0].startswith("test_resnet at 32 x 32 pixels on 15 images of ")
    assert lines[1] == (
        f"top-1 {report['top1']:.2f} %, top-5 {report['top5']:.2f} %, "
        f"cross-entropy {report['cross_entropy']:.4f}, "
        f"calibration error (ECE) {report['ece']:.2f} %"
    )
    pairs = json.loads((tmp_path / "evaluation.json").read_text())["confusion"]
    worst = max((n, -a, -b) for a, b, n in pairs if a != b)
    names = ["ants", "bees", "cats"]
    assert lines[2] == "most confused (class, taken for):"
    assert lines[3] == f"  {names[-worst[1]]}, {names[-worst[2]]}: {worst[0]} of 5"
    assert len(lines) == 3 + sum(a != b for a, b, _ in pairs)


def test_another_split_and_size_can_be_asked_for(
    done: Run, evaluate: list[object], trained: tuple[Path, dict[str, Any]]
) -> None:
    flags = [*evaluate, "--checkpoint", trained[0]]
    train = done(*flags, "--val-split", "train").report
    assert train["num_images"] == 36
    larger = done(*flags, "--img-size", 48).report
    assert larger["img_size"] == 48
    assert larger["cross_entropy"] != done(*flags).report["cross_entropy"]


def test_amp_changes_little(
    done: Run, evaluate: list[object], trained: tuple[Path, dict[str, Any]]
) -> None:
    found = done(*evaluate, "--checkpoint", trained[0], "--amp").report
    assert found["cross_entropy"] == pytest.approx(trained[1]["cross_entropy"], rel=0.05)
    assert found["cross_entropy"] != trained[1]["cross_entropy"]


@pytest.mark.parametrize("policy", ["fail", "skip"])
def test_bad_image_stops_or_is_left_out(
    run_cli: Run, own_data: Path, trained: tuple[Path, dict[str, Any]], policy: str
) -> None:
    bad = own_data / "val" / "bees" / "00.jpg"
    bad.write_bytes(b"")
    flags = ["--data-dir", own_data, "--checkpoint", trained[0], "--workers", 0]
    result = run_cli("evaluate", *flags, "--json", "--on-bad-image", policy)
    if policy == "fail":
        assert result.code == 1
        assert str(bad) in result.stderr
    else:
        assert result.code == 0
        assert result.report["num_images"] == 14


def test_students_folder_is_a_timm_model(trained: tuple[Path, dict[str, Any]]) -> None:
    model = timm.create_model(f"local-dir:{trained[0] / 'student'}", pretrained=True)
    assert model.num_classes == 3


def test_state_dict_of_timm_with_its_model_name_is_evaluated(
    done: Run, evaluate: list[object], trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    run, report = trained
    state = safetensors.torch.load_file(run / "student" / "model.safetensors")
    torch.save({"state_dict": state}, tmp_path / "theirs.pth")
    flags = ["--checkpoint", tmp_path / "theirs.pth", "--model", "test_resnet", "--img-size", 32]
    found = done(*evaluate, *flags).report
    assert found["cross_entropy"] == pytest.approx(report["cross_entropy"], rel=1e-6)


def test_checkpoint_of_a_run_is_evaluated_like_its_student(
    done: Run, evaluate: list[object], trained: tuple[Path, dict[str, Any]]
) -> None:
    run, report = trained
    newest = max((run / "checkpoints").iterdir())
    flags = ["--checkpoint", newest, "--model", "test_resnet", "--img-size", 32]
    found = done(*evaluate, *flags).report
    assert found["cross_entropy"] == pytest.approx(report["cross_entropy"], rel=1e-6)
