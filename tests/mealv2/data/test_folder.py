"""mealv2.data.folder: what is an image of a split."""

import os
import shutil
import unicodedata
from pathlib import Path

import pytest
from torchvision import datasets

from mealv2.data.folder import ImageFolder
from mealv2.data.open import open_source
from mealv2.data.source import fingerprint
from mealv2.errors import ConfigError
from pictures import encoded, photo


def plant(root: Path, *names: str, data: bytes | None = None) -> Path:
    """Write an image under each name; the names' length sets their size."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(photo(len(name), 3), "PNG") if data is None else data)
    return root


# --- ImageFolder ----------------------------------------------------------------------------------

TREE = [
    "train/ant/b.jpg",
    "train/ant/a.JPEG",
    "train/ant/nested/deep/c.png",
    "train/ant-eater/x.webp",  # '-' sorts before '/': keys and classes sort differently
    "train/Zebra/1.tif",
    "train/Zebra/10.bmp",
    "train/Zebra/2.PPM",
    "train/猫/写真.png",
]


def test_keys_classes_and_labels_are_those_of_torchvision(tmp_path):
    plant(tmp_path, *TREE)
    plant(tmp_path, "train/ant/notes.txt", "train/stray.png", data=b"no image of a class")
    (tmp_path / "train/Zebra/linked").symlink_to(tmp_path / "train/ant/nested")
    ours = ImageFolder(tmp_path, "train")
    theirs = datasets.ImageFolder(tmp_path / "train")

    split = tmp_path / "train"
    expected = {Path(p).relative_to(split).as_posix(): label for p, label in theirs.samples}
    assert dict(zip(ours.keys, ours.labels, strict=True)) == expected
    assert len(ours) == len(ours.keys) == 9
    assert ours.classes == theirs.classes
    assert ours.keys == sorted(ours.keys)
    assert [ours.read(i) for i in range(len(ours))] == [(split / k).read_bytes() for k in ours.keys]
    assert ours.sizes == [len(ours.read(i)) for i in range(len(ours))]


def test_order_does_not_depend_on_the_order_of_creation(tmp_path):
    names = [*TREE, *(f"train/ant/{i * 7919 % 1000}.png" for i in range(100))]
    forward = ImageFolder(plant(tmp_path / "a", *names), "train")
    backward = ImageFolder(plant(tmp_path / "b", *reversed(names)), "train")
    assert forward.keys == backward.keys
    assert forward.labels == backward.labels
    assert fingerprint(forward) == fingerprint(backward)


def test_keys_are_unicode_normalised(tmp_path):
    decomposed = unicodedata.normalize("NFD", "größe.png")
    plant(tmp_path, f"train/a/{decomposed}")
    source = ImageFolder(tmp_path, "train")
    assert source.keys == ["a/größe.png"] != [f"a/{decomposed}"]
    assert source.read(0)


def test_classes_do_not_depend_on_how_unicode_spells_the_folder_names(tmp_path):
    names, data = ["éclair", "fudge", "zoo"], encoded(photo(5, 3), "PNG")
    trees = [
        ImageFolder(
            plant(tmp_path / form, *(f"train/{n}/1.png" for n in spelled), data=data), "train"
        )
        for form in ("NFC", "NFD")
        for spelled in [[unicodedata.normalize(form, name) for name in names]]
    ]
    assert trees[0].keys == trees[1].keys
    assert trees[0].labels == trees[1].labels
    assert trees[0].classes == trees[1].classes
    assert fingerprint(trees[0]) == fingerprint(trees[1])


def test_names_that_differ_only_in_unicode_spelling_are_refused(tmp_path):
    plant(tmp_path, *(f"train/a/{unicodedata.normalize(f, 'é.png')}" for f in ("NFC", "NFD")))
    with pytest.raises(ConfigError, match="differ only in Unicode normalisation"):
        ImageFolder(tmp_path, "train")


def test_class_folders_that_differ_only_in_unicode_spelling_are_refused(tmp_path):
    for number, form in enumerate(("NFC", "NFD")):
        plant(tmp_path, f"train/{unicodedata.normalize(form, 'é')}/{number}.png")
    with pytest.raises(ConfigError, match="differ only in Unicode normalisation"):
        ImageFolder(tmp_path, "train")


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    plant(tmp_path, "train/a/1.png")
    os.link(tmp_path / "train/a/1.png", os.fsencode(tmp_path / "train/a") + b"/\xff.png")
    with pytest.raises(ConfigError, match="not valid UTF-8"):
        ImageFolder(tmp_path, "train")


def test_names_that_begin_with_a_dot_are_ignored(tmp_path):
    plant(tmp_path, "train/dog/1.png")
    plant(
        tmp_path,
        "train/dog/._1.png",
        "train/dog/.thumbnails/1.png",
        "train/.ipynb_checkpoints/1.png",
        "train/.DS_Store",
    )
    source = ImageFolder(tmp_path, "train")
    assert source.classes == ["dog"]
    assert source.keys == ["dog/1.png"]


def test_an_empty_class_is_refused_by_name(tmp_path):
    plant(tmp_path, "train/dog/1.png")
    plant(tmp_path, "train/cat/readme.txt", "train/cat/.hidden.png", data=b"x")
    with pytest.raises(ConfigError, match=r"train/cat has no image .*\.jpg"):
        ImageFolder(tmp_path, "train")


def test_a_split_without_class_folders_is_refused(tmp_path):
    plant(tmp_path, "train/1.png")
    with pytest.raises(ConfigError, match="has no class folders"):
        ImageFolder(tmp_path, "train")


def test_a_missing_split_is_refused_naming_what_is_there(tmp_path):
    plant(tmp_path, "training/dog/1.png", "validation/dog/1.png")
    with pytest.raises(ConfigError, match=r"no folder .*/val; .*training, validation\)"):
        ImageFolder(tmp_path, "val")
    with pytest.raises(ConfigError, match=r"no folder .*\(there is no folder .*nowhere\)"):
        ImageFolder(tmp_path / "nowhere", "val")


def test_open_source_opens_an_image_folder_and_refuses_what_is_none(tmp_path):
    plant(tmp_path, *TREE)
    source = open_source(tmp_path, "train")
    assert source.keys == ImageFolder(tmp_path, "train").keys
    assert (source.split, len(source)) == ("train", 8)
    with pytest.raises(ConfigError, match=r"no folder .*/val"):
        open_source(tmp_path, "val")


def test_a_file_that_went_away_raises_os_error_when_read(tmp_path):
    plant(tmp_path, "train/dog/1.png")
    (tmp_path / "train/dog/0.png").symlink_to(tmp_path / "gone.png")
    source = ImageFolder(tmp_path, "train")
    assert source.sizes[0] == 0
    with pytest.raises(FileNotFoundError):
        source.read(0)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_that_replaced_an_image_and_a_huge_file_are_never_read(tmp_path):
    plant(tmp_path, "train/dog/1.png", "train/dog/2.png")
    source = ImageFolder(tmp_path, "train")
    (tmp_path / "train/dog/1.png").unlink()
    os.mkfifo(tmp_path / "train/dog/1.png")
    os.truncate(tmp_path / "train/dog/2.png", 20 << 30)  # sparse
    with pytest.raises(OSError, match="a named pipe, not a file"):
        source.read(0)
    with pytest.raises(OSError, match="21474836480 bytes, more than the 2147483648"):
        source.read(1)


def rename_key(root: Path) -> None:
    (root / "train/ant/b.jpg").rename(root / "train/ant/bb.jpg")


def grow_file(root: Path) -> None:
    with (root / "train/ant/b.jpg").open("ab") as file:
        file.write(b"\0")


def rename_class(root: Path) -> None:
    (root / "train/Zebra").rename(root / "train/Zebras")


def drop_image(root: Path) -> None:
    (root / "train/Zebra/10.bmp").unlink()


@pytest.mark.parametrize(
    "change", [rename_key, grow_file, rename_class, drop_image], ids=lambda f: f.__name__
)
def test_fingerprint_changes_with(tmp_path, change):
    plant(tmp_path, *TREE)
    before = fingerprint(ImageFolder(tmp_path, "train"))
    change(tmp_path)
    assert fingerprint(ImageFolder(tmp_path, "train")) != before


def test_fingerprint_changes_with_nothing_but_a_label_or_a_class_name(tmp_path):
    source = ImageFolder(plant(tmp_path, *TREE), "train")
    seen = {fingerprint(source)}
    source.labels[0], kept = source.labels[0] + 1, source.labels[0]
    seen.add(fingerprint(source))
    source.labels[0] = kept
    source.classes[0] += "x"
    seen.add(fingerprint(source))
    assert len(seen) == 3


def test_fingerprint_does_not_change_with_mtime_or_place(tmp_path):
    plant(tmp_path / "here", *TREE)
    before = fingerprint(ImageFolder(tmp_path / "here", "train"))
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    for path in (tmp_path / "there").rglob("*"):
        os.utime(path, (1, 1))
    assert fingerprint(ImageFolder(tmp_path / "there", "train")) == before
