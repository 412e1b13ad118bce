"""mealv2.annotate: stage one from Python gives the files of `mealv2 precompute`."""

import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import mealv2
from mealv2 import messages
from mealv2.data.folder import ImageFolder
from mealv2.data.memory import ImageSequence
from mealv2.errors import ConfigError, DataError, LabelSetError
from mealv2.label_set import UNKNOWN, Encoding, LabelSet, Rows
from mealv2.labelling import row_encoder
from mealv2.labelling.row_encoder import RowEncoder

SETTINGS = {"img_size": 32, "num_views": 4, "view_seed": 7, "shard_size": 10, "batch_size": 16}
TOP2: dict[str, Any] = {"topk": 2, "label_dtype": "float16", "workers": 0, "device": "cpu"}


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def in_memory(data_dir: Path, split: str) -> list[tuple[str, bytes, str]]:
    source = ImageFolder(data_dir, split)
    rows = enumerate(zip(source.keys, source.labels, strict=True))
    return [(key, source.read(i), source.classes[label]) for i, (key, label) in rows]


def test_a_folder_gives_the_files_of_precompute(
    data_dir: Path, teacher_dirs: dict[str, Path], labels_dir: Path, tmp_path: Path
) -> None:
    teachers = [f"{name}={path}" for name, path in teacher_dirs.items()]
    labels = mealv2.annotate(data_dir, teachers, tmp_path / "labels", **SETTINGS, **TOP2)
    assert shards(labels.folder) == shards(labels_dir)


def test_pictures_in_memory_and_modules_give_the_files_of_precompute(
    data_dir: Path, teacher_dirs: dict[str, Path], labels_dir: Path, tmp_path: Path
) -> None:
    teachers = [
        mealv2.create_classifier(name, num_classes=3, checkpoint=path, img_size=32)
        for name, path in teacher_dirs.items()
    ]
    labels = mealv2.annotate(
        in_memory(data_dir, "train"),
        teachers,
        tmp_path / "labels",
        val_images=in_memory(data_dir, "val"),
        **SETTINGS,
        **TOP2,
    )
    assert shards(labels.folder) == shards(labels_dir)
    dataset = mealv2.SoftLabelDataset(labels.folder, data_dir)
    assert len(dataset) == 36


