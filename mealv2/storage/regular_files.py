"""Open and read regular files only: a pipe could wait for ever, a device never ends."""

import errno
import os
import stat

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

# Of a file that is read at once, where no smaller size is known: a JSON index of 14 million images
# has about 1.4 GB.
MAX_BYTES = 1 << 32


def open_regular(path: str | os.PathLike[str], *, max_bytes: int | None = None) -> int:
    """Return a descriptor of a regular file, for reading; a link to one is followed.

    Raises OSError with its reason as ``strerror`` for a pipe, a device or a folder, and for a file
    of more than ``max_bytes``: nothing is read before.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe does not block
    try:
        require_regular(os.fstat(handle), path, max_bytes=max_bytes)
    except OSError:
        os.close(handle)
        raise
    return handle


def require_regular(
    found: os.stat_result, path: str | os.PathLike[str], *, max_bytes: int | None = None
) -> None:
    """Raise OSError, as ``open_regular`` does, for what ``os.stat`` found at a path."""
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "a special file")
        raise OSError(errno.EINVAL, f"it is {kind}, not a file", str(path))
    if max_bytes is not None and found.st_size > max_bytes:
        reason = f"it has {found.st_size} bytes, more than the {max_bytes} that it can have"
        raise OSError(errno.EFBIG, reason, str(path))


def read_regular(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> bytes:
    """Return the content of a regular file; raises OSError as ``open_regular``."""
    with os.fdopen(open_regular(path, max_bytes=max_bytes), "rb") as file:
        return file.read()
