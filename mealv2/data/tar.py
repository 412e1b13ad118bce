"""WebDataset tar shards as an image source: the samples in them, and their images by position.

A shard is indexed on its own, through ``index_shard``, and read through ``atomic.OpenFiles``.
"""

import os
import re
import unicodedata
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from mealv2.data.folder import UnorderedSource
from mealv2.data.keys import Keys
from mealv2.data.source import EXTENSIONS
from mealv2.data.tar_headers import BLOCK, Archive, Member
from mealv2.data.tar_index import ShardIndex, index_path, is_key, read_index
from mealv2.errors import ConfigError, DataError
from mealv2.storage.atomic import OpenFiles

_INDEXED_AT_ONCE = 16  # on a cold disk or a share every header waits for a read of its own
_KEPT_OPEN = 64  # files a process; the usual limit is 1024, on some systems 256
_TEXTS = {"cls": 32, "key": 4096}  # members that are read with the headers, at most so long
META = re.compile(r"__[^/]*__(/|$)")
_MOST_CLASSES = 1_000_000  # without a file of names


class TarFile(Protocol):
    """A tar file, wherever it lies."""

    @property
    def name(self) -> str:
        """What to call it in messages."""

    def index(self) -> ShardIndex:
        """Return its samples; raises as ``index_shard``."""

    def open(self) -> int:
        """Return a descriptor to read it; it may have to be fetched first."""


@dataclass(frozen=True)
class LocalTar:
    """A tar file of this machine."""

    path: Path

    @property
    def name(self) -> str:
        """Its path."""
        return str(self.path)

    def index(self) -> ShardIndex:
        """Return its samples; raises as ``indexed``."""
        return indexed(self.path)

    def open(self) -> int:
        """Return a descriptor to read it."""
        return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)


class TarShards(UnorderedSource):
    """Images in tar files as WebDataset lays them out, in the order of the shards' names.

    A sample is a run of members with one name up to the first dot of the base name, which is its
    key (the text of its ``.key`` member where it has one); it needs one image and the class id in
    ``.cls``. Without ``classes`` their names are the ids, zero-padded. Any thread or forked or
    spawned process may read. Raises DataError for a damaged file or sample and for a key that
    comes twice, ConfigError for a class id without a name.
    """

    def __init__(
        self,
        files: Sequence[TarFile | Path],
        *,
        name: str,
        split: str,
        classes: list[str] | None = None,
    ) -> None:
        self._tar_files = [LocalTar(f) if isinstance(f, Path) else f for f in files]
        self._files = OpenFiles(self._tar_files, most=_KEPT_OPEN)
        self.name = name
        self.split = split
        self.labels, self.sizes, self.stored_sizes = array("q"), array("q"), array("q")
        self._offsets, self._head_sizes, self._crcs = array("q"), array("q"), array("I")
        self._first: list[int] = []  # position of each shard's first image
        keys = []
        with ThreadPoolExecutor(_INDEXED_AT_ONCE) as threads:
            for index in threads.map(lambda file: file.index(), self._tar_files):
                self._first.append(len(self.labels))
                keys.append(Keys.of(index.keys))
                self.labels += index.labels
                self.sizes += index.original_sizes
                self.stored_sizes += index.sizes
                self._offsets += index.offsets
                self._head_sizes += index.head_sizes
                self._crcs += index.head_crc32s
        self.keys = Keys.concat(keys)
        stops = [*self._first[1:], len(self.keys)]
        self.shard_starts = [a for a, b in zip(self._first, stops, strict=True) if a < b]
        if not self.keys:
            raise ConfigError(f"{name} holds no samples: images with a .cls member each")
        self._check_unique()
        self.classes = classes or self._numbered_classes()
        if (max_classes := max(self.labels)) >= len(self.classes):
            key = self.keys[self.labels.index(max_classes)]
            raise ConfigError(
                f"image {key} of {name} has the class id {max_classes}, but only "
                f"{len(self.classes)} "
                "classes have names, counted from 0; complete the file of class names"
            )

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, position: int) -> bytes:
        """Return the encoded image at ``position``; raises OSError where it cannot be read.

        DataError where the shard is not what its index says, or no longer what it was: what is
        before the image is compared too.
        """
        number = self._shard_of(position)
        head = self._head_sizes[position]
        wanted = head + self.stored_sizes[position]
        data = self._files.read(number, wanted, self._offsets[position] - head)
        if len(data) != wanted or zlib.crc32(data[:head]) != self._crcs[position]:
            raise DataError(
                f"{self._tar_files[number].name} was changed since it was opened or indexed"
            )
        return data[head:]

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

    def _numbered_classes(self) -> list[str]:
        max_classes = max(self.labels)
        if max_classes >= _MOST_CLASSES:
            name = self._name_at(self.labels.index(max_classes))
            raise DataError(f"{name} has the class id {max_classes}; ids are counted from 0")
        width = len(str(max_classes))
        return [f"{class_id:0{width}d}" for class_id in range(max_classes + 1)]


