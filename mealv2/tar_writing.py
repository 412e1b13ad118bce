"""Writing a tar file of images: equal images give equal bytes, on any machine and in any year."""

import re
import tarfile
import zlib
from array import array
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b, sha256
from pathlib import PurePosixPath
from typing import BinaryIO

from mealv2.images import EXTENSIONS, extension_of
from mealv2.tar_headers import BLOCK
from mealv2.tar_index import ShardIndex, TarIndex

_RECORD = 20 * BLOCK  # what tar files are a multiple of
_META = re.compile(r"__[^/]*__(/|$)")


class TarWriter:
    """Writes samples one after another; at the end it knows the index of the file."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._digest = sha256()
        self._end = 0
        self._images = ShardIndex(
            [],
            *(array(kind) for kind in "qqqqIq"),  # as its fields are declared
        )

    def add(self, name: str, key: str, class_id: int, image: bytes, *, original_size: int) -> None:
        """Write a sample: its class, its key, then the image.

        In this order, so that what is before the image is all that the index says of it.
        """
        head = b"".join(
            [
                _member(f"{name}.cls", str(class_id).encode()),
                _member(f"{name}.key", key.encode()),
                _header(f"{name}.{_extension(key, image)}", len(image)),
            ]
        )
        index = self._images
        index.keys.append(key)
        index.labels.append(class_id)
        index.sizes.append(len(image))
        index.offsets.append(self._end + len(head))
        index.head_sizes.append(len(head))
        index.head_crc32s.append(zlib.crc32(head))
        index.original_sizes.append(original_size)
        for part in (head, image, _padding(len(image), BLOCK)):
            self._write(part)

    def finish(self) -> TarIndex:
        """Write tar's mark of the end; return the index."""
        self._write(bytes(2 * BLOCK))
        self._write(_padding(self._end, _RECORD))
        return TarIndex(self._images, self._end, self._digest.hexdigest())

    def _write(self, data: bytes) -> None:
        self._stream.write(data)
        self._digest.update(data)
        self._end += len(data)


def pack_order(keys: Sequence[str]) -> list[int]:
    """Return the positions of keys sorted by a hash: mixed, and the same whatever their order."""
    hashes = [blake2b(key.encode(), digest_size=8).digest() for key in keys]
    return sorted(range(len(keys)), key=hashes.__getitem__)


def sample_names(keys: Sequence[str]) -> list[str]:
    """Return the names of the samples of a tar file: the keys without extension.

    A sample's name ends at the first dot, and two samples may not have the same one: where that
    would not be so, a hash of the key makes the name.
    """
    stems = [PurePosixPath(key).with_suffix("").as_posix() for key in keys]
    uses = Counter(stems)
    return [
        stem if uses[stem] == 1 and _is_name(stem) else _hashed(stem, key)
        for stem, key in zip(stems, keys, strict=True)
    ]


def _is_name(stem: str) -> bool:
    return "." not in stem.rpartition("/")[2] and not _META.match(stem)


def _hashed(stem: str, key: str) -> str:
    name = stem.replace(".", "-").replace("__", "--")
    return f"{name}-{blake2b(key.encode(), digest_size=8).hexdigest()}"


def _extension(key: str, image: bytes) -> str:
    """Return the extension of an image's member: the key's own, as WebDataset's users write it."""
    suffix = PurePosixPath(key).suffix.lower()
    suffix = suffix[1:] if suffix in EXTENSIONS else extension_of(image)
    return "jpg" if suffix == "jpeg" else suffix


def _member(name: str, data: bytes) -> bytes:
    return _header(name, len(data)) + data + _padding(len(data), BLOCK)


def _header(name: str, size: int) -> bytes:
    """Return the header of a file of nobody's and of no time, in GNU's format."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict")


def _padding(size: int, to: int) -> bytes:
    return bytes(-size % to)
