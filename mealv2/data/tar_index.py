"""TAR.index beside a tar file: the images in it and where they lie, so that no header is read.

`mealv2 pack --to tar` writes it; docs/how-to/tar-shards.md has the format. Read and written as
bytes or by path. Whoever uses one compares the tar file's size with it, and what is before an image
with its CRC whenever that is read: an index of another file is found out, not followed.
"""

from array import array
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mealv2.data.index_json import ADVICE_RERUN, checked_json, sealed_json
from mealv2.data.tar_splits import INDEX_SUFFIX
from mealv2.errors import DataError
from mealv2.storage.atomic import write_atomic

SUFFIX = INDEX_SUFFIX
_KNOWN = ("mealv2-tar-index", 1)
_ADVICE_RECREATE = f"remove it to do without, or {ADVICE_RERUN}"
_COLUMNS = {
    "classes": "q",
    "sizes": "q",
    "offsets": "q",
    "head_sizes": "q",
    "head_crc32s": "I",
}


class ShardIndex(NamedTuple):
    """The images of one tar file, in the order they lie.

    ``sizes`` and ``offsets`` say where an image's bytes are; ``head_crc32s`` are the CRC-32 of the
    ``head_sizes`` bytes before them. ``original_sizes`` are those before the images were packed.
    """

    keys: list[str]
    labels: "array[int]"
    sizes: "array[int]"
    offsets: "array[int]"
    head_sizes: "array[int]"
    head_crc32s: "array[int]"
    original_sizes: "array[int]"


class TarIndex(NamedTuple):
    """An index: the images of a tar file, its size in bytes, and its SHA-256 (hex)."""

    images: ShardIndex
    num_bytes: int
    sha256: str


def index_path(tar: Path) -> Path:
    """Return where the index of a tar file lies."""
    return tar.with_name(tar.name + SUFFIX)


def read_index(tar: Path) -> TarIndex | None:
    """Read the index beside a tar file, None where there is none; raises as index_of_bytes."""
    path = index_path(tar)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    return index_of_bytes(data, str(path))


def write_index(tar: Path, index: TarIndex) -> None:
    """Write the index beside a tar file."""
    write_atomic(index_path(tar), index_bytes(index))


def index_bytes(index: TarIndex) -> bytes:
    """Return the file of an index: compact JSON, the same for equal indices."""
    images = index.images
    is_packed = images.original_sizes != images.sizes
    value = {
        "bytes": index.num_bytes,
        "sha256": index.sha256,
        "keys": images.keys,
        "classes": images.labels.tolist(),
        "sizes": images.sizes.tolist(),
        "offsets": images.offsets.tolist(),
        "head_sizes": images.head_sizes.tolist(),
        "head_crc32s": images.head_crc32s.tolist(),
        "original_sizes": images.original_sizes.tolist() if is_packed else None,
    }
    return sealed_json(_KNOWN, value)


def index_of_bytes(data: bytes, name: str) -> TarIndex:
    """Parse the file of an index; raises DataError, calling it ``name``, for one that is damaged.

    It is not compared with the tar file: that is for whoever has both.
    """
    value = checked_json(
        data, name, what="an index of a tar file", known=_KNOWN, advice=_ADVICE_RECREATE
    )
    index = _index_of(value)
    if index is None:
        raise DataError(f"{name} is damaged: it describes no tar file; {_ADVICE_RECREATE}")
    return index


def _index_of(value: dict[str, Any]) -> TarIndex | None:
    """Return the index that a JSON object is, None where it is none that could be true."""
    keys, num_bytes, of_tar = (value.get(name) for name in ("keys", "bytes", "sha256"))
    if not (isinstance(keys, list) and all(map(is_key, keys))):
        return None
    if type(num_bytes) is not int or not isinstance(of_tar, str):
        return None
    try:
        columns = [array(kind, value[name]) for name, kind in _COLUMNS.items()]
        labels, sizes, offsets, heads, crcs = columns
        originals = value["original_sizes"]
        originals = sizes if originals is None else array("q", originals)
    except (KeyError, TypeError, OverflowError):
        return None
    if any(len(column) != len(keys) for column in (*columns, originals)):
        return None
    tables = [np.asarray(column) for column in (labels, sizes, offsets, heads, originals)]
    if any((table < 0).any() or (table > 1 << 62).any() for table in tables):
        return None
    _, sizes_N, offsets_N, heads_N, _ = tables
    if (heads_N > offsets_N).any() or (offsets_N + sizes_N > num_bytes).any():
        return None
    images = ShardIndex(keys, labels, sizes, offsets, heads, crcs, originals)
    return TarIndex(images, num_bytes, of_tar)


def is_key(key: object) -> bool:
    """Return whether a value can be an image's key: a text, and no path out of a folder."""
    return (
        isinstance(key, str)
        and key != ""
        and "\0" not in key
        and key[0] != "/"
        and ".." not in key.split("/")
    )