# --- samples ----------------------------------------------------------------------------------


def indexed(path: Path) -> ShardIndex:
    """Return the samples of a tar file: from the index beside it if there is one, else by headers.

    Raises DataError as index_shard and read_index, and for the index of another file.
    """
    index = read_index(path)
    if index is None:
        return index_shard(path)
    if (size := path.stat().st_size) != index.num_bytes:
        raise DataError(
            f"{index_path(path)} is the index of another file: {path.name} has {size} bytes, not "
            f"{index.num_bytes}; remove the index if the tar file is right, or make both again"
        )
    return index.images


def index_shard(path: Path) -> ShardIndex:
    """Find the samples of a tar file by one pass over its headers.

    Raises DataError, naming file and sample, for what is no sample or no whole tar file.
    """
    sizes = array("q")
    index = ShardIndex([], array("q"), sizes, array("q"), array("q"), array("I"), sizes)
    with Archive(path) as archive:
        for sample in _samples(archive):
            where = f"sample {sample.name} of {path}"
            if (image := _image_of(sample, where)) is None:
                continue
            index.keys.append(_key_of(sample, where))
            index.labels.append(_label_of(sample, where))
            index.sizes.append(image.size)
            index.offsets.append(image.offset)
            index.head_sizes.append(BLOCK)
            index.head_crc32s.append(image.header_crc32)
    return index


class _Sample:
    """Members with one name up to the dot, by extension, and the text of the small ones."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.members: dict[str, Member] = {}
        self.texts: dict[str, bytes] = {}


def _samples(archive: Archive) -> Iterator[_Sample]:
    """Yield each run of members with one name."""
    sample = _Sample("")
    for member in archive.members():
        folder, slash, base = member.name.rpartition("/")
        stem, dot, extension = base.partition(".")
        # webdataset: names without a dot, and what lies in __some__/, are no samples
        if not (stem and dot) or (folder[:2] == "__" and META.match(folder)):
            continue
        if (name := folder + slash + stem) != sample.name:
            if sample.members:
                yield sample
            sample = _Sample(name)
        extension = extension.lower()
        if extension in sample.members:
            raise DataError(f"sample {name} of {archive.path} has two members .{extension}")
        sample.members[extension] = member
        if (limit := _TEXTS.get(extension)) is not None:  # now, while it is near
            if member.size > limit:
                raise DataError(
                    f"{member.name} in {archive.path} has {member.size} bytes, more than {limit}"
                )
            sample.texts[extension] = archive.read(member.offset, member.size)
    if sample.members:
        yield sample


def _image_of(sample: _Sample, where: str) -> Member | None:
    """Return the image of a sample; None where it has neither image nor class."""
    images = [member for ext, member in sample.members.items() if f".{ext}" in EXTENSIONS]
    if len(images) > 1:
        names = ", ".join(member.name for member in images)
        raise DataError(f"{where} has {len(images)} images: {names}; one is needed")
    if images and "cls" not in sample.members:
        raise DataError(
            f"{where} has no class: a member .cls with the number must stand next to the image"
        )
    if not images and "cls" in sample.members:
        raise DataError(
            f"{where} has no image next to it, such as .jpg or .png (there: "
            f"{', '.join(f'.{ext}' for ext in list(sample.members)[:8])})"
        )
    return images[0] if images else None


def _label_of(sample: _Sample, where: str) -> int:
    digits = sample.texts["cls"].strip()
    if not digits.isdigit():
        raise DataError(f"the .cls of {where} is {digits!r}; it must be a class id, counted from 0")
    return min(int(digits), _MOST_CLASSES)  # more are refused


def _key_of(sample: _Sample, where: str) -> str:
    try:
        key = sample.texts["key"].decode("utf-8") if "key" in sample.texts else sample.name
    except UnicodeDecodeError:
        key = ""
    if not key or "\0" in key:
        raise DataError(f"the .key of {where} is not a text in UTF-8")
    if not is_key(key):
        raise DataError(f"{where} has the key {key!r}, which leads out of its folder")
    return unicodedata.normalize("NFC", key)
