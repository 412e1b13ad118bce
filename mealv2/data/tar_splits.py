"""Which tar files are a split of a data set, by folder or pattern, and the names of its classes."""

import contextlib
import fnmatch
import glob
import itertools
import json
import os
import posixpath
import re
import unicodedata
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from urllib.parse import urlsplit

from braceexpand import braceexpand  # comes with webdataset

from mealv2.data.pack_index import ADVICE_RERUN, Pack
from mealv2.data.pack_index import SUFFIX as PACK_SUFFIX
from mealv2.errors import ConfigError, DataError
from mealv2.storage.json_format import parse_json
from mealv2.storage.regular_files import read_regular
from mealv2.storage.urls import PIPE, Location, beside, file_name, is_url, shown, within

_COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4|lzma|z)|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
_MAX_FILES = 100_000
_MAX_BYTES = 1 << 30  # of a list of classes or a SPLIT.pack.json
INDEX_SUFFIX = ".index"  # of the index file next to a tar file
_CLASS_FILES = ("classes.txt", "classes.json")
Store = ModuleType  # mealv2.storage.object_store, which takes 0.2 s to import


class Split(NamedTuple):
    """The sorted tar files of a split, its name in messages, and the class names if known."""

    tars: list[Location]
    name: str
    classes: list[str] | None


def find_split(data_dir: Location, split: str, *, store: Store | None = None) -> Split | None:
    """Find the tar files of a split; None if ``data_dir`` has none. A URL needs a ``store``.

    ``data_dir`` is a folder with SPLIT/*.tar, or with *.tar whose names contain SPLIT as a word; or
    a pattern of such files, with ``{000000..000146}``, ``{a,b}``, ``*``, ``?`` and ``[…]``. A SPLIT
    folder with subfolders belongs to an ImageFolder. Raises ConfigError, RemoteError, and DataError
    for a folder that does not match the index of `mealv2 pack`.
    """
    text = str(data_dir)
    if not is_url(data_dir) and os.path.isdir(text):  # noqa: PTH112 - Path.is_dir: name too long
        return _in_folder(data_dir, split, store)
    if text.startswith(PIPE) or _is_tar(text) or re.search(r"[{*?[]", text):
        return _by_pattern(data_dir, split, store)
    return _in_folder(data_dir, split, store) if is_url(data_dir) else None


def require_no_split(data_dir: Location, split: str, *, store: Store | None = None) -> None:
    """Raise ConfigError if a data set has a split: --val-fraction would replace it."""
    try:
        found = find_split(data_dir, split, store=store) is not None
    except ConfigError:  # no file of the pattern is of the split
        found = False
    if isinstance(data_dir, Path):
        found = found or (data_dir / split).is_dir()
    if found:
        raise ConfigError(own_split(data_dir, split))


def own_split(data_dir: Location, split: str) -> str:
    """Return the message for a data set that has a split that --val-fraction would make."""
    return (
        f"{shown(data_dir)} has a split {split}, which --val-fraction would not use; leave out "
        "--val-fraction, or give the held-out images another name with --val-split"
    )


def _in_folder(root: Location, split: str, store: Store | None) -> Split | None:
    folder = _within(root, split)
    if isinstance(folder, Path) and any(p.name[0] != "." for p in folder.glob("*/")):
        return None
    sizes = _tars(root, store)  # first: a server that cannot list is an error that names this URL
    inside = [_within(folder, name) for name in _tars(folder, store)]
    beside_it = [_within(root, name) for name in sizes if _has_word(name, split)]
    if inside and beside_it:
        raise ConfigError(
            f"both {shown(inside[0])} and {shown(beside_it[0])} are shards of {split}; move one "
            "kind elsewhere"
        )
    _check_not_compressed([*inside, *beside_it])
    _check_one_series(root, split, [_name(tar) for tar in beside_it])
    pack_file = _within(root, f"{split}{PACK_SUFFIX}")
    if not inside and (data := _read(pack_file, store)) is not None:
        pack = Pack.of_bytes(data, shown(pack_file))
        pack.check(shown(root).rstrip("/"), {name: sizes[name] for name in map(_name, beside_it)})
    tars = inside or beside_it
    name = str(folder) if isinstance(folder, Path) else f"{shown(root)} ({split})"
    return Split(tars, name, _class_names(tars, split, store)) if tars else None


def _check_one_series(root: Location, split: str, names: Sequence[str]) -> None:
    """Raise ConfigError for names that differ in more than their numbers."""
    series = {re.sub(r"\d+", "#", name): name for name in names}
    if len(series) > 1:
        one, two = sorted(series.values())[:2]
        pattern = f"{shown(root)}/{re.sub(r'[0-9]+', '[0-9]*', one)}"
        raise ConfigError(
            f"{shown(root)} has two series of shards that could be {split}: {one} and {two}; "
            f"choose one by a pattern in quotes: --data-dir '{pattern}'"
        )


