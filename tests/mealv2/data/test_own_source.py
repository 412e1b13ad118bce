"""--data-dir PACKAGE.MODULE:FUNCTION and torch Datasets: every command reads a user's own data."""

import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import Dataset

import mealv2
from conftest import Result
from mealv2.data.folder import ImageFolder
from mealv2.data.open import open_source
from mealv2.data.own_source import as_source, own_source
from mealv2.data.pixels import decode
from mealv2.errors import ConfigError, DataError
from mealv2.label_set import LabelSet
from mealv2.models import read_metadata

Run = Callable[..., Result]

CODE = """
from pathlib import Path

from PIL import Image
from torchvision.datasets import ImageFolder

import mealv2
from mealv2.data.folder import ImageFolder as Folder

ROOT = Path({root!r})

class Pictures(ImageFolder):
    \"\"\"torchvision's own, with the keys of a folder.\"\"\"

    @property
    def keys(self):
        return [Path(path).relative_to(self.root).as_posix() for path, _ in self.samples]

def pictures(split):
    return Pictures(ROOT / split)

def files(split):
    return Folder(ROOT, split)

class Half(mealv2.UnorderedSource):
    name, split, classes = "half", "train", ["a"]
    keys, labels = ["1", "2"], [0, 0]

    def __len__(self):
        return 2

    def read(self, position):
        return b""

def half(split):
    return Half()

class Late(Pictures):
    def __getitem__(self, index):
        import own_reader
        return own_reader.read(self.samples[index])

def late(split):
    return Late(ROOT / split)

def fails(split):
    raise RuntimeError("the disk is on fire")

def number(split):
    return 3
"""


@pytest.fixture
def own_code(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with a module of data sets."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own_data.py").write_text(CODE.format(root=str(data_dir)))
    yield tmp_path
    sys.modules.pop("own_data", None)


class Items(Dataset[Any]):
    """A data set of given items."""

    classes = ("dark", "light")

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def picture(mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


# --- the commands -------------------------------------------------------------------------------


def test_a_dataset_goes_through_all_commands(
    done: Run, precompute_flags: list[str], distill_flags: list[str], own_code: Path
) -> None:
    data = ["--data-dir", "own_data:pictures"]
    done(*precompute_flags, *data, "--output", "labels")
    assert "ants/00.jpg" in set(LabelSet.open(Path("labels")).keys())
    done(*distill_flags, *data, "--labels", "labels", "--epochs", 1, "--output", "run")
    assert read_metadata(Path("run/student"))["classes"] == ["ants", "bees", "cats"]
    report = done("evaluate", *data, "--checkpoint", "run", "--workers", 0, "--json").report
    assert report["num_images"] == 15
    (own_code / "elsewhere").mkdir()
    resumed = ["--resume", "run", "--epochs", 2, "--val-interval", 2]
    assert done("distill", *resumed).report["epochs"] == 2
    held = done("finetune", *distill_flags[1:3], *data, *FINETUNE, "--output", "tuned")
    assert held.report["num_images"] == 9  # a quarter of 36


FINETUNE = ["--model", "test_resnet", "--no-pretrained", "--img-size", 32, "-b", 12, "--epochs", 1]
FINETUNE += ["--workers", 0, "--val-fraction", 0.25, "--val-split", "held"]


def test_a_source_of_own_code_has_the_labels_of_the_folder(
    done: Run, precompute_flags: list[str], labels_dir: Path, own_code: Path
) -> None:
    done(*precompute_flags, "--data-dir", "own_data:files", "--output", "labels")
    for path in labels_dir.glob("*.h5"):
        assert (Path("labels") / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_data:missing", "own_data has no function missing"),
        ("no_module:f", "no module no_module in "),
        ("own_data:fails", "has no split train: the disk is on fire; "),
        ("own_data:number", "own_data:number (train) is a int; an ImageSource is needed"),
        ("own_data:half", "own_data:half (train) has read, but no sizes: mealv2.ImageSource lists"),
    ],
)
def test_what_does_not_work_is_one_line(
    run_cli: Run, own_code: Path, name: str, message: str
) -> None:
    result = run_cli("finetune", "--data-dir", name, "--model", "test_resnet", "--no-pretrained")
    assert (result.code, result.stderr.count("\n")) == (2, 1), result.stderr
    assert message in result.stderr


