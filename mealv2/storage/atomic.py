"""Files that are whole under their final name or not there, and files that are read in parts."""

import contextlib
import errno
import hashlib
import os
import secrets
import socket
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

Stamp = tuple[int, int, int]  # size, time and inode of a file

TEMPORARY_PREFIX = ".tmp-"
SCRIPTS_NAME = "slurm"  # batch jobs keep their scripts there, in the folder that they fill
# Between tries to put a file in place. Some network shares lose the reply to what they did, and
# show a folder as it was some seconds ago.
_RETRY_DELAYS_S = (0.2, 0.8, 2.0, 5.0)
DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
_PERMANENT = DISK_FULL | {
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EROFS,
    errno.ENAMETOOLONG,
}  # the same again
_LINKS_UNSUPPORTED = {
    errno.EPERM,
    errno.EACCES,
    errno.EINVAL,
    errno.EMLINK,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
}


def list_folder(folder: Path) -> list[str]:
    """Return the names in a folder, but for temporary files and the scripts that fill it."""
    names = sorted(path.name for path in folder.iterdir())
    return [n for n in names if not n.startswith(TEMPORARY_PREFIX) and n != SCRIPTS_NAME]


def file_sha256(path: Path) -> str:
    """Return the SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(
    path: Path, data: bytes, *, replace: bool = True, damaged: Stamp | None = None
) -> bool:
    """Write a file so that no reader ever sees a part of it; return whether it was put in place.

    A unique temporary file in the same folder, flush, fsync, then os.replace; with
    ``replace=False`` a hard link instead, so that the first whole file wins and False says another
    was there. ``damaged`` is the stamp of a file that is to give way, if it is still that one; any
    other stays. Raises OSError (disk full, no permission), which names ``path``, and leaves nothing
    behind.
    """
    temporary = _temporary(path)
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
    except OSError as error:  # a full disk names no file, a failed rename the temporary one
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        _unlink(temporary)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to; it becomes ``path`` at the end, or is removed.

    For what is too large for the memory, or written by a library. Raises as write_atomic.
    """
    temporary = _temporary(path)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        _publish(temporary, path, replace=True)
        _sync_folder(path.parent)
    finally:
        _unlink(temporary)


def file_stamp(path: Path) -> Stamp | None:
    """Return what tells a file from one that takes its place; None where there is none."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino


class File(Protocol):
    """What can be opened to be read, wherever it lies."""

    def open(self) -> int:
        """Return a new descriptor of the file."""


class OpenFiles:
    """Reads parts of some files by their number, at most ``most`` of them open in each process.

    Any thread, and any forked or spawned process, may read.
    """

    def __init__(self, files: Sequence[File], *, most: int) -> None:
        self._files = list(files)
        self._most = most
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[int, _Descriptor] = OrderedDict()
        self._pid = os.getpid()

    def read(self, number: int, size: int, offset: int) -> bytes:
        """Return up to ``size`` bytes, fewer at the end; raises what the file's ``open`` does."""
        if self._pid != os.getpid():  # a fork: a lock may be held there by nobody
            self._start()
        with self._lock:
            file = self._open.get(number)
            if file is not None:
                self._open.move_to_end(number)
        if file is None:
            file = _Descriptor(self._files[number])  # others read on while it is fetched
            with self._lock:
                file = self._open.setdefault(number, file)
                if len(self._open) > self._most:
                    self._open.popitem(last=False)
        return os.pread(file.fd, size, offset)

    def __getstate__(self) -> tuple[list[File], int]:
        return self._files, self._most

    def __setstate__(self, state: tuple[list[File], int]) -> None:
        self._files, self._most = state
        self._start()


class _Descriptor:
    """An open file, closed when the last thread that reads it lets it go."""

    def __init__(self, file: File) -> None:
        self.fd = -1
        self.fd = file.open()

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


def _temporary(path: Path) -> Path:
    unique = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    return path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{unique}")


def _unlink(temporary: Path) -> None:
    if temporary.exists():
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def _publish(temporary: Path, path: Path, *, replace: bool) -> bool:
    """Give a file its final name; return False where another file has it and is to keep it.

    An error of a share that lost its reply, or that will not last, is not one: it looks whether the
    file is in place, waits and tries again. Raises OSError.
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
            # a share can make up inodes; its temporary file went nowhere else
            if existing and written and existing[:2] == written[:2] and not temporary.exists():
                return True
            if links and error.errno in _LINKS_UNSUPPORTED:
                links = False  # a rename, which may replace an equal file
                continue
            pause = next(pauses, None)
            if pause is None or error.errno in _PERMANENT:
                raise
            time.sleep(pause)


def _move_aside(path: Path, damaged: Stamp) -> None:
    """Remove a damaged file, and no whole one that another job put in its place meanwhile.

    It is looked at again after it was moved aside, for between a look and a rename, or in a rename
    that a network held up, another job may have been at it. Raises OSError.
    """
    if file_stamp(path) != damaged:
        return
    if stat.S_ISDIR(path.lstat().st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    aside = _temporary(path)
    with contextlib.suppress(FileNotFoundError):  # another job was first
        path.rename(aside)
    if (found := file_stamp(aside)) is None:
        return
    if found[:2] != damaged[:2]:
        _publish(aside, path, replace=False)
    with contextlib.suppress(FileNotFoundError):
        aside.unlink()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some network file systems cannot sync a folder
        return
    finally:
        os.close(handle)
