"""Tar shards behind URLs as an image source: found by pattern or listing, read through a cache.

Each is fetched whole, once, ahead of its turn; an epoch's order (pipeline/order.py) sees to it that
few of them are needed at a time.
"""

import fnmatch
import posixpath
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from mealv2.data.jpeg_pack import SUFFIX as PACK_SUFFIX
from mealv2.data.jpeg_pack import Pack
from mealv2.data.tar import TarShards, index_shard
from mealv2.data.tar_index import SUFFIX as INDEX_SUFFIX
from mealv2.data.tar_index import ShardIndex, TarIndex, index_bytes, index_of_bytes
from mealv2.data.tar_splits import (
    CLASS_FILES,
    class_names,
    has_word,
    is_tar,
    require_plain_tars,
    shards_of,
    without_braces,
)
from mealv2.errors import ConfigError, DataError, RemoteError
from mealv2.storage import object_store
from mealv2.storage.atomic import file_sha256, write_atomic
from mealv2.storage.cache import Cache
from mealv2.storage.urls import PIPE, beside, file_name, shown, within

AHEAD = 8  # shards fetched ahead of those that are read, as many as an epoch reads at a time
_FETCHED_AT_ONCE = 2


class RemoteTar:
    """A tar file behind a URL, and its copy."""

    def __init__(self, url: str, cache: Cache) -> None:
        self.name = shown(url)
        self._url = url
        self._cache = cache
        self._sha256 = ""
        self._has_index = False
        self._remote: object_store.File | None = None  # as it was when its samples were found
        self._version = ""  # what its copy is told by from those of files it has replaced
        self.size = 0  # 0: not known

    def index(self) -> ShardIndex:
        """Return its samples, from the index beside it, or by reading it once.

        Raises DataError, RemoteError, ConfigError where it is not there.
        """
        index = self._remote_index()
        self._has_index = index is not None
        if index is not None:
            self._version = index.sha256
        else:
            index = self._cached_index()
        self.size, self._sha256 = index.num_bytes, index.sha256
        return index.images

    def open(self) -> int:
        """Return a descriptor of the copy; it is fetched where it is not there.

        Raises RemoteError, also where the copy cannot be written: the image is none the worse.
        """
        try:
            return self._cache.open(self._url, self._fetch, size=self.size, version=self._version)
        except OSError as error:
            raise RemoteError(
                f"cannot keep a copy of {self.name}: {error.strerror or error}: "
                f"{error.filename or self._cache.folder}; see to --cache-dir and run the same "
                "command again"
            ) from error

    def fetch(self) -> None:
        """See that the copy is there."""
        self._cache.make(self._url, self._fetch, size=self.size, version=self._version)

    def _remote_index(self) -> TarIndex | None:
        if self._url.startswith(PIPE):
            return None
        url = beside(self._url, file_name(self._url) + INDEX_SUFFIX)
        data = object_store.read(url)
        return None if data is None else index_of_bytes(data, shown(url))

    def _cached_index(self) -> TarIndex:
        """Return the index of a file that has none beside it; kept beside the copy.

        It is that of the very file that is there, as far as the server tells files apart; what a
        program prints is taken for the same.
        """
        if not self._url.startswith(PIPE):
            self._remote = object_store.info(self._url)
            self._version = f"{self._remote.size} {self._remote.stamp}"
        copy = self._cache.path_of(self._url, version=self._version)
        path = copy.with_name(copy.name + INDEX_SUFFIX)
        with suppress(OSError, DataError):  # one that is missing or damaged is made anew
            return index_of_bytes(path.read_bytes(), str(path))
        while True:
            self.fetch()
            try:
                index = TarIndex(index_shard(copy), copy.stat().st_size, file_sha256(copy))
            except FileNotFoundError:
                continue  # another process needed the room
            except DataError as error:
                raise DataError(str(error).replace(str(copy), self.name)) from None
            write_atomic(path, index_bytes(index))
            return index

    def _fetch(self, path: Path) -> None:
        object_store.fetch(self._url, path)
        if self._remote is not None and object_store.info(self._url) != self._remote:
            raise RemoteError(
                f"{self.name} was replaced while it was read; run the same command again"
            )
        if self._sha256 and file_sha256(path) != self._sha256:
            raise RemoteError(
                f"{self.name} is not the file that its index describes (SHA-256); put both there "
                "anew, as `mealv2 pack` made them"
                if self._has_index
                else f"{self.name} is no longer what it was; run the same command again"
            )


