"""Tar shards behind URLs as an image source, read through a cache.

Each shard is fetched once, ahead of its first use; an epoch's order (mealv2/batches.py)
keeps the number of shards that are needed at a time small.
"""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from mealv2.data.source import ClassNames
from mealv2.data.tar import TarShards
from mealv2.data.tar_index import (
    ShardIndex,
    TarIndex,
    create_plain_index,
    index_bytes,
    index_of_bytes,
    index_path,
    read_index,
)
from mealv2.data.tar_splits import INDEX_SUFFIX
from mealv2.errors import ConfigError, DataError, RemoteError
from mealv2.storage import object_store
from mealv2.storage.atomic import file_sha256, write_atomic
from mealv2.storage.cache import Cache, locked
from mealv2.storage.transfer import File
from mealv2.storage.urls import PIPE, beside, file_name, shown

AHEAD = 8  # shards fetched ahead of those in use, as many as an epoch reads at a time
_MAX_FETCHES = 2


class RemoteTar:
    """A tar file behind a URL, and its copy."""

    def __init__(self, url: str, cache: Cache) -> None:
        self.name = shown(url)
        self.size = 0  # bytes; 0 if unknown
        self._url = url
        self._cache = cache
        self._sha256 = ""
        self._has_index = False
        self._remote: File | None = None  # as it was when it was indexed
        self._version = ""  # distinguishes its copy from those of files that it replaced

    def index(self) -> ShardIndex:
        """Return its samples, from the index beside it, or by reading it once.

        Raises DataError, RemoteError, ConfigError for a missing file.
        """
        url = beside(self._url, file_name(self._url) + INDEX_SUFFIX)
        data = None if self._url.startswith(PIPE) else object_store.read(url)
        self._has_index = data is not None
        index = self._cached_index() if data is None else index_of_bytes(data, shown(url))
        if self._has_index:
            self._version = index.sha256
        self.size, self._sha256 = index.num_bytes, index.sha256
        return index.images

    def open(self) -> int:
        """Return a descriptor of the copy, which is fetched if it is missing.

        Raises RemoteError, also if the copy cannot be written, which is not a bad image.
        """
        try:
            return self._cache.open(self._url, self._fetch, size=self.size, version=self._version)
        except OSError as error:
            raise RemoteError(
                f"cannot keep a copy of {self.name}: {error.strerror or error}: "
                f"{error.filename or self._cache.folder}; check --cache-dir and run the same "
                "command again"
            ) from error

    def fetch(self) -> None:
        """Fetch the copy if it is missing."""
        self._cache.make(self._url, self._fetch, size=self.size, version=self._version)

    def remove_damaged(self) -> None:
        """Remove the copy unless it has the SHA-256 of the index; the next use fetches it again."""
        copy = self._cache.path_of(self._url, version=self._version)
        with suppress(FileNotFoundError), locked(copy):
            if file_sha256(copy) != self._sha256:
                copy.unlink()

    def _cached_index(self) -> TarIndex:
        """Return the index of a file that has none beside it, and keep it beside the copy.

        It matches the remote file's size and stamp; the output of a program is assumed constant.
        """
        if not self._url.startswith(PIPE):
            self._remote = object_store.info(self._url)
            self._version = f"{self._remote.size} {self._remote.stamp}"
        copy = self._cache.path_of(self._url, version=self._version)
        with suppress(OSError, DataError):  # a missing or damaged one is created again
            if (kept := read_index(copy)) is not None:
                return kept
        while True:
            self.fetch()
            try:
                index = create_plain_index(copy)
            except FileNotFoundError:
                continue  # another process removed the copy to free space
            except DataError as error:
                raise DataError(str(error).replace(str(copy), self.name)) from None
            write_atomic(index_path(copy), index_bytes(index))
            return index

    def _fetch(self, path: Path) -> None:
        object_store.fetch(self._url, path)
        if self._remote is not None and object_store.info(self._url) != self._remote:
            raise RemoteError(
                f"{self.name} was replaced while it was read; run the same command again"
            )
        if self._sha256 and file_sha256(path) != self._sha256:
            raise RemoteError(
                f"{self.name} is not the file that its index describes (SHA-256); upload both "
                "again, as `mealv2 pack` made them"
                if self._has_index
                else f"{self.name} has changed since it was opened; run the same command again"
            )


class RemoteShards(TarShards):
    """Images in tar files behind URLs; a file is fetched when one of its images is needed.

    Raises as TarShards, and ConfigError for a cache that cannot hold the shards in use.
    """

    def __init__(
        self,
        files: Sequence[RemoteTar],
        cache: Cache,
        *,
        name: str,
        split: str,
        classes: list[str] | None,
        names: ClassNames | None = None,
    ) -> None:
        super().__init__(files, name=name, split=split, classes=classes, names=names)
        self._tars = list(files)
        self.groups = self.shard_starts or []
        self._numbers = [self._shard_of(start) for start in self.groups]  # shards with images
        self._next: dict[int, list[int]] = {}
        self._wanted: dict[int, None] = {}
        self._num_fetching = 0
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(_MAX_FETCHES, "mealv2-fetch")
        needed = sum(sorted((tar.size for tar in files), reverse=True)[: AHEAD + 1])
        if needed > cache.limit:
            raise ConfigError(
                f"--cache-size {cache.limit} bytes: reading {name} needs {AHEAD + 1} of its "
                f"shards at a time, {needed} bytes"
            )

    def announce(self, groups: Sequence[int]) -> None:
        """Store the order in which shards will be read, to fetch them ahead."""
        order = [self._numbers[group] for group in groups]
        with self._lock:
            self._next = {n: order[i + 1 : i + 1 + AHEAD] for i, n in enumerate(order)}

    def read(self, position: int) -> bytes:
        """Return the encoded image at ``position``.

        A damaged copy of its shard is fetched again. Raises RemoteError if the shard cannot be
        fetched, else as TarShards.
        """
        with self._lock:
            self._wanted |= dict.fromkeys(self._next.pop(self._shard_of(position), []))
            self._start_fetches()
        try:
            return super().read(position)
        except DataError:  # the copy may be damaged: fetch it again, once
            self._tars[self._shard_of(position)].remove_damaged()
            self._files.close()
            return super().read(position)

    def _start_fetches(self) -> None:
        """Fetch the shards that are wanted first; the lock is held.

        The pool's queue stays empty: a process that ends would still fetch all of it.
        """
        while self._wanted and self._num_fetching < _MAX_FETCHES:
            del self._wanted[number := next(iter(self._wanted))]
            self._num_fetching += 1
            self._threads.submit(self._fetch, number)

    def _fetch(self, number: int) -> None:
        try:
            self._tars[number].fetch()
        finally:
            with self._lock:
                self._num_fetching -= 1
                self._start_fetches()
