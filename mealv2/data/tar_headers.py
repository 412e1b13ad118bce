"""The members of a tar file, found by its headers alone: ustar, GNU long names, pax records.

The standard library's tarfile takes several times as long, and reads a file that is truncated
between two members as a shorter archive.
"""

import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

from mealv2.errors import DataError

BLOCK = 512
_ZEROS = bytes(BLOCK)
_WINDOW = 4096  # read at once: the headers and small members between two images
_MAX_RECORD_SIZE = 1 << 20  # of a long name or pax header; real ones have some hundred bytes
_ADLER = 65521
_REGULAR = b"0\0" + b"7"
_KINDS = {b"1": "a hard link", b"2": "a symbolic link", b"S": "a sparse file"}


class Member(NamedTuple):
    """A regular file in a tar file: name, offset and size of its bytes, CRC-32 of its header."""

    name: str
    offset: int
    size: int
    header_crc32: int


class Archive:
    """A context manager: a tar file open for one pass over its headers.

    Raises OSError, and DataError, with file and byte, for a file that is not a complete tar file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        status = os.fstat(self._fd)
        self._size = status.st_size
        self._window, self._start = b"", 0
        if not stat.S_ISREG(status.st_mode):
            os.close(self._fd)
            raise DataError(f"{path} is not a tar file: it is not a regular file")

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes of the file, from the window of the last read if possible."""
        begin = offset - self._start
        if begin < 0 or begin + size > len(self._window):
            if offset + size > self._size:
                self._error(offset, "it is truncated")
            self._window = os.pread(self._fd, max(size, _WINDOW), offset)
            self._start, begin = offset, 0
            if len(self._window) < size:
                self._error(offset, "it was truncated while it was read")
        return self._window[begin : begin + size]

    def members(self) -> Iterator[Member]:
        """Yield the regular files in file order; folders are skipped.

        Links, sparse files and devices are errors. So is a missing end mark: the file may be
        truncated between two members.
        """
        offset = 0
        long_name: bytes | None = None
        pax: dict[bytes, bytes] = {}
        while (header := self.read(offset, BLOCK)) != _ZEROS:
            self._check_header(header, offset)
            kind, size = header[156:157], self._number(header[124:136], offset)
            data = offset + BLOCK
            if kind in b"LKxXg":
                if size > _MAX_RECORD_SIZE:
                    self._error(data, f"a name or record of {size} bytes")
                record = self.read(data, size)
                if kind == b"L":
                    long_name = record.partition(b"\0")[0]
                elif kind == b"g":
                    if {b"path", b"size"} & self._pax(record, offset).keys():
                        self._error(offset, "a pax header gives all members one name or size")
                elif kind != b"K":
                    pax = self._pax(record, offset)
                offset = data + size + -size % BLOCK
                continue
            size = self._number(pax[b"size"], offset, base=10) if b"size" in pax else size
            name = pax.get(b"path", _plain_name(header) if long_name is None else long_name)
            if kind == b"5" or (kind == b"\0" and name.endswith(b"/")):
                size = 0
            elif kind not in _REGULAR:
                what = _KINDS.get(kind, f"of the kind {kind!r}")
                self._error(
                    offset, f"{_shown(name)} is {what}; only files can be read", damaged=False
                )
            elif data + size > self._size:
                self._error(offset, f"it is truncated within {_shown(name)}")
            else:
                yield Member(self._text(name, offset), data, size, zlib.crc32(header))
            long_name, pax = None, {}
            offset = data + size + -size % BLOCK
        if long_name is not None or pax:
            self._error(offset, "a long name has no file")
        self._check_end(offset)

    def _check_header(self, header: bytes, offset: int) -> None:
        """Compare a header with its checksum: the sum of its bytes, with spaces in the field."""
        stored = self._number(header[148:156], offset)
        others = header[:148] + b"        " + header[156:]
        # Adler-32's lower half is 1 + the sum modulo 65521, forty times as fast as sum()
        if ((zlib.adler32(others) & 0xFFFF) - 1 - stored) % _ADLER:
            signed = sum(byte - 256 if byte > 127 else byte for byte in others)
            if signed != stored:  # some old programs add signed bytes
                self._error(offset, self._describe_block(offset, header))

    def _describe_block(self, offset: int, header: bytes) -> str:
        packed = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
        if offset == 0 and header.startswith(packed):
            return "it is compressed; unpack it to a plain .tar"
        return "there is no header of a member"

    def _number(self, field: bytes, offset: int, *, base: int = 8) -> int:
        """Parse octal digits, or GNU's binary number after a byte 0x80."""
        if base == 8 and field[0] == 0x80:
            return int.from_bytes(field[1:], "big")
        digits = field.partition(b"\0")[0].strip(b" ") or b"0"
        try:
            return int(digits if digits.isdigit() and len(digits) < 24 else b"?", base)
        except ValueError:
            self._error(offset, self._describe_block(offset, self._window[:6]))

    def _pax(self, record: bytes, offset: int) -> dict[bytes, bytes]:
        """Parse pax records, each ``LENGTH KEY=VALUE`` and a newline."""
        found: dict[bytes, bytes] = {}
        at = 0
        while at < len(record) and record[at]:
            digits = record[at : at + 8].partition(b" ")[0]
            length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
            line = record[at : at + length]
            key, equals, value = line[len(digits) + 1 : -1].partition(b"=")
            if not (key and equals and len(line) == length and line.endswith(b"\n")):
                self._error(offset, "a damaged pax record")
            if key.startswith(b"GNU.sparse."):
                self._error(offset, "a sparse file; only complete files can be read", damaged=False)
            found[key] = value
            at += length
        return found

    def _text(self, name: bytes, offset: int) -> str:
        try:
            text = name.decode("utf-8")
        except UnicodeDecodeError:
            text = ""
        if not text or "\0" in text:
            self._error(offset, f"the name {name[:80]!r} is not UTF-8 text", damaged=False)
        return text

    def _check_end(self, offset: int) -> None:
        """Raise for data after the end mark, which most readers would skip."""
        while offset < self._size:
            rest = os.pread(self._fd, 1 << 16, offset)
            if not rest:
                return
            if rest.strip(b"\0"):
                self._error(offset, "data after the end; tar files cannot be joined with cat")
            offset += len(rest)

    def _error(self, offset: int, what: str, *, damaged: bool = True) -> NoReturn:
        state = "is damaged" if damaged else "cannot be read"
        advice = "; copy or create it again" if damaged else ""
        raise DataError(f"tar file {self.path} {state} at byte {offset}: {what}{advice}")


def _plain_name(header: bytes) -> bytes:
    """Return the name in a header; ustar has a field for its folders."""
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        return header[345:500].partition(b"\0")[0] + b"/" + name
    return name


def _shown(name: bytes) -> str:
    return name[:200].decode("utf-8", "backslashreplace")
