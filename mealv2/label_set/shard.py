"""One shard of a label set: an HDF5 file in contiguous columns, behind a head of our own.

The head, 512 bytes that HDF5 leaves to its users, says where everything is and its SHA-256, so
that reading needs no HDF5 library and nothing unchecked is ever parsed. Written in memory and
published whole; docs/reference/label-set-format.md has every byte.
"""

import json
import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any
from zlib import crc32

import h5py
import numpy as np

from mealv2.errors import LabelSetError
from mealv2.storage.atomic import Stamp, write_atomic

APPENDED_PREFIX = "more-"  # in the names of files of appended rows, after the role
FORMAT_VERSION = 2

MAGIC = b"MEALV2\x1a\n"
# magic, format version, 0, bytes of the file, offset and bytes of the header, its SHA-256
HEAD = struct.Struct("<8sII QQQ 32s")
HEAD_SIZE = 512  # of HDF5's user block; 72 bytes of it, their SHA-256, zeros
_LIBRARY_VERSION = "v110"  # HDF5 1.10's file format: readable everywhere, and byte-reproducible
LABELS = "labels"  # the one column that is not checked as a whole when a set is opened

# Every column: its type and its number of dimensions, the first of them the images.
COLUMNS: dict[str, tuple[str, int]] = {
    LABELS: ("|u1", 1),
    "keys": ("|u1", 1),
    "key_ends": ("<u8", 1),
    "key_hashes": ("<u8", 1),
    "label_ends": ("<u8", 1),
    "crc32": ("<u4", 1),
    "image_sizes": ("<u4", 2),
    "file_bytes": ("<u8", 1),
    "classes": ("<u4", 1),
    "boxes": ("<u2", 3),
    "flips": ("|u1", 2),
    "views": ("<u8", 1),
}


@dataclass(frozen=True)
class Images:
    """What a label set knows of N images beside their labels.

    ``sizes_N2`` width and height in pixels, ``file_bytes_N`` the size of the file, ``classes_N``
    the data set's own class id; all whole numbers.
    """

    sizes_N2: np.ndarray
    file_bytes_N: np.ndarray
    classes_N: np.ndarray

    def rows(self, order: Sequence[int] | np.ndarray) -> "Images":
        """Return images by index."""
        order = np.asarray(order, dtype=np.int64)
        return Images(self.sizes_N2[order], self.file_bytes_N[order], self.classes_N[order])

    @staticmethod
    def concat(parts: "Sequence[Images]") -> "Images":
        """Return the images of several, one after another."""
        return Images(
            np.concatenate([part.sizes_N2 for part in parts]),
            np.concatenate([part.file_bytes_N for part in parts]),
            np.concatenate([part.classes_N for part in parts]),
        )


@dataclass(frozen=True)
class StoredViews:
    """Boxes of N images x V views that no arithmetic gives again, as fractions of 65535.

    ``boxes_NV4`` uint16 top, left, height, width of the image's; ``flips_NV`` 0 or 1.
    """

    boxes_NV4: np.ndarray
    flips_NV: np.ndarray


@dataclass(frozen=True)
class Shard:
    """The labels of N images x V views, from ``first_view`` on; ``blocks`` has one per image.

    ``skipped`` the images of this shard without labels, by key: their ``position`` among all the
    images of the shard, ``reason``, ``bytes`` and ``class``. ``boxes_sha256`` covers the boxes that
    were cut (see ``boxes_sha256``); ``counts`` are whole numbers, such as how many answers were
    right. In appended rows V is 1, and ``views_N`` names each row's view: a key may come twice.
    """

    plan_sha256: str
    split: str
    number: int
    first_view: int
    num_views: int
    keys: list[str]
    blocks: list[bytes]
    images: Images | None = None
    stored_views: StoredViews | None = None
    views_N: np.ndarray | None = None
    boxes_sha256: str | None = None
    skipped: dict[str, dict[str, Any]] = field(default_factory=dict)
    counts: dict[str, list[int]] = field(default_factory=dict)


def write_shard(
    path: Path, shard: Shard, *, replace: bool = False, damaged: Stamp | None = None
) -> bool:
    """Publish a shard whole; return False when another job's was there first. Raises OSError.

    ``damaged`` is the stamp of a file that gives way, if it is still that one.
    """
    return write_atomic(path, shard_bytes(shard), replace=replace, damaged=damaged)


