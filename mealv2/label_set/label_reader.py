"""Reads single blocks from many shards, with few files open."""

import os
import resource

from mealv2.label_set.shard_file import ShardFile

_MOST_OPEN = 1024


def most_open() -> int:
    """Return how many shards of a set may stay open: a part of what the process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return _MOST_OPEN
    return max(0, min(_MOST_OPEN, soft // 4 - 16))


class LabelReader:
    """Reads blocks of one shard after another; a context that closes the last one.

    Reads and does not map: pages of a mapped file count as the process's memory, and where blocks
    are picked at random these are in the end all.
    """

    def __init__(self) -> None:
        self._file: ShardFile | None = None
        self._handle = -1
        self._offset = 0

    def read(self, file: ShardFile, begin: int, size: int) -> bytes:
        """Return some bytes of the blocks, not checked; raises LabelSetError without the file."""
        if file is not self._file:
            self._open(file)
        if self._handle < 0:
            return bytes(file.labels[begin : begin + size])
        return os.pread(self._handle, size, self._offset + begin)

    def __enter__(self) -> "LabelReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _open(self, file: ShardFile) -> None:
        self._close()
        self._handle, self._offset = file.open_labels()
        self._file = file

    def _close(self) -> None:
        if self._file is not None and self._handle >= 0 and not self._file.stays_open:
            os.close(self._handle)
        self._file, self._handle = None, -1
