"""Write a part of a data set as class folders: equally many images of each class."""

from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from mealv2.data.image_files import extension_of
from mealv2.data.open import open_source
from mealv2.errors import ConfigError
from mealv2.storage.atomic import write_atomic
from mealv2.storage.json_format import canonical_json, read_json

_RECORD = "subset.json"


class Part(NamedTuple):
    """A split to write: images ``first`` to ``first + per_class - 1`` of each class of a split."""

    split: str
    per_class: int
    first: int = 0


def write_subset(data_dir: Path, folder: Path, parts: Mapping[str, Part]) -> Path:
    """Write parts of a data set as FOLDER/SPLIT/CLASS/IMAGE, the files as they are.

    The images of a class are ordered by a hash of their keys, so a smaller part is the beginning of
    a larger one. A folder that has these parts is kept. Raises ConfigError for a folder with
    others, and for a class with too few images.
    """
    wanted = {"data_dir": str(data_dir.resolve()), "parts": {k: list(p) for k, p in parts.items()}}
    record = folder / _RECORD
    if record.exists():
        if read_json(record) != wanted:
            raise ConfigError(f"{folder} has other images than asked for; give another --output")
        return folder
    for name, part in parts.items():
        _write_part(data_dir, folder / name, part)
    write_atomic(record, canonical_json(wanted).encode())
    return folder


def _write_part(data_dir: Path, folder: Path, part: Part) -> None:
    source = open_source(data_dir, part.split)
    by_class: dict[int, list[tuple[bytes, int]]] = {}
    for position, (key, label) in enumerate(zip(source.keys, source.labels, strict=True)):
        rank = blake2b(key.encode(), digest_size=8).digest()
        by_class.setdefault(label, []).append((rank, position))
    end = part.first + part.per_class
    for label, images in sorted(by_class.items()):
        class_name = source.classes[label]
        if len(images) < end:
            raise ConfigError(
                f"{data_dir}: class {class_name} of {part.split} has {len(images)} images, "
                f"{end} are needed"
            )
        (folder / class_name).mkdir(parents=True, exist_ok=True)
        for place, (_, position) in enumerate(sorted(images)[part.first : end], part.first):
            data = source.read(position)
            (folder / class_name / f"{place:05d}.{extension_of(data)}").write_bytes(data)
