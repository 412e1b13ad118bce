"""ONNX files as teachers: those of `mealv2 export` and those of other programs."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

from conftest import IMG_SIZE, Result
from mealv2.errors import ConfigError
from mealv2.label_set import LabelSet, read_plan
from mealv2.labelling.teachers import load_teacher
from mealv2.models.onnx_file import OnnxClassifier
from mealv2.models.released import MEAN, STD
from mealv2.storage.atomic import file_sha256

Run = Callable[..., Result]
CLASSES = ["ants", "bees", "cats"]
SIZE = 40


@pytest.fixture(scope="module")
def checkpoint(make_model: Callable[..., Path]) -> Path:
    return make_model("test_resnet", seed=5, steps=2, img_size=48)


@pytest.fixture(scope="module")
def exported(done: Run, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX file of the checkpoint, 48 pixels."""
    out = tmp_path_factory.mktemp("onnx") / "model.onnx"
    done("export", checkpoint, "--to", "onnx", "--output", out)
    return out


def write_foreign(
    path: Path, *, batch: int | str = 4, colours: int = 3, num_classes: int = 3
) -> np.ndarray:
    """Write a network of another program: mean over the pixels, then a matrix; return it."""
    weights = np.random.default_rng(0).normal(size=(colours, num_classes)).astype(np.float32)
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["y"]),
    ]
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, colours, SIZE, SIZE])
    logits = helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, num_classes])
    initial = [numpy_helper.from_array(weights, "w")]
    graph = helper.make_graph(nodes, "g", [image], [logits], initializer=initial)
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    return weights


def write_with_data(path: Path, *, seed: int = 0, location: str = "weights/w.data") -> None:
    """Write the network of ``write_foreign`` with its matrix in a data file, at a location."""
    write_foreign(path)
    model = onnx.load(path)
    (matrix,) = model.graph.initializer
    values = np.random.default_rng(seed).normal(size=(3, 3)).astype("<f4").tobytes()
    data = path.parent / location
    data.parent.mkdir(exist_ok=True)
    data.write_bytes(values)
    set_external_data(matrix, location)
    matrix.ClearField("raw_data")
    path.write_bytes(model.SerializeToString())


def test_the_hash_of_a_file_covers_the_data_files_with_its_weights(tmp_path: Path) -> None:
    path = tmp_path / "other.onnx"
    hashes, outputs = [], []
    images = torch.ones(1, 3, SIZE, SIZE)
    for seed in (0, 1, 0):
        write_with_data(path, seed=seed)
        teacher = OnnxClassifier(path)
        hashes.append(teacher.sha256)
        outputs.append(teacher(images))
    assert not torch.equal(outputs[0], outputs[1])  # the data file is used
    assert (hashes[0] == hashes[2], hashes[0] != hashes[1]) == (True, True)
    alone = tmp_path / "alone.onnx"
    write_foreign(alone)
    assert OnnxClassifier(alone).sha256 == file_sha256(alone)