class Shades(nn.Module):
    """Logits from the mean of each colour channel."""

    def __init__(self, scale: float = 4.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.scale * images_BCHW.float().mean(dim=(2, 3)) / 255.0


def test_any_module_and_any_function_are_teachers(data_dir: Path, tmp_path: Path) -> None:
    def reds(images_BCHW: Tensor) -> Tensor:
        return torch.nn.functional.pad(images_BCHW[:, :1].float().mean(dim=(2, 3)) / 50.0, (0, 2))

    shades = Shades()
    frozen = nn.Sequential(Shades(3.0)).requires_grad_(False).train()
    frozen[0].eval()
    folder = tmp_path / "labels"
    labels = mealv2.annotate(
        data_dir, [shades, frozen, reds], folder, val_split=None, topk="all", **SETTINGS, workers=0
    )
    dataset = mealv2.SoftLabelDataset(folder, data_dir, label="probs")
    for index, view in ((0, 1), (17, 3)):
        pixels, probs = dataset[index, view]
        logits = [teacher(pixels[None]).double() for teacher in (shades, frozen, reds)]
        expected = torch.stack(logits).softmax(dim=2).mean(dim=0)[0]
        assert torch.allclose(probs.double(), expected, atol=1e-3)
    assert (shades.training, shades.scale.requires_grad) == (True, True)  # as before
    assert (frozen.training, frozen[0].training) == (True, False)
    assert not frozen[0].scale.requires_grad
    module, _, function = labels.manifest["plan"]["teachers"]
    assert module["model"].endswith(":Shades")
    assert len(module["weights_sha256"]) == 64
    assert function["model"].endswith("reds")
    assert function["weights_sha256"] == UNKNOWN


def test_the_teachers_go_on_while_labels_are_encoded(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    added, goes_on = threading.Event(), threading.Event()
    add, encode = RowEncoder.add, Encoding.encode

    def adding(self: RowEncoder, *args: Any) -> None:
        add(self, *args)
        added.set()

    def teacher(images_BCHW: Tensor) -> Tensor:
        if added.is_set():
            goes_on.set()
        return Shades()(images_BCHW).detach()

    def waiting(self: Encoding, probs_NC: Tensor, *args: Any, **kwargs: Any) -> Rows:
        if len(probs_NC):
            assert goes_on.wait(60), "the next batch waits for the labels of the first"
        return encode(self, probs_NC, *args, **kwargs)

    settings = SETTINGS | {"img_size": 16, "val_split": None, "topk": 2, "workers": 0}
    expected = mealv2.annotate(data_dir, [teacher], tmp_path / "expected", **settings)
    monkeypatch.setattr(row_encoder, "_MAX_VIEWS", 8)
    monkeypatch.setattr(RowEncoder, "add", adding)
    monkeypatch.setattr(Encoding, "encode", waiting)
    labels = mealv2.annotate(data_dir, [teacher], tmp_path / "labels", **settings)
    assert shards(labels.folder) == shards(expected.folder)


class Pictures(Dataset[Any]):
    """The pictures of a split of a folder, as a map-style Dataset."""

    def __init__(self, data_dir: Path, split: str) -> None:
        self._source = ImageFolder(data_dir, split)
        self.classes, self.keys = self._source.classes, list(self._source.keys)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        return self._source.read(index), self._source.labels[index]


@pytest.mark.parametrize("kind", ["folder", "dataset", "in memory"])
def test_given_classes_are_those_of_the_label_set(
    data_dir: Path, tmp_path: Path, kind: str
) -> None:
    of: dict[str, Callable[[str], Any]] = {
        "folder": lambda split: ImageFolder(data_dir, split),
        "dataset": lambda split: Pictures(data_dir, split),
        "in memory": lambda split: in_memory(data_dir, split),
    }
    images = data_dir if kind == "folder" else of[kind]("train")
    settings: dict[str, Any] = {**SETTINGS, "workers": 0, "val_images": of[kind]("val")}
    classes = ["dogs", "cats", "bees", "ants"]

    def four(images_BCHW: Tensor) -> Tensor:
        return nn.functional.pad(Shades()(images_BCHW).flip(1), (1, 0))

    labels = mealv2.annotate(images, [four], tmp_path / "labels", classes=classes, **settings)
    assert labels.classes == classes
    assert labels.manifest["roles"]["val"]["accuracy"]["ensemble"]["top1"] == 100.0
    with pytest.raises(ConfigError, match="cats"):
        mealv2.annotate(images, [Shades()], tmp_path / "b", classes=["ants", "bees"], **settings)


def test_a_folder_of_pictures_without_classes_is_labelled_with_given_ones(
    data_dir: Path, tmp_path: Path
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (data_dir / "train").glob("*/0[0-3].*"):
        shutil.copy(path, flat / f"{path.parent.name}-{path.name}")
    settings: dict[str, Any] = {**SETTINGS, "workers": 0}
    classes = ["ants", "bees", "cats"]
    for missing in ({"val_split": None}, {"classes": classes}):
        with pytest.raises(ConfigError, match="class names as classes=, and val_split=None"):
            mealv2.annotate(flat, [Shades()], tmp_path / "labels", **settings | missing)
    settings |= {"classes": classes, "val_split": None}
    labels = mealv2.annotate(flat, [Shades()], tmp_path / "labels", **settings)
    assert (labels.classes, len(list(labels.keys()))) == (classes, 12)
    assert len(mealv2.SoftLabelDataset(labels.folder, flat)) == 12


@pytest.mark.parametrize("url", ["s3://bucket/pictures", "https://host/pictures?token=abc"])
def test_images_behind_a_url_are_one_line(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match=r"local images, not .*; label them with .mealv2 pre"):
        mealv2.annotate(url, [Shades()], tmp_path / "labels")


def test_an_interrupted_set_is_completed_and_another_plan_is_refused(
    data_dir: Path, tmp_path: Path
) -> None:
    def label(*teachers: nn.Module, **changes: Any) -> LabelSet:
        settings = {**SETTINGS, "workers": 0, **changes}
        return mealv2.annotate(data_dir, teachers, tmp_path / "labels", **settings)

    label(Shades())
    whole = shards(tmp_path / "labels")
    for name in ("manifest.json", sorted(whole)[3]):
        (tmp_path / "labels" / name).unlink()
    label(Shades())
    assert shards(tmp_path / "labels") == whole
    with pytest.raises(LabelSetError, match="teachers"):
        label(Shades(5.0))
    with pytest.raises(LabelSetError, match="num_views"):
        label(Shades(), num_views=3)


def test_messages_go_to_the_logger_where_no_program_shows_them(
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(messages, "_info", logging.getLogger("mealv2").info)
    monkeypatch.setattr(messages, "_progress", messages._silent)
    with caplog.at_level(logging.INFO, logger="mealv2"):
        for _ in range(2):
            mealv2.annotate(data_dir, [Shades()], tmp_path / "labels", **SETTINGS, workers=0)
    assert "train: 4 of 4 shards complete" in caplog.messages
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"teachers": [nn.Flatten()]}, r"gives \(2, 3072\) for 2 images"),
        ({"teachers": [lambda images: [1]]}, "gives list for 2 images"),
        ({"teachers": [Shades(), Shades()]}, "the same weights"),
        ({"num_views": 0}, "num_views 0"),
        ({"batch_size": 0}, "batch_size 0: must be at least 1"),
        ({"img_size": 0}, "img_size 0: must be at least 1"),
        ({"workers": -1}, "workers -1: must be from 0 to"),
        ({"view_seed": -1}, "view_seed -1: must be from 0 to"),
        ({"view_seed": 1 << 63}, "view_seed 9223372036854775808: must be from 0 to"),
        ({"teachers": []}, "teachers is empty; give at least one"),
        ({"device": "foo"}, "device foo: "),
        ({"device": "cuda:77"}, "device cuda:77: "),
        ({"device": "meta"}, "device meta: "),
        ({"topk": 4}, "only 3 classes"),
        ({"val_images": [("a", b"", "ants")]}, "other classes"),
        ({"val_split": "test"}, "no folder .*test"),
    ],
)
def test_what_cannot_be_labelled_is_named(
    data_dir: Path, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    settings: dict[str, Any] = {"teachers": [Shades()], **SETTINGS, "workers": 0, **changes}
    if "val_images" in changes:
        settings["val_images"] = ImageSequence(changes["val_images"])
    with pytest.raises(ConfigError, match=named):
        mealv2.annotate(data_dir, output=tmp_path / "labels", **settings)
    assert not (tmp_path / "labels").exists()


def test_a_bad_picture_is_named_or_skipped(data_dir: Path, tmp_path: Path) -> None:
    images = [*in_memory(data_dir, "train"), ("broken", b"no image", "ants")]
    settings: dict[str, Any] = {**SETTINGS, "workers": 0}
    with pytest.raises(DataError, match="broken"):
        mealv2.annotate(images, [Shades()], tmp_path / "a", **settings)
    labels = mealv2.annotate(images, [Shades()], tmp_path / "b", on_bad_image="skip", **settings)
    assert list(labels.skipped) == ["broken"]


# --- images in memory ----------------------------------------------------------------------------


def test_images_in_memory_have_the_classes_of_their_names_or_those_given() -> None:
    named = ImageSequence([("b", b"12", "cats"), ("a", b"3", "ants")])
    assert (named.keys, named.labels, named.sizes) == (["b", "a"], [1, 0], [2, 1])
    assert named.classes == ["ants", "cats"]
    given = ImageSequence([("b", b"12", 2), ("a", b"3", "x")], classes=["x", "y", "z"])
    assert (given.labels, given.read(1)) == ([2, 0], b"3")


@pytest.mark.parametrize(
    ("images", "named"),
    [
        ([("a", b"", "x"), ("a", b"", "x")], "key 'a' is found twice"),
        ([("a", b"", 1)], "class 1 has no name"),
        ([("a", b"", -1)], "class -1 has no name"),
    ],
)
def test_keys_and_classes_in_memory_are_checked(images: list[Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ImageSequence(images)
