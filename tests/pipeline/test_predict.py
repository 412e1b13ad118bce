"""pipeline.predict: the answers of `evaluate`, by name, for pictures nobody labelled."""

import csv
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import safetensors.torch
import timm
import torch

from conftest import Result
from mealv2.data.folder import ImageFolder
from mealv2.data.pixels import centre_crop, decode

Run = Callable[..., Result]
MEAN_AND_STD = ["--mean", 0.4, 0.5, 0.6, "--std", 0.25, 0.25, 0.3]


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path]) -> Path:
    """A model that is better than chance and not perfect."""
    return make_model("test_resnet", seed=1, steps=4)


@pytest.fixture
def predict(model: Path) -> list[object]:
    return ["predict", "--checkpoint", model, "--workers", 0, "--json"]


def best(report: dict[str, Any]) -> dict[str, str]:
    """Return the best class of every image by its path."""
    return {
        prediction["image"]: prediction["best"][0]["class"] for prediction in report["predictions"]
    }


@pytest.mark.parametrize(
    "flags", [[], ["--batch-size", 4], ["--img-size", 48], MEAN_AND_STD], ids=str
)
def test_right_answers_are_as_many_as_evaluate_counts(
    done: Run, predict: list[object], data_dir: Path, flags: list[object]
) -> None:
    folder = data_dir / "val"
    evaluated = done("evaluate", "--data-dir", data_dir, *predict[1:], *flags).report
    found = done(*predict, folder, *flags).report
    right = [Path(image).parent.name == name for image, name in best(found).items()]
    assert len(right) == found["num_images"] == evaluated["num_images"] == 15
    assert 100 * sum(right) / 15 == evaluated["top1"]
    assert 0 < sum(right) < 15
    of_truth = [
        row["prob"]
        for prediction in found["predictions"]
        for row in prediction["best"]
        if row["class"] == Path(prediction["image"]).parent.name
    ]
    cross_entropy = -sum(map(math.log, of_truth)) / len(right)
    assert cross_entropy == pytest.approx(evaluated["cross_entropy"], rel=1e-5)
    assert found["img_size"] == evaluated["img_size"]


@pytest.mark.parametrize("flags", [[], MEAN_AND_STD], ids=str)
def test_probabilities_are_the_models_on_the_centre_crop(
    done: Run, predict: list[object], model: Path, data_dir: Path, flags: list[object]
) -> None:
    """Computed again with timm alone, its normalisation written out."""
    backbone = timm.create_model(f"local-dir:{model}", pretrained=True).eval()
    source = ImageFolder(data_dir, "val")
    predictions = done(*predict, data_dir / "val", *flags).report["predictions"]
    assert [prediction["image"] for prediction in predictions] == [
        str(data_dir / "val" / key) for key in source.keys
    ]
    own = [backbone.pretrained_cfg[n] for n in ("mean", "std")]
    given = [flags[1:4], flags[5:]] if flags else own
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in given)
    for position, prediction in enumerate(predictions):
        crop = torch.from_numpy(centre_crop(decode(source.read(position)), 32).copy())
        image_BCHW = ((crop.permute(2, 0, 1) / 255 - mean) / std)[None]
        with torch.no_grad():
            probs_C = backbone(image_BCHW).softmax(1)[0].double()
        shown = {row["class"]: row["prob"] for row in prediction["best"]}
        assert list(shown.values()) == sorted(shown.values(), reverse=True)
        expected = dict(zip(source.classes, probs_C.tolist(), strict=True))
        assert shown == pytest.approx(expected, abs=1e-5)


def test_files_and_folders_mix_and_a_picture_named_twice_is_one(
    done: Run, predict: list[object], data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data_dir)
    found = done(*predict, "val/cats/01.jpg", "val/ants", "val/cats/01.jpg", "val/ants/00.jpg")
    names = [prediction["image"] for prediction in found.report["predictions"]]
    assert names[:2] == ["val/cats/01.jpg", "val/ants/00.jpg"]
    assert len(names) == len(set(names)) == 6


def test_folders_are_walked_for_pictures_that_are_not_hidden(
    done: Run, predict: list[object], data_dir: Path, tmp_path: Path
) -> None:
    picture = data_dir / "val" / "ants" / "00.jpg"
    for name in ("b/deep/er/1.JPG", "a.jpeg", ".hidden.jpg", ".cache/2.jpg", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, tmp_path / name)
    predictions = done(*predict, tmp_path).report["predictions"]
    assert [prediction["image"] for prediction in predictions] == [
        str(tmp_path / name) for name in ("a.jpeg", "b/deep/er/1.JPG")
    ]


