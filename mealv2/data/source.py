"""The interface of image sources: keys, classes, sizes and encoded images; their fingerprint."""

from collections.abc import Callable, Container, Iterable, Sequence
from hashlib import sha256
from typing import Any, Protocol

from mealv2.data.left_out import LeftOut

UNLABELLED = -1  # the class id of an image without one
ClassNames = Callable[[], Sequence[str]]  # finds the class names of unlabelled images


class ImageSource(Protocol):
    """Images by position, in the source's own order: a key, a class and encoded bytes each."""

    @property
    def name(self) -> str:
        """The name in messages."""

    @property
    def split(self) -> str:
        """The part of the data set: ``train``, ``val``, …"""

    @property
    def keys(self) -> Sequence[str]:
        """The stable, unique text id of each image."""

    @property
    def labels(self) -> Sequence[int]:
        """The class id of each image, or ``UNLABELLED``."""

    @property
    def sizes(self) -> Sequence[int]:
        """The size in bytes of each encoded image, before it was packed if it is packed."""

    @property
    def stored_sizes(self) -> Sequence[int]:
        """The size in bytes of each encoded image as ``read`` returns it."""

    @property
    def shard_starts(self) -> Sequence[int] | None:
        """The position of each tar file's first image; None if every image has its own file."""

    @property
    def groups(self) -> Sequence[int] | None:
        """The first position of each group of images to read together; None if order is free."""

    def announce(self, groups: Sequence[int]) -> None:
        """Receive the numbers of the groups that will be read, in order of first use."""

    @property
    def classes(self) -> list[str]:
        """The class names, by class id."""

    @property
    def left_out(self) -> LeftOut:
        """The files that are not images of the source, and remarks on those that are."""

    def __len__(self) -> int: ...

    def read(self, position: int) -> bytes:
        """Return the encoded image at ``position``; raises OSError, DataError, RemoteError.

        Bytes of which an index has the content hash are compared with it: DataError if they differ.
        """

    def original_hash(self, position: int, data: bytes) -> int:
        """Return the content hash of an image before it was packed.

        ``data`` is what ``read`` returned, the image itself unless it is packed.
        """


def is_unlabelled(source: ImageSource) -> bool:
    """Return whether no image of a source has a class."""
    return all(label == UNLABELLED for label in source.labels)


def multi_labels_of(source: ImageSource) -> Sequence[Sequence[int]] | None:
    """Return 1, 0 (ignored) or -1 of each class for every image; None if images have one class.

    A source of images with several classes has them as ``multi_labels``; its ``labels`` are then
    the first class present in each image.
    """
    found: Sequence[Sequence[int]] | None = getattr(source, "multi_labels", None)
    return found


def _supervision_of(source: ImageSource) -> Iterable[Any]:
    """Return what the fingerprint has of each image's labels: a class id, classes, or objects.

    A source of images with objects has those as ``objects``.
    """
    found = multi_labels_of(source) or getattr(source, "objects", None)
    return source.labels if found is None else map(tuple, found)


def where_is(source: ImageSource, position: int) -> str:
    """Return where an image is, for messages: its path if it has one, else its source and key."""
    where = getattr(source, "where", None)
    if where is not None:
        return str(where(position))
    return "/".join(filter(None, (source.name, source.keys[position])))


def fingerprint(source: ImageSource, *, only: Container[str] | None = None) -> str:
    """Return the fingerprint of a source's images, or of those whose keys are in ``only``."""
    images = zip(_supervision_of(source), source.keys, source.sizes, strict=True)
    return fingerprint_of(source.classes, (i for i in images if only is None or i[1] in only))


def fingerprint_of(classes: Iterable[str], images: Iterable[tuple[Any, str, int]]) -> str:
    """Return a SHA-256 (hex) over class names and sorted (class id, key, file size) of images."""
    digest = sha256()
    for name in classes:
        digest.update(f"class\0{name}\n".encode())
    for label, key, size in sorted(images):
        digest.update(f"{key}\0{size}\0{label}\n".encode())
    return digest.hexdigest()
