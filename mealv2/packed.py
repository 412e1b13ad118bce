"""pack.json: what `mealv2 pack` says of the images of a packed split.

Labels belong to the original files; the index keeps those files' sizes, so that both trees are one
data set, and the packed files' sizes, so that a file that was replaced is noticed.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from mealv2.errors import DataError
from mealv2.formats import AFRESH, AGAIN, checked_json

INDEX_NAME = "pack.json"
FORMAT = "mealv2-pack"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class PackIndex:
    """What pack.json says: the fingerprint of the originals, and what became of each.

    ``images`` has the bytes of the original and of the packed file by key, None until all are
    there; ``kept`` says why a file is the original's copy.
    """

    jpegtran: str
    data_sha256: str
    images: dict[str, tuple[int, int]] | None = None
    kept: dict[str, str] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Return the file: compact JSON, the same for equal indices."""
        value = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "jpegtran": self.jpegtran,
            "data_sha256": self.data_sha256,
            "images": self.images,
            "kept": self.kept,
        }
        text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return (text + "\n").encode()

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Read the index of a split's folder; None where it has none.

        Raises DataError for a file that `mealv2 pack` did not write.
        """
        path = folder / INDEX_NAME
        if not path.is_file():
            return None
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}; {AFRESH}") from None
        known, what = (FORMAT, FORMAT_VERSION), "an index of `mealv2 pack`"
        value = checked_json(data, str(path), what=what, known=known)
        if (problem := _problem(value)) is not None:
            raise DataError(f"{path} is damaged: {problem}; {AFRESH}")
        images = value["images"]
        if images is not None:
            images = {key: (sizes[0], sizes[1]) for key, sizes in images.items()}
        return cls(value["jpegtran"], value["data_sha256"], images, value["kept"])


def finished_index(folder: Path) -> PackIndex | None:
    """Read the index of a split's folder; None where the split is not packed.

    Raises DataError for one that is damaged, or of a pack that did not come to its end.
    """
    index = PackIndex.read(folder)
    if index is not None and index.images is None:
        raise DataError(f"{folder} is packed in part only; {AGAIN} to go on")
    return index


def original_sizes(
    index: PackIndex, folder: Path, *, keys: Sequence[str], sizes: Sequence[int]
) -> list[int]:
    """Return the sizes in bytes of the originals of a packed split's images, in their order.

    ``sizes`` are those of the files. Raises DataError where the index does not tell of exactly
    these files.
    """
    assert index.images is not None, "finished"
    originals = []
    for key, size in zip(keys, sizes, strict=True):
        original, packed = index.images.get(key, (-1, -1))
        if original < 0:
            raise DataError(
                f"{folder / key} was not put there by `mealv2 pack` ({INDEX_NAME} lacks it); "
                "move it away, or pack its data set into a new folder"
            )
        if size != packed:
            raise DataError(
                f"{folder / key} has {size} bytes, {INDEX_NAME} says {packed}: it was replaced or "
                f"damaged; {AGAIN} to make it anew"
            )
        originals.append(original)
    if len(keys) < len(index.images):
        lost = min(index.images.keys() - set(keys))
        raise DataError(f"{folder / lost} is missing; {AGAIN} to make it anew")
    return originals


def _problem(value: dict[str, Any]) -> str | None:
    """Return what of an index is not as it should be."""
    for name in ("jpegtran", "data_sha256"):
        if not isinstance(value.get(name), str):
            return f"{name} is no text"
    kept = value.get("kept")
    if not isinstance(kept, dict) or not all(isinstance(reason, str) for reason in kept.values()):
        return "kept is no object of texts"
    images = value.get("images", 0)
    if images is None:
        return None
    if not isinstance(images, dict):
        return "images is no object"
    for key, sizes in images.items():
        if not (isinstance(sizes, list) and len(sizes) == 2 and all(map(_is_count, sizes))):
            return f"the sizes of {key!r} are not two byte counts"
    return None


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0
