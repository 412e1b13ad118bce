"""Unlabelled pictures: a folder of them or of tar files, and a labelled source joined with some."""

import os
import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, chain
from pathlib import Path

from mealv2.data.folder import UnorderedSource, check_unique, key_of
from mealv2.data.image_files import EXTENSIONS, MAX_BYTES
from mealv2.data.left_out import LeftOut
from mealv2.data.source import UNLABELLED, ImageSource, is_unlabelled, where_is
from mealv2.data.tar import TarShards
from mealv2.data.walk import Walk
from mealv2.errors import ConfigError
from mealv2.storage.regular_files import read_regular

_GROUP = 2048  # images of a folder for each shard of labels, beside tar files


class UnlabelledFolder(UnorderedSource):
    """The pictures below a folder, at any depth, as an ImageSource; class ids are ``UNLABELLED``.

    Keys are POSIX paths in the folder, in NFC, sorted; ``Walk`` states what an image is. Raises
    ConfigError for a missing folder or one without images.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, classes: Sequence[str], split: str = "train"
    ) -> None:
        root = Path(folder)
        self.name = str(folder)
        self.split = split
        self.classes = list(classes)
        if not root.is_dir():
            raise ConfigError(f"no folder {folder}; give a folder of unlabelled pictures")
        walk = Walk(root)
        found = sorted((key_of(path, root), size, str(path)) for path, size in walk.images(root))
        self.left_out: LeftOut = walk.left_out()
        if not found:
            raise ConfigError(f"{folder} has no image ({', '.join(EXTENSIONS)})")
        check_unique([(key, path) for key, _, path in found])
        self.keys = [key for key, _, _ in found]
        self.labels = [UNLABELLED] * len(found)
        self.sizes = self.stored_sizes = [size for _, size, _ in found]
        self._paths = [path for _, _, path in found]

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, position: int) -> bytes:
        """Return the encoded image at ``position``; raises OSError."""
        return read_regular(self._paths[position], max_bytes=MAX_BYTES)


def open_unlabelled(folder: Path, *, classes: Sequence[str]) -> ImageSource:
    """Open the pictures below a folder, or in its tar files, whose samples need no class id.

    Raises ConfigError for tar files with class ids, and for pictures beside them; otherwise as
    UnlabelledFolder and TarShards.
    """
    tars = sorted(folder.glob("*.tar")) if folder.is_dir() else []
    if not tars:
        return UnlabelledFolder(folder, classes=classes)
    for path, _ in Walk(folder).images(folder):
        raise ConfigError(
            f"{folder} has tar files and pictures ({path.name}); move one kind elsewhere"
        )
    source = TarShards(tars, name=str(folder), split="train", names=lambda: classes)
    if not is_unlabelled(source):
        raise ConfigError(f"{folder} has tar files with class ids; give them as --data-dir")
    return source


class WithExtra:
    """A labelled source and folders of unlabelled pictures as one ImageSource.

    The key of an unlabelled picture is ``extra/NAME/KEY``, with the name of its folder: two folders
    of one name are an error, as is a folder that contains labelled images, those of ``val`` too, or
    is in their folder, and a source whose images are read in groups (remote tar files).
    """

    def __init__(
        self,
        source: ImageSource,
        folders: Sequence[ImageSource],
        *,
        val: ImageSource | None = None,
    ) -> None:
        if source.groups is not None:
            raise ConfigError("--extra-data needs a local --data-dir, not a URL")
        self.folders = {_name_of(Path(folder.name)): folder for folder in folders}
        if len(self.folders) < len(folders):
            raise ConfigError(
                "two folders of --extra-data have the same name, which is part of the names of "
                "their images; rename one"
            )
        for folder in folders:
            for labelled in filter(None, (source, val)):
                _check_apart(Path(folder.name), labelled)
        self.name, self.split, self.classes = source.name, source.split, list(source.classes)
        self.parts: list[ImageSource] = [source, *folders]
        prefixes = ["", *(f"extra/{name}/" for name in self.folders)]
        self.keys = [
            f"{prefix}{key}"
            for prefix, part in zip(prefixes, self.parts, strict=True)
            for key in part.keys
        ]
        if len(set(self.keys)) < len(self.keys):
            raise ConfigError(f"{source.name} has a class folder extra/…; rename it")
        self.labels = list(chain.from_iterable(part.labels for part in self.parts))
        self.sizes = list(chain.from_iterable(part.sizes for part in self.parts))
        self.stored_sizes = list(chain.from_iterable(part.stored_sizes for part in self.parts))
        self._first = [0, *accumulate(len(part) for part in self.parts)][:-1]
        self.groups: Sequence[int] | None = None
        self.shard_starts: Sequence[int] | None = None
        if source.shard_starts is not None:
            chunks = (
                range(first, first + len(part), _GROUP)
                for first, part in zip(self._first[1:], folders, strict=True)
            )
            self.shard_starts = [*source.shard_starts, *chain.from_iterable(chunks)]
        self.left_out = source.left_out

    def __len__(self) -> int:
        return len(self.keys)

    def announce(self, groups: Sequence[int]) -> None:
        """Do nothing: the order is free."""

    def _part(self, position: int) -> tuple[ImageSource, int]:
        number = bisect_right(self._first, position) - 1
        return self.parts[number], position - self._first[number]

    def where(self, position: int) -> str:
        """Return the path of an image for messages."""
        part, at = self._part(position)
        return where_is(part, at)

    def read(self, position: int) -> bytes:
        """Return the encoded image at ``position``; raises as its part."""
        part, at = self._part(position)
        return part.read(at)

    def original_hash(self, position: int, data: bytes) -> int:
        """Return the content hash of an image before it was packed."""
        part, at = self._part(position)
        return part.original_hash(at, data)


def _name_of(folder: Path) -> str:
    return unicodedata.normalize("NFC", folder.absolute().name)


def _check_apart(extra: Path, labelled: ImageSource) -> None:
    """Raise ConfigError for a folder that has a labelled image in it, or lies among them."""
    given, root = extra.resolve(), Path(labelled.name).resolve()
    folders = {Path(where_is(labelled, position)).parent for position in range(len(labelled))}
    if given.is_relative_to(root) or any(
        folder.resolve().is_relative_to(given) for folder in (root, *folders)
    ):
        raise ConfigError(
            f"--extra-data {extra} and the labelled images of {labelled.split} in {labelled.name} "
            "contain one another, so images would count twice; give another folder"
        )
