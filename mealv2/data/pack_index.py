"""pack.json: the files that `mealv2 pack` made of a split, JPEGs in a tree or tar files.

Labels identify the original files. The index has their fingerprint, sizes and content hashes, so
that originals and packed files are the same data set, and the sizes and content hashes of the
packed files, to detect a replaced or damaged one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from mealv2.data.content_hash import hash_text, parse_hash
from mealv2.errors import DataError
from mealv2.storage.json_format import parse_sealed_json, sealed_json
from mealv2.storage.regular_files import read_regular

INDEX_NAME = "pack.json"  # in the folder of a split of a tree
SUFFIX = f".{INDEX_NAME}"  # after the name of a split, beside its tar files
ADVICE_RERUN = "run the same `mealv2 pack` again"
_ADVICE_RECREATE = f"remove it and {ADVICE_RERUN} into a new folder"
_KNOWN = ("mealv2-pack", 1)


class PackedImage(NamedTuple):
    """An image file of a packed tree, its content hash, and those of the original.

    ``kept`` is the reason why it is a copy of the original.
    """

    bytes: int
    original_bytes: int
    content_hash: int
    original_hash: int
    kept: str = ""

    def row(self) -> list[int | str]:
        """Return the JSON value."""
        hashes = map(hash_text, (self.content_hash, self.original_hash))
        return [self.bytes, self.original_bytes, *hashes, *filter(None, [self.kept])]


class PackedTar(NamedTuple):
    """A tar file of a pack, and its SHA-256 (hex)."""

    bytes: int
    sha256: str

    def row(self) -> list[int | str]:
        """Return the JSON value."""
        return list(self)


@dataclass(frozen=True)
class Pack:
    """The content of an index: the fingerprint of the original images, and the packed files.

    ``settings`` are the other inputs that determine the files' bytes. ``files``, by path below the
    split or by name of the tar file, is None until the pack is complete.
    """

    data_sha256: str
    settings: dict[str, str | int]
    files: Mapping[str, PackedImage | PackedTar] | None = None

    def to_bytes(self) -> bytes:
        """Return the file; equal indices give equal bytes."""
        files = None
        if self.files is not None:
            files = {name: file.row() for name, file in self.files.items()}
        value = {"data_sha256": self.data_sha256, "settings": self.settings, "files": files}
        return sealed_json(_KNOWN, value)

    @classmethod
    def of_bytes(cls, data: bytes, name: str) -> Self:
        """Parse an index file called ``name``; raises DataError."""
        what = "an index of `mealv2 pack`"
        value = parse_sealed_json(data, name, what=what, known=_KNOWN, advice=_ADVICE_RECREATE)
        try:
            files = value["files"]
            if files is not None:
                files = {name: _file(row) for name, row in files.items()}
            return cls(value["data_sha256"], dict(value["settings"]), files)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise DataError(f"{name} is damaged; {_ADVICE_RECREATE}") from None

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Read an index file, None if there is none; raises DataError."""
        try:
            return cls.of_bytes(read_regular(path), str(path))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}; {_ADVICE_RECREATE}") from None

    def require_finished(self, folder: str) -> None:
        """Raise DataError if the pack in ``folder`` is incomplete."""
        if self.files is None:
            raise DataError(f"{folder} is only partly packed; {ADVICE_RERUN} to continue")

    def check(self, folder: str, sizes: Mapping[str, int | None], *, is_part: bool = False) -> None:
        """Raise DataError if the files of ``folder`` are not those listed, or some of them.

        ``sizes`` are their bytes by name, None where nobody knows.
        """
        self.require_finished(folder)
        files = self.files or {}
        for name, size in sizes.items():
            if name not in files:
                raise DataError(
                    f"{folder}/{name} was not made by `mealv2 pack`; move it away, or pack its "
                    "data set into a new folder"
                )
            if size not in (None, files[name].bytes):
                raise DataError(
                    f"{folder}/{name} has {size} bytes, not the {files[name].bytes} that were "
                    f"packed: it was replaced or damaged; {ADVICE_RERUN} to repair it"
                )
        if len(sizes) < len(files) and not is_part:
            lost = min(files.keys() - sizes.keys())
            raise DataError(f"{folder}/{lost} is missing; {ADVICE_RERUN} to repair it")

    def images(self) -> dict[str, PackedImage]:
        """Return the image files of a packed tree; raises DataError for a pack of tar files."""
        images = {n: f for n, f in (self.files or {}).items() if isinstance(f, PackedImage)}
        if len(images) < len(self.files or {}):
            raise DataError(f"{INDEX_NAME} lists tar files, not images; {_ADVICE_RECREATE}")
        return images


def _file(row: list[object]) -> PackedImage | PackedTar:
    match row:
        case [int(size), str(sha256)]:
            return PackedTar(size, sha256)
        case [int(size), int(original_size), str(found), str(original), *kept]:
            reason = str(kept[0]) if kept else ""
            return PackedImage(size, original_size, parse_hash(found), parse_hash(original), reason)
    raise ValueError("not a file of a pack")
