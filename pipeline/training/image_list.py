"""The images that a run started with, kept in its folder: what changed, what was deleted."""

import gzip
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mealv2.data.source import ImageSource
from mealv2.errors import DataError
from mealv2.storage.atomic import write_atomic
from mealv2.storage.json_format import parse_json
from mealv2.storage.regular_files import read_regular
from pipeline import console
from pipeline.config import TrainConfig

LIST_NAME = "images.json.gz"
_MAX_BYTES = 1 << 32


@dataclass(frozen=True)
class ImageList:
    """Keys, class ids and sizes in bytes of a source's images, in its order, and its classes."""

    keys: list[str]
    labels: list[int]
    sizes: list[int]
    classes: list[str]

    def differences(self, source: ImageSource) -> str:
        """Return how a source differs, as text; empty if it has the same names and sizes."""
        before = dict(zip(self.keys, zip(self.labels, self.sizes, strict=True), strict=True))
        now = dict(zip(source.keys, zip(source.labels, source.sizes, strict=True), strict=True))
        groups = {
            "missing": [key for key in before if key not in now],
            "new": [key for key in now if key not in before],
            "changed": [key for key in before if key in now and before[key] != now[key]],
        }
        found = [
            f"{len(keys)} {what} ({console.first_names(keys)})"
            for what, keys in groups.items()
            if keys
        ]
        return ", ".join(found)


def write(run: Path, source: ImageSource) -> None:
    """Write the list of a source with a file for each image; others are read shard by shard."""
    if source.groups is not None:
        return
    columns = [list(source.keys), list(source.labels), list(source.sizes), list(source.classes)]
    text = json.dumps(columns, ensure_ascii=False, separators=(",", ":"))
    write_atomic(run / LIST_NAME, gzip.compress(text.encode(), compresslevel=1, mtime=0))


def read(run: Path) -> ImageList | None:
    """Return the list of a run; None if it has none. Raises DataError for a damaged one."""
    path = run / LIST_NAME
    try:
        unpack = zlib.decompressobj(zlib.MAX_WBITS | 16)
        text = unpack.decompress(read_regular(path, max_bytes=_MAX_BYTES), _MAX_BYTES)
        found = ImageList(*parse_json(text))
        kinds: list[tuple[list[Any], type]] = [
            (found.keys, str),
            (found.labels, int),
            (found.sizes, int),
            (found.classes, str),
        ]
        if not all(isinstance(item, kind) for items, kind in kinds for item in items):
            raise ValueError("a column has another type")
        if not len(found.keys) == len(found.labels) == len(found.sizes):
            raise ValueError("its columns differ in length")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error}); remove it to resume without it") from None
    return found


def with_deleted(config: TrainConfig, source: ImageSource) -> ImageSource:
    """Return the source with the images that were deleted since the run to resume started.

    They keep their place in the order of the run, and reading one fails, so that --on-bad-image
    skip skips and counts them. A source that differs otherwise is returned as it is.
    """
    if config.resume is None or config.on_bad_image != "skip" or source.groups is not None:
        return source
    kept = read(config.resume)
    if kept is None or kept.classes != list(source.classes):
        return source
    deleted = set(kept.keys) - set(source.keys)
    if not deleted or len(source.keys) + len(deleted) != len(kept.keys):
        return source
    console.info(
        f"{console.count(len(deleted), 'image')} of {source.name} deleted since the run started "
        f"({console.first_names(sorted(deleted))}): skipped and counted (--on-bad-image skip)"
    )
    return _WithDeleted(source, kept)


class _WithDeleted:
    """A source with more images, which cannot be read; an ImageSource."""

    def __init__(self, source: ImageSource, kept: ImageList) -> None:
        self._source = source
        self.keys, self.labels = kept.keys, kept.labels
        found = {key: position for position, key in enumerate(source.keys)}
        self._positions = [found.get(key) for key in kept.keys]
        self.sizes = self._column(source.sizes, kept.sizes)
        self.stored_sizes = self._column(source.stored_sizes, kept.sizes)

    def _column(self, found: Sequence[int], kept: Sequence[int]) -> list[int]:
        """Return the values of the images that exist, and the kept ones of those that do not."""
        return [
            before if position is None else found[position]
            for position, before in zip(self._positions, kept, strict=True)
        ]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, position: int) -> bytes:
        """Return an encoded image; raises DataError for a deleted one."""
        found = self._positions[position]
        if found is None:
            raise DataError("it was deleted after the run had started")
        return self._source.read(found)

    def original_hash(self, position: int, data: bytes) -> int:
        """Return the content hash of an image before it was packed."""
        found = self._positions[position]
        assert found is not None, "a deleted image has no bytes"
        return self._source.original_hash(found, data)
