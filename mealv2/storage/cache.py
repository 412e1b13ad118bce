"""A folder with copies of remote files and a size limit; removes the least recently used first."""

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

from mealv2.errors import ConfigError
from mealv2.storage.atomic import TEMPORARY_PREFIX, atomic_file
from mealv2.storage.urls import PIPE, shown, without_secrets

DEFAULT_LIMIT = 100 * 10**9  # bytes
_LOCK_PREFIX = ".lock-"
STAMPS_PREFIX = ".notes-"  # of files with the stamps of the remote files that were copied
_OLD_NS = 86_400 * 10**9  # older temporary files are left over from processes that were killed
_PLAIN = re.compile(r"[A-Za-z0-9_.,=@+-]+")


class Cache:
    """Copies of remote files, in a folder that the processes of a machine share.

    Each file is fetched once. When a new file would exceed ``limit`` bytes, the files used longest
    ago are removed, also open ones: an open file stays readable.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit

    def path_of(self, url: str, *, version: str = "") -> Path:
        """Return the path of the copy of a URL, with readable names and one path a ``version``.

        Another password or signature gives the same path.
        """
        url = without_secrets(url)
        if url.startswith(PIPE):
            return self.folder / "pipe" / _digest(url)
        parts = urlsplit(url)
        names = [parts.scheme, parts.netloc.rpartition("@")[2], *parts.path.split("/")]
        safe = [name if _is_plain(name) else _digest(name) for name in names if name]
        for hint in filter(None, (parts.query, version)):
            safe[-1] = f"{_digest(hint)}-{safe[-1]}"
        return self.folder.joinpath(*safe)

    def open(
        self, url: str, fetch: Callable[[Path], None], *, size: int = 0, version: str = ""
    ) -> int:
        """Return a descriptor of the copy of a URL; ``fetch`` writes a missing copy to a path.

        Raises the errors of ``fetch``, and ConfigError if ``size`` exceeds the limit.
        """
        path = self.path_of(url, version=version)
        while True:
            with contextlib.suppress(FileNotFoundError):
                handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                if os.fstat(handle).st_size == size or not size:
                    os.utime(handle)
                    return handle
                os.close(handle)
                path.unlink(missing_ok=True)  # a copy of another version
            self.make(url, fetch, size=size, version=version)

    def make(
        self, url: str, fetch: Callable[[Path], None], *, size: int = 0, version: str = ""
    ) -> None:
        """Fetch the copy of a URL if it is missing; raises as ``open``."""
        if size > self.limit:
            raise ConfigError(
                f"{shown(url)} has {size} bytes, more than --cache-size {self.limit}; increase it"
            )
        path = self.path_of(url, version=version)
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path):
            if not path.exists():
                self.trim(size)
                with atomic_file(path) as temporary:
                    fetch(temporary)
        self.trim(0, keep=path)

    def trim(self, needed: int, *, keep: Path | None = None) -> int:
        """Remove the files used longest ago until ``needed`` more bytes fit.

        Returns the bytes of the files that are left, with ``needed``: holes in files have none.
        """
        files = []
        for where, _, names in os.walk(self.folder):
            for name in names:
                if name.startswith((_LOCK_PREFIX, STAMPS_PREFIX)):
                    continue
                path = Path(where, name)
                with contextlib.suppress(FileNotFoundError):
                    found = path.stat()
                    num_bytes = min(found.st_size, 512 * found.st_blocks)
                    files.append((found.st_mtime_ns, num_bytes, path))
        total = needed + sum(size for _, size, _ in files)
        written_since_ns = time.time_ns() - _OLD_NS
        for time_ns, size, path in sorted(files):
            if total <= self.limit:
                break
            is_written = path.name.startswith(TEMPORARY_PREFIX) and time_ns > written_since_ns
            if path == keep or is_written or in_use(path.parent):
                continue
            path.unlink(missing_ok=True)
            total -= size
        return total


def default_cache() -> Cache:
    """Return the user's cache, of the default size of the command line."""
    return Cache(Path.home() / ".cache" / "mealv2", DEFAULT_LIMIT)


def hold(folder: Path) -> int:
    """Mark a folder as in use until the returned descriptor is closed or the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(_lock_of(folder), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    with contextlib.suppress(OSError):  # a share without locks
        fcntl.flock(handle, fcntl.LOCK_SH)
    return handle


def in_use(folder: Path) -> bool:
    """Return whether a process has marked a folder with ``hold``."""
    try:
        handle = os.open(_lock_of(folder), os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a path, across threads and processes."""
    handle = os.open(_lock_of(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        with contextlib.suppress(OSError):  # without locks a file may be fetched twice
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _lock_of(path: Path) -> Path:
    return path.with_name(f"{_LOCK_PREFIX}{path.name}")


def _is_plain(name: str) -> bool:
    return _PLAIN.fullmatch(name) is not None and name[0] != "." and len(name) < 128


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:24]
