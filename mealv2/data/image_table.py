"""A table of images as a data set: CSV, TSV or Parquet with the columns path, class and split."""

import csv
import io
import os
import stat
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from mealv2.data.folder import ADVICE_NO_VAL, UnorderedSource
from mealv2.data.image_files import MAX_BYTES
from mealv2.data.tar_splits import own_split, read_class_names
from mealv2.errors import ConfigError
from mealv2.storage.regular_files import read_regular

# Names of the columns; the first is ours, the others are those of other programs' tables.
COLUMNS = {
    "path": ("path", "filename", "file_name", "filepath", "image"),
    "class": ("class", "label", "class_name", "target"),
    "split": ("split", "subset", "fold"),
}
_MAX_BYTES = 1 << 30


class Row(NamedTuple):
    """A line of a table: an image's path, its class, its split, and the number of the line."""

    path: str
    class_name: str
    split: str
    line: int


def is_table(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is named like a table of images."""
    return Path(path).suffix.lower() in _READERS


def check_splits(table: Path, splits: Iterable[str], *, made: str | None = None) -> None:
    """Raise ConfigError for a table without one of ``splits``, or with the split ``made``.

    ``made`` is a split that --val-fraction makes. Raises as ImageTable for a table that is damaged.
    """
    found = {row.split for row in _rows(table)}
    if made in found:
        raise ConfigError(own_split(table, str(made)))
    for split in splits:
        if split not in found:
            raise ConfigError(missing_split(table, split, sorted(found)))


class ImageTable(UnorderedSource):
    """The images that a table lists for a split.

    Paths are relative to the folder of the table and lie below it; they are the keys, in NFC,
    sorted. Class ids follow classes.txt or classes.json beside the table, which may also give the
    names of numbers in it; without such a file, the sorted names of all rows (numbers by value).
    Without a column ``split`` all rows are ``train``.
    Raises ConfigError for a table that cannot be read, a path outside, twice or without a file.
    """

    def __init__(self, table: Path, split: str) -> None:
        self.name = f"{table} ({split})"
        self.split = split
        self._folder = table.parent
        rows = list(_rows(table))
        chosen = [row for row in rows if row.split == split]
        if not chosen:
            raise ConfigError(missing_split(table, split, sorted({row.split for row in rows})))
        self.classes, id_of = _classes(table, rows)
        found = sorted((_key_of(table, row), row) for row in chosen)
        for (key, row), (other, _) in zip(found[1:], found, strict=False):
            if key == other:
                raise ConfigError(f"{table}, line {row.line}: {key} is listed twice for {split}")
        self.keys = [key for key, _ in found]
        self.labels = [id_of[row.class_name] for _, row in found]
        self._paths = [self._folder / row.path for _, row in found]
        self.sizes = self.stored_sizes = _sizes(table, self._paths)

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, position: int) -> bytes:
        """Return the encoded image at ``position``; raises OSError."""
        return read_regular(self._paths[position], max_bytes=MAX_BYTES)

    def where(self, position: int) -> str:
        """Return the path of an image for messages."""
        return str(self._paths[position])


def missing_split(table: Path, split: str, splits: Sequence[str]) -> str:
    """Return the message for a split that no row of a table has."""
    if split == "train":
        advice = "name the split of its rows with --train-split"
    else:
        advice = ADVICE_NO_VAL
    return f"{table} has no row of the split {split} (splits: {', '.join(splits)}); {advice}"


def _rows(table: Path) -> Iterator[Row]:
    """Yield the rows of a table; raises ConfigError."""
    names, lines = _READERS[table.suffix.lower()](table)
    lowered = [name.strip().lower() for name in names]
    at: dict[str, int] = {}
    for column, known in COLUMNS.items():
        found = [lowered.index(name) for name in known if name in lowered]
        if not found and column != "split":
            other = "; cells are divided by commas (.csv) or tabs (.tsv)" if len(names) == 1 else ""
            raise ConfigError(
                f"{table} has no column {column}: its columns are {', '.join(names) or 'none'}; "
                f"the first line names the columns path, class and, if it has several, split{other}"
            )
        at[column] = found[0] if found else -1
    number = 1
    for number, cells in enumerate(lines, 2):
        if not cells:
            continue  # an empty line
        if len(cells) != len(names):
            raise ConfigError(
                f"{table}, line {number}: {len(cells)} cells, but {len(names)} columns"
            )
        row = Row(
            cells[at["path"]].strip(),
            unicodedata.normalize("NFC", cells[at["class"]].strip()),
            cells[at["split"]].strip() if at["split"] >= 0 else "train",
            number,
        )
        for column, value in (("path", row.path), ("class", row.class_name), ("split", row.split)):
            if not value:
                hint = "; give a folder of unlabelled pictures as --extra-data instead"
                raise ConfigError(
                    f"{table}, line {number} has no {column}{hint if column == 'class' else ''}"
                )
        yield row
    if number == 1:
        raise ConfigError(f"{table} has no rows")


Table = tuple[list[str], Iterator[list[str]]]


def _text_table(table: Path, *, delimiter: str) -> Table:
    try:
        text = read_regular(table, max_bytes=_MAX_BYTES).decode("utf-8-sig")
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        names = next(lines, [])
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigError(f"cannot read {table}: {error}") from None
    return names, _checked(table, lines)


def _checked(table: Path, lines: Iterator[list[str]]) -> Iterator[list[str]]:
    try:
        yield from lines
    except csv.Error as error:
        raise ConfigError(f"cannot read {table}: {error}") from None


def _parquet_table(table: Path) -> Table:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ConfigError(f"{table}: pip install 'mealv2[parquet]' to read it") from None
    try:
        known = [name for names in COLUMNS.values() for name in names]
        file = parquet.ParquetFile(table)
        names = [name for name in file.schema_arrow.names if name.strip().lower() in known]
        found = file.read(columns=names)
        columns = [found.column(name).cast(pyarrow.string()).to_pylist() for name in names]
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"cannot read {table}: {reason}") from None
    return names, ([cell or "" for cell in row] for row in zip(*columns, strict=True))


_READERS: dict[str, Callable[[Path], Table]] = {
    ".csv": partial(_text_table, delimiter=","),
    ".tsv": partial(_text_table, delimiter="\t"),
    ".parquet": _parquet_table,
}


def _classes(table: Path, rows: Sequence[Row]) -> tuple[list[str], dict[str, int]]:
    """Return the class names by class id, and the class id of each value in the table."""
    names = {row.class_name for row in rows}
    are_numbers = all(name.isdecimal() and name.isascii() for name in names)
    known = read_class_names(table.parent)
    if known is None:
        known = sorted(names, key=(lambda name: (int(name), name)) if are_numbers else None)
    elif unknown := sorted(names - set(known)):
        if are_numbers and all(int(name) < len(known) for name in names):
            return known, {name: int(name) for name in names}
        raise ConfigError(
            f"{table} has the class {unknown[0]}, which the file of class names beside it does not "
            "list; add it, or remove the file"
        )
    return known, {name: class_id for class_id, name in enumerate(known)}


def _key_of(table: Path, row: Row) -> str:
    """Return the key of an image; raises ConfigError for a path outside the table's folder."""
    normal = os.path.normpath(row.path)
    if "\0" in row.path or Path(normal).is_absolute() or normal == ".." or normal[:3] == "../":
        raise ConfigError(
            f"{table}, line {row.line}: {row.path!r} is not a path in {table.parent}; move the "
            "table to a folder above the images and write their paths from there"
        )
    return unicodedata.normalize("NFC", Path(normal).as_posix())


def _sizes(table: Path, paths: Sequence[Path]) -> list[int]:
    sizes: list[int] = []
    missing: list[Path] = []
    for path in paths:
        try:
            found = path.stat()
        except (OSError, ValueError):
            missing.append(path)
            continue
        if not stat.S_ISREG(found.st_mode):
            missing.append(path)
        sizes.append(found.st_size)
    if missing:
        raise ConfigError(
            f"{table}: {len(missing)} of {len(paths)} images are not files, the first "
            f"{missing[0]}; paths are relative to the folder of the table"
        )
    return sizes