class RemoteShards(TarShards):
    """Images in tar files behind URLs; each file is fetched whole when an image of it is needed."""

    def __init__(
        self,
        files: Sequence[RemoteTar],
        *,
        name: str,
        split: str,
        classes: list[str] | None,
        cache: Cache,
    ) -> None:
        super().__init__(files, name=name, split=split, classes=classes)
        self._tars = list(files)
        self.groups = self.shard_starts or []
        # of the tar files that have images at all, which are the groups
        self._numbers = [self._shard_of(start) for start in self.groups]
        self._next: dict[int, list[int]] = {}
        self._wanted: dict[int, None] = {}
        self._num_fetching = 0
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(_FETCHED_AT_ONCE, "mealv2-fetch")
        self._check_cache_size(cache)

    def announce(self, groups: Sequence[int]) -> None:
        """Take note in which order shards will be read, to fetch them ahead of it."""
        order = [self._numbers[group] for group in groups]
        with self._lock:
            self._next = {n: order[i + 1 : i + 1 + AHEAD] for i, n in enumerate(order)}

    def read(self, position: int) -> bytes:
        """Return the encoded image at ``position``.

        Raises RemoteError where its shard cannot be fetched, else as TarShards.
        """
        self._fetch_after(self._shard_of(position))
        return super().read(position)

    def _fetch_after(self, number: int) -> None:
        with self._lock:
            self._wanted |= dict.fromkeys(self._next.pop(number, []))
            while self._wanted and self._num_fetching < _FETCHED_AT_ONCE:
                self._num_fetching += 1
                self._begin()

    def _begin(self) -> None:
        """Begin to fetch what is wanted first, if anything is; the lock is held.

        One after another: what is in the pool's own queue would be fetched even by a process that
        is about to end.
        """
        if not self._wanted:
            self._num_fetching -= 1
            return
        del self._wanted[number := next(iter(self._wanted))]
        self._threads.submit(self._fetch, number)

    def _fetch(self, number: int) -> None:
        try:
            self._tars[number].fetch()
        finally:
            with self._lock:
                self._begin()

    def _check_cache_size(self, cache: Cache) -> None:
        """Raise ConfigError for a cache that would be emptied before an epoch has used it."""
        needed = sum(sorted((tar.size for tar in self._tars), reverse=True)[: AHEAD + 1])
        if needed > cache.limit:
            raise ConfigError(
                f"--cache-size {cache.limit} bytes: reading {self.name} needs {AHEAD + 1} of its "
                f"shards at a time, {needed} bytes"
            )


# --- which -------------------------------------------------------------------------------------


def open_remote(url: str, split: str, cache: Cache) -> RemoteShards:
    """Open the tar files of a split behind a URL: a pattern of names, or a folder of a store.

    Raises ConfigError where there are none, DataError, RemoteError.
    """
    urls = _by_pattern(url, split) if _is_pattern(url) else _in_folder(url, split)
    if not urls:
        raise ConfigError(f"{shown(url)} has no tar files of the split {split}")
    return RemoteShards(
        [RemoteTar(name, cache) for name in urls],
        name=f"{shown(url)} ({split})",
        split=split,
        classes=None if url.startswith(PIPE) else _classes(urls, split),
        cache=cache,
    )


def _is_pattern(url: str) -> bool:
    return url.startswith(PIPE) or is_tar(url) or re.search(r"[{*?[]", url) is not None


def _in_folder(url: str, split: str) -> list[str]:
    listed = _tars(url)  # first: a server that lists nothing is refused by the name that was given
    inside = [within(url, f"{split}/{name}") for name in _tars(within(url, split))]
    urls = sorted(shards_of(split, url.rstrip("/"), inside, listed))
    pack_url = within(url, f"{split}{PACK_SUFFIX}")
    if not inside and (data := object_store.read(pack_url)) is not None:
        pack = Pack.of_bytes(data, shown(pack_url))
        pack.check(shown(url).rstrip("/"), {n: listed[n] for n in map(file_name, urls)})
    return urls


def _by_pattern(pattern: str, split: str) -> list[str]:
    named = without_braces(pattern)
    if pattern.startswith(PIPE):
        tar_urls = [command for command in named if has_word(command, split)]
    else:
        named = [url for name in named for url in _matching(name)]
        tar_urls = [url for url in named if _is_of(split, url)]
        require_plain_tars(map(shown, tar_urls))
    if named and not tar_urls:
        raise ConfigError(
            f"--data-dir {shown(pattern)}: none of its {len(named)} tar files is of the split "
            f"{split}, whose name must be a word of the file's or its folder's name"
        )
    return sorted(set(tar_urls))


def _is_of(split: str, url: str) -> bool:
    folder = posixpath.basename(posixpath.dirname(shown(url)))
    return folder == split or has_word(file_name(url), split)


def _matching(url: str) -> list[str]:
    """Return the files that a name with wildcards stands for; the name itself without any."""
    name = file_name(url)
    if not re.search(r"[*?[]", name):
        return [url]
    folder = beside(url, "")
    return [within(folder, other) for other in _tars(folder) if fnmatch.fnmatch(other, name)]


def _tars(url: str) -> dict[str, int]:
    """Return the tar files in a folder by name, in order, with their sizes."""
    listed = sorted(object_store.listing(url).items())
    return {name: file.size for name, file in listed if name[0] != "." and is_tar(name)}


def _classes(urls: Sequence[str], split: str) -> list[str] | None:
    """Read the class names beside the shards, or in the folder above where a split has its own."""
    folders = {beside(url, "") for url in urls}
    above = {beside(f.rstrip("/"), "") for f in folders if f.rstrip("/").endswith(f"/{split}")}
    found = []
    for folder in sorted(folders | above):
        for name in CLASS_FILES:
            url = within(folder, name)
            if (data := object_store.read(url)) is not None:
                found.append((shown(url), data))
    return class_names(found)
