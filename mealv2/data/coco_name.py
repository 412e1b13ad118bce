"""Where a data set in COCO's format has its files; torch-free."""

import re
from pathlib import Path
from typing import NamedTuple

from mealv2.errors import ConfigError

_YEARS = ("", "2017", "2014")
_NAMED = re.compile(r"(?:(?P<base>.*)/)?coco:(?P<folder>.+)")
_FORMS = (
    "annotations/instances_{split}.json with images in {split}/ or images/{split}/, or "
    "{split}/_annotations.coco.json beside its images"
)


class CocoSplit(NamedTuple):
    """The files of a split; ``part`` is its published name, such as train2017.

    ``is_published``: the data set was named coco:FOLDER, so its sizes are compared.
    """

    name: str
    split: str
    part: str
    annotations: Path
    images: Path
    is_published: bool


def find_coco(data_dir: Path, split: str) -> CocoSplit:
    """Return the files of a split of FOLDER or coco:FOLDER; raises ConfigError.

    The split ``train`` is also found as train2017 or train2014, in this order.
    """
    named = None if data_dir.exists() else _NAMED.fullmatch(data_dir.as_posix())
    folder = Path(named["base"] or "", named["folder"]) if named else data_dir
    name = f"coco:{folder}" if named else str(folder)
    if not folder.is_dir():
        raise ConfigError(f"no folder {folder}; give the data set as --data-dir")
    if re.search(r"[/\\\0]", split) or split in ("", ".", ".."):
        raise ConfigError(f"the split {split!r} must be a plain name")
    for part in (f"{split}{year}" for year in _YEARS):
        beside = folder / part / "_annotations.coco.json"
        if beside.is_file():
            return CocoSplit(name, split, part, beside, beside.parent, named is not None)
        listed = folder / "annotations" / f"instances_{part}.json"
        if listed.is_file():
            candidates = (folder / part, folder / "images" / part, folder / "images")
            images = next((path for path in candidates if path.is_dir()), None)
            if images is None:
                raise ConfigError(
                    f"{name}: {listed} is there, but no folder of its images: {part} or "
                    f"images/{part} in {folder}"
                )
            return CocoSplit(name, split, part, listed, images, named is not None)
    forms = _FORMS.format(split=split)
    raise ConfigError(f"{name} has no split {split}: it needs {forms}")
