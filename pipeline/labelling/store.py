"""Where a label set is stored: in a folder, or at a URL with a copy in the cache.

Files at a URL never change in place, so fetching missing files updates a copy. Of two uploads of a
file the first one wins (mealv2.storage.object_store.upload).
"""

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from mealv2 import label_set
from mealv2.errors import ConfigError, LabelSetError
from mealv2.label_set import MANIFEST_NAME, PLAN_NAME, WebSet, is_web, read_manifest
from mealv2.labelling.store import Store
from mealv2.storage import object_store
from mealv2.storage.atomic import atomic_file, file_sha256, write_atomic
from mealv2.storage.cache import STAMPS_PREFIX, Cache, hold, locked
from mealv2.storage.json_format import canonical_json, read_json
from mealv2.storage.transfer import File
from mealv2.storage.urls import PIPE, Location, is_url, shown, within
from mealv2.text import set_display_name
from pipeline import console
from pipeline.config import CacheConfig
from pipeline.loading.sources import cache_of

_FILES_OF_A_SET = re.compile(r"(plan|manifest)\.json|(train|val)-[a-z0-9-]+\.h5")
# hf://USER/NAME is a data set of the Hub, as `mealv2 push` makes; fsspec takes it for a model
_HUB_NAME = re.compile(r"hf://(?!(?:datasets|models|spaces|buckets)/)")
_NUM_FETCHERS = 8  # threads that fetch files
_open_copies: list[int] = []  # locks: copies that this process reads are kept until it ends
_open_web_sets: list[WebSet] = []  # for the same reason


def open_store(config: CacheConfig, location: Location) -> Store:
    """Return the store for the label set at a location. Raises RemoteError, ConfigError."""
    if not is_url(location):
        return Store(Path(location))
    location = _HUB_NAME.sub("hf://datasets/", str(location))
    if is_web(location):
        raise ConfigError(
            f"{shown(location)}: a web server takes no files, a label set there is only read; give "
            "a folder or a bucket"
        )
    if location.startswith(PIPE):
        raise ConfigError(
            f"{shown(location)}: a program has no label set; give a folder, a bucket or the URL of "
            "a web server"
        )
    return RemoteStore(str(location), cache_of(config))


def local_folder(
    config: CacheConfig,
    labels: Location,
    *,
    require_complete: bool = True,
    whole_files: bool = False,
) -> Path:
    """Return the folder to read a label set from: its own, or a copy of the files at a URL.

    From a web server, the copy has the index, and LabelSet reads the blocks that it needs;
    ``whole_files`` fetches them all. Raises RemoteError, ConfigError, and LabelSetError as
    ``Store.fetch_all``.
    """
    if is_web(labels):
        web_set = WebSet(str(labels), cache_of(config))
        _open_web_sets.append(web_set)
        if web_set.num_fetched:
            shards = console.count(web_set.num_fetched, "shard")
            console.info(f"fetched the index of {shards} from {shown(labels)}")
        if whole_files:
            web_set.fetch_all()
        return web_set.folder
    store = open_store(config, labels)
    store.fetch_all(require_complete=require_complete)
    return store.folder


class RemoteStore(Store):
    """A label set at ``url``; ``folder`` is its copy in the cache."""

    keeps_temporary_files = False  # the cache removes those of its copies

    def __init__(self, url: str, cache: Cache) -> None:
        self.url = url
        super().__init__(cache.path_of(url.rstrip("/")))
        self.location = shown(url)
        self._cache = cache
        _open_copies.append(hold(self.folder))
        set_display_name(self.folder, self.location.rstrip("/"))
        self._remote: dict[str, File] = {}
        with self._locked():
            self._list()
        self._is_listed = True  # the first operation needs no new listing

    def claim(self, plan: dict[str, Any]) -> None:
        with self._locked():
            self._list_again()
            label_set.claim(self.folder, plan)
            if not self._upload(PLAN_NAME):
                label_set.claim(self.folder, plan)  # another job was first: compare its plan

    def fetch(self, name: str) -> None:
        # a file that only the copy has stays: its run ended before the upload
        if name in self._remote and not self._is_current(name):
            self.refetch(name)

    def refetch(self, name: str) -> bool:
        if name not in self._remote:
            return False
        with self._locked():
            # before the download: what is downloaded is this version or a later one
            self._remote[name] = object_store.info(within(self.url, name))
            self._download(name)
            self._write_stamps([name])
        return True

    def fetch_all(self, *, require_complete: bool = False) -> None:
        with self._locked():
            self._list_again()
            self._fetch_all(require_complete=require_complete)

    def is_missing(self, name: str) -> bool:
        return name not in self._remote

    def upload(self, name: str, *, replace: bool = False, damaged: bool = False) -> bool:
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
            data = object_store.read(within(self.url, name)) if name in self._remote else None
            if data is None:
                self._remote.pop(name, None)
                (self.folder / name).unlink(missing_ok=True)
            else:
                write_atomic(self.folder / name, data)
        if PLAN_NAME not in self._remote:  # the set was removed: a plan is uploaded first
            for path in self.folder.iterdir():
                if _FILES_OF_A_SET.fullmatch(path.name):
                    path.unlink(missing_ok=True)

    def _fetch_all(self, *, require_complete: bool) -> None:
        sha256_of: dict[str, str] = {}
        if MANIFEST_NAME in self._remote:
            splits = read_manifest(self.folder)["roles"]
            sha256_of = {s["name"]: s["sha256"] for s in label_set.listed_shards(splits)}
        elif require_complete:
            reason = "is not finished" if self._remote else "has no label set"
            raise LabelSetError(
                f"{shown(self.url)} {reason}; run `mealv2 precompute` with this URL as --output"
            )
        # readers need the files in the manifest, status and repair the files at the URL now
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

    def _upload(self, name: str, *, replace: bool = False, damaged: File | None = None) -> bool:
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
        """Return whether a file of the copy is the one at the URL, and has the given SHA-256.

        With ``trust_manifest`` the size and the SHA-256 are enough.
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
        """Return the stamps of the copied files at the URL, by name."""
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
        """Let one process at a time change the copy, so that ranks fetch it once."""
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
