"""Which tar files are a split of a data set, by folder or pattern, and the names of its classes."""

import glob
import itertools
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from braceexpand import braceexpand  # comes with webdataset

from mealv2.data.jpeg_pack import SUFFIX as PACK_SUFFIX
from mealv2.data.jpeg_pack import Pack
from mealv2.errors import ConfigError
from mealv2.storage.json_format import parse_json

_COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4|lzma|z)|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
_MOST_FILES = 100_000
INDEX_SUFFIX = ".index"  # of the file next to a tar file that lists its images
CLASS_FILES = ("classes.txt", "classes.json")


class Split(NamedTuple):
    """The tar files of a split, by name, what to call them, and the class names if known."""

    paths: list[Path]
    name: str
    classes: list[str] | None


def find_split(data_dir: Path, split: str) -> Split | None:
    """Find the tar files of a split; None where ``data_dir`` is something else.

    It is a folder with SPLIT/*.tar, or with *.tar whose names have SPLIT as a word; or a pattern of
    such files, with ``{000000..000146}``, ``{a,b}``, ``*``, ``?`` and ``[…]``. A SPLIT folder with
    folders in it is an ImageFolder's, whatever else is there. Raises ConfigError, and DataError for
    a folder that `mealv2 pack` made which lacks files or has others.
    """
    text = str(data_dir)
    if os.path.isdir(text):  # noqa: PTH112 - a pattern can be too long for Path.is_dir
        return _in_folder(data_dir, split)
    if text.lower().endswith(".tar") or _COMPRESSED.search(text) or re.search(r"[{*?[]", text):
        return _by_pattern(text, split)
    return None


def _in_folder(root: Path, split: str) -> Split | None:
    folder = root / split
    if folder.is_dir() and any(p.is_dir() for p in folder.iterdir() if p.name[0] != "."):
        return None
    inside = _tars(folder) if folder.is_dir() else []
    names = [path.name for path in _tars(root)]
    paths = [*map(Path, shards_of(split, str(root), map(str, inside), names))]
    if not inside and (pack := Pack.read(root / f"{split}{PACK_SUFFIX}")) is not None:
        pack.check(str(root), {path.name: path.stat().st_size for path in paths})
    return Split(paths, str(folder), _class_names([root])) if paths else None


def shards_of(split: str, root: str, inside: Iterable[str], names: Iterable[str]) -> list[str]:
    """Return the tar files of a split in a folder: those in ROOT/SPLIT, or those named after it.

    ``inside`` are whole names, ``names`` those right in ``root``. Raises ConfigError where both
    kinds, or two series of names, could be meant.
    """
    inside = list(inside)
    beside = [f"{root}/{name}" for name in names if has_word(name, split)]
    if inside and beside:
        raise ConfigError(
            f"both {inside[0]} and {beside[0]} are shards of {split}; move one kind elsewhere"
        )
    require_plain_tars([*inside, *beside])
    series = {re.sub(r"\d+", "#", base := path.rpartition("/")[2]): base for path in beside}
    if len(series) > 1:
        one, two = sorted(series.values())[:2]
        raise ConfigError(
            f"{root} has two series of shards that could be {split}: {one} and {two}; "
            "give the one as a pattern in quotes, such as --data-dir "
            f"'{root}/{re.sub(r'[0-9]+', '[0-9]*', one)}'"
        )
    return inside or beside


