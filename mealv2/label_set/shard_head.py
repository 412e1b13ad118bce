"""The head, header and index of a shard, checked before use."""

import io
import math
import os
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from mealv2.data.content_hash import parse_hash
from mealv2.errors import LabelSetError
from mealv2.label_set.shard import COLUMNS, FORMAT_VERSION, HEAD, HEAD_SIZE, LABELS, MAGIC
from mealv2.storage.json_format import parse_json
from mealv2.storage.regular_files import open_regular

_BYTES = (LABELS, "keys")  # columns of bytes, not one entry per image
_NEEDED = ("keys", "key_ends", "key_hashes", LABELS, "label_ends", "crc32")
_TOGETHER = (("image_sizes", "file_bytes", "classes"), ("boxes", "flips"))
_HEADER: dict[str, type | tuple[type, ...]] = {
    "plan_sha256": str,
    "role": str,
    "number": int,
    "first_view": int,
    "num_views": int,
    "boxes_sha256": (str, type(None)),
    "skipped": dict,
    "counts": dict,
}


class ColumnSpec(NamedTuple):
    """The position of a column in the file."""

    offset: int
    kind: str
    shape: tuple[int, ...]


class Head(NamedTuple):
    """The SHA-256 of the head, the header, the columns, and the bytes of the file."""

    sha256: str
    header: dict[str, Any]
    columns: dict[str, ColumnSpec]
    size: int


def read_head(path: Path, data: bytes | None = None, *, with_index: bool = True) -> Head:
    """Read and check head, header and index; ``data`` is the content of a file not on disk.

    Raises LabelSetError for a damaged file, FileNotFoundError, PermissionError.
    """
    try:
        with os.fdopen(open_regular(path), "rb") if data is None else io.BytesIO(data) as file:
            head = _parse(file)
            if with_index:
                _check_index(file, head)
            return head
    except (FileNotFoundError, PermissionError):
        raise
    except OSError as error:
        raise LabelSetError(f"cannot read shard {path}: {error.strerror}") from None
    except ValueError as error:
        raise LabelSetError(f"shard {path} is damaged: {error}") from None


def read_header(path: Path) -> dict[str, Any]:
    """Return a shard's header without reading its columns; raises as ``read_head``."""
    return read_head(path, with_index=False).header


def _check_index(file: BinaryIO, head: Head) -> None:
    """Check all columns but the labels; raises ValueError."""
    columns = {}
    for name, (offset, kind, shape) in head.columns.items():
        if name != LABELS:
            data = _read(file, offset, math.prod(shape) * np.dtype(kind).itemsize)
            if sha256(data).hexdigest() != head.header["columns"][name].get("sha256"):
                raise ValueError(f"the column {name} fails its SHA-256")
            columns[name] = np.frombuffer(data, kind)
    for name, content in (("key_ends", "keys"), ("label_ends", LABELS)):
        ends = columns[name]
        last = int(ends[-1]) if len(ends) else 0
        if (ends[1:] < ends[:-1]).any() or last != head.columns[content].shape[0]:
            raise ValueError(f"the column {name} does not match {content}")
    keys, ends = columns["keys"], columns["key_ends"]
    keys.tobytes().decode()
    starts = ends[ends < len(keys)].astype(np.int64)
    # bytes 10xxxxxx continue a character, so no key of valid UTF-8 starts with one
    if ((keys[starts] & 0xC0) == 0x80).any():
        raise ValueError("a key ends within a character")