def test_data_files_that_are_missing_outside_or_unknown_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for location in ("../w.data", str(tmp_path / "w.data")):
        write_with_data(folder / "other.onnx", location=location)
        with pytest.raises(ConfigError, match=r"weights outside its folder, in .*w\.data; export"):
            OnnxClassifier(folder / "other.onnx")
    write_with_data(folder / "other.onnx")
    (folder / "weights/w.data").unlink()
    with pytest.raises(ConfigError, match=r"cannot read .*w\.data: No such file"):
        OnnxClassifier(folder / "other.onnx")
    write_with_data(folder / "other.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ConfigError, match=r"weights in other files.*export it as one file"):
        OnnxClassifier(folder / "other.onnx")


def test_an_exported_file_labels_as_its_checkpoint_does(
    done: Run, exported: Path, checkpoint: Path, data_dir: Path, tmp_path: Path
) -> None:
    flags = [
        "--data-dir",
        data_dir,
        "--img-size",
        IMG_SIZE,
        "--num-views",
        2,
        "--val-split",
        "none",
    ]
    flags += ["--topk", "all", "--label-dtype", "float32", "--workers", 0, "--batch-size", 16]
    teachers = {"onnx": exported, "torch": f"test_resnet={checkpoint}"}
    for name, spec in teachers.items():
        done("precompute", *flags, "--teacher", spec, "--output", tmp_path / name)
    found, expected = (LabelSet.open(tmp_path / name) for name in teachers)
    for key in list(found.keys()):
        ours, theirs = (s.soft_labels([key] * 2, [0, 1]).to_dense() for s in (found, expected))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    (teacher,) = read_plan(tmp_path / "onnx")["teachers"]
    (by_torch,) = read_plan(tmp_path / "torch")["teachers"]
    expected_teacher = {"model": "model.onnx", "weights_sha256": file_sha256(exported)}
    assert teacher == by_torch | expected_teacher  # img_size 48, mean and std

    verify = ["labels", "verify", tmp_path / "onnx", "--data-dir", data_dir, "--workers", 0]
    report = done(*verify, "--relabel", 20, "--teacher", exported).report
    assert report["relabelled"]["kl"] < 1e-7


@pytest.mark.parametrize("batch", [4, "n"])
def test_a_file_of_another_program_gets_normalised_images(tmp_path: Path, batch: int | str) -> None:
    weights = write_foreign(tmp_path / "other.onnx", batch=batch)
    teacher = OnnxClassifier(tmp_path / "other.onnx")
    assert teacher.img_size == SIZE
    assert "normalised with ImageNet's mean and std" in teacher.notes[-1]
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (6, 3, SIZE, SIZE)).astype(np.uint8)  # 6: a batch and a half
    found_BC = teacher(torch.from_numpy(images))
    scaled = images.astype(np.float64).mean(axis=(2, 3)) / 255
    expected = (scaled - np.array(MEAN)) / np.array(STD) @ weights.astype(np.float64)
    np.testing.assert_allclose(found_BC.numpy(), expected, rtol=0, atol=1e-5)
    floats_BC = teacher(torch.from_numpy(images).float() / 255)
    torch.testing.assert_close(floats_BC, found_BC, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 5}, "has 5 classes, the data has 3"),
        ({"colours": 1}, r"a teacher maps float images B x 3 x S x S"),
    ],
)
def test_a_file_that_does_not_fit_is_named(
    tmp_path: Path, changes: dict[str, int], message: str
) -> None:
    path = tmp_path / "other.onnx"
    write_foreign(path, **changes)
    with pytest.raises(ConfigError, match=message):
        load_teacher(str(path), None, classes=CLASSES, img_size=SIZE)


def test_sizes_classes_and_damage_are_checked(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="takes images of 48 pixels only, not of 32"):
        load_teacher(str(exported), None, classes=CLASSES, img_size=32)
    with pytest.raises(ConfigError, match="trained on other classes"):
        load_teacher(str(exported), None, classes=[*CLASSES[:2], "dogs"], img_size=48)
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(exported.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"cannot read .*damaged\.onnx as an ONNX model"):
        OnnxClassifier(damaged)


def test_pictures_without_classes_have_those_of_an_exported_file(
    done: Run, run_cli: Run, exported: Path, data_dir: Path, tmp_path: Path
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (data_dir / "train").glob("*/00.*"):
        shutil.copy(path, flat / f"{path.parent.name}-{path.name}")
    flags = ["precompute", "--data-dir", flat, "--val-split", "none", "--num-views", 1]
    flags += ["--img-size", 32, "--workers", 0]
    done(*flags, "--teacher", exported, "--output", tmp_path / "labels")
    assert read_plan(tmp_path / "labels")["classes"] == CLASSES
    write_foreign(tmp_path / "other.onnx")
    result = run_cli(*flags, "--teacher", tmp_path / "other.onnx", "--output", tmp_path / "b")
    assert (result.code, result.stderr.count("\n")) == (2, 1)
    assert "other.onnx has no class names; give NAME=RUN" in result.stderr


def test_errors_of_the_flag_are_one_line(
    run_cli: Run, exported: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def error_of(spec: object) -> str:
        flags = ["--data-dir", data_dir, "--num-views", 1, "--output", tmp_path / "labels"]
        result = run_cli("precompute", *flags, "--teacher", spec)
        assert (result.code, result.stderr.count("\n")) == (2, 1)
        return result.stderr

    other = shutil.copy(exported, tmp_path / "other.onnx")
    assert f"(in {tmp_path}: other.onnx)" in error_of(tmp_path / "none.onnx")
    assert f"give an ONNX file alone: --teacher {other}" in error_of(f"resnet18={other}")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert error_of(other).endswith("needs onnxruntime: pip install onnxruntime\n")
