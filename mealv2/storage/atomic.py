"""Files that appear under their final name only when complete, and reads of parts of files."""

import contextlib
import errno
import hashlib
import os
import secrets
import socket
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

from mealv2.storage.regular_files import open_regular

Stamp = tuple[int, int, int]  # size, time and inode of a file

TEMPORARY_PREFIX = ".tmp-"
SCRIPTS_NAME = "slurm"  # folder of the job scripts, inside the folder that the jobs fill
# Before each retry of a rename or link. Some network shares lose the reply to an operation, and
# list a folder as it was some seconds ago.
_RETRY_DELAYS_S = (0.2, 0.8, 2.0, 5.0)
DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
_PERMANENT = DISK_FULL | {errno.EISDIR, errno.ENOTDIR, errno.EROFS, errno.ENAMETOOLONG}
_NO_LINKS = {errno.EPERM, errno.EACCES, errno.EINVAL, errno.EMLINK, errno.ENOSYS}
_NO_LINKS |= {errno.ENOTSUP, errno.EOPNOTSUPP}  # one number on Linux, two on macOS


def list_folder(folder: Path) -> list[str]:
    """Return the sorted names in a folder, without temporary files and job scripts."""
    names = sorted(path.name for path in folder.iterdir())
    return [n for n in names if not n.startswith(TEMPORARY_PREFIX) and n != SCRIPTS_NAME]


def file_sha256(path: Path) -> str:
    """Return the SHA-256 (hex) of a regular file's bytes; raises OSError."""
    with os.fdopen(open_regular(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(
    path: Path, data: bytes, *, replace: bool = True, damaged: Stamp | None = None
) -> bool:
    """Write a file atomically; return whether it got its final name.

    Writes a unique temporary file in the same folder, flushes, syncs and calls os.replace. With
    ``replace=False`` it calls os.link: the first file wins, and False means that one exists.
    ``damaged`` is the stamp of a file to replace; a file with another stamp stays. Raises OSError
    with ``path`` as the file name (disk full, no permission), and removes the temporary file.
    """
    temporary = new_temporary(path)
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if damaged is not None:
            _move_aside(path, damaged)
        if not _publish(temporary, path, replace=replace and damaged is None):
            return False
        _sync_folder(path.parent)
        return True
    except OSError as error:  # its file name is missing or the temporary one
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        if temporary.exists():  # unlink would raise where the parent is not a folder
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it becomes ``path`` at the end, or is removed on error.

    For files that do not fit in memory or that a library writes. Raises OSError.
    """
    temporary = new_temporary(path)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        _publish(temporary, path, replace=True)
        _sync_folder(path.parent)
    finally:
        if temporary.exists():  # unlink would raise where the parent is not a folder
            temporary.unlink(missing_ok=True)


def file_stamp(path: Path) -> Stamp | None:
    """Return size, time and inode of a file, which change when it is replaced, or None."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino


class File(Protocol):
    """A local or remote file that can be opened for reading."""

    def open(self) -> int:
        """Return a new file descriptor."""


class OpenFiles:
    """Reads parts of files by their number; each process keeps the ``most`` last used ones open.

    Any thread and any forked or spawned process may read. ``descriptor(number)`` returns an open
    file, whose ``fd`` is valid as long as the caller keeps the object; raises what the file's
    ``open`` raises.
    """

    def __init__(self, files: Sequence[File], *, most: int) -> None:
        self._files, self._most = list(files), most
        opened = self._files  # no reference to self: files close when the last reader drops them
        # pread has no position to share, and no lock is held while a file opens
        self.descriptor = lru_cache(maxsize=most)(lambda number: Descriptor(opened[number]))

    def read(self, number: int, size: int, offset: int) -> bytes:
        """Return up to ``size`` bytes, fewer at the end of the file; raises as ``descriptor``."""
        file = self.descriptor(number)
        return os.pread(file.fd, size, offset)

    def close(self) -> None:
        """Close all files, so that the next use opens them again."""
        self.descriptor.cache_clear()

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(OpenFiles, most=self._most), (self._files,)


class Descriptor:
    """An open file, closed when the last thread that reads it drops the object."""

    def __init__(self, file: File) -> None:
        self.fd = -1
        self.fd = file.open()

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if self.fd >= 0:  # at the interpreter's exit the module's names are gone
            close(self.fd)


def new_temporary(path: Path) -> Path:
    """Return a unique temporary path in the same folder; nothing is made."""
    unique = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    # a name has at most 255 bytes
    room = 255 - len(os.fsencode(f"{TEMPORARY_PREFIX}-{unique}"))
    name = os.fsencode(path.name)[: max(room, 0)].decode(errors="ignore")
    return path.with_name(f"{TEMPORARY_PREFIX}{name}-{unique}")


def _publish(temporary: Path, path: Path, *, replace: bool) -> bool:
    """Give a file its final name; return False if another file has it and must stay.

    After an error that a network share may have caused, checks whether the file is in place, waits
    and tries again. Raises OSError.
    """
    written, links = file_stamp(temporary), not replace
    pauses = iter(_RETRY_DELAYS_S)
    while True:
        try:
            (os.link if links else os.replace)(temporary, path)
            return True
        except OSError as error:
            existing = file_stamp(path)
            if existing is not None and existing == written:
                return True
            if links and (existing or error.errno == errno.EEXIST):
                return False
            # a share can invent inodes: compare size and time; the temporary file was renamed
            if existing and written and existing[:2] == written[:2] and not temporary.exists():
                return True
            if links and error.errno in _NO_LINKS:
                links = False  # a rename may replace an equal file
                continue
            pause = next(pauses, None)
            if pause is None or error.errno in _PERMANENT:
                raise
            time.sleep(pause)


def _move_aside(path: Path, damaged: Stamp) -> None:
    """Remove a damaged file, but not an intact file that replaced it.

    Another job may replace the file between the check and the rename, so the stamp is compared
    again after the rename. Raises OSError.
    """
    if file_stamp(path) != damaged:
        return
    if stat.S_ISDIR(path.lstat().st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    aside = new_temporary(path)
    with contextlib.suppress(FileNotFoundError):  # another job moved it
        path.rename(aside)
    if (found := file_stamp(aside)) is None:
        return
    if found[:2] != damaged[:2]:
        _publish(aside, path, replace=False)
    aside.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some network file systems cannot sync a folder
        return
    finally:
        os.close(handle)
