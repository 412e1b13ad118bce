"""Where a label set is stored: in a folder, or at a URL with a copy in the cache.

Files at a URL never change in place, so fetching the missing ones updates a copy. An upload is one
step, and of two uploads of a file the first one wins (mealv2.storage.object_store.upload).
"""

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from mealv2 import label_set
from mealv2.errors import ConfigError, LabelSetError
from mealv2.label_set import MANIFEST_NAME, PLAN_NAME, read_manifest
from mealv2.storage import object_store
from mealv2.storage.atomic import atomic_file, file_sha256, write_atomic
from mealv2.storage.cache import STAMPS_PREFIX, Cache, hold, locked
from mealv2.storage.json_format import canonical_json, read_json
from mealv2.storage.urls import Location, is_url, shown, within
from pipeline import console, display_names
from pipeline.config import CacheConfig
from pipeline.loading.sources import cache_of

_FILES_OF_A_SET = re.compile(r"(plan|manifest)\.json|(train|val)-[a-z0-9-]+\.h5")
_NUM_FETCHERS = 8  # threads that fetch files
_open_copies: list[int] = []  # locks: copies that this process reads are kept until it ends


class Store:
    """A label set in a local folder: what is written into ``folder`` needs no upload.

    ``location`` is what messages call it. RemoteStore does the same for a set at a URL.
    """

    def __init__(self, folder: Path) -> None:
        self.location = str(folder)
        self.folder = folder

    def claim(self, plan: dict[str, Any]) -> None:
        """Write the plan to the empty location; raises as label_set.claim if it has another."""
        label_set.claim(self.folder, plan)

    def fetch(self, name: str) -> None:
        """Update a file of ``folder`` from the location."""

    def refetch(self, name: str) -> bool:
        """Fetch a damaged file of ``folder`` again; return False if there is no other copy."""
        return False

    def fetch_all(self) -> None:
        """Update all files of ``folder`` from the location."""

    def is_missing(self, name: str) -> bool:
        """Return whether a file of ``folder`` was not uploaded."""
        return False

    def upload(self, name: str, *, replace: bool = False, damaged: bool = False) -> bool:
        """Upload a file of ``folder``; return False if another one was uploaded first.

        Then that one replaces the file in ``folder``. ``damaged`` replaces the file that was there
        when it was last fetched, ``replace`` replaces any.
        """
        return True


def open_store(config: CacheConfig, location: Location) -> Store:
    """Return the store for the label set at a location. Raises RemoteError, ConfigError."""
    if is_url(location):
        return _remote_store(config, str(location))
    return Store(Path(location))


def local_folder(config: CacheConfig, labels: Location, *, require_complete: bool = True) -> Path:
    """Return the folder to read a label set from: its own, or a copy of the files at a URL.

    Raises RemoteError, ConfigError, and LabelSetError if the set at a URL is not complete; without
    ``require_complete`` an incomplete set is copied as it is.
    """
    if not is_url(labels):
        return Path(labels)
    store = _remote_store(config, str(labels))
    store.fetch_set(require_complete=require_complete)
    return store.folder


def _remote_store(config: CacheConfig, url: str) -> "RemoteStore":
    if re.match("pipe:|https?:", url):
        raise ConfigError(
            f"{shown(url)}: a label set is a folder of files, and neither a program nor a web "
            "server lists its files; give a folder or a bucket"
        )
    return RemoteStore(url, cache_of(config))


