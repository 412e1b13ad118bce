"""Tar shards behind URLs as an image source: found by pattern or listing, read through a cache.

Each is fetched whole, once, ahead of its turn; an epoch's order (pipeline/order.py) sees to it that
few of them are needed at a time.
"""

import fnmatch
import posixpath
import re
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from mealv2 import remote
from mealv2.cache import Cache
from mealv2.errors import ConfigError, RemoteError
from mealv2.files import file_sha256, write_whole
from mealv2.locations import PIPE, beside, file_name, shown, within
from mealv2.tar_files import (
    CLASS_FILES,
    class_names,
    has_word,
    is_tar,
    refuse_others,
    shards_of,
    without_braces,
)
from mealv2.tar_index import INDEX_SUFFIX, TarIndex
from mealv2.tar_shards import ShardIndex, TarShards

WINDOW = 8  # shards read at a time, see pipeline/order.py; as many more are fetched ahead
_FETCHED_AT_ONCE = 2


class RemoteTar:
    """A tar file behind a URL, and its copy."""

    def __init__(self, url: str, cache: Cache) -> None:
        self.name = shown(url)
        self._url = url
        self._cache = cache
        self._sha256 = ""
        self.size = 0  # 0: not known

    def index(self) -> ShardIndex:
        """Return its samples, from the index beside it, or by reading it once.

        Raises DataError, RemoteError.
        """
        index = self._index_there() or self._index_here()
        self.size, self._sha256 = index.num_bytes, index.sha256
        return index.samples

    def open(self) -> int:
        """Return a descriptor of the copy; it is fetched where it is not there."""
        return self._cache.open(self._url, self._fetch, size=self.size)

    def fetch(self) -> None:
        """See that the copy is there."""
        self._cache.make(self._url, self._fetch, size=self.size)

    def _index_there(self) -> TarIndex | None:
        if self._url.startswith(PIPE):
            return None
        url = beside(self._url, file_name(self._url) + INDEX_SUFFIX)
        data = remote.read(url)
        return None if data is None else TarIndex.of_bytes(data, shown(url))

    def _index_here(self) -> TarIndex:
        """Return the index of a file that has none beside it; kept beside the copy."""
        copy = self._cache.path_of(self._url)
        path = copy.with_name(copy.name + INDEX_SUFFIX)
        if path.is_file():
            return TarIndex.of_bytes(path.read_bytes(), str(path))
        while True:
            self.fetch()
            try:
                index = TarIndex.of_tar(copy)
            except FileNotFoundError:
                continue  # another process needed the room
            write_whole(path, index.to_bytes())
            return index

    def _fetch(self, path: Path) -> None:
        remote.fetch(self._url, path)
        if self._sha256 and file_sha256(path) != self._sha256:
            raise RemoteError(
                f"{self.name} is not the file that its index describes (SHA-256); put both there "
                "anew, as `mealv2 pack` made them"
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
        self._next: dict[int, list[int]] = {}
        self._ahead: dict[int, Future[None]] = {}
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(_FETCHED_AT_ONCE, "mealv2-fetch")
        self._refuse_small(cache)

    def announce(self, order: Sequence[int]) -> None:
        """Say in which order shards will be read, so that they are fetched ahead of it."""
        with self._lock:
            self._next = {n: list(order[i + 1 : i + 1 + WINDOW]) for i, n in enumerate(order)}

    def read(self, position: int) -> bytes:
        """Return the encoded image at ``position``.

        Raises RemoteError where its shard cannot be fetched, else as TarShards.
        """
        self._fetch_after(self._shard_of(position))
        return super().read(position)

    def _fetch_after(self, number: int) -> None:
        with self._lock:
            for other in self._next.pop(number, []):
                if other not in self._ahead:
                    self._ahead[other] = self._threads.submit(self._tars[other].fetch)

    def _refuse_small(self, cache: Cache) -> None:
        """Raise ConfigError for a cache that would be emptied before an epoch has used it."""
        needed = sum(sorted((tar.size for tar in self._tars), reverse=True)[: WINDOW + 1])
        if needed > cache.limit:
            raise ConfigError(
                f"--cache-size {cache.limit} bytes: reading {self.name} needs {WINDOW + 1} of its "
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
    inside = [within(url, f"{split}/{name}") for name in _tars(within(url, split))]
    return sorted(shards_of(split, url.rstrip("/"), inside, _tars(url)))


def _by_pattern(pattern: str, split: str) -> list[str]:
    named = without_braces(pattern)
    if pattern.startswith(PIPE):
        ours = [command for command in named if has_word(command, split)]
    else:
        named = [url for name in named for url in _matching(name)]
        ours = [url for url in named if _is_of(split, url)]
        refuse_others(map(shown, ours))
    if named and not ours:
        raise ConfigError(
            f"--data-dir {shown(pattern)}: none of its {len(named)} tar files is of the split "
            f"{split}, whose name must be a word of the file's or its folder's name"
        )
    return sorted(set(ours))


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


def _tars(url: str) -> list[str]:
    """List the names of the tar files in a folder, in order."""
    return sorted(name for name in remote.listing(url) if name[0] != "." and is_tar(name))


def _classes(urls: Sequence[str], split: str) -> list[str] | None:
    """Read the class names beside the shards, or in the folder above where a split has its own."""
    folders = {beside(url, "") for url in urls}
    above = {beside(f.rstrip("/"), "") for f in folders if f.rstrip("/").endswith(f"/{split}")}
    found = []
    for folder in sorted(folders | above):
        for name in CLASS_FILES:
            url = within(folder, name)
            if (data := remote.read(url)) is not None:
                found.append((shown(url), data))
    return class_names(found)
