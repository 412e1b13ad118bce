"""What an image source is: keys, classes, sizes and encoded images, and their fingerprint."""

from collections.abc import Container, Iterable, Sequence
from hashlib import sha256
from typing import Protocol

# torchvision: the file names that ImageFolder takes for images
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

# How files of the formats begin.
_STARTS = {
    b"\xff\xd8": "jpg",
    b"\x89PNG": "png",
    b"BM": "bmp",
    b"II*\0": "tif",
    b"MM\0*": "tif",
    b"P5": "pgm",
    b"P6": "ppm",
}


class ImageSource(Protocol):
    """Images by position: a key, a class and encoded bytes each, in an order of the source's."""

    @property
    def name(self) -> str:
        """What to call the source in messages."""

    @property
    def split(self) -> str:
        """Which part of the data set it is."""

    @property
    def keys(self) -> Sequence[str]:
        """The stable text id of each image, unique, in the source's order."""

    @property
    def labels(self) -> Sequence[int]:
        """The class id of each image."""

    @property
    def sizes(self) -> Sequence[int]:
        """The size in bytes of each encoded image, before it was packed if it was."""

    @property
    def stored_sizes(self) -> Sequence[int]:
        """The size in bytes of each encoded image as ``read`` returns it."""

    @property
    def shard_starts(self) -> Sequence[int] | None:
        """The position of the first image of each file of many, None where each has its own."""

    @property
    def groups(self) -> Sequence[int] | None:
        """The position at which each group of images begins that should be read together.

        None where any order costs the same.
        """

    def announce(self, groups: Sequence[int]) -> None:
        """Take note of the groups that will be read, by number, in the order of their first use."""

    @property
    def classes(self) -> list[str]:
        """The class names, by class id."""

    def __len__(self) -> int: ...

    def read(self, position: int) -> bytes:
        """Return the encoded image at ``position``; raises OSError where it cannot be read."""


def fingerprint(source: ImageSource, *, only: Container[str] | None = None) -> str:
    """Return the fingerprint of a source's images; ``only`` leaves out keys that it lacks."""
    images = zip(source.labels, source.keys, source.sizes, strict=True)
    return fingerprint_of(source.classes, (i for i in images if only is None or i[1] in only))


def fingerprint_of(classes: Iterable[str], images: Iterable[tuple[int, str, int]]) -> str:
    """Return a SHA-256 (hex) over the class names and (class, key, bytes of the file) of images.

    In the order of these, so that a set of images has one fingerprint, whatever its order.
    """
    digest = sha256()
    for name in classes:
        digest.update(f"class\0{name}\n".encode())
    for label, key, size in sorted(images):
        digest.update(f"{key}\0{size}\0{label}\n".encode())
    return digest.hexdigest()


def extension_of(data: bytes) -> str:
    """Return the extension, without a dot, that an encoded image goes by; ``jpg`` if unknown."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((name for start, name in _STARTS.items() if data.startswith(start)), "jpg")
