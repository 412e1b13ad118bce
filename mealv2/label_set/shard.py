"""One shard of a label set: HDF5 in contiguous columns, with a checksum of its own.

Written in memory and published whole; see docs/label-set-format.md for the bytes.
"""

import io
import json
import secrets
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mealv2.errors import LabelSetError
from mealv2.files import write_whole

APPENDED_PREFIX = "more-"  # in the names of files of appended rows, after the role

_LIBRARY_VERSION = "v110"  # HDF5 1.10's file format: readable everywhere, and byte-reproducible


@dataclass(frozen=True)
class Shard:
    """The labels of N images x V views, K classes each.

    ``probs`` (N, V, K) float16 or float32; ``indices`` (N, V, K) uint16 or uint32 class ids and
    ``rest`` (N, V) the mass not kept, both None for dense labels in class order; ``skipped`` the
    images without labels and why; ``counts`` whole numbers, such as how many answers were right.
    ``views`` (N, V) uint64 names the views where they are not 0..V-1: in appended rows, which may
    have a key more than once.
    """

    plan_sha256: str
    role: str
    number: int
    keys: list[str]
    probs: np.ndarray
    indices: np.ndarray | None = None
    rest: np.ndarray | None = None
    views: np.ndarray | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    counts: dict[str, list[int]] = field(default_factory=dict)


def class_id_type(num_classes: int) -> np.dtype[Any]:
    """Return the smallest stored type that holds every class id."""
    return np.dtype("<u2" if num_classes <= 1 << 16 else "<u4")


def num_label_bytes(k: int, num_classes: int, label_dtype: str) -> int:
    """Return how many bytes one view's label takes."""
    value = np.dtype(label_dtype).itemsize
    if k == num_classes:
        return k * value
    return k * (class_id_type(num_classes).itemsize + value) + value


def num_header_bytes() -> int:
    """Return how many bytes a shard takes beside labels and keys."""
    columns = np.zeros((1, 1, 1), "<f2"), np.zeros((1, 1, 1), "<u2"), np.zeros((1, 1), "<f2")
    return len(shard_bytes(Shard("0" * 64, "train", 0, ["k"], *columns)))


def write_shard(path: Path, shard: Shard, *, replace: bool = False) -> bool:
    """Publish a shard whole; return False when another job's was there first. Raises OSError."""
    return write_whole(path, shard_bytes(shard), replace=replace)


def read_shard(path: Path) -> Shard:
    """Read a shard and check every byte of it; raises LabelSetError with the reason.

    A missing file raises FileNotFoundError.
    """
    try:
        with h5py.File(io.BytesIO(path.read_bytes()), "r") as file:
            columns = {name: file[name][()] for name in file}
            header = json.loads(str(file.attrs["header"]))
            digest = str(file.attrs["payload_sha256"])
        if digest != _digest(header, columns):
            raise LabelSetError(f"shard {path} is damaged: its contents fail their SHA-256")
        keys = _unpack_keys(columns["keys"], columns["key_ends"])
        return Shard(
            keys=keys,
            probs=columns["probs"],
            indices=columns.get("indices"),
            rest=columns.get("rest"),
            views=columns.get("views"),
            **header,
        )
    except (LabelSetError, FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # h5py raises OSError, KeyError, ValueError, RuntimeError on damage
        raise LabelSetError(f"shard {path} is damaged: {type(error).__name__}: {error}") from error


def shard_keys(data: bytes) -> list[str]:
    """Return the keys of a shard whose bytes are known to be whole (their hash was checked)."""
    with h5py.File(io.BytesIO(data), "r") as file:
        return _unpack_keys(file["keys"][()], file["key_ends"][()])


def column_offsets(path: Path) -> dict[str, tuple[int, tuple[int, ...], np.dtype[Any]]]:
    """Return where each column lies in the file: name -> (byte offset, shape, type)."""
    with h5py.File(path, "r") as file:
        return {
            name: (column.id.get_offset() or 0, column.shape, column.dtype)
            for name, column in file.items()
        }


def shard_bytes(shard: Shard) -> bytes:
    """Return the HDF5 file of a shard; equal shards give equal bytes."""
    packed, ends = _pack_keys(shard.keys)
    columns = {"keys": packed, "key_ends": ends, "probs": shard.probs}
    if (shard.indices is None) != (shard.rest is None):
        raise ValueError("class ids and the rest go together: a dense label has neither")
    if shard.indices is not None and shard.rest is not None:
        columns |= {"indices": shard.indices, "rest": shard.rest}
    if shard.views is not None:
        columns["views"] = shard.views
    header = {
        "plan_sha256": shard.plan_sha256,
        "role": shard.role,
        "number": shard.number,
        "skipped": shard.skipped,
        "counts": shard.counts,
    }
    with h5py.File(
        f"shard-{secrets.token_hex(8)}",  # in memory; of one name HDF5 opens only one at a time
        "w",
        driver="core",
        backing_store=False,
        libver=("earliest", _LIBRARY_VERSION),
    ) as file:
        for name, column in columns.items():
            file.create_dataset(name, data=column, track_times=False)
        text = json.dumps(header, sort_keys=True, ensure_ascii=False)
        file.attrs["header"] = text
        file.attrs["payload_sha256"] = _digest(header, columns)
        file.flush()
        image: bytes = file.id.get_file_image()
    return image


def _digest(header: dict[str, Any], columns: dict[str, np.ndarray]) -> str:
    digest = sha256(json.dumps(header, sort_keys=True, ensure_ascii=False).encode())
    for name, column in sorted(columns.items()):
        digest.update(f"{name}\0{column.dtype.str}\0{column.shape}\n".encode())
        digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()


def _pack_keys(keys: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return all keys as UTF-8 bytes in a row, and where each ends."""
    encoded = [key.encode() for key in keys]
    ends = np.cumsum([len(key) for key in encoded], dtype="<u8")
    return np.frombuffer(b"".join(encoded), dtype="u1"), ends


def _unpack_keys(packed: np.ndarray, ends: np.ndarray) -> list[str]:
    data = packed.tobytes()
    starts = [0, *ends.tolist()[:-1]]
    return [data[a:b].decode() for a, b in zip(starts, ends.tolist(), strict=False)]