def _parse(file: BinaryIO) -> Head:
    """Check head and header, but no column; raises ValueError."""
    size = file.seek(0, io.SEEK_END)
    head = _read(file, 0, min(HEAD_SIZE, size))
    if len(head) < HEAD_SIZE or head[:8] != MAGIC:
        raise ValueError(f"it is not a label shard of format {FORMAT_VERSION}")
    _, version, zero, file_bytes, header_at, header_size, header_sha256 = HEAD.unpack_from(head)
    body = head[: HEAD.size]
    if head != (body + sha256(body).digest()).ljust(HEAD_SIZE, b"\0"):
        raise ValueError("its head fails its SHA-256")
    if version != FORMAT_VERSION or zero:
        raise ValueError(f"it has format version {version}; this mealv2 reads {FORMAT_VERSION}")
    if size != file_bytes or header_at + header_size > size:
        raise ValueError(f"it has {size} bytes of {file_bytes}")
    text = _read(file, header_at, header_size)
    if sha256(text).digest() != header_sha256:
        raise ValueError("its header fails its SHA-256")
    try:
        header = parse_json(text)
        columns = {n: _column_spec(size, n, spec) for n, spec in header["columns"].items()}
        _check_header(header, {name: spec.shape for name, spec in columns.items()})
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its header is not valid ({error})") from None
    return Head(sha256(head).hexdigest(), header, columns, size)


def _column_spec(size: int, name: str, entry: dict[str, Any]) -> ColumnSpec:
    """Return the position of a column, inside a file of ``size`` bytes."""
    offset, shape = entry["offset"], tuple(entry["shape"])
    kind, num_dimensions = COLUMNS[name]
    is_valid = entry["type"] == kind and len(shape) == num_dimensions
    if not is_valid or not all(type(n) is int and n >= 0 for n in (offset, *shape)):
        raise ValueError(f"the type or shape of the column {name} is not valid")
    if offset + math.prod(shape) * np.dtype(kind).itemsize > size:
        raise ValueError(f"the column {name} exceeds the file")
    return ColumnSpec(offset, kind, shape)


def _check_header(header: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError or KeyError for a header that contradicts itself."""
    (num_images,) = shapes["key_ends"]
    for name in _NEEDED:
        shapes[name]  # a KeyError names what is missing
    for name, kinds in _HEADER.items():
        if not isinstance(header[name], kinds):
            raise ValueError(f"its {name} is not valid")
    num_views = header["num_views"]
    if header["first_view"] < 0 or num_views < 1:
        raise ValueError("its views are not valid")
    if num_images * num_views > shapes[LABELS][0]:  # a label has at least one byte
        raise ValueError("it has fewer labels than views")
    if not isinstance(header.get("first_sha256", ""), str):
        raise ValueError("its first_sha256 is not valid")
    if not all(map(_is_skipped, header["skipped"].values())):
        raise ValueError("its skipped images are not valid")
    if not _is_loss(header.get("encoding_loss", {"kl": 0.0, "num_views": 1})):
        raise ValueError("its encoding_loss is not valid")
    for together in _TOGETHER:
        if 0 < len(shapes.keys() & together) < len(together):
            raise ValueError(f"one of {', '.join(together)} is missing")
    if "content_hashes" in shapes and not shapes.keys() & {"classes", "views"}:
        raise ValueError("it has content hashes of unknown images")
    inner = {"image_sizes": (2,), "boxes": (num_views, 4), "flips": (num_views,)}
    for name in shapes.keys() - _BYTES:
        if shapes[name] != (num_images, *inner.get(name, ())):
            raise ValueError(f"the column {name} has the shape {shapes[name]}")


def _is_loss(entry: object) -> bool:
    """Return whether a header's entry of the loss of the encoding is valid."""
    if not (isinstance(entry, dict) and entry.keys() == {"kl", "num_views"}):
        return False
    kl, num_views = entry["kl"], entry["num_views"]
    return type(kl) is float and 0.0 <= kl < math.inf and type(num_views) is int and num_views > 0


def _is_skipped(entry: object) -> bool:
    """Return whether a header's entry of a skipped image is valid."""
    if isinstance(entry, dict) and "content_hash" in entry:
        parse_hash(entry["content_hash"])
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("reason"), str)
        and all(
            type(entry.get(name)) is int and entry[name] >= 0
            for name in ("position", "bytes", "class")
        )
    )


def _read(file: BinaryIO, at: int, size: int) -> bytes:
    file.seek(at)
    return file.read(size)
