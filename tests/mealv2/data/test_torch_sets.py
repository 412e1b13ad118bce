"""mealv2.data.torch_sets: torchvision's data sets, from archives that the test writes."""

import hashlib
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchvision import datasets

from conftest import Result
from mealv2.data.open import open_source
from mealv2.data.pixels import decode
from mealv2.data.torch_name import torch_name
from mealv2.errors import ConfigError
from mealv2.storage import reachable
from stores import silent_server, web_server

CLASSES = ["plane", "car", "bird"]


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, np.ndarray]:
    """A folder with a CIFAR-10 of 30 + 9 images in its published form, and the training pixels."""
    root = tmp_path / "root"
    folder = root / datasets.CIFAR10.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def write(name: str, content: dict[str, Any]) -> str:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    pixels_NHWC = rng.integers(0, 256, (30, 32, 32, 3), np.uint8)
    for which, name, pixels in (
        ("train_list", "data_batch_1", pixels_NHWC),
        ("test_list", "test_batch", pixels_NHWC[:9]),
    ):
        data = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)
        labels = [n % 3 for n in range(len(pixels))]
        digest = write(name, {"data": data, "labels": labels})
        monkeypatch.setattr(datasets.CIFAR10, which, [[name, digest]])
    meta = dict(datasets.CIFAR10.meta)
    meta["md5"] = write(meta["filename"], {"label_names": CLASSES})
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    return root, pixels_NHWC


def test_images_are_those_of_the_archive(cifar: tuple[Path, np.ndarray]) -> None:
    root, pixels_NHWC = cifar
    source = open_source(Path(f"torch/cifar10:{root}"), "train")
    assert (source.classes, list(source.labels[:4])) == (CLASSES, [0, 1, 2, 0])
    assert (source.keys[0], source.keys[-1], len(source)) == ("00", "29", 30)
    for position in (0, 29):
        data = source.read(position)
        assert np.array_equal(decode(data), pixels_NHWC[position])
        assert len(data) == source.sizes[position]
    assert len(open_source(Path(f"torch/cifar10:{root}"), "val")) == 9


@pytest.mark.parametrize(
    ("text", "folder"),
    [
        ("torch/mnist:data", "data"),
        ("/data/torch/mnist:data", "/data/data"),
        ("/data/torch/mnist:/data", "/data"),
    ],
)
def test_a_relative_folder_means_the_same_in_an_absolute_setting(text: str, folder: str) -> None:
    assert torch_name(Path(text)) == ("mnist", Path(folder))


def test_other_paths_name_no_set() -> None:
    assert torch_name(Path("pictures/torch")) is None


def test_a_changed_archive_is_an_error(cifar: tuple[Path, np.ndarray]) -> None:
    root, _ = cifar
    with (root / datasets.CIFAR10.base_folder / "data_batch_1").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ConfigError, match=r"corrupted in .*; put .* or add --download"):
        open_source(Path(f"torch/cifar10:{root}"), "train")


def test_download_fetches_what_is_missing_once(
    cifar: tuple[Path, np.ndarray],
    run_cli: Callable[..., Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root, _ = cifar
    served = tmp_path / "served"
    served.mkdir()
    with tarfile.open(served / "a.tar.gz", "w:gz") as archive:
        archive.add(root / datasets.CIFAR10.base_folder, datasets.CIFAR10.base_folder)
    digest = hashlib.md5((served / "a.tar.gz").read_bytes()).hexdigest()
    monkeypatch.setattr(datasets.CIFAR10, "filename", "a.tar.gz")
    words = ["finetune", "--model", "test_resnet", "--no-pretrained", "--img-size", 32, "-b", 8]
    words += ["--epochs", 1, "--workers", 0, "--output", tmp_path / "run"]
    words += ["--data-dir", f"torch/cifar10:{tmp_path / 'new'}", "--download"]
    with silent_server() as url:  # nothing responds: one line
        monkeypatch.setattr(reachable, "RESPONSE_TIMEOUT_S", 0.1)
        monkeypatch.setattr(datasets.CIFAR10, "url", f"{url}/a.tar.gz")
        result = run_cli(*words)
    assert (result.code, result.stderr.count("\n")) == (1, 1), result.stderr
    assert "by hand" in result.stderr
    with web_server(served) as url:
        monkeypatch.setattr(datasets.CIFAR10, "url", f"{url}/a.tar.gz")
        monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", "0" * 32)
        result = run_cli(*words)
        assert result.code == 1
        assert "corrupted" in result.stderr
        monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", digest)
        result = run_cli(*words)
    assert result.code == 0, result.stderr
    assert result.report["num_images"] == 9
    again = run_cli(*words, "--output", tmp_path / "again")  # the server is gone
    assert again.code == 0, again.stderr


def test_a_student_is_tuned_on_it_and_wrong_names_are_one_line(
    cifar: tuple[Path, np.ndarray], run_cli: Callable[..., Result], tmp_path: Path
) -> None:
    words = ["finetune", "--model", "test_resnet", "--no-pretrained", "--img-size", 32, "-b", 8]
    words += ["--epochs", 1, "--workers", 0, "--output", tmp_path / "run", "--data-dir"]
    for location, flags, message in (
        ("torch/cifar1:x", [], "torch/cifar1 is unknown; known: cifar10"),
        ("torch/cifar10:nowhere", [], "no archives in nowhere; put the archives there"),
        ("torch/cifar10", [], "name the folder of its archives: torch/cifar10:FOLDER"),
        (f"torch/cifar10:{cifar[0]}", ["--val-split", "x"], "has the splits train, val, test"),
        (f"torch/cifar10:{cifar[0]}", ["--val-fraction", "0.2"], "has a split val"),
    ):
        result = run_cli(*words, location, *flags)
        assert (result.code, result.stderr.count("\n")) == (2, 1), result.stderr
        assert message in result.stderr
    result = run_cli(*words, f"torch/cifar10:{cifar[0]}")
    assert result.code == 0, result.stderr
    assert result.report["num_images"] == 9
    held = ["--val-fraction", "0.2", "--val-split", "held", "--output", tmp_path / "two"]
    assert run_cli(*words, f"torch/cifar10:{cifar[0]}", *held).report["num_images"] == 6


def test_a_model_is_transferred_to_it(
    cifar: tuple[Path, np.ndarray], run_cli: Callable[..., Result], tmp_path: Path
) -> None:
    words = ["transfer", "--model", "test_resnet", "--mode", "scratch", "--img-size", 32, "-b", 8]
    words += ["--epochs", 1, "--workers", 0, "--crop", "pad", "--output", tmp_path / "run"]
    result = run_cli(*words, "--data-dir", f"torch/cifar10:{cifar[0]}")
    assert result.code == 0, result.stderr
    assert result.report["num_images"] == 9
