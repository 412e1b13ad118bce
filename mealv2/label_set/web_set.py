"""A label set on a web server: its index in the cache, its blocks read when they are needed.

The copy of a shard is a sparse file: all bytes but the labels, and the blocks that were read. No
list says which those are: a block whose CRC is right is there. Each manifest has copies of its own.
"""

import contextlib
import os
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from mealv2.errors import ConfigError, LabelSetError, RemoteError
from mealv2.label_set.blocks import block_crc
from mealv2.label_set.manifest import MANIFEST_NAME, PLAN_NAME, listed_shards, read_manifest
from mealv2.label_set.shard import HEAD, HEAD_SIZE, LABELS
from mealv2.label_set.shard_head import Head, read_head
from mealv2.storage import object_store
from mealv2.storage.atomic import atomic_file, file_sha256, write_atomic
from mealv2.storage.cache import Cache, default_cache, hold, locked
from mealv2.storage.urls import shown, within
from mealv2.storage.web_ranges import Part
from mealv2.text import set_display_name

_NUM_THREADS = 16  # that fetch indexes
_FIRST = 4096  # bytes at the start of a shard: head, and HDF5's own before the labels
_INDEX_OF_IMAGE = 128  # bytes at the end of a shard that are read for each image; more if needed
_PAGE = 4096
_NUM_WRITERS = 16  # processes that may add blocks to the cache at the same time
_BUDGET = 64 << 20  # bytes of new blocks between two looks at the size of the cache
_opened: "defaultdict[str, weakref.WeakSet[WebSet]]" = defaultdict(weakref.WeakSet)  # by folder


class Missing(NamedTuple):
    """A block that the copy does not have: its row in the batch, the copy, its key and CRC."""

    row: int
    path: Path
    offset: int
    size: int
    key: bytes
    crc: int


def is_web(location: object) -> bool:
    """Return whether a location is a URL of a web server."""
    return isinstance(location, str) and location.lower().startswith(("http://", "https://"))


def web_set_at(folder: Path) -> "WebSet | None":
    """Return the open web set whose copy is in a folder, if it is one."""
    return next(iter(_opened[str(folder)]), None) if str(folder) in _opened else None


