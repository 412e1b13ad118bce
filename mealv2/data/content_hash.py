"""The content hash of an image: 8 bytes that change when any byte of the encoded image does.

It finds accidents: a replaced, exchanged or damaged file. It is not cryptographic, so it does not
find a file that somebody built to have the same hash.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import xxhash

from mealv2.errors import DataError

ALGORITHM = "xxh3-64"  # XXH3 of 64 bits with seed 0
NOT_LABELLED = "it is not the picture that was labelled"  # begins the reason of such a bad image


def content_hash(data: bytes) -> int:
    """Return the content hash of an encoded image: XXH3-64 of its bytes, seed 0."""
    return xxhash.xxh3_64_intdigest(data)


def hash_text(value: int) -> str:
    """Return a content hash as JSON files have it: 16 hex digits."""
    return f"{value:016x}"


def parse_hash(text: object) -> int:
    """Return the content hash in a text of 16 hex digits; raises ValueError."""
    if not isinstance(text, str) or len(text) != 16 or not set(text) <= set("0123456789abcdef"):
        raise ValueError(f"{text!r} is not a content hash")
    return int(text, 16)


def content_line(key: str, value: int) -> bytes:
    """Return the line of an image in ``combined_sha256``: its key, a zero byte, its hash."""
    return f"{key}\0{hash_text(value)}\n".encode()


def combined_sha256(lines: Iterable[bytes]) -> str:
    """Return the SHA-256 (hex) of the sorted lines of images: one hash of a whole split."""
    digest = sha256()
    for line in sorted(lines):
        digest.update(line)
    return digest.hexdigest()


@dataclass(frozen=True)
class KnownHashes:
    """The content hashes of N images by position: ``hashes_N`` uint64, where ``is_known_N``."""

    hashes_N: np.ndarray
    is_known_N: np.ndarray

    @classmethod
    def none(cls, num_images: int) -> "KnownHashes":
        """Return the hashes of images of which none is known yet."""
        return cls(np.zeros(num_images, np.uint64), np.zeros(num_images, bool))

    def set(self, position: int, value: int) -> None:
        """Add the hash of an image."""
        self.hashes_N[position] = value
        self.is_known_N[position] = True

    @property
    def num_known(self) -> int:
        """The number of images whose hash is known."""
        return int(self.is_known_N.sum())

    def check(self, position: int, found: int) -> None:
        """Raise DataError for an image that has another content hash than ``found``."""
        known = int(self.hashes_N[position])
        if known != found and self.is_known_N[position]:
            was = f"its content hash is {hash_text(found)}, not {hash_text(known)}"
            raise DataError(f"{NOT_LABELLED}: {was}")


class ImageCheck:
    """Compares images with those that were labelled, at the first reading of each or ``always``.

    An image whose hash is unknown becomes known when it is read first.
    """

    def __init__(self, known: KnownHashes, *, always: bool = False) -> None:
        self._known = known
        self._is_due_N = np.ones(len(known.hashes_N), bool)  # threads clear single entries
        self._is_always = always

    def is_due(self, position: int) -> bool:
        """Return whether an image is to be compared at this reading."""
        return bool(self._is_due_N[position])

    def hash_of(self, position: int) -> int | None:
        """Return the content hash of an image, None if it is unknown."""
        known = self._known
        return int(known.hashes_N[position]) if known.is_known_N[position] else None

    def __call__(self, position: int, found: int) -> None:
        """Compare an image by its content hash; raises DataError for another image."""
        self._known.check(position, found)
        self._known.set(position, found)
        if not self._is_always:
            self._is_due_N[position] = False