def _by_pattern(pattern: Location, split: str, store: Store | None) -> Split:
    found = [tar for name in expand_braces(str(pattern)) for tar in _matching(name, store)]
    tars = sorted({tar for tar in found if _is_of(split, tar)}, key=_sort_key)
    missing = [tar for tar in tars if isinstance(tar, Path) and not tar.is_file()]
    flag = f"--data-dir {shown(pattern)}"
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigError(f"{flag}: there is no file {missing[0]}{more}")
    if not found:
        raise ConfigError(f"{flag}: there is no such file")
    if not tars:
        raise ConfigError(
            f"{flag}: none of its {len(found)} tar files is of the split {split}, which must be a "
            f"word in the file's or its folder's name (first: {shown(found[0])})"
        )
    if str(pattern).startswith(PIPE):
        return Split(tars, f"{shown(pattern)} ({split})", None)
    _check_not_compressed(tars)
    for folder in {_parent(tar) for tar in tars}:
        pack_file = _within(folder, f"{split}{PACK_SUFFIX}")
        if (data := _read(pack_file, store)) is not None:
            of_folder = [tar for tar in tars if _parent(tar) == folder]
            sizes = {_name(t): t.stat().st_size if isinstance(t, Path) else None for t in of_folder}
            pack = Pack.of_bytes(data, shown(pack_file))
            pack.check(shown(folder).rstrip("/"), sizes, is_part=True)
    name = f"{shown(pattern)} ({split})" if is_url(pattern) else str(pattern)
    return Split(tars, name, _class_names(tars, split, store))


def _is_of(split: str, tar: Location) -> bool:
    if isinstance(tar, str) and tar.startswith(PIPE):
        return _has_word(tar, split)
    return _has_word(_name(tar), split) or _name(_parent(tar)) == split


def _is_tar(name: str) -> bool:
    return name.lower().endswith(".tar") or _COMPRESSED.search(name) is not None


def _check_not_compressed(tars: Iterable[Location]) -> None:
    """Raise ConfigError for a file whose name is not that of an uncompressed tar file."""
    for name in map(shown, tars):
        if _COMPRESSED.search(name):
            raise ConfigError(
                f"{name} is compressed, so single images cannot be read from it; "
                "unpack it to a plain .tar (images hardly shrink)"
            )
        if not name.lower().endswith(".tar"):
            raise ConfigError(f"{name} is not a .tar file; exclude it from the --data-dir pattern")


def _has_word(name: str, split: str) -> bool:
    """Return whether a name contains the split's name with no letter or digit next to it."""
    return bool(re.search(rf"(?<![^\W_]){re.escape(split)}(?![^\W_])", name))


# --- patterns ---------------------------------------------------------------------------------


def expand_braces(pattern: str) -> list[str]:
    """Expand ``{a,b}`` and ``{000..146}`` as webdataset does."""
    ranges = re.findall(r"\{(\d+)\.\.(\d+)", pattern)
    names: list[str] = []
    # braceexpand creates a list of each range at once
    if all(abs(int(last) - int(first)) <= _MAX_FILES for first, last in ranges):
        try:
            names = list(itertools.islice(braceexpand(pattern, escape=False), _MAX_FILES + 1))
        except ValueError:  # unbalanced braces are literal, as in bash
            return [pattern]
    if not 0 < len(names) <= _MAX_FILES:
        raise ConfigError(f"--data-dir {shown(pattern)} names more than {_MAX_FILES} files")
    return names


def _matching(name: str, store: Store | None) -> list[Location]:
    """Return the files that match a name with wildcards; the name itself if it has none."""
    if not is_url(name):
        names = sorted(glob.glob(name)) if glob.has_magic(name) else [name]  # noqa: PTH207
        return [Path(name) for name in names if not name.endswith(f".tar{INDEX_SUFFIX}")]
    if name.startswith(PIPE) or not glob.has_magic(file_name(name)):
        return [name]
    folder = beside(name, "")
    return [within(folder, tar) for tar in fnmatch.filter(_tars(folder, store), file_name(name))]


# --- local files and those of a store ---------------------------------------------------------


def _tars(folder: Location, store: Store | None) -> dict[str, int]:
    """Return the tar files in a folder, compressed ones too, as sorted names, and their sizes."""
    if isinstance(folder, Path):
        paths = sorted(folder.iterdir()) if folder.is_dir() else []
        paths = [path for path in paths if _is_tar(path.name)]
        sizes = {path.name: path.stat().st_size if path.exists() else 0 for path in paths}
    else:
        assert store is not None, "URLs need a store"
        listed = sorted(store.listing(folder).items())
        sizes = {name: file.size for name, file in listed if _is_tar(name)}
    return {name: size for name, size in sizes.items() if name[0] != "."}


