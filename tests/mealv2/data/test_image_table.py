"""mealv2.data.image_table: CSV, TSV and Parquet tables of images."""

import csv
from pathlib import Path

import pytest

from mealv2.data.folder import ImageFolder
from mealv2.data.image_table import ImageTable
from mealv2.data.open import open_source
from mealv2.data.source import fingerprint, where_is
from mealv2.errors import ConfigError

Rows = list[tuple[str, ...]]


def rows_of(source: ImageFolder, *, prefix: str = "") -> Rows:
    names = [source.classes[label] for label in source.labels]
    return [
        (f"{prefix}{key}", name, source.split) for key, name in zip(source.keys, names, strict=True)
    ]


def write(path: Path, rows: Rows, *, head: tuple[str, ...] = ("path", "class", "split")) -> Path:
    if path.suffix == ".parquet":
        arrow = pytest.importorskip("pyarrow")
        columns = {name: [row[i] for row in rows] for i, name in enumerate(head)}
        pytest.importorskip("pyarrow.parquet").write_table(arrow.table(columns), path)
        return path
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows([head, *rows])
    return path


@pytest.mark.parametrize("name", ["list.csv", "list.tsv", "list.parquet"])
def test_a_table_has_the_images_of_the_folder(own_data: Path, name: str) -> None:
    train, val = (ImageFolder(own_data, split) for split in ("train", "val"))
    rows = [*rows_of(val, prefix="val/"), *rows_of(train, prefix="train/")]
    table = write(own_data / name, rows)
    for folder in (train, val):
        source = open_source(table, folder.split)
        assert source.keys == [f"{folder.split}/{key}" for key in folder.keys]
        assert (source.labels, source.classes) == (folder.labels, folder.classes)
        assert source.sizes == folder.sizes
        assert source.read(4) == folder.read(4)
        assert where_is(source, 4) == str(own_data / folder.split / folder.keys[4])


def test_a_table_beside_class_folders_is_the_same_data_set(own_data: Path) -> None:
    folder = ImageFolder(own_data / "train", "train")
    rows = [row[:2] for row in rows_of(folder)]
    table = write(own_data / "train" / "x.csv", rows, head=("filename", "Label"))
    assert fingerprint(ImageTable(table, "train")) == fingerprint(folder)


def test_numbers_are_class_ids_by_value_and_may_have_names(own_data: Path) -> None:
    rows = [(f"train/ants/{n:02d}.jpg", str(c), "train") for n, c in ((0, 2), (1, 10), (3, 2))]
    table = write(own_data / "list.csv", rows)
    assert ImageTable(table, "train").classes == ["2", "10"]
    (own_data / "classes.txt").write_text("\n".join("abcdefghijk"))
    source = ImageTable(table, "train")
    assert (source.classes[2], source.labels) == ("c", [2, 10, 2])


def test_names_beside_the_table_give_the_order_of_the_ids(own_data: Path) -> None:
    table = write(own_data / "list.csv", [("train/ants/00.jpg", "ants", "train")])
    (own_data / "classes.txt").write_text("zebras\nants\n")
    source = ImageTable(table, "train")
    assert (source.classes, source.labels) == (["zebras", "ants"], [1])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("/etc/passwd", "a", "train")], r"line 2: '/etc/passwd' is not a path in"),
        ([("../other/1.jpg", "a", "train")], "is not a path in"),
        ([("train/../../1.jpg", "a", "train")], "is not a path in"),
        ([("..", "a", "train")], "is not a path in"),
        ([("s3://b/1.jpg", "a", "train")], "1 of 1 images are not files"),
        ([("train", "a", "train")], "1 of 1 images are not files"),
        ([("train/ants/00.jpg", "", "train")], "line 2 has no class; .*--extra-data"),
        ([("", "a", "train")], "line 2 has no path"),
        ([("train/ants/00.jpg", "a")], "2 cells, but 3 columns"),
        ([("train/ants/00.jpg", "a", "test")], r"\(splits: test\); .* --train-split"),
        ([("train/ants/00.jpg", "a", "train"), ("./train//ants/00.jpg", "b", "train")], "twice"),
        ([], "has no rows"),
    ],
)
def test_a_wrong_row_is_named(own_data: Path, rows: Rows, message: str) -> None:
    table = write(own_data / "list.csv", rows)
    with pytest.raises(ConfigError, match=message):
        ImageTable(table, "train")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a,b\n1,2\n", "no column path: its columns are a, b"),
        (b"path,other\n1,2\n", "no column class"),
        (b"", "its columns are none"),
        (b"path;class\nx;1\n", r"are path;class.*divided by commas"),
        (b"\xff\xfe\x00", "cannot read"),
        (b'path,class\n"x,1\n', "cannot read"),
    ],
)
def test_a_file_that_is_not_such_a_table_is_an_error(
    tmp_path: Path, data: bytes, message: str
) -> None:
    (tmp_path / "x.csv").write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        ImageTable(tmp_path / "x.csv", "train")


def test_a_damaged_parquet_file_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ConfigError, match="cannot read"):
        ImageTable(tmp_path / "x.parquet", "train")


def test_a_missing_validation_split_names_the_flags(own_data: Path) -> None:
    table = write(own_data / "list.csv", [("train/ants/00.jpg", "a", "train")])
    with pytest.raises(ConfigError, match=r"--val-fraction 0\.2.*--val-split none"):
        ImageTable(table, "val")
