"""Label sets behind URLs: a copy in the cache that is read like any other, and what is new put
there.

Nothing is ever changed in place there, so that a copy is brought up to date by fetching files that
it lacks. A file is put there in one step, and the first one wins (mealv2.remote.put).
"""

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from mealv2 import label_set, remote
from mealv2.cache import NOTES_PREFIX, Cache, hold, locked
from mealv2.errors import ConfigError, LabelSetError
from mealv2.files import canonical_json, file_sha256, read_json, whole_file, write_whole
from mealv2.label_set import MANIFEST_NAME, PLAN_NAME, read_manifest
from mealv2.locations import Location, is_url, shown, within
from pipeline import copies, logs
from pipeline.config import Caching
from pipeline.sources import cache_of

_OURS = re.compile(r"(plan|manifest)\.json|(train|val)-[a-z0-9-]+\.h5")
_AT_ONCE = 8
_held: list[int] = []  # copies that this process reads are not removed before it ends


class Store(Protocol):
    """Where stage one puts a label set: ``place`` as a person calls it, files in ``folder``."""

    place: str
    folder: Path

    def claim(self, plan: dict[str, Any]) -> None:
        """Make the place that of a plan's label set; raises as label_set.claim."""

    def bring(self, name: str) -> None:
        """See that ``folder`` has a file as it is there."""

    def renew(self, name: str) -> bool:
        """Bring a file of ``folder`` that is not whole anew; return False where none is there."""

    def bring_all(self) -> None:
        """See that ``folder`` has all files as they are there."""

    def lacks(self, name: str) -> bool:
        """Return whether a file that ``folder`` has is not there."""

    def publish(self, name: str, *, replace: bool = False, damaged: bool = False) -> bool:
        """Put a file of ``folder`` there; return False where another one was first.

        That one takes its place in ``folder``. With ``damaged`` the one that was found there gives
        way, with ``replace`` any.
        """


class Folder:
    """A folder of this machine: what is written into it is there."""

    def __init__(self, folder: Path) -> None:
        self.place = str(folder)
        self.folder = folder

    def claim(self, plan: dict[str, Any]) -> None:
        """Make the folder that of a plan's label set."""
        label_set.claim(self.folder, plan)

    def bring(self, name: str) -> None:
        """Do nothing."""

    def renew(self, name: str) -> bool:
        """Return False: there is no other."""
        return False

    def bring_all(self) -> None:
        """Do nothing."""

    def lacks(self, name: str) -> bool:
        """Return False."""
        return False

    def publish(self, name: str, *, replace: bool = False, damaged: bool = False) -> bool:
        """Do nothing: it was published as it was written."""
        return True


def store_at(config: Caching, place: Location) -> Store:
    """Return where a label set is, or is to be, written. Raises RemoteError, ConfigError."""
    if is_url(place):
        return _mirror(config, str(place))
    return Folder(Path(place))


def folder_of(config: Caching, labels: Location, *, whole: bool = True) -> Path:
    """Return where a label set can be read: its folder, or a copy of what is at a URL.

    What is at a URL must be ``whole``, or is brought as it is. Raises LabelSetError where it is
    not, RemoteError, ConfigError.
    """
    if not is_url(labels):
        return Path(labels)
    mirror = _mirror(config, str(labels))
    mirror.bring_set(whole=whole)
    return mirror.folder


def _mirror(config: Caching, url: str) -> "Mirror":
    if re.match("pipe:|https?:", url):
        raise ConfigError(
            f"{shown(url)}: a label set is files in a folder, which a program or a web server "
            "does not list; give a folder or a bucket"
        )
    return Mirror(url, cache_of(config))