def test_a_file_named_without_a_pictures_suffix_is_read(
    done: Run, predict: list[object], data_dir: Path, tmp_path: Path
) -> None:
    shutil.copy(data_dir / "val" / "ants" / "00.jpg", tmp_path / "download")
    assert done(*predict, tmp_path / "download").report["num_images"] == 1


def test_topk_limits_the_classes_and_text_is_on_stdout_without_json(
    done: Run, predict: list[object], data_dir: Path
) -> None:
    picture = data_dir / "val" / "bees" / "00.jpg"
    result = done(*predict, picture, "--topk", 2)
    (prediction,) = result.report["predictions"]
    assert len(prediction["best"]) == 2
    assert len(result.stdout.splitlines()) == 1
    assert result.stderr == ""
    text = done(*predict, picture, "--topk", 2, "--no-json")
    lines = text.stdout.splitlines()
    assert lines[0] == str(picture)
    expected = [f"{100 * row['prob']:.2f} %  {row['class']}" for row in prediction["best"]]
    assert [line.strip() for line in lines[1:]] == expected
    assert text.stderr == ""


@pytest.mark.parametrize("suffix", ["json", "csv"])
def test_results_file_holds_the_answers(
    done: Run, predict: list[object], data_dir: Path, tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"answers.{suffix}"
    report = done(*predict, data_dir / "val" / "ants", "--results-file", path).report
    if suffix == "json":
        assert json.loads(path.read_text()) == report
        return
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = [
        (prediction["image"], str(rank), row["class"], str(row["class_id"]), row["prob"])
        for prediction in report["predictions"]
        for rank, row in enumerate(prediction["best"], start=1)
    ]
    names = ("image", "rank", "class", "class_id")
    assert [(*(row[n] for n in names), float(row["prob"])) for row in rows] == expected


@pytest.mark.parametrize("policy", ["fail", "skip"])
def test_bad_image_stops_or_is_left_out_by_name(
    run_cli: Run, predict: list[object], own_data: Path, policy: str
) -> None:
    bad = own_data / "val" / "bees" / "00.jpg"
    bad.write_bytes(b"no picture")
    result = run_cli(*predict, own_data / "val", "--on-bad-image", policy)
    if policy == "fail":
        assert result.code == 1
        assert f"cannot read image {bad}: " in result.stderr
        assert result.stdout == ""
    else:
        assert result.code == 0
        assert result.report["num_images"] == 14
        assert list(result.report["skipped"]) == [str(bad)]
        assert f"skipped {bad}: not an image" in result.stderr


def test_nothing_but_bad_images_is_a_failure(
    run_cli: Run, predict: list[object], tmp_path: Path
) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"")
    result = run_cli(*predict, tmp_path, "--on-bad-image", "skip")
    assert result.code == 1
    assert "no image could be read" in result.stderr


def test_timms_imagenet_weights_answer_with_names(
    done: Run, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = tmp_path / "hub"
    snapshot = hub / "models--timm--test_resnet.r160_in1k" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    state = timm.create_model("test_resnet").state_dict()
    state["fc.weight"], state["fc.bias"] = torch.zeros(1000, 96), torch.zeros(1000)
    state["fc.bias"][1], state["fc.bias"][999] = 9, 5
    safetensors.torch.save_file(state, snapshot / "model.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    picture = data_dir / "val" / "ants" / "00.jpg"
    flags = ["--workers", 0, "--topk", 2, "--json"]
    report = done("predict", picture, "--model", "test_resnet", *flags).report
    assert report["model"] == "test_resnet.r160_in1k"
    names = [row["class"] for row in report["predictions"][0]["best"]]
    assert names == ["goldfish, Carassius auratus", "toilet tissue, toilet paper, bathroom tissue"]

    # weights of unknown classes are not given ImageNet's names
    theirs = ["--model", "test_resnet", "--checkpoint", snapshot / "model.safetensors"]
    report = done("predict", picture, *theirs, *flags).report
    assert [row["class"] for row in report["predictions"][0]["best"]] == ["1", "999"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "IMAGE is required"),
        (["/nowhere.jpg"], "/nowhere.jpg"),
        (["{tmp}"], "has no images"),
        (["{picture}", "--topk", "0"], "--topk"),
        (["{picture}", "--results-file", "x.txt"], "--results-file"),
        (["{picture}", "--checkpoint", "/nowhere"], "/nowhere"),
        (["{picture}", "--model", "test_vit"], "another model"),
    ],
)
def test_wrong_use_is_said_in_one_line(
    run_cli: Run,
    predict: list[object],
    data_dir: Path,
    tmp_path: Path,
    words: list[str],
    named: str,
) -> None:
    picture = data_dir / "val" / "ants" / "00.jpg"
    result = run_cli(*predict, *(word.format(tmp=tmp_path, picture=picture) for word in words))
    assert result.code == 2
    (line,) = result.stderr.splitlines()
    assert named in line