class WebSet:
    """A finished label set below a URL, as the path of ``folder``, which has its index.

    It reads the blocks of images when they are needed, and keeps them within the cache's limit; the
    cache keeps the folder while this object or a LabelSet of it exists. ``num_fetched`` counts the
    shards whose index was not in the cache. Rows that jobs appended are not in the manifest, so
    they are not read.
    """

    def __init__(self, url: str, cache: Cache | None = None) -> None:
        """Fetch the manifest and the missing indexes.

        Raises RemoteError, ConfigError, LabelSetError for a set that is unfinished or damaged.
        """
        self.url = url
        self._cache = cache or default_cache()
        self._budget = 0
        self._has_room = True
        manifest = self._read(MANIFEST_NAME)
        version = sha256(manifest).hexdigest()
        self.folder = self._cache.path_of(url.rstrip("/"), version=version)
        set_display_name(self.folder, shown(url).rstrip("/"))
        weakref.finalize(self, os.close, hold(self.folder))
        with self._errors(), locked(self.folder.with_name(f"changes-of-{self.folder.name}")):
            write_atomic(self.folder / MANIFEST_NAME, manifest)
            self._shards = listed_shards(read_manifest(self.folder)["roles"])
            self._sizes = {shard["name"]: shard["bytes"] for shard in self._shards}
            write_atomic(self.folder / PLAN_NAME, self._read(PLAN_NAME))
            self.num_fetched = self._each(self._fetch_index)
            if self._cache.trim(0) > self._cache.limit:
                self._drop_blocks()
        _opened[str(self.folder)].add(self)

    def __fspath__(self) -> str:
        return str(self.folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return WebSet, (self.url, self._cache)

    def fill(self, blocks: list[bytes], missing: Sequence[Missing]) -> None:
        """Read the missing blocks of a batch, and keep them in the copies.

        After an error those that were received are kept. Raises RemoteError, ConfigError for a
        missing file, LabelSetError for a block that is not the one of the index.
        """
        parts = [
            Part(self._url_of(m.path.name), m.offset, m.size, self._sizes[m.path.name])
            for m in missing
        ]
        found: dict[Part, bytes] = {}
        with self._errors():
            try:
                object_store.read_parts(parts, found)
            finally:
                self._keep({m: found[p] for m, p in zip(missing, parts, strict=True) if p in found})
        for wanted, part in zip(missing, parts, strict=True):
            blocks[wanted.row] = block = found[part]
            if block_crc(wanted.key, block) != wanted.crc:
                raise LabelSetError(
                    f"the labels of {wanted.key.decode()!r} in {shown(part.url)} are not those of "
                    "its index (CRC-32): the file was replaced since it was opened, or is damaged; "
                    "run the same command again, and if that fails upload the label set again"
                )

    def fetch_all(self) -> None:
        """Fetch all files completely, for checks of every byte.

        Raises RemoteError, and ConfigError for a set that is larger than the cache.
        """
        total = sum(self._sizes.values())
        if total > self._cache.limit:
            raise ConfigError(
                f"{shown(self.url)} has {total} bytes, more than --cache-size {self._cache.limit}; "
                "give a larger --cache-size"
            )
        with self._errors():
            self._cache.trim(total)
            self._each(self._fetch_complete)

    def _drop_blocks(self) -> None:
        """Fetch all indexes to new copies; raises ConfigError if they do not fit the cache."""
        for name in self._sizes:
            (self.folder / name).unlink()
        self.num_fetched = self._each(self._fetch_index)
        if self._cache.trim(0) > self._cache.limit:
            raise ConfigError(
                f"--cache-size {self._cache.limit} bytes: the index of {shown(self.url)} needs more"
            )

    def _each(self, fetch: Callable[[dict[str, Any]], bool]) -> int:
        """Call a function for each shard, in threads; return how many it fetched."""
        with ThreadPoolExecutor(_NUM_THREADS, "mealv2-labels") as threads:
            return sum(threads.map(fetch, self._shards))

    def _fetch_complete(self, shard: dict[str, Any]) -> bool:
        path = self.folder / shard["name"]
        if file_sha256(path) == shard["sha256"]:
            return False
        with atomic_file(path) as temporary:
            object_store.fetch(self._url_of(shard["name"]), temporary)
        return True

    def _fetch_index(self, shard: dict[str, Any]) -> bool:
        """Fetch a shard without its labels, unless the copy is right; return whether it was not."""
        path, head_sha256 = self.folder / shard["name"], shard.get("head_sha256")
        with contextlib.suppress(LabelSetError, OSError):  # a missing or damaged one is fetched
            if read_head(path).sha256 == head_sha256:
                os.utime(path)  # the cache removes the files that were used longest ago
                return False
        where = shown(self._url_of(shard["name"]))
        with atomic_file(path) as temporary:
            try:
                head = self._write_index(temporary, shard)
            except LabelSetError as error:
                raise LabelSetError(
                    f"{str(error).replace(str(temporary), where)}; upload the label set again"
                ) from None
            if head.sha256 != head_sha256:
                raise LabelSetError(
                    f"{where} is not the shard in the manifest; run the same command again, or "
                    "upload the label set again"
                )
        return True

    def _write_index(self, path: Path, shard: dict[str, Any]) -> Head:
        """Write a sparse file with all but the labels; return its head. Raises as read_head."""
        size = shard["bytes"]
        tail_at = max(0, size - _FIRST - _INDEX_OF_IMAGE * shard.get("images", 0))
        with path.open("xb") as file:
            copy = partial(self._copy, file.fileno(), shard)
            copy((0, min(_FIRST, size)), (tail_at, size))
            file.truncate(size)
            with path.open("rb") as written:
                start = written.read(HEAD_SIZE)
            header_at, header_size = HEAD.unpack_from(start.ljust(HEAD_SIZE, b"\0"))[4:6]
            if header_at < tail_at:
                copy((header_at, min(header_at + header_size, size)))
            labels = read_head(path, with_index=False).columns[LABELS]
            copy((_FIRST, labels.offset), (labels.offset + labels.shape[0], tail_at))
        return read_head(path)

    def _copy(self, handle: int, shard: dict[str, Any], *spans: tuple[int, int]) -> None:
        """Copy parts of a shard to a file; a span that ends before it starts is empty."""
        url, size = self._url_of(shard["name"]), shard["bytes"]
        parts = [Part(url, start, stop - start, size) for start, stop in spans if start < stop]
        found: dict[Part, bytes] = {}
        object_store.read_parts(parts, found)
        for part, data in found.items():
            os.pwrite(handle, data, part.offset)

    def _keep(self, found: dict[Missing, bytes]) -> None:
        """Write blocks to the copies while the cache has room."""
        self._budget -= sum(len(block) + _PAGE for block in found.values())
        if self._budget < 0:
            self._budget = min(_BUDGET, self._cache.limit // (4 * _NUM_WRITERS))
            reserve = _NUM_WRITERS * self._budget
            self._has_room = self._cache.trim(reserve) <= self._cache.limit
        if not self._has_room:
            return
        by_file: dict[Path, list[tuple[int, bytes]]] = defaultdict(list)
        for missing, block in found.items():
            by_file[missing.path].append((missing.offset, block))
        for path, spans in by_file.items():
            try:
                handle = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            except FileNotFoundError:  # another process makes room: the blocks are not kept
                self._has_room = False
                return
            try:
                for offset, block in spans:
                    os.pwrite(handle, block, offset)
            finally:
                os.close(handle)

    def _read(self, name: str) -> bytes:
        data = object_store.read(self._url_of(name))
        if data is None:
            raise LabelSetError(
                f"{shown(self.url)} has no {name}: it is no finished label set, or the server "
                "denies access; give the URL of the folder with the files of the label set"
            )
        return data

    def _url_of(self, name: str) -> str:
        return within(self.url, name)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Convert errors of the copies into a RemoteError."""
        try:
            yield
        except OSError as error:
            raise RemoteError(
                f"cannot keep a copy of {shown(self.url)}: {error.strerror or error}: "
                f"{error.filename or self.folder}; check --cache-dir and run the same command again"
            ) from error
