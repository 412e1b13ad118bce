"""Reading a shard: everything is checked before it is used, and no HDF5 library is needed."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from mealv2.errors import LabelSetError
from mealv2.label_set.shard import (
    LABELS,
    Images,
    Shard,
    StoredViews,
    block_crc,
)
from mealv2.label_set.shard_head import read_head


class ShardFile:
    """A shard whose head, header and index were checked; it is mapped at first use.

    ``header`` is its JSON, ``size`` the bytes of the file, ``head_sha256`` the SHA-256 of its first
    512 bytes, which cover all the rest.
    ``data`` is the file's content where it is not on disk.
    """

    def __init__(self, path: Path, data: bytes | None = None) -> None:
        self.path = path
        self.head_sha256, self.header, self._columns, self.size = read_head(path, data)
        self._data = data
        self._buffer: np.ndarray | None = None
        self._labels: memoryview | None = None

    @property
    def num_images(self) -> int:
        """How many images, or in appended rows how many rows, it has."""
        return int(self._columns["key_ends"].shape[0])

    @property
    def first_view(self) -> int:
        """The first view of each image that is labelled here."""
        return int(self.header["first_view"])

    @property
    def num_views(self) -> int:
        """How many views of each image are labelled here."""
        return int(self.header["num_views"])

    @property
    def images(self) -> Images | None:
        """What is known of the images, where the shard says it."""
        if not self.has_column("classes"):
            return None
        return Images(*map(self.column, ("image_sizes", "file_bytes", "classes")))

    @property
    def stored_views(self) -> StoredViews | None:
        """The boxes, where they are stored."""
        if not self.has_column("boxes"):
            return None
        return StoredViews(self.column("boxes"), self.column("flips"))

    def column(self, name: str) -> np.ndarray:
        """Return a column of the file where it is mapped; raises KeyError when it has none."""
        offset, kind, shape = self._columns[name]
        return np.ndarray(shape, kind, buffer=self._mapped(), offset=offset)

    def has_column(self, name: str) -> bool:
        """Return whether the file has a column."""
        return name in self._columns

    def keys(self) -> list[str]:
        """Return all keys, in order."""
        packed = self.column("keys").tobytes()
        ends = self.column("key_ends").tolist()
        return [packed[a:b].decode() for a, b in zip([0, *ends[:-1]], ends, strict=False)]

    def all_keys(self) -> list[str]:
        """Return the keys of the images it was made from, skipped ones in their places."""
        keys = self.keys()
        skipped = self.header["skipped"]
        for key in sorted(skipped, key=lambda key: int(skipped[key]["position"])):
            keys.insert(skipped[key]["position"], key)
        return keys

    @property
    def labels(self) -> memoryview:
        """The blocks of all images, one after another, not checked."""
        if self._labels is None:
            self._labels = self.column(LABELS).data
        return self._labels

    def open(self) -> int:
        """Return a descriptor of the file; raises LabelSetError."""
        try:
            return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise LabelSetError(f"cannot read shard {self.path}: {error.strerror}") from None

    @property
    def labels_at(self) -> int:
        """Where in the file the blocks begin."""
        return self._columns[LABELS].offset

    def unmap(self) -> None:
        """Let go of what is mapped of the file; the next use maps it again."""
        self._buffer = self._labels = None

    def blocks(self) -> Iterator[tuple[bytes, memoryview, bool]]:
        """Yield every image's key, its labels, and whether they pass their CRC."""
        packed = self.column("keys").tobytes()
        key_at = label_at = 0
        for key_end, label_end, crc in zip(
            self.column("key_ends").tolist(),
            self.column("label_ends").tolist(),
            self.column("crc32").tolist(),
            strict=True,
        ):
            key, block = packed[key_at:key_end], self.labels[label_at:label_end]
            yield key, block, block_crc(key, block) == crc
            key_at, label_at = key_end, label_end

    def intact_blocks(self) -> Iterator[memoryview]:
        """Yield the labels of every image; raises LabelSetError naming a damaged one."""
        for key, block, is_intact in self.blocks():
            if not is_intact:
                raise damaged_rows(self, key.decode())
            yield block

    def shard(self) -> Shard:
        """Return all of it, every block checked; raises as ``intact_blocks``."""
        header = self.header
        return Shard(
            plan_sha256=header["plan_sha256"],
            split=header["role"],
            number=header["number"],
            first_view=header["first_view"],
            num_views=header["num_views"],
            keys=self.keys(),
            blocks=[bytes(block) for block in self.intact_blocks()],
            images=self.images,
            stored_views=self.stored_views,
            views_N=self.column("views") if self.has_column("views") else None,
            boxes_sha256=header["boxes_sha256"],
            skipped=header["skipped"],
            counts=header["counts"],
        )

    def _mapped(self) -> np.ndarray:
        if self._buffer is None and self._data is not None:
            self._buffer = np.frombuffer(self._data, np.uint8)
        elif self._buffer is None:
            # torch maps the file and closes it; mmap would keep a descriptor of each shard
            mapped = torch.from_file(
                str(self.path), shared=False, size=self.size, dtype=torch.uint8
            )
            self._buffer = mapped.numpy()
            self._buffer.flags.writeable = False
        return self._buffer


def damaged_rows(file: ShardFile, key: str) -> LabelSetError:
    """Return the error for labels that fail their CRC."""
    again = "the same `mealv2 precompute` makes the shard anew"
    if file.has_column("views"):
        again = "remove the file, its rows can be made again"
    return LabelSetError(
        f"the labels of {key!r} in {file.path} are damaged (CRC-32); `mealv2 labels verify` lists "
        f"all damage, {again}"
    )


def read_shard(path: Path) -> Shard:
    """Read a shard and check every byte that matters; raises LabelSetError with the reason.

    A missing file raises FileNotFoundError.
    """
    return ShardFile(path).shard()