def test_items_may_import_a_neighbour_of_the_function(
    own_code: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import pathlib\n\ndef read(item):\n    return pathlib.Path(item[0]).read_bytes(), 0\n"
    (own_code / "own_reader.py").write_text(code)
    source = open_source(own_code / "own_data:late", "train")
    monkeypatch.chdir(data_dir)
    assert source.read(0) == (data_dir / "train" / source.keys[0]).read_bytes()
    del sys.modules["own_reader"]


# --- the sources --------------------------------------------------------------------------------


def test_a_path_names_a_function_if_it_does_not_exist(tmp_path: Path) -> None:
    named = own_source(tmp_path / "pkg.data:pictures")
    assert named is not None
    assert named == ("pkg.data:pictures", tmp_path)
    assert own_source(tmp_path / "pictures") is None
    (tmp_path / "pkg.data:pictures").mkdir()
    assert own_source(tmp_path / "pkg.data:pictures") is None


def test_the_absolute_name_works_from_every_folder(
    own_code: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    source = open_source(own_code / "own_data:pictures", "val")
    folder = ImageFolder(data_dir, "val")
    assert (list(source.keys), list(source.labels)) == (list(folder.keys), list(folder.labels))
    assert (decode(source.read(3)) == decode(folder.read(3))).all()


def test_a_dataset_without_keys_and_targets_is_read_by_position() -> None:
    stream = io.BytesIO()
    picture().save(stream, "png")
    items = [(picture("L"), 0), (stream.getvalue(), 1), (picture("P"), np.int64(1))]
    source = as_source(Items(items), "items", split="train")
    assert (source.keys, source.labels) == (["0", "1", "2"], [0, 1, 1])
    assert source.read(0).startswith(b"P5\n30 20\n255\n")
    assert source.read(1) == stream.getvalue()
    assert (decode(source.read(2)) == np.asarray(picture("P").convert("RGB"))).all()


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "has no images"),
        ([(picture(), 2)], "class ids outside 0 to 1"),
        ([(picture(), -1)], "class ids outside 0 to 1"),
        ([(picture(), "dark")], "its class ids cannot be read"),
        ([(picture(), 0.5)], "0.5 is not an integer"),
        ([5], "its class ids cannot be read"),
    ],
)
def test_a_dataset_that_contradicts_itself_is_named(items: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        as_source(Items(items), "items", split="train")


def test_a_key_that_is_found_twice_is_named() -> None:
    found: Any = Items([(picture(), 0)] * 2)
    found.keys = ["same", "same"]
    with pytest.raises(ConfigError, match="a key twice"):
        as_source(found, "items", split="train")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 3), np.uint8), "a ndarray; it must give PIL images or encoded bytes"),
        (Image.new("I;16", (4, 4)), "a PIL image of mode I;16; give its encoded bytes"),
    ],
)
def test_an_image_of_another_kind_is_a_bad_image(image: Any, message: str) -> None:
    source = as_source(Items([(image, 0)]), "items", split="train")
    with pytest.raises(DataError, match=message):
        source.read(0)


def test_annotate_takes_a_dataset(teacher_dirs: dict[str, Path], tmp_path: Path) -> None:
    class Three(Items):
        classes = ("ants", "bees", "cats")

    (name, path), *_ = teacher_dirs.items()
    items = Three([(picture(), number) for number in (0, 1, 2)])
    labels = mealv2.annotate(
        items, [f"{name}={path}"], tmp_path / "set", num_views=2, img_size=32, workers=0
    )
    assert list(labels.keys()) == ["0", "1", "2"]
    assert len(mealv2.SoftLabelDataset(labels.folder, items)) == 3
