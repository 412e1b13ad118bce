"""Which tar files are a split of a data set, by folder or pattern, and the names of its classes."""

import glob
import itertools
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mealv2.errors import ConfigError
from mealv2.files import parse_json
from mealv2.packed_tars import TarPack
from mealv2.tar_index import SUFFIX as INDEX_SUFFIX

_COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4|lzma|z)|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
_MOST_FILES = 100_000
_CLASS_FILES = ("classes.txt", "classes.json")


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
    beside = [path for path in _tars(root) if _has_word(path.name, split)]
    if inside and beside:
        raise ConfigError(
            f"both {inside[0]} and {beside[0]} are shards of {split}; move one kind elsewhere"
        )
    _refuse_others([*inside, *beside])
    series = {re.sub(r"\d+", "#", path.name): path.name for path in beside}
    if len(series) > 1:
        one, two = sorted(series.values())[:2]
        raise ConfigError(
            f"{root} has two series of shards that could be {split}: {one} and {two}; "
            "give the one as a pattern in quotes, such as --data-dir "
            f"'{root}/{re.sub(r'[0-9]+', '[0-9]*', one)}'"
        )
    paths = inside or beside
    if not inside and (pack := TarPack.read(root, split)) is not None:
        pack.check(root, beside)
    return Split(paths, str(folder), _class_names([root])) if paths else None


def _by_pattern(pattern: str, split: str) -> Split:
    named = [Path(name) for name in _expanded(pattern)]
    ours = [path for path in named if path.parent.name == split or _has_word(path.name, split)]
    missing = [path for path in ours if not path.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigError(f"--data-dir {pattern}: there is no file {missing[0]}{more}")
    if not named:
        raise ConfigError(f"--data-dir {pattern}: there is no such file")
    if not ours:
        raise ConfigError(
            f"--data-dir {pattern}: none of its {len(named)} tar files is of the split {split}, "
            f"whose name must be a word of the file's or its folder's name (first: {named[0]})"
        )
    _refuse_others(ours)
    folders = {path.parent for path in ours}
    folders |= {folder.parent for folder in folders if folder.name == split}
    return Split(sorted(set(ours)), pattern, _class_names(sorted(folders)))


def _tars(folder: Path) -> list[Path]:
    """List the tar files in a folder by name, the compressed ones too; hidden ones aside."""
    files = sorted(path for path in folder.iterdir() if path.name[0] != ".")
    return [
        path
        for path in files
        if path.name.lower().endswith(".tar") or _COMPRESSED.search(path.name)
    ]


def _refuse_others(paths: Sequence[Path]) -> None:
    for path in paths:
        if _COMPRESSED.search(path.name):
            raise ConfigError(
                f"{path} is compressed, so that no image can be read on its own; "
                "unpack it to a plain .tar (images hardly shrink)"
            )
        if not path.name.lower().endswith(".tar"):
            raise ConfigError(f"{path} is no .tar file; let the pattern of --data-dir leave it out")


def _has_word(name: str, split: str) -> bool:
    """Return whether a split's name stands in a file's name with no letter or digit next to it."""
    return bool(re.search(rf"(?<![^\W_]){re.escape(split)}(?![^\W_])", name))


# --- patterns ---------------------------------------------------------------------------------


def _expanded(pattern: str) -> list[str]:
    """Return the names that a pattern stands for: braces as written, wildcards as files match."""
    names = list(itertools.islice(_braces(pattern), _MOST_FILES + 1))
    if len(names) > _MOST_FILES:
        raise ConfigError(f"--data-dir {pattern} names more than {_MOST_FILES} files")
    found: list[str] = []
    for name in names:
        found += sorted(glob.glob(name)) if glob.has_magic(name) else [name]  # noqa: PTH207
    return [name for name in found if not name.endswith(f".tar{INDEX_SUFFIX}")]


def _braces(pattern: str) -> Iterator[str]:
    """Yield what a pattern with ``{a,b}`` and ``{000..146}`` stands for, as shells expand it."""
    for begin in (place for place, letter in enumerate(pattern) if letter == "{"):
        parts, end = _parts(pattern, begin)
        choices = _numbers(parts[0]) if len(parts) == 1 else parts
        if choices is not None:
            for choice in choices:
                for middle in _braces(choice):
                    for rest in _braces(pattern[end:]):
                        yield pattern[:begin] + middle + rest
            return
    yield pattern


def _parts(pattern: str, begin: int) -> tuple[list[str], int]:
    """Split at the commas between an opening brace and its partner; return the end too."""
    depth, starts = 0, [begin + 1]
    for place in range(begin, len(pattern)):
        depth += {"{": 1, "}": -1}.get(pattern[place], 0)
        if depth == 1 and pattern[place] == ",":
            starts.append(place + 1)
        if depth == 0:
            ends = [*(start - 1 for start in starts[1:]), place]
            return [pattern[a:b] for a, b in zip(starts, ends, strict=True)], place + 1
    return [""], begin


def _numbers(text: str) -> Iterator[str] | None:
    """Return the numbers of ``FIRST..LAST`` or ``FIRST..LAST..STEP``; None where it is none."""
    found = re.fullmatch(r"([0-9]{1,18})\.\.([0-9]{1,18})(?:\.\.([0-9]{1,18}))?", text)
    if found is None:
        return None
    ends = found[1], found[2]
    first, last, step = int(ends[0]), int(ends[1]), int(found[3] or 1) or 1
    width = max(map(len, ends)) if any(end[0] == "0" != end for end in ends) else 0
    numbers = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
    return (f"{number:0{width}d}" for number in numbers)


# --- class names ------------------------------------------------------------------------------


def _class_names(folders: Sequence[Path]) -> list[str] | None:
    """Read classes.txt (a name a line) or classes.json (a list) in one of the folders.

    None where there is none. Raises ConfigError where there are several, or one is no such list.
    """
    files = [folder / name for folder in folders for name in _CLASS_FILES]
    there = [path for path in files if path.is_file()]
    if not there:
        return None
    if len(there) > 1:
        raise ConfigError(f"{there[0]} and {there[1]} both name the classes; remove one")
    path = there[0]
    try:
        names = parse_json(path.read_bytes()) if path.suffix == ".json" else _lines(path)
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    good = isinstance(names, list) and all(isinstance(name, str) and name for name in names)
    if not (good and names):
        raise ConfigError(f"{path} must be a list of class names, by class id, none of them empty")
    names = [unicodedata.normalize("NFC", name) for name in names]
    if len(set(names)) < len(names):
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise ConfigError(f"{path} has the class {twice} twice")
    return names


def _lines(path: Path) -> list[str]:
    text = path.read_bytes().decode("utf-8")
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
