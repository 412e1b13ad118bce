"""One shard of a label set: an HDF5 file of contiguous columns.

The first 512 bytes, HDF5's user block, locate everything and hold its SHA-256. So reading needs no
HDF5 library and parses only checked bytes. docs/reference/label-set-format.md describes every byte.
"""

import json
import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from mealv2.data.source import UNLABELLED
from mealv2.label_set.blocks import block_crc, key_hashes
from mealv2.storage.atomic import Stamp, write_atomic

APPENDED_PREFIX = "more-"  # in the names of files of appended rows, after the split
FORMAT_VERSION = 2

MAGIC = b"MEALV2\x1a\n"
# magic, format version, 0, bytes of the file, offset and bytes of the header, its SHA-256
HEAD = struct.Struct("<8sII QQQ 32s")
HEAD_SIZE = 512  # HDF5's user block: HEAD, its SHA-256, zeros
_LIBRARY_VERSION = "v110"  # HDF5 1.10's format is common and gives the same bytes each time
LABELS = "labels"  # the only column without a SHA-256: each block has a CRC

# The type and the number of dimensions of each column; the first dimension is the images.
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
    "content_hashes": ("<u8", 1),
    "boxes": ("<u2", 3),
    "flips": ("|u1", 2),
    "views": ("<u8", 1),
}


NO_CLASS = (1 << 32) - 1  # in the column of classes


def stored_class(class_id: int) -> int:
    """Return a class id as shards have it; UNLABELLED becomes NO_CLASS."""
    return NO_CLASS if class_id == UNLABELLED else class_id


def class_of(stored: int) -> int:
    """Return the class id that a shard has."""
    return UNLABELLED if stored == NO_CLASS else stored


@dataclass(frozen=True)
class Images:
    """Properties of N images, all integers.

    ``sizes_N2`` width and height in pixels, ``file_bytes_N`` the size of the file, ``classes_N``
    the data set's class id or NO_CLASS, ``hashes_N`` the content hash of the file
    (mealv2.data.content_hash); None where nobody read the files, as for imported labels.
    """

    sizes_N2: np.ndarray
    file_bytes_N: np.ndarray
    classes_N: np.ndarray
    hashes_N: np.ndarray | None = None

    def rows(self, order: Sequence[int] | np.ndarray) -> "Images":
        """Return images by index."""
        order = np.asarray(order, dtype=np.int64)
        hashes_N = None if self.hashes_N is None else self.hashes_N[order]
        return Images(
            self.sizes_N2[order], self.file_bytes_N[order], self.classes_N[order], hashes_N
        )


@dataclass(frozen=True)
class StoredViews:
    """Boxes of N images x V views that cannot be computed again.

    ``boxes_NV4`` uint16 top, left, height, width as fractions of the image in units of 1 / 65535;
    ``flips_NV`` 0 or 1.
    """

    boxes_NV4: np.ndarray
    flips_NV: np.ndarray


class EncodingLoss(NamedTuple):
    """KL(exact probabilities || labels) in nats, the mean over the ``num_views`` views measured."""

    kl: float
    num_views: int

    def __str__(self) -> str:
        return f"{self.kl:.3g} nats, measured on {self.num_views} views"


@dataclass(frozen=True)
class Shard:
    """The labels of N images x V views that start at ``first_view``; one block per image.

    ``skipped`` maps the key of each image without labels to its ``position`` among all images of
    the shard, ``reason``, ``bytes``, ``class`` and, if its bytes could be read, ``content_hash``.
    ``boxes_sha256`` covers the boxes of the views; ``counts`` are integers, for example of correct
    predictions. ``first_sha256`` is the SHA-256 of the head of the shard with the first views of
    the same images, where blocks use its models. ``loss`` is of its first labels, None where the
    exact probabilities are not known. In appended rows V is 1, ``views_N`` has the view of each row
    and ``hashes_N`` the content hash of its image, and a key may occur twice.
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
    hashes_N: np.ndarray | None = None
    boxes_sha256: str | None = None
    skipped: dict[str, dict[str, Any]] = field(default_factory=dict)
    counts: dict[str, list[int]] = field(default_factory=dict)
    first_sha256: str | None = None
    loss: EncodingLoss | None = None


def write_shard(
    path: Path, shard: Shard, *, replace: bool = False, damaged: Stamp | None = None
) -> bool:
    """Write a shard atomically; return False if the file exists. Raises OSError.

    ``damaged`` is the stamp of a damaged file, which the shard replaces.
    """
    return write_atomic(path, shard_bytes(shard), replace=replace, damaged=damaged)


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
        **({} if shard.first_sha256 is None else {"first_sha256": shard.first_sha256}),
        **({} if shard.loss is None else {"encoding_loss": shard.loss._asdict()}),
        "columns": {
            name: {"offset": 0, "type": column.dtype.str, "shape": list(column.shape)}
            | ({} if name == LABELS else {"sha256": sha256(column.tobytes()).hexdigest()})
            for name, column in columns.items()
        },
    }
    with h5py.File(
        f"shard-{secrets.token_hex(8)}",  # in memory; HDF5 opens a name only once at a time
        "w",
        driver="core",
        backing_store=False,
        libver=("earliest", _LIBRARY_VERSION),
        userblock_size=HEAD_SIZE,
    ) as file:
        for name, column in columns.items():
            dataset = file.create_dataset(name, data=column, track_times=False)
            # an empty column has no offset
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
    """Return the columns by name, the labels first."""
    keys = [key.encode() for key in shard.keys]
    blocks = shard.blocks
    columns: dict[str, np.ndarray] = {
        LABELS: np.frombuffer(b"".join(blocks), dtype="|u1"),
        "keys": np.frombuffer(b"".join(keys), dtype="|u1"),
        "key_ends": np.cumsum([len(key) for key in keys], dtype="<u8"),
        "key_hashes": key_hashes(keys),
        "label_ends": np.cumsum([len(block) for block in blocks], dtype="<u8"),
        "crc32": np.array([*map(block_crc, keys, blocks)], dtype="<u4"),
    }
    if shard.images is not None:
        columns["image_sizes"] = shard.images.sizes_N2.astype("<u4")
        columns["file_bytes"] = shard.images.file_bytes_N.astype("<u8")
        columns["classes"] = shard.images.classes_N.astype("<u4")
        if shard.images.hashes_N is not None:
            columns["content_hashes"] = shard.images.hashes_N.astype("<u8")
    if shard.stored_views is not None:
        columns["boxes"] = shard.stored_views.boxes_NV4.astype("<u2")
        columns["flips"] = shard.stored_views.flips_NV.astype("|u1")
    if shard.views_N is not None:
        columns["views"] = shard.views_N.astype("<u8")
        if shard.hashes_N is not None:
            columns["content_hashes"] = shard.hashes_N.astype("<u8")
    return columns
