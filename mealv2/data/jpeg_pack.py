"""pack.json: which files `mealv2 pack` made of a split, JPEGs in a tree or tar files.

Labels belong to the original files. The index has their fingerprint, and of a tree their sizes, so
that the original and the packed files are one data set. It has the sizes of the packed files, so
that a file that was replaced is noticed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from mealv2.data.index_json import ADVICE_RECREATE, ADVICE_RERUN, checked_json, sealed_json
from mealv2.errors import DataError

INDEX_NAME = "pack.json"  # in the folder of a split, of a tree
SUFFIX = f".{INDEX_NAME}"  # after the name of a split, beside its tar files
_KNOWN = ("mealv2-pack", 1)


class PackedImage(NamedTuple):
    """An image file of a packed tree; ``kept`` says why it is a copy of the original."""

    bytes: int
    original_bytes: int
    kept: str = ""


class PackedTar(NamedTuple):
    """A tar file of a pack, and its SHA-256 (hex)."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Pack:
    """What an index says: the fingerprint of the original images, and the files made of them.

    ``settings`` are what else the bytes of the files depend on. ``files``, by path below the split
    or by name of the tar file, is None until all files are there.
    """

    data_sha256: str
    settings: dict[str, str | int]
    files: Mapping[str, PackedImage | PackedTar] | None = None

    def to_bytes(self) -> bytes:
        """Return the file; equal indices give equal bytes."""
        files = None
        if self.files is not None:
            files = {name: [v for v in file if v != ""] for name, file in self.files.items()}
        value = {"data_sha256": self.data_sha256, "settings": self.settings, "files": files}
        return sealed_json(_KNOWN, value)

    @classmethod
    def of_bytes(cls, data: bytes, name: str) -> Self:
        """Parse an index; raises DataError, which calls it ``name``, for anything else."""
        value = checked_json(data, name, what="an index of `mealv2 pack`", known=_KNOWN)
        try:
            files = value["files"]
            if files is not None:
                files = {name: _file(row) for name, row in files.items()}
            return cls(value["data_sha256"], dict(value["settings"]), files)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise DataError(f"{name} is damaged; {ADVICE_RECREATE}") from None

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Read an index, None where there is none; raises DataError as ``of_bytes``."""
        try:
            return cls.of_bytes(path.read_bytes(), str(path))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}; {ADVICE_RECREATE}") from None

    def require_finished(self, place: str) -> None:
        """Raise DataError where not all files of the pack are there; ``place`` is its name."""
        if self.files is None:
            raise DataError(f"{place} is packed in part only; {ADVICE_RERUN} to go on")

    def check(self, place: str, sizes: Mapping[str, int]) -> None:
        """Raise DataError where the files of the split are not those of the index.

        ``sizes`` are the bytes of the files there, ``place`` is the name of their folder.
        """
        self.require_finished(place)
        files = self.files or {}
        for name, size in sizes.items():
            if name not in files:
                raise DataError(
                    f"{place}/{name} was not put there by `mealv2 pack`; move it away, or pack its "
                    "data set into a new folder"
                )
            if size != files[name].bytes:
                raise DataError(
                    f"{place}/{name} has {size} bytes, not the {files[name].bytes} that were "
                    f"packed: it was replaced or damaged; {ADVICE_RERUN} to make it anew"
                )
        if len(sizes) < len(files):
            lost = min(files.keys() - sizes.keys())
            raise DataError(f"{place}/{lost} is missing; {ADVICE_RERUN} to make it anew")

    def images(self) -> dict[str, PackedImage]:
        """Return the image files of a packed tree; raises DataError for a pack of tar files."""
        images = {n: f for n, f in (self.files or {}).items() if isinstance(f, PackedImage)}
        if len(images) < len(self.files or {}):
            raise DataError(f"{INDEX_NAME} lists tar files and no images; {ADVICE_RECREATE}")
        return images


def _file(row: list[object]) -> PackedImage | PackedTar:
    match row:
        case [int(size), str(sha256)]:
            return PackedTar(size, sha256)
        case [int(size), int(original_size)]:
            return PackedImage(size, original_size)
        case [int(size), int(original_size), str(kept)]:
            return PackedImage(size, original_size, kept)
    raise ValueError("no file of a pack")
