"""Reading a shard: every byte is checked before use, without an HDF5 library."""

import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch

from mealv2.data.content_hash import parse_hash
from mealv2.errors import LabelSetError
from mealv2.label_set.shard import LABELS, EncodingLoss, Images, Shard, StoredViews
from mealv2.label_set.shard_head import read_head
from mealv2.storage.regular_files import open_regular


class ShardFile:
    """A shard whose head, header and index are checked; it is mapped at first use.

    ``data`` is the content of a file that is not on disk. ``header`` is the JSON header, ``size``
    the bytes of the file, ``head_sha256`` the SHA-256 of its first 512 bytes.
    """

    def __init__(self, path: Path, data: bytes | None = None) -> None:
        self.path = path
        self.head_sha256, self.header, self._columns, self.size = read_head(path, data)
        self._data = data

    @property
    def num_images(self) -> int:
        """The number of images, or of appended rows."""
        return int(self._columns["key_ends"].shape[0])

    @property
    def first_view(self) -> int:
        """The first labelled view of each image."""
        return int(self.header["first_view"])

    @property
    def num_views(self) -> int:
        """The number of labelled views of each image."""
        return int(self.header["num_views"])

    @property
    def images(self) -> Images | None:
        """The properties of the images, if the shard has them."""
        if not self.has_column("classes"):
            return None
        hashes_N = self.column("content_hashes") if self.has_column("content_hashes") else None
        return Images(
            self.column("image_sizes"), self.column("file_bytes"), self.column("classes"), hashes_N
        )

    @property
    def stored_views(self) -> StoredViews | None:
        """The boxes, if the shard stores them."""
        if not self.has_column("boxes"):
            return None
        return StoredViews(self.column("boxes"), self.column("flips"))

    def column(self, name: str) -> np.ndarray:
        """Return a column as a view of the mapped file; raises KeyError if the file has none."""
        offset, kind, shape = self._columns[name]
        return np.ndarray(shape, kind, buffer=self._mapped, offset=offset)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a column; raises KeyError if the file has none."""
        return self._columns[name].shape

    def read_columns(self, **into: np.ndarray) -> None:
        """Read columns into contiguous arrays of their types, without mapping the file.

        Raises LabelSetError.
        """
        handle = self.open() if self._data is None else None
        try:
            for name, array in into.items():
                offset, kind, shape = self._columns[name]
                assert array.dtype == np.dtype(kind)
                assert array.shape == shape
                if handle is None:
                    array[:] = self.column(name)
                elif os.preadv(handle, [array.data], offset) != array.nbytes:
                    raise LabelSetError(f"shard {self.path} is damaged: it became shorter")
        except OSError as error:
            raise LabelSetError(f"cannot read shard {self.path}: {error.strerror}") from None
        finally:
            if handle is not None:
                os.close(handle)

    def has_column(self, name: str) -> bool:
        """Return whether the file has a column."""
        return name in self._columns

    def packed_keys(self) -> list[bytes]:
        """Return all keys in UTF-8, in order."""
        packed = self.column("keys").tobytes()
        ends = self.column("key_ends").tolist()
        return [packed[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=False)]

    def keys(self) -> list[str]:
        """Return all keys, in order."""
        return [key.decode() for key in self.packed_keys()]

    def all_keys(self) -> list[str]:
        """Return the keys of all images of the range, in order, skipped ones included."""
        keys = self.keys()
        skipped = self.header["skipped"]
        for key in sorted(skipped, key=lambda key: int(skipped[key]["position"])):
            keys.insert(skipped[key]["position"], key)
        return keys

    def content_hashes(self) -> dict[str, int]:
        """Return the content hash of each image that has one, by key; skipped images included."""
        hashes: dict[str, int] = {}
        if self.has_column("content_hashes"):
            hashes.update(zip(self.keys(), self.column("content_hashes").tolist(), strict=True))
        return hashes | skipped_hashes(self)

    @property
    def labels(self) -> memoryview:
        """The blocks of all images in order, unchecked."""
        return self.column(LABELS).data

    def open(self) -> int:
        """Return a descriptor of the file; raises LabelSetError."""
        try:
            return open_regular(self.path)
        except OSError as error:
            raise LabelSetError(f"cannot read shard {self.path}: {error.strerror}") from None

    @property
    def labels_at(self) -> int:
        """The offset of the blocks in the file."""
        return self._columns[LABELS].offset

    def unmap(self) -> None:
        """Drop the mapping; the next use maps the file again."""
        self.__dict__.pop("_mapped", None)

    def blocks(self) -> Iterator[tuple[bytes, memoryview, bool]]:
        """Yield every image's key, its block, and whether the block passes its CRC."""
        labels, crcs = self.labels, self.column("crc32").tolist()
        ends = self.column("label_ends").tolist()
        for key, begin, end, crc in zip(self.packed_keys(), [0, *ends], ends, crcs, strict=False):
            block = labels[begin:end]
            yield key, block, crc32(block, crc32(key)) == crc  # block_crc, without its call

    def damaged_keys(self) -> list[str]:
        """Return the keys of the images whose block fails its CRC."""
        return [key.decode() for key, _, is_intact in self.blocks() if not is_intact]

    def intact_blocks(self) -> Iterator[memoryview]:
        """Yield the block of every image; raises LabelSetError for a damaged one."""
        for key, block, is_intact in self.blocks():
            if not is_intact:
                raise damaged_rows(self, key.decode())
            yield block

    def shard(self, *, with_blocks: bool = True) -> Shard:
        """Return the content, every block checked, or without blocks; raises as intact_blocks."""
        header = self.header
        is_appended, has_hashes = map(self.has_column, ("views", "content_hashes"))
        return Shard(
            plan_sha256=header["plan_sha256"],
            split=header["role"],
            number=header["number"],
            first_view=header["first_view"],
            num_views=header["num_views"],
            keys=self.keys(),
            blocks=[bytes(block) for block in self.intact_blocks()] if with_blocks else [],
            images=self.images,
            stored_views=self.stored_views,
            views_N=self.column("views") if is_appended else None,
            hashes_N=self.column("content_hashes") if is_appended and has_hashes else None,
            boxes_sha256=header["boxes_sha256"],
            skipped=header["skipped"],
            counts=header["counts"],
            first_sha256=header.get("first_sha256"),
            loss=loss_in(header),
        )

    @cached_property
    def _mapped(self) -> np.ndarray:
        if self._data is not None:
            return np.frombuffer(self._data, np.uint8)
        # torch closes the file after mapping it; mmap keeps a descriptor of each shard
        mapped = torch.from_file(str(self.path), shared=False, size=self.size, dtype=torch.uint8)
        array = mapped.numpy()
        array.flags.writeable = False
        return array


def loss_in(header: Mapping[str, Any]) -> EncodingLoss | None:
    """Return what a shard's labels lose, by its header; None if it does not say."""
    return EncodingLoss(**header["encoding_loss"]) if "encoding_loss" in header else None


def skipped_hashes(file: ShardFile) -> dict[str, int]:
    """Return the content hash of each skipped image whose bytes could be read, by key."""
    skipped = file.header["skipped"].items()
    return {k: parse_hash(i["content_hash"]) for k, i in skipped if "content_hash" in i}


def damaged_rows(file: ShardFile, key: str) -> LabelSetError:
    """Return the error for labels that fail their CRC."""
    advice = "and what to do"
    if file.has_column("views"):
        advice = "remove the file, a later run can add its rows"
    return LabelSetError(
        f"the labels of {key!r} in {file.path} are damaged (CRC-32); `mealv2 labels verify` lists "
        f"all damage, {advice}"
    )


def read_shard(path: Path) -> Shard:
    """Read and check a shard; raises LabelSetError, FileNotFoundError for a missing file."""
    return ShardFile(path).shard()
