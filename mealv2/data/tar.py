"""WebDataset tar shards as an image source: images by position, over many tar files."""

import zlib
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np

from mealv2.data.content_hash import content_hash
from mealv2.data.folder import UnorderedSource
from mealv2.data.image_files import MAX_BYTES
from mealv2.data.keys import Keys
from mealv2.data.left_out import LeftOut
from mealv2.data.pack_index import ADVICE_RERUN
from mealv2.data.source import UNLABELLED, ClassNames
from mealv2.data.tar_index import MAX_CLASSES, ShardIndex, index_path, index_shard, read_index
from mealv2.errors import ConfigError, DataError
from mealv2.storage.atomic import OpenFiles
from mealv2.storage.regular_files import open_regular

_INDEX_THREADS = 16  # on a cold disk or a network share every header is a read of its own
_MAX_OPEN = 64  # files of a process; the usual limit is 1024, on some systems 256


class TarFile(Protocol):
    """A local or remote tar file: its name in messages, its samples, a descriptor to read it."""

    @property
    def name(self) -> str: ...

    def index(self) -> ShardIndex: ...

    def open(self) -> int: ...


class LocalTar:
    """A tar file on this machine."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)

    def index(self) -> ShardIndex:
        """Return its samples, from the index beside it or by its headers.

        Raises DataError as index_shard and read_index, and for an index of another file.
        """
        index = read_index(self.path)
        if index is None:
            return index_shard(self.path)
        if (size := self.path.stat().st_size) != index.num_bytes:
            raise DataError(
                f"{index_path(self.path)} is the index of another file: {self.path.name} has "
                f"{size} bytes, not {index.num_bytes}; remove the index if the tar file is right, "
                "or create both again"
            )
        return index.images

    def open(self) -> int:
        """Return a descriptor to read it."""
        return open_regular(self.path)


class TarShards(UnorderedSource):
    """Images in tar files as WebDataset lays them out, in the order of the files.

    A sample is a run of members with one name up to the first dot of the base name, which is its
    key (or the text of its ``.key`` member); it needs one image and the class id in ``.cls``.
    Without ``classes``, their names are the ids, zero-padded. If no sample has a ``.cls``, the
    images are unlabelled, and ``names`` returns the class names. Any thread and any forked or
    spawned process may read. Raises DataError for a damaged file or sample, for a duplicate key and
    for a sample without a class among others or without ``names``, ConfigError for a class id
    without a name.
    """

    _advice = f"remove the tar file and {ADVICE_RERUN}, or copy it again"

    def __init__(
        self,
        files: Sequence[TarFile | Path],
        *,
        name: str,
        split: str,
        classes: list[str] | None = None,
        names: ClassNames | None = None,
    ) -> None:
        self._tar_files = [LocalTar(f) if isinstance(f, Path) else f for f in files]
        self._files = OpenFiles(self._tar_files, most=_MAX_OPEN)
        self.name = name
        self.split = split
        self.labels, self.sizes, self.stored_sizes = array("q"), array("q"), array("q")
        self._offsets, self._head_sizes, self._crcs = array("q"), array("q"), array("I")
        self._hashes, self._original_hashes = array("Q"), array("Q")
        self._has_hashes: list[bool] = []  # of each tar file
        self.left_out = LeftOut()
        self._first: list[int] = []  # position of each shard's first image
        keys = []
        with ThreadPoolExecutor(_INDEX_THREADS) as threads:
            for index in threads.map(lambda file: file.index(), self._tar_files):
                self._first.append(len(self.labels))
                keys.append(Keys.of(index.keys))
                self.left_out.update(index.left_out)
                self.labels += index.labels
                self.sizes += index.original_sizes
                self.stored_sizes += index.sizes
                self._offsets += index.offsets
                self._head_sizes += index.head_sizes
                self._crcs += index.head_crc32s
                self._has_hashes.append(len(index.hashes) > 0)
                unknown = array("Q", bytes(0 if index.hashes else 8 * len(index.keys)))
                self._hashes += index.hashes or unknown
                self._original_hashes += index.original_hashes or unknown
        self.keys = Keys.concat(keys)
        stops = [*self._first[1:], len(self.keys)]
        self.shard_starts = [a for a, b in zip(self._first, stops, strict=True) if a < b]
        if not self.keys:
            raise ConfigError(f"{name} holds no samples: images with a .cls member each")
        self._check_unique()
        if UNLABELLED in self.labels:
            classes = self._names_of_unlabelled(names)
        self.classes = classes or self._numbered_classes()
        if (max_class := max(self.labels)) >= len(self.classes):
            key = self.keys[self.labels.index(max_class)]
            raise ConfigError(
                f"image {key} of {name} has the class id {max_class}, but only "
                f"{len(self.classes)} classes have names; complete the file of class names"
            )

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, position: int) -> bytes:
        """Return the encoded image at ``position``; raises OSError where it cannot be read.

        Raises DataError for a shard that no longer matches its index, by the CRC of what precedes
        the image and, if it was indexed with content hashes, by that of the image.
        """
        number = self._shard_of(position)
        head = self._head_sizes[position]
        if (size := self.stored_sizes[position]) > MAX_BYTES:
            raise DataError(f"it has {size} bytes, more than the {MAX_BYTES} that it can have")
        size += head
        data = self._files.read(number, size, self._offsets[position] - head)
        if len(data) != size or zlib.crc32(data[:head]) != self._crcs[position]:
            raise DataError(
                f"{self._tar_files[number].name} was changed since it was opened or indexed"
            )
        image = data[head:]
        if self._has_hashes[number] and content_hash(image) != self._hashes[position]:
            raise DataError(
                f"it was changed since {self._tar_files[number].name} was indexed; {self._advice}"
            )
        return image

    def original_hash(self, position: int, data: bytes) -> int:
        """Return the content hash of an image before it was packed."""
        if self._has_hashes[self._shard_of(position)]:
            return self._original_hashes[position]
        return content_hash(data)

    def _shard_of(self, position: int) -> int:
        return bisect_right(self._first, position) - 1

    def _name_at(self, position: int) -> str:
        return self._tar_files[self._shard_of(position)].name

    def _check_unique(self) -> None:
        hashes_N = np.fromiter(map(hash, self.keys), np.int64, len(self.keys))
        if len(np.unique(hashes_N)) == len(hashes_N):
            return
        positions: dict[str, int] = {}
        for position, key in enumerate(self.keys):
            if (other := positions.setdefault(key, position)) != position:
                one, two = (self._name_at(p) for p in (other, position))
                where = f"twice in {one}" if one == two else f"in {one} and in {two}"
                raise DataError(f"sample {key} is {where}; every image needs a key of its own")

    def _names_of_unlabelled(self, names: ClassNames | None) -> list[str]:
        if names is None or max(self.labels) != UNLABELLED:
            position = self.labels.index(UNLABELLED)
            where = f"sample {self.keys[position]} of {self._name_at(position)}"
            raise DataError(f"{where} has no class: add a member .cls with the class id")
        return list(names())

    def _numbered_classes(self) -> list[str]:
        max_class = max(self.labels)
        if max_class >= MAX_CLASSES:
            name = self._name_at(self.labels.index(max_class))
            raise DataError(f"{name} has the class id {max_class}; ids are counted from 0")
        width = len(str(max_class))
        return [f"{class_id:0{width}d}" for class_id in range(max_class + 1)]
