"""A folder with one label set for each teacher, written by `mealv2 precompute --store per-teacher`.

FOLDER/teachers.json names the teachers in order; the labels of the i-th are the label set
FOLDER/teacher-i. It is written first, so that a missing set is noticed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mealv2.errors import ConfigError, LabelSetError
from mealv2.storage.atomic import write_atomic
from mealv2.storage.json_format import canonical_json, read_json

INDEX_NAME = "teachers.json"
_FORMAT = "mealv2 label sets of teachers"


def is_folder_of_sets(folder: Path) -> bool:
    """Return whether a folder has one label set for each teacher."""
    return (folder / INDEX_NAME).exists()


def claim_sets(folder: Path, teachers: Sequence[str]) -> list[Path]:
    """Write the index of ``teachers`` into an empty folder; return the folder of each set.

    An equal index is kept. Raises ConfigError for a folder with other files or other teachers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    index = _index(teachers)
    if not is_folder_of_sets(folder):
        if other := sorted(path.name for path in folder.iterdir()):
            raise ConfigError(
                f"{folder} is not empty ({other[0]}, …) and has no {INDEX_NAME}; give another "
                "--output"
            )
        write_atomic(folder / INDEX_NAME, canonical_json(index).encode())
    found = _read(folder)
    if found != index:
        raise ConfigError(
            f"{folder} has the labels of other teachers ({', '.join(found['teachers'])}, not "
            f"{', '.join(teachers)}); give another --output"
        )
    return _folders(folder, len(teachers))


def sets_of(folder: Path) -> list[Path]:
    """Return the label sets in a folder of sets, in the order of the teachers; else the folder.

    Raises LabelSetError if the index is damaged or a set is missing.
    """
    if not is_folder_of_sets(folder):
        return [folder]
    folders = _folders(folder, len(_read(folder)["teachers"]))
    if missing := [path for path in folders if not path.is_dir()]:
        raise LabelSetError(
            f"{missing[0]} is missing; run `mealv2 precompute --store per-teacher` again to make it"
        )
    return folders


def _index(teachers: Sequence[str]) -> dict[str, Any]:
    return {"format": _FORMAT, "teachers": list(teachers)}


def _folders(folder: Path, count: int) -> list[Path]:
    return [folder / f"teacher-{number}" for number in range(count)]


def _read(folder: Path) -> dict[str, Any]:
    path = folder / INDEX_NAME
    try:
        found = read_json(path)
        names = found["teachers"]
        if found != _index(names) or not all(isinstance(name, str) for name in names):
            raise ValueError("it is not a list of teachers")
        return dict(found)
    except (ValueError, KeyError, TypeError) as error:
        raise LabelSetError(f"{path} is damaged: {error}") from None
