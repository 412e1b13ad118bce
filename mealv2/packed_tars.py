"""SPLIT.pack.json: which tar files `mealv2 pack --to tar` made of a split, and of which images."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from mealv2.errors import DataError
from mealv2.formats import AFRESH, AGAIN, checked_json

FORMAT = "mealv2-tar-pack"
FORMAT_VERSION = 1
SUFFIX = ".pack.json"


class PackedTar(NamedTuple):
    """A tar file of a pack: its name, how many images it has, its bytes and their SHA-256."""

    name: str
    images: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class TarPack:
    """What SPLIT.pack.json says; ``shards`` is None until all are there.

    ``data_sha256`` is the fingerprint of the original images, ``stored_sha256`` that of the files
    that were put into tar files: of a packed tree they differ.
    """

    data_sha256: str
    stored_sha256: str
    images_per_shard: int
    shards: list[PackedTar] | None = None

    def to_bytes(self) -> bytes:
        """Return the file: JSON, the same for equal packs."""
        value = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "data_sha256": self.data_sha256,
            "stored_sha256": self.stored_sha256,
            "images_per_shard": self.images_per_shard,
            "shards": None if self.shards is None else [s._asdict() for s in self.shards],
        }
        return (json.dumps(value, sort_keys=True, ensure_ascii=False, indent=1) + "\n").encode()

    @classmethod
    def of_bytes(cls, data: bytes, name: str) -> Self:
        """Parse the file; raises DataError, calling it ``name``, for what is no such file."""
        known, what = (FORMAT, FORMAT_VERSION), "a list of `mealv2 pack`"
        value = checked_json(data, name, what=what, known=known)
        pack = _pack_of(value)
        if pack is None:
            raise DataError(f"{name} is damaged; {AFRESH}")
        return cls(*pack)

    @classmethod
    def read(cls, folder: Path, split: str) -> Self | None:
        """Read the pack of a split in a folder, None where it has none; raises DataError."""
        path = pack_path(folder, split)
        try:
            return cls.of_bytes(path.read_bytes(), str(path))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}; {AFRESH}") from None

    def check(self, folder: str, sizes: Mapping[str, int]) -> None:
        """Raise DataError where the tar files of the split in a folder are not those listed.

        ``sizes`` are their bytes by name, ``folder`` what to call it.
        """
        if self.shards is None:
            raise DataError(f"{folder} is packed in part only; {AGAIN} to go on")
        listed = {shard.name: shard.bytes for shard in self.shards}
        for name, size in sizes.items():
            if name not in listed:
                raise DataError(
                    f"{folder}/{name} was not put there by `mealv2 pack`; move it away, or name "
                    "the tar files that are meant by a pattern"
                )
            if size != listed[name]:
                raise DataError(
                    f"{folder}/{name} has {size} bytes, not the {listed[name]} that were packed: "
                    f"it was replaced or damaged; {AGAIN} to make it anew"
                )
        if lost := sorted(listed.keys() - sizes.keys()):
            raise DataError(f"{folder}/{lost[0]} is missing; {AGAIN} to make it anew")


def pack_path(folder: Path, split: str) -> Path:
    """Return where the pack of a split in a folder says what it is."""
    return folder / f"{split}{SUFFIX}"


def _pack_of(value: dict[str, Any]) -> tuple[str, str, int, list[PackedTar] | None] | None:
    """Return what a JSON object says, None where it says something else."""
    texts = [value.get(name) for name in ("data_sha256", "stored_sha256")]
    per_shard, shards = value.get("images_per_shard"), value.get("shards", 0)
    if not (all(isinstance(text, str) for text in texts) and type(per_shard) is int):
        return None
    found = None
    if shards is not None:
        try:
            found = [PackedTar(**shard) for shard in shards]
        except TypeError:
            return None
        kinds = {tuple(map(type, shard)) for shard in found}
        if kinds - {(str, int, int, str)} or not found:
            return None
    return (texts[0], texts[1], per_shard, found)  # type: ignore[return-value]