def key_hash(key: bytes) -> bytes:
    """Return the 8 bytes under which an image is found: BLAKE2b-64 of its key in UTF-8."""
    return blake2b(key, digest_size=8).digest()


def block_crc(key: bytes, block: bytes | memoryview) -> int:
    """Return the CRC-32 (zlib's) of a key in UTF-8 followed by the image's block."""
    return crc32(block, crc32(key))


def member_bytes(key: str, block: bytes) -> bytes:
    """Return an image's block as it stands alone, in a tar shard: with its CRC-32 behind it."""
    return block + block_crc(key.encode(), block).to_bytes(4, "little")


def block_of_member(key: str, data: bytes) -> bytes:
    """Return the block that member_bytes was given; raises LabelSetError where it is damaged."""
    block = data[:-4]
    if len(data) < 4 or block_crc(key.encode(), block) != int.from_bytes(data[-4:], "little"):
        raise LabelSetError(f"the labels of {key!r} are damaged (CRC-32)")
    return block


# --- writing --------------------------------------------------------------------------------------


def shard_bytes(shard: Shard) -> bytes:
    """Return the file of a shard; equal shards give equal bytes."""
    columns = _columns(shard)
    header: dict[str, Any] = {
        "plan_sha256": shard.plan_sha256,
        "role": shard.split,
        "number": shard.number,
        "first_view": shard.first_view,
        "num_views": shard.num_views,
        "boxes_sha256": shard.boxes_sha256,
        "skipped": shard.skipped,
        "counts": shard.counts,
        "columns": {
            name: {"offset": 0, "type": column.dtype.str, "shape": list(column.shape)}
            | ({} if name == LABELS else {"sha256": sha256(column.tobytes()).hexdigest()})
            for name, column in columns.items()
        },
    }
    with h5py.File(
        f"shard-{secrets.token_hex(8)}",  # in memory; of one name HDF5 opens only one at a time
        "w",
        driver="core",
        backing_store=False,
        libver=("earliest", _LIBRARY_VERSION),
        userblock_size=HEAD_SIZE,
    ) as file:
        for name, column in columns.items():
            dataset = file.create_dataset(name, data=column, track_times=False)
            # an empty column lies nowhere
            header["columns"][name]["offset"] = dataset.id.get_offset() or HEAD_SIZE
        text = np.frombuffer(
            json.dumps(header, sort_keys=True, ensure_ascii=False).encode(), dtype="|u1"
        )
        header_at = file.create_dataset("header", data=text, track_times=False).id.get_offset()
        file.flush()
        image: bytes = file.id.get_file_image()
    head = HEAD.pack(
        MAGIC,
        FORMAT_VERSION,
        0,
        HEAD_SIZE + len(image),
        header_at,
        len(text),
        sha256(text.tobytes()).digest(),
    )
    return (head + sha256(head).digest()).ljust(HEAD_SIZE, b"\0") + image


def _columns(shard: Shard) -> dict[str, np.ndarray]:
    """Return the columns of a shard by name, the labels first."""
    keys = [key.encode() for key in shard.keys]
    blocks = shard.blocks
    columns: dict[str, np.ndarray] = {
        LABELS: np.frombuffer(b"".join(blocks), dtype="|u1"),
        "keys": np.frombuffer(b"".join(keys), dtype="|u1"),
        "key_ends": np.cumsum([len(key) for key in keys], dtype="<u8"),
        "key_hashes": np.frombuffer(b"".join(map(key_hash, keys)), dtype="<u8"),
        "label_ends": np.cumsum([len(block) for block in blocks], dtype="<u8"),
        "crc32": np.array([*map(block_crc, keys, blocks)], dtype="<u4"),
    }
    if shard.images is not None:
        columns["image_sizes"] = shard.images.sizes_N2.astype("<u4")
        columns["file_bytes"] = shard.images.file_bytes_N.astype("<u8")
        columns["classes"] = shard.images.classes_N.astype("<u4")
    if shard.stored_views is not None:
        columns["boxes"] = shard.stored_views.boxes_NV4.astype("<u2")
        columns["flips"] = shard.stored_views.flips_NV.astype("|u1")
    if shard.views_N is not None:
        columns["views"] = shard.views_N.astype("<u8")
    return columns
