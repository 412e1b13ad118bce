"""mealv2.data.layouts: published layouts are read as published, and their paths not trusted."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from layouts import BIRDS, VOC_CLASSES, draw_birdsnap, draw_cub, draw_lists, draw_voc

from mealv2.data import layouts
from mealv2.data.held_out import HeldOut
from mealv2.data.layout_name import layout_name
from mealv2.data.layouts import ListedSource
from mealv2.data.open import open_source
from mealv2.data.source import ImageSource, fingerprint, multi_labels_of
from mealv2.errors import ConfigError

DRAW: dict[str, Callable[[Path], Path]] = {
    "voc2007": draw_voc,
    "cub200": draw_cub,
    "birdsnap": draw_birdsnap,
}


def opened(layout: str, folder: Path, split: str) -> ImageSource:
    return open_source(Path(f"{layout}:{folder}"), split)


def test_voc_has_1_0_and_minus_1_of_every_class(tmp_path: Path) -> None:
    folder = draw_voc(tmp_path / "VOC2007")
    train, test = (opened("voc2007", folder, split) for split in ("train", "val"))
    assert train.classes == list(VOC_CLASSES)
    assert (len(train), len(test)) == (24, 12)
    assert train.keys[:2] == ["000001.jpg", "000002.jpg"]
    labels = multi_labels_of(train)
    assert labels is not None
    # images 2, 4 and 6: kinds are the bits of the number before; the sixth has a difficult cat
    assert [tuple(labels[n]) for n in (1, 3, 5)] == [(1, -1, -1), (1, 1, -1), (1, -1, 0)]
    assert train.labels[:4] == [0, 0, 1, 0]
    assert train.read(0).startswith(b"\xff\xd8")
    same = opened("voc2007", folder, "trainval"), opened("voc2007", folder, "test")
    assert [list(source.keys) for source in same] == [list(train.keys), list(test.keys)]


@pytest.mark.parametrize("layout", ["cub200", "birdsnap"])
def test_birds_are_divided_as_published(tmp_path: Path, layout: str) -> None:
    folder = DRAW[layout](tmp_path / "birds")
    train, test = (opened(layout, folder, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (18, 9)
    assert [name.split(".")[-1] for name in train.classes] == list(BIRDS)
    assert set(train.keys).isdisjoint(test.keys)
    for source in (train, test):
        for key, label in zip(source.keys, source.labels, strict=True):
            assert key.split("/")[0] == source.classes[label]
    assert multi_labels_of(train) is None


def test_lists_of_images_have_the_classes_of_all_splits(tmp_path: Path) -> None:
    folder = draw_lists(tmp_path / "realm")
    name = f"{folder}/lists={folder}"
    train, val = (opened("list", Path(name), split) for split in ("train", "val"))
    assert (len(train), len(val)) == (18, 9)
    assert train.classes == val.classes == ["0", "10", "20"]
    assert train.labels == [0] * 6 + [1] * 6 + [2] * 6
    # a list beside the images, with the name of a realm
    (folder / "bird.train").write_bytes((folder / "lists" / "train.txt").read_bytes())
    beside = opened("list", folder / "bird", "train")
    assert beside.keys == train.keys


def test_names_of_classes_beside_the_lists_are_used(tmp_path: Path) -> None:
    folder = draw_lists(tmp_path / "realm")
    names = [f"name {number}" for number in range(21)]
    (folder / "lists" / "classes.txt").write_text("\n".join(names))
    found = opened("list", Path(f"{folder}/lists={folder}"), "val")
    assert found.classes == names
    assert set(found.labels) == {0, 10, 20}


@pytest.mark.parametrize("layout", list(DRAW))
def test_another_size_than_the_published_is_a_remark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    folder = DRAW[layout](tmp_path / "set")
    (remark,) = opened(layout, folder, "train").left_out.remarks
    published = layouts.PUBLISHED[layout]["trainval" if layout == "voc2007" else "train"]
    assert f"published are {published}" in remark
    sizes = {"voc2007": (24, 12), "cub200": (18, 9), "birdsnap": (18, 9)}[layout]
    names = layouts.PUBLISHED[layout]
    monkeypatch.setitem(layouts.PUBLISHED, layout, dict(zip(names, sizes, strict=True)))
    for split in ("train", "test"):
        assert opened(layout, folder, split).left_out.remarks == []


def test_the_published_sizes_are_those_of_table_8() -> None:
    assert layouts.PUBLISHED == {
        "voc2007": {"trainval": 5011, "test": 4952},
        "cub200": {"train": 5994, "test": 5794},
        "birdsnap": {"train": 47386, "test": 2443},
    }


def test_a_listed_image_without_a_file_is_left_out_and_counted(tmp_path: Path) -> None:
    folder = draw_birdsnap(tmp_path / "birds")
    (folder / "download" / "images" / BIRDS[0] / "0.jpg").unlink()
    found = opened("birdsnap", folder, "train")
    assert len(found) == 17
    assert found.left_out.counts == {"listed, but missing": 1}


@pytest.mark.parametrize("path", ["../outside.jpg", "/etc/passwd", "a/../../b.jpg", "..", "a\0b"])
@pytest.mark.parametrize("layout", ["cub200", "birdsnap", "list"])
def test_a_path_outside_the_folder_is_an_error(tmp_path: Path, layout: str, path: str) -> None:
    draw = {**DRAW, "list": draw_lists}[layout]
    folder = draw(tmp_path / "set")
    file = folder / {"list": "lists/train.txt"}.get(layout, "images.txt")
    lines = file.read_text().splitlines(keepends=True)
    line = {"cub200": f"1 {path}\n", "birdsnap": f"u\t0\t{path}\t1\t1\n", "list": f"{path} 0\n"}
    number = 1 if layout == "birdsnap" else 0
    lines[number] = line[layout]
    file.write_text("".join(lines))
    name = Path(f"{folder}/lists={folder}") if layout == "list" else folder
    with pytest.raises(ConfigError, match="not a path in its folder of images"):
        opened(layout, name, "train")


def test_a_voc_image_id_outside_is_an_error(tmp_path: Path) -> None:
    folder = draw_voc(tmp_path / "set")
    for file in (folder / "ImageSets" / "Main").glob("*_trainval.txt"):
        file.write_text(file.read_text() + "../../secret -1\n")
    with pytest.raises(ConfigError, match="secret"):
        opened("voc2007", folder, "train")


@pytest.mark.parametrize(
    ("layout", "file", "text", "named"),
    [
        ("voc2007", "ImageSets/Main/cat_trainval.txt", "000001 2\n", "1, 0 or -1"),
        ("voc2007", "ImageSets/Main/cat_trainval.txt", "000001 1\n", "lists other images than"),
        ("voc2007", "ImageSets/Main/cat_trainval.txt", "000001\n", "line 1: two words"),
        ("cub200", "image_class_labels.txt", "1 1\n", "image 2 has no class"),
        ("cub200", "train_test_split.txt", "1 2\n", "neither 0 nor 1"),
        ("birdsnap", "images.txt", "url\tpath\n", "no column species_id"),
        ("birdsnap", "images.txt", "path\tspecies_id\na/b.jpg\n", "line 2: 1 cells are too few"),
        ("birdsnap", "images.txt", "path\tspecies_id\na.jpg\t9\n", "species 9"),
        ("birdsnap", "species.txt", b"\xff\xfe\x00", "cannot read"),
    ],
)
def test_a_damaged_list_is_named(
    tmp_path: Path, layout: str, file: str, text: str | bytes, named: str
) -> None:
    folder = DRAW[layout](tmp_path / "set")
    (folder / file).write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError, match=named):
        opened(layout, folder, "train")


def test_an_image_that_is_listed_twice_is_an_error(tmp_path: Path) -> None:
    folder = draw_lists(tmp_path / "set")
    file = folder / "lists" / "train.txt"
    file.write_text(file.read_text() + "./images/0-0.jpg 0\n")
    with pytest.raises(ConfigError, match="twice"):
        opened("list", Path(f"{folder}/lists={folder}"), "train")


def test_a_name_means_the_same_by_its_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_cub(tmp_path / "birds")
    monkeypatch.chdir(tmp_path)
    relative = Path("cub200:birds")
    named, again = layout_name(relative), layout_name(Path(os.path.abspath(relative)))  # noqa: PTH100
    assert named is not None
    assert again is not None
    assert again.folder == tmp_path / "birds"
    assert list(open_source(relative, "train").keys) == list(
        open_source(tmp_path / "cub200:birds", "train").keys
    )


@pytest.mark.parametrize("path", ["birds", "cub:birds", "cub200", "cub200:", "package.module:load"])
def test_other_paths_name_no_layout(path: str) -> None:
    assert layout_name(Path(path)) is None


def test_a_missing_folder_or_split_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no train_test_split\.txt"):
        opened("cub200", tmp_path, "train")
    with pytest.raises(ConfigError, match="has the splits train, val, test, not dev"):
        opened("cub200", draw_cub(tmp_path / "birds"), "dev")
    with pytest.raises(ConfigError, match=r"give train\.txt there"):
        opened("list", tmp_path, "train")


def test_labels_of_several_classes_are_held_out_and_hashed_with_their_images(
    tmp_path: Path,
) -> None:
    name = Path(f"voc2007:{draw_voc(tmp_path / 'set')}")
    held_out = HeldOut(0.25, name="tuning")
    parts = [open_source(name, split, held_out=held_out) for split in ("train", "tuning")]
    whole = open_source(name, "train")
    known = dict(zip(whole.keys, multi_labels_of(whole) or (), strict=True))
    assert sum(map(len, parts)) == len(whole)
    for part in parts:
        labels = multi_labels_of(part)
        assert labels is not None
        assert [known[key] for key in part.keys] == list(labels)
    assert isinstance(whole, ListedSource)
    before = fingerprint(whole)
    assert whole.multi_labels is not None
    whole.multi_labels[3] = (1, 1, 1)
    assert fingerprint(whole) != before
