"""mealv2.data.walk: every file is an image or counted; links that loop are refused."""

import os
import re
import socket
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mealv2.data.folder import ImageFolder
from mealv2.errors import ConfigError
from pictures import encoded, photo

PNG = encoded(photo(5, 3), "PNG")


def plant(root: Path, *names: str, data: bytes = PNG) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def test_all_extensions_are_taken_and_unknown_ones_by_their_content(tmp_path: Path) -> None:
    taken = [f"train/a/{n}{suffix}" for n, suffix in enumerate((
        ".jpg", ".JPE", ".jfif", ".gif", ".avif", ".heic", ".pbm", ".pnm", ".TIFF", ".webp", "",
        ".jpg_large",
    ))]  # fmt: skip
    plant(tmp_path, *taken)
    plant(tmp_path, "train/a/notes.txt", "train/a/copy.png.bak", "train/a/copy.png~")
    plant(tmp_path, "train/a/IMG_1.NEF", "train/a/MOV_1.THM", "train/a/x.jpg_original")
    plant(tmp_path, "train/a/README", "train/a/x.dat", data=b"text")
    source = ImageFolder(tmp_path, "train")
    assert source.keys == sorted(name.removeprefix("train/") for name in taken)
    counts = {".txt": 1, ".bak": 1, ".png~": 1, "no extension": 1, ".dat": 1}
    counts |= {".nef": 1, ".thm": 1, ".jpg_original": 1}
    assert source.left_out.counts == counts


def test_what_is_not_a_regular_file_is_counted_and_never_opened(tmp_path: Path) -> None:
    folder = plant(tmp_path, "train/a/1.png") / "train/a"
    os.mkfifo(folder / "pipe.jpg")
    os.mkfifo(folder / "pipe")
    (folder / "linked.jpg").symlink_to("pipe.jpg")
    (folder / "null.jpg").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as listening:
        path = folder / "socket.jpg"
        descriptor = os.open(folder, os.O_RDONLY)
        try:  # the path of a socket has at most 108 bytes
            listening.bind(f"/proc/self/fd/{descriptor}/{path.name}")
        finally:
            os.close(descriptor)
        source = ImageFolder(tmp_path, "train")
    assert source.keys == ["a/1.png"]
    assert source.left_out.counts == {"not a file": 5}


@pytest.mark.parametrize("target", [".", "..", "../..", "../../.."])
def test_a_link_to_a_folder_above_is_refused_by_its_name(tmp_path: Path, target: str) -> None:
    plant(tmp_path, "data/train/a/1.png", "data/train/b/1.png", "data/val/a/1.png")
    link = tmp_path / "data/train/a/again"
    link.symlink_to(target)
    with pytest.raises(ConfigError, match=f"{re.escape(str(link))} is a link to .* contains it"):
        ImageFolder(tmp_path / "data", "train")


def test_a_class_that_is_a_link_to_its_split_and_links_in_a_circle_are_refused(
    tmp_path: Path,
) -> None:
    plant(tmp_path, "one/train/a/1.png", "two/train/a/1.png", "two/train/b/1.png")
    (tmp_path / "one/train/self").symlink_to(".")
    with pytest.raises(ConfigError, match="train/self is a link to"):
        ImageFolder(tmp_path / "one", "train")
    (tmp_path / "two/train/a/to-b").symlink_to("../b")
    (tmp_path / "two/train/b/to-a").symlink_to("../a")
    with pytest.raises(ConfigError, match=r"to-\w is a link to"):
        ImageFolder(tmp_path / "two", "train")


def test_a_link_to_a_folder_elsewhere_is_followed_and_a_doubled_one_named(tmp_path: Path) -> None:
    plant(tmp_path, "data/train/a/1.png", "elsewhere/deep/2.png")
    (tmp_path / "data/train/b").symlink_to(tmp_path / "elsewhere")
    source = ImageFolder(tmp_path / "data", "train")
    assert source.keys == ["a/1.png", "b/deep/2.png"]
    assert source.left_out.remarks == []
    (tmp_path / "data/train/a/more").symlink_to(tmp_path / "elsewhere/deep")
    source = ImageFolder(tmp_path / "data", "train")
    assert source.keys == ["a/1.png", "a/more/2.png", "b/deep/2.png"]
    assert source.left_out.remarks == [
        "b/deep is the same folder as a/more: its images count twice"
    ]


def test_a_link_to_nothing_is_a_bad_image_and_said(tmp_path: Path) -> None:
    plant(tmp_path, "train/a/1.png")
    (tmp_path / "train/a/0.png").symlink_to("gone.png")
    (tmp_path / "train/a/2.png").symlink_to("2.png")
    (tmp_path / "train/a/3").symlink_to("gone")
    source = ImageFolder(tmp_path, "train")
    assert source.keys == ["a/0.png", "a/1.png", "a/2.png"]
    assert source.left_out.remarks == ["links to nothing among the images: 2 (a/0.png)"]
    assert source.left_out.counts == {"a link to nothing": 1}


def test_files_outside_a_class_are_counted_but_not_the_index_of_a_pack(tmp_path: Path) -> None:
    plant(tmp_path, "train/a/1.png", "train/1.png", "train/readme.txt", "train/.hidden/1.png")
    source = ImageFolder(tmp_path, "train")
    assert source.left_out.counts == {"outside a class folder": 2, "hidden": 1}
    assert "1.png (outside a class folder)" in source.left_out.examples


names = st.sampled_from(["a.jpg", "b.PNG", "c.txt", "d", "e.gif", ".f.jpg", "g.tar", "h.xyz", "i~"])
kinds = st.sampled_from(["image", "text", "pipe", "dangling", "link"])
entries = st.dictionaries(
    st.tuples(st.sampled_from(["", "sub/", "sub/deeper/"]), names), kinds, max_size=12
)


@settings(max_examples=60, deadline=None, database=None)
@given(entries)
def test_images_and_files_left_out_are_all_files(tree: dict[tuple[str, str], str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folder = plant(root, "train/class/first.png", "elsewhere.png") / "train/class"
        for (below, base), kind in tree.items():
            path = folder / below / base
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "pipe":
                os.mkfifo(path)
            elif kind in ("dangling", "link"):
                path.symlink_to(root / ("gone" if kind == "dangling" else "elsewhere.png"))
            else:
                path.write_bytes(PNG if kind == "image" else b"text")
        source = ImageFolder(root, "train")
        assert len(source) + source.left_out.counts.total() == 1 + len(tree)
        for key in source.keys:
            assert not key.rpartition("/")[2].startswith(".")
