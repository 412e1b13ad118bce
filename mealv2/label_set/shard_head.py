"""The head, header and index of a shard, checked before anything of them is used."""

import io
import math
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from mealv2.errors import LabelSetError
from mealv2.label_set.shard import COLUMNS, FORMAT_VERSION, HEAD, HEAD_SIZE, LABELS, MAGIC
from mealv2.storage.json_format import parse_json

_BYTES = (LABELS, "keys")  # their length is not the number of images
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
    """Where a column lies in the file."""

    offset: int
    kind: str
    shape: tuple[int, ...]


class Head(NamedTuple):
    """What a shard says of itself: SHA-256 of the head, the header, the columns, bytes in all."""

    sha256: str
    header: dict[str, Any]
    columns: dict[str, ColumnSpec]
    size: int


def read_head(path: Path, data: bytes | None = None) -> Head:
    """Read and check a shard but for its labels; ``data`` is the file where it is not on disk.

    Raises LabelSetError for a file that is not whole, FileNotFoundError, PermissionError.
    """
    return _opened(path, data, _parse)


def read_header(path: Path) -> dict[str, Any]:
    """Return a shard's header without looking at its columns; raises as read_head."""
    return _opened(path, None, _parse_header).header


def _opened(path: Path, data: bytes | None, parse: Callable[[BinaryIO], Head]) -> Head:
    try:
        if data is not None:
            return parse(io.BytesIO(data))
        with path.open("rb") as file:
            return parse(file)
    except (FileNotFoundError, PermissionError):
        raise
    except OSError as error:
        raise LabelSetError(f"cannot read shard {path}: {error.strerror}") from None
    except ValueError as error:
        raise LabelSetError(f"shard {path} is damaged: {error}") from None


def _parse(file: BinaryIO) -> Head:
    """Check head, header and index; raises ValueError."""
    head = _parse_header(file)
    for name, (offset, kind, shape) in head.columns.items():
        if name != LABELS:
            column = _read(file, offset, math.prod(shape) * np.dtype(kind).itemsize)
            if sha256(column).hexdigest() != head.header["columns"][name].get("sha256"):
                raise ValueError(f"its column {name} fails its SHA-256")
    (num_images,) = head.columns["key_ends"].shape
    for name, content in (("key_ends", "keys"), ("label_ends", LABELS)):
        offset, kind, _ = head.columns[name]
        ends = np.frombuffer(_read(file, offset, 8 * num_images), kind)
        last = int(ends[-1]) if num_images else 0
        if (ends[1:] < ends[:-1]).any() or last != head.columns[content].shape[0]:
            raise ValueError(f"its column {name} does not fit")
    _check_keys(file, head.columns, num_images)
    return head


def _parse_header(file: BinaryIO) -> Head:
    """Check head and header, and nothing of the columns; raises ValueError."""
    size = file.seek(0, io.SEEK_END)
    head = _read(file, 0, min(HEAD_SIZE, size))
    if len(head) < HEAD_SIZE or head[:8] != MAGIC:
        raise ValueError(f"it is no label shard of format {FORMAT_VERSION}")
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
        columns = {
            name: _column_spec(size, name, where) for name, where in header["columns"].items()
        }
        _check_header(header, {name: spec.shape for name, spec in columns.items()})
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its header is not one of a shard ({error})") from None
    return Head(sha256(head).hexdigest(), header, columns, size)


def _column_spec(size: int, name: str, where: Mapping[str, Any]) -> ColumnSpec:
    """Return where a column lies, inside of a file of ``size`` bytes."""
    offset, shape = where["offset"], tuple(where["shape"])
    kind, num_dimensions = COLUMNS[name]
    if where["type"] != kind or len(shape) != num_dimensions:
        raise ValueError(f"its column {name} is not one of a shard")
    if not all(type(n) is int and n >= 0 for n in (offset, *shape)):
        raise ValueError(f"its column {name} is not one of a shard")
    if offset + math.prod(shape) * np.dtype(kind).itemsize > size:
        raise ValueError(f"its column {name} lies outside of the file")
    return ColumnSpec(offset, kind, shape)


def _check_header(header: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError or KeyError where the header does not fit itself."""
    (num_images,) = shapes["key_ends"]
    for name, shape in shapes.items():
        if name not in _BYTES and shape[0] != num_images:
            raise ValueError(f"its column {name} has the shape {shape}")
    for name in _NEEDED:
        shapes[name]  # a KeyError names what is missing
    for name, kinds in _HEADER.items():
        if not isinstance(header[name], kinds):
            raise ValueError(f"its {name} is not one of a shard")
    num_views = header["num_views"]
    if header["first_view"] < 0 or num_views < 1:
        raise ValueError("its views are not those of a shard")
    if num_images * num_views > shapes[LABELS][0]:  # a label has a byte or more
        raise ValueError("its labels are fewer than its views")
    if not all(map(_is_skipped, header["skipped"].values())):
        raise ValueError("its skipped images are not those of a shard")
    for together in _TOGETHER:
        if 0 < len(shapes.keys() & together) < len(together):
            raise ValueError(f"it lacks one of {', '.join(together)}")
    inner = {"image_sizes": (2,), "boxes": (num_views, 4), "flips": (num_views,)}
    for name in inner.keys() & shapes.keys():
        if shapes[name][1:] != inner[name]:
            raise ValueError(f"its column {name} has the shape {shapes[name]}")


def _check_keys(file: BinaryIO, columns: dict[str, ColumnSpec], num_images: int) -> None:
    """Raise ValueError where a key is not UTF-8."""
    offset, _, (size,) = columns["keys"]
    keys = _read(file, offset, size)
    keys.decode()
    ends = np.frombuffer(_read(file, columns["key_ends"][0], 8 * num_images), "<u8")
    starts = ends[ends < size].astype(np.int64)
    # all of it is UTF-8; a key that began with a byte 10xxxxxx would begin within a character
    if ((np.frombuffer(keys, np.uint8)[starts] & 0xC0) == 0x80).any():
        raise ValueError("its keys are cut within a character")


def _is_skipped(missing: object) -> bool:
    """Return whether this is what a shard says of an image without labels."""
    return (
        isinstance(missing, dict)
        and isinstance(missing.get("reason"), str)
        and all(
            type(missing.get(name)) is int and missing[name] >= 0
            for name in ("position", "bytes", "class")
        )
    )


def _read(file: BinaryIO, at: int, size: int) -> bytes:
    file.seek(at)
    return file.read(size)