class Mirror:
    """The copy of a label set's folder at ``url``; ``folder`` is the copy."""

    def __init__(self, url: str, cache: Cache) -> None:
        self.url = url
        self.place = shown(url)
        self.folder = cache.path_of(url.rstrip("/"))
        self._cache = cache
        _held.append(hold(self.folder))
        copies.name_copy(self.folder, self.place.rstrip("/"))
        self._there: dict[str, remote.File] = {}
        with self._alone():
            self._refresh()
        self._is_new = True  # nothing was done yet since it was looked what is there

    def claim(self, plan: dict[str, Any]) -> None:
        """Make the place that of a plan's label set; raises as label_set.claim."""
        with self._alone():
            self._look_again()
            label_set.claim(self.folder, plan)
            if not self._put(PLAN_NAME):
                label_set.claim(self.folder, plan)  # another one was first: is it the same?

    def _look_again(self) -> None:
        """Look what is there now, but for the first time: that was just done."""
        if not self._is_new:
            self._refresh()
        self._is_new = False

    def _refresh(self) -> None:
        """Look what is there now, and bring plan and manifest."""
        listed = remote.listing(self.url)
        self._there = {name: file for name, file in listed.items() if _OURS.fullmatch(name)}
        for name in (PLAN_NAME, MANIFEST_NAME):
            self._bring_text(name)
        if PLAN_NAME not in self._there:  # a set that was removed, for plans are put there first
            for path in self.folder.iterdir():
                if _OURS.fullmatch(path.name):
                    path.unlink(missing_ok=True)

    def bring_set(self, *, whole: bool) -> None:
        """Bring the files of the set that the copy lacks.

        Raises LabelSetError where ``whole`` is wanted and the set is not finished, or a file is
        not the one that its manifest lists.
        """
        with self._alone():
            self._bring_set(whole=whole)

    def _bring_set(self, *, whole: bool) -> None:
        listed: dict[str, str] = {}
        if MANIFEST_NAME in self._there:
            roles = read_manifest(self.folder)["roles"].values()
            blocks = [block for role in roles for block in role.get("blocks", [role])]
            listed = {shard["name"]: shard["sha256"] for b in blocks for shard in b["shards"]}
        elif whole:
            what = "is not finished" if self._there else "holds no label set"
            raise LabelSetError(
                f"{shown(self.url)} {what}; `mealv2 precompute` with it as --out makes one"
            )
        # who reads a set wants what its manifest lists; who looks after it, what is there now
        wanted = [n for n in self._there if not self._has(n, listed.get(n), listed_is_enough=whole)]
        self._make_room(wanted)
        with ThreadPoolExecutor(_AT_ONCE, "mealv2-labels") as threads:
            list(threads.map(self._fetch, wanted))
        self._note(wanted)
        for name in wanted:
            has_listed = self._has(name, listed.get(name), listed_is_enough=True)
            if whole and name in listed and not has_listed:
                raise LabelSetError(
                    f"{shown(within(self.url, name))} is damaged: not the file that the manifest "
                    "lists (SHA-256); run the command that made the set again"
                )

    def bring(self, name: str) -> None:
        """See that the copy has a file as it is there, and none where none is.

        What only the copy has was made by a run that ended before it was put there: it is put
        there if it is asked for again, see ``publish``.
        """
        if name in self._there and not self._has(name):
            self.renew(name)

    def renew(self, name: str) -> bool:
        """Fetch a file whose copy is not whole, if it is there."""
        if name not in self._there:
            return False
        with self._alone():
            self._there[name] = remote.info(within(self.url, name))  # before: it is this or later
            self._fetch(name)
            self._note([name])
        return True

    def bring_all(self) -> None:
        """Look again what is there, and bring it."""
        with self._alone():
            self._look_again()
            self._bring_set(whole=False)

    def _fetch(self, name: str) -> None:
        with whole_file(self.folder / name) as temporary:
            remote.fetch(within(self.url, name), temporary)

    def publish(self, name: str, *, replace: bool = False, damaged: bool = False) -> bool:
        """Put a file of the copy there; return False where another one was first.

        That one takes its place in the copy. With ``damaged`` the one that was last brought gives
        way: of two jobs that made it anew the first one wins, as far as the store can compare (see
        mealv2.remote.put).
        """
        with self._alone():
            there = self._there.get(name) if damaged else None
            return self._put(name, replace=replace, damaged=there)

    def _put(self, name: str, *, replace: bool = False, damaged: remote.File | None = None) -> bool:
        url = within(self.url, name)
        is_put = remote.put(url, self.folder / name, replace=replace, damaged=damaged)
        if not is_put:
            self._fetch(name)
        self._there[name] = remote.info(url)
        self._note([name])
        return is_put

    def lacks(self, name: str) -> bool:
        """Return whether a file was not there when it was last looked."""
        return name not in self._there

    def _has(self, name: str, sha256: str | None = None, *, listed_is_enough: bool = False) -> bool:
        """Return whether the copy has a file as it is there, and as a manifest lists it."""
        path, file = self.folder / name, self._there[name]
        if not path.is_file() or path.stat().st_size != file.size:
            return False
        if sha256 is not None:
            if file_sha256(path) != sha256:
                return False
            if listed_is_enough:
                return True
        return self._notes().get(name) == file.stamp  # one of the same size may take its place

    def _notes(self) -> dict[str, str]:
        """Return the stamps of the files that the copies are of, by name."""
        try:
            notes = read_json(self._beside(NOTES_PREFIX))
        except (OSError, ValueError):
            return {}
        return notes if isinstance(notes, dict) else {}

    def _note(self, names: Iterable[str]) -> None:
        stamps = {name: self._there[name].stamp for name in names}
        if stamps:
            data = canonical_json(self._notes() | stamps).encode()
            write_whole(self._beside(NOTES_PREFIX), data)

    def _beside(self, prefix: str) -> Path:
        return self.folder.with_name(f"{prefix}{self.folder.name}")

    def _alone(self) -> AbstractContextManager[None]:
        """Let one process of this machine at a time change the copy: ranks fetch it once."""
        return locked(self._beside("changes-of-"))

    def _make_room(self, names: Iterable[str]) -> None:
        """Remove other copies where there is no room; raises ConfigError where it is too little."""
        total = sum(file.size for file in self._there.values())
        if total > self._cache.limit:
            raise ConfigError(
                f"{shown(self.url)} has {total} bytes, more than --cache-size "
                f"{self._cache.limit}; give more"
            )
        needed = sum(self._there[name].size for name in names)
        self._cache.trim(needed)
        if needed:
            logs.say(f"fetching {logs.size_of(needed)} of labels from {shown(self.url)}")

    def _bring_text(self, name: str) -> None:
        data = remote.read(within(self.url, name)) if name in self._there else None
        if data is None:
            self._there.pop(name, None)
            (self.folder / name).unlink(missing_ok=True)
        else:
            write_whole(self.folder / name, data)