class RemoteStore(Store):
    """A label set at ``url``; ``folder`` is its copy in the cache."""

    def __init__(self, url: str, cache: Cache) -> None:
        self.url = url
        super().__init__(cache.path_of(url.rstrip("/")))
        self.location = shown(url)
        self._cache = cache
        _open_copies.append(hold(self.folder))
        display_names.set_display_name(self.folder, self.location.rstrip("/"))
        self._remote: dict[str, object_store.File] = {}
        with self._locked():
            self._list()
        self._is_listed = True  # the first operation needs no new listing

    def claim(self, plan: dict[str, Any]) -> None:
        with self._locked():
            self._list_again()
            label_set.claim(self.folder, plan)
            if not self._upload(PLAN_NAME):
                label_set.claim(self.folder, plan)  # another job was first: compare its plan

    def fetch_set(self, *, require_complete: bool) -> None:
        """Fetch the files of the set that the copy does not have.

        Raises LabelSetError if ``require_complete`` is set and the set has no manifest, or a file
        is not the one that the manifest lists.
        """
        with self._locked():
            self._fetch_set(require_complete=require_complete)

    def fetch(self, name: str) -> None:
        """Update a file of the copy.

        A file that only the copy has stays: its run ended before the upload. See ``is_missing``.
        """
        if name in self._remote and not self._is_current(name):
            self.refetch(name)

    def refetch(self, name: str) -> bool:
        """Fetch a file even if the copy has it; return False if there is none at the URL."""
        if name not in self._remote:
            return False
        with self._locked():
            # before the download: what is downloaded is this version or a later one
            self._remote[name] = object_store.info(within(self.url, name))
            self._download(name)
            self._write_stamps([name])
        return True

    def fetch_all(self) -> None:
        with self._locked():
            self._list_again()
            self._fetch_set(require_complete=False)

    def is_missing(self, name: str) -> bool:
        return name not in self._remote

    def upload(self, name: str, *, replace: bool = False, damaged: bool = False) -> bool:
        """Upload a file of the copy; return False if another one was uploaded first.

        Then that one replaces the file in the copy. ``damaged`` replaces the file that was last
        fetched: of two jobs that made it again the first one wins, as far as the object store can
        compare (see mealv2.storage.object_store.upload).
        """
        with self._locked():
            damaged_file = self._remote.get(name) if damaged else None
            return self._upload(name, replace=replace, damaged=damaged_file)

    def _list_again(self) -> None:
        """List the files at the URL, unless they were listed when the object was made."""
        if not self._is_listed:
            self._list()
        self._is_listed = False

    def _list(self) -> None:
        """List the files at the URL; fetch plan and manifest."""
        listed = object_store.listing(self.url)
        self._remote = {n: file for n, file in listed.items() if _FILES_OF_A_SET.fullmatch(n)}
        for name in (PLAN_NAME, MANIFEST_NAME):
            self._fetch_text(name)
        if PLAN_NAME not in self._remote:  # the set was removed: a plan is uploaded first
            for path in self.folder.iterdir():
                if _FILES_OF_A_SET.fullmatch(path.name):
                    path.unlink(missing_ok=True)

    def _fetch_set(self, *, require_complete: bool) -> None:
        sha256_of: dict[str, str] = {}
        if MANIFEST_NAME in self._remote:
            splits = read_manifest(self.folder)["roles"]
            sha256_of = {s["name"]: s["sha256"] for s in label_set.listed_shards(splits)}
        elif require_complete:
            reason = "is not finished" if self._remote else "holds no label set"
            raise LabelSetError(
                f"{shown(self.url)} {reason}; `mealv2 precompute` with it as --output makes one"
            )
        # readers of a set need the files that its manifest lists, status and repair those that are
        # at the URL now
        names = [
            name
            for name in self._remote
            if not self._is_current(name, sha256_of.get(name), trust_manifest=require_complete)
        ]
        self._make_room(names)
        with ThreadPoolExecutor(_NUM_FETCHERS, "mealv2-labels") as threads:
            list(threads.map(self._download, names))
        self._write_stamps(names)
        for name in names if require_complete else []:
            sha256 = sha256_of.get(name)
            if sha256 is not None and not self._is_current(name, sha256, trust_manifest=True):
                raise LabelSetError(
                    f"{shown(within(self.url, name))} is damaged: its SHA-256 is not the one in "
                    "the manifest; run the command that made the set again"
                )

    def _download(self, name: str) -> None:
        with atomic_file(self.folder / name) as temporary:
            object_store.fetch(within(self.url, name), temporary)

    def _upload(
        self, name: str, *, replace: bool = False, damaged: object_store.File | None = None
    ) -> bool:
        url = within(self.url, name)
        was_uploaded = object_store.upload(
            url, self.folder / name, replace=replace, damaged=damaged
        )
        if not was_uploaded:
            self._download(name)
        self._remote[name] = object_store.info(url)
        self._write_stamps([name])
        return was_uploaded

    def _is_current(
        self, name: str, sha256: str | None = None, *, trust_manifest: bool = False
    ) -> bool:
        """Return whether the copy has a file as it is at the URL, and as a manifest lists it.

        With ``trust_manifest`` the SHA-256 is enough.
        """
        path, file = self.folder / name, self._remote[name]
        if not path.is_file() or path.stat().st_size != file.size:
            return False
        if sha256 is not None:
            if file_sha256(path) != sha256:
                return False
            if trust_manifest:
                return True
        return self._stamps().get(name) == file.stamp  # another file may have the same size

    def _stamps(self) -> dict[str, str]:
        """Return the stamps of the remote files that were copied, by name."""
        try:
            stamps = read_json(self._sibling(STAMPS_PREFIX))
        except (OSError, ValueError):
            return {}
        return stamps if isinstance(stamps, dict) else {}

    def _write_stamps(self, names: Iterable[str]) -> None:
        stamps = {name: self._remote[name].stamp for name in names}
        if stamps:
            data = canonical_json(self._stamps() | stamps).encode()
            write_atomic(self._sibling(STAMPS_PREFIX), data)

    def _sibling(self, prefix: str) -> Path:
        return self.folder.with_name(f"{prefix}{self.folder.name}")

    def _locked(self) -> AbstractContextManager[None]:
        """Let one process of this computer at a time change the copy: ranks fetch it once."""
        return locked(self._sibling("changes-of-"))

    def _make_room(self, names: Iterable[str]) -> None:
        """Remove other copies if the cache is full; raises ConfigError if the set is too large."""
        total = sum(file.size for file in self._remote.values())
        if total > self._cache.limit:
            raise ConfigError(
                f"{shown(self.url)} has {total} bytes, more than --cache-size "
                f"{self._cache.limit}; give a larger --cache-size"
            )
        needed = sum(self._remote[name].size for name in names)
        self._cache.trim(needed)
        if needed:
            console.info(f"fetching {console.size_of(needed)} of labels from {shown(self.url)}")

    def _fetch_text(self, name: str) -> None:
        data = object_store.read(within(self.url, name)) if name in self._remote else None
        if data is None:
            self._remote.pop(name, None)
            (self.folder / name).unlink(missing_ok=True)
        else:
            write_atomic(self.folder / name, data)