def _read(file: Location, store: Store | None) -> bytes | None:
    """Return the bytes of a small file, None if there is none."""
    if isinstance(file, Path):
        if not os.path.lexists(file):
            return None
        try:
            return read_regular(file, max_bytes=_MAX_BYTES)
        except OSError as error:
            reason = error.strerror if file.exists() else "it is a link to nothing"
            raise ConfigError(f"cannot read {file}: {reason}; remove it or replace it") from None
    assert store is not None, "URLs need a store"
    data: bytes | None = store.read(file)
    return data


def _within(folder: Location, name: str) -> Location:
    return folder / name if isinstance(folder, Path) else within(folder, name)


def _parent(file: Location) -> Location:
    if isinstance(file, Path):
        return file.parent
    parts = urlsplit(file)
    return parts._replace(path=posixpath.dirname(parts.path)).geturl()


def _name(file: Location) -> str:
    return file.name if isinstance(file, Path) else file_name(file)


def _sort_key(file: Location) -> tuple[str, ...]:
    return file.parts if isinstance(file, Path) else (file,)


# --- class names ------------------------------------------------------------------------------


def _class_names(tars: Sequence[Location], split: str, store: Store | None) -> list[str] | None:
    """Read the class names beside the tar files, or above a folder with the split's name.

    From classes.txt (a name a line) or classes.json (a list); None if there is no such file. Raises
    ConfigError for files that differ, or for one that is not a list of names.
    """
    folders = {_parent(tar) for tar in tars}
    folders |= {_parent(folder) for folder in folders if _name(folder) == split}
    paths = [_within(folder, name) for folder in sorted(folders, key=str) for name in _CLASS_FILES]
    files = [(shown(path), data) for path in paths if (data := _read(path, store)) is not None]
    _check_packed_names(folders, split, files, store)
    return _names_in(files)


def read_class_names(folder: Path) -> list[str] | None:
    """Read the class names in a folder, from classes.txt or classes.json; None without a file.

    Raises ConfigError as for tar files.
    """
    paths = [folder / name for name in _CLASS_FILES]
    return _names_in([(str(p), data) for p in paths if (data := _read(p, None)) is not None])


def read_class_map(path: Path) -> list[str]:
    """Read the class names by class id from a file: .txt, one a line; .json, a list, or an object
    of class ids by name.

    Raises ConfigError; names are in NFC.
    """
    data, kind = _read(path, None), path.suffix.lower()
    if data is None or kind not in (".txt", ".json"):
        raise ConfigError(f"{path} must be a .txt file, one class a line by class id, or a .json")
    with contextlib.suppress(ValueError):
        ids = parse_json(data) if kind == ".json" else None
        if isinstance(ids, dict):
            if list(map(repr, sorted(ids.values(), key=str))) != sorted(map(str, range(len(ids)))):
                last = len(ids) - 1
                raise ConfigError(f"{path}: the class ids must be 0 to {last}, each once")
            data = json.dumps(sorted(ids, key=ids.__getitem__)).encode()
    names = _names_in([(str(path), data)])
    assert names is not None
    return names


def _names_in(files: Sequence[tuple[str, bytes]]) -> list[str] | None:
    if not files:
        return None
    if len({data for _, data in files}) > 1:
        raise ConfigError(f"{files[0][0]} and {files[1][0]} both name the classes; remove one")
    file, data = files[0]
    try:
        names = parse_json(data) if file.endswith(".json") else _lines(data)
    except ValueError as error:
        raise ConfigError(f"cannot read {file}: {error}") from None
    is_list = isinstance(names, list) and all(isinstance(name, str) and name for name in names)
    if not (is_list and names):
        raise ConfigError(f"{file} must be a list of class names, by class id, none of them empty")
    names = [unicodedata.normalize("NFC", name) for name in names]
    if len(set(names)) < len(names):
        twice = next(name for index, name in enumerate(names) if name in names[:index])
        raise ConfigError(f"{file} lists the class {twice} twice")
    return names


def _check_packed_names(
    folders: Iterable[Location], split: str, files: Sequence[tuple[str, bytes]], store: Store | None
) -> None:
    """Raise DataError if class names are not those with which `mealv2 pack` made the tar files."""
    for folder in folders:
        pack_file = _within(folder, f"{split}{PACK_SUFFIX}")
        if (data := _read(pack_file, store)) is None:
            continue
        wanted = Pack.of_bytes(data, shown(pack_file)).settings.get("classes_sha256")
        classes = shown(_within(folder, _CLASS_FILES[0]))
        changed = [name for name, found in files if sha256(found).hexdigest() != wanted]
        if changed or not files:
            problem = f"{changed[0]} was changed" if changed else f"{classes} is missing"
            raise DataError(
                f"{problem}: {shown(pack_file)} has the SHA-256 of the file of class names; remove "
                f"a changed file and {ADVICE_RERUN} to write it again"
            )


def _lines(data: bytes) -> list[str]:
    """Return the lines of a text without a byte-order mark and blanks at their ends."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("it is UTF-16; save it as UTF-8")
    text = data.decode("utf-8-sig").rstrip()
    return [line.strip() for line in text.split("\n")]