def _by_pattern(pattern: str, split: str) -> Split:
    named = [Path(name) for name in _expanded(pattern)]
    own_paths = [path for path in named if path.parent.name == split or has_word(path.name, split)]
    missing = [path for path in own_paths if not path.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigError(f"--data-dir {pattern}: there is no file {missing[0]}{more}")
    if not named:
        raise ConfigError(f"--data-dir {pattern}: there is no such file")
    if not own_paths:
        raise ConfigError(
            f"--data-dir {pattern}: none of its {len(named)} tar files is of the split {split}, "
            f"whose name must be a word of the file's or its folder's name (first: {named[0]})"
        )
    require_plain_tars(map(str, own_paths))
    folders = {path.parent for path in own_paths}
    folders |= {folder.parent for folder in folders if folder.name == split}
    return Split(sorted(set(own_paths)), pattern, _class_names(sorted(folders)))


def _tars(folder: Path) -> list[Path]:
    """List the tar files in a folder by name, the compressed ones too; hidden ones aside."""
    files = sorted(path for path in folder.iterdir() if path.name[0] != ".")
    return [path for path in files if is_tar(path.name)]


def is_tar(name: str) -> bool:
    """Return whether a file's name is a tar file's, compressed or not."""
    return name.lower().endswith(".tar") or _COMPRESSED.search(name) is not None


def require_plain_tars(paths: Iterable[str]) -> None:
    """Raise ConfigError for a name that is not a plain tar file's."""
    for path in paths:
        if _COMPRESSED.search(path):
            raise ConfigError(
                f"{path} is compressed, so that no image can be read on its own; "
                "unpack it to a plain .tar (images hardly shrink)"
            )
        if not path.lower().endswith(".tar"):
            raise ConfigError(f"{path} is no .tar file; let the pattern of --data-dir leave it out")


def has_word(name: str, split: str) -> bool:
    """Return whether a split's name stands in a file's name with no letter or digit next to it."""
    return bool(re.search(rf"(?<![^\W_]){re.escape(split)}(?![^\W_])", name))


# --- patterns ---------------------------------------------------------------------------------


def _expanded(pattern: str) -> list[str]:
    """Return the names that a pattern stands for: braces as written, wildcards as files match."""
    found: list[str] = []
    for name in without_braces(pattern):
        found += sorted(glob.glob(name)) if glob.has_magic(name) else [name]  # noqa: PTH207
    return [name for name in found if not name.endswith(f".tar{INDEX_SUFFIX}")]


def without_braces(pattern: str) -> list[str]:
    """Return what a pattern with ``{a,b}`` and ``{000..146}`` stands for, as in webdataset."""
    ranges = re.findall(r"\{(\d+)\.\.(\d+)", pattern)
    names: list[str] = []
    # braceexpand makes a list of each range at once
    if all(abs(int(last) - int(first)) <= _MOST_FILES for first, last in ranges):
        try:
            names = list(itertools.islice(braceexpand(pattern, escape=False), _MOST_FILES + 1))
        except ValueError:  # unbalanced braces stand for themselves, as in bash
            return [pattern]
    if not 0 < len(names) <= _MOST_FILES:
        raise ConfigError(f"--data-dir {pattern} names more than {_MOST_FILES} files")
    return names


# --- class names ------------------------------------------------------------------------------


def _class_names(folders: Sequence[Path]) -> list[str] | None:
    """Read the class names that lie in one of the folders; see ``class_names``."""
    paths = [folder / name for folder in folders for name in CLASS_FILES]
    return class_names([(str(path), path.read_bytes()) for path in paths if path.is_file()])


def class_names(files: Sequence[tuple[str, bytes]]) -> list[str] | None:
    """Return what classes.txt (a name a line) or classes.json (a list) says, by name and bytes.

    None where there is no such file. Raises ConfigError where there are several, or one is no such
    list.
    """
    if not files:
        return None
    if len(files) > 1:
        raise ConfigError(f"{files[0][0]} and {files[1][0]} both name the classes; remove one")
    file, data = files[0]
    try:
        names = parse_json(data) if file.endswith(".json") else _lines(data)
    except ValueError as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None
    good = isinstance(names, list) and all(isinstance(name, str) and name for name in names)
    if not (good and names):
        raise ConfigError(f"{file} must be a list of class names, by class id, none of them empty")
    names = [unicodedata.normalize("NFC", name) for name in names]
    if len(set(names)) < len(names):
        twice = next(name for index, name in enumerate(names) if name in names[:index])
        raise ConfigError(f"{file} has the class {twice} twice")
    return names


def _lines(data: bytes) -> list[str]:
    text = data.decode("utf-8")
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
