"""The name of a data set in a published layout as a path: ``voc2007:FOLDER``; torch-free."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from mealv2.data.tar_splits import own_split
from mealv2.errors import ConfigError

# The layouts, and the file or folder by which each is recognised.
LAYOUTS = {
    "voc2007": "ImageSets/Main",
    "cub200": "train_test_split.txt",
    "birdsnap": "test_images.txt",
    "list": "",
}
# Published splits: train+val of VOC is one.
SPLITS = {"train": "train", "val": "test", "test": "test"}
VOC_SPLITS = {"train": "trainval", "trainval": "trainval", "val": "test", "test": "test"}
LIST_SPLITS = ("train", "val", "test")
_NAMED = re.compile(
    rf"(?:(?P<base>.*)/)?(?P<layout>{'|'.join(LAYOUTS)}):(?P<folder>[^=]*)(?:=(?P<images>.*))?"
)


class LayoutName(NamedTuple):
    """A data set in a published layout: its folder, and for ``list`` also that of the images."""

    layout: str
    folder: Path
    images: Path | None

    @property
    def name(self) -> str:
        """The name for messages."""
        return f"{self.layout}:{self.folder}"

    @property
    def splits(self) -> dict[str, str]:
        """The published split by split name."""
        if self.layout == "list":
            return {split: split for split in LIST_SPLITS if self.list_file(split) is not None}
        return VOC_SPLITS if self.layout == "voc2007" else SPLITS

    def list_file(self, split: str) -> Path | None:
        """Return the list file of a split: FOLDER/SPLIT.txt or FOLDER.SPLIT; None without one."""
        folder = self.folder
        paths = (folder / f"{split}.txt", folder.with_name(f"{folder.name}.{split}"))
        return next((path for path in paths if path.is_file()), None)

    def check(self, splits: Iterable[str], *, made: str | None = None) -> None:
        """Raise ConfigError for a missing folder, or a split that the data set does not have.

        ``made`` is a split that --val-fraction makes.
        """
        marker = LAYOUTS[self.layout]
        if marker and not (self.folder / marker).exists():
            raise ConfigError(f"{self.name}: {self._without(marker)}")
        if self.images is not None and self.layout != "list":
            raise ConfigError(f"{self.name}: =IMAGES is for list:LISTS=IMAGES only")
        known = self.splits
        if made in known:
            raise ConfigError(own_split(Path(self.name), str(made)))
        for split in splits:
            if split not in known:
                files = f": give {split}.txt there" if self.layout == "list" else ""
                raise ConfigError(
                    f"{self.name} has the splits {', '.join(known) or 'of no list file'}, not "
                    f"{split}{files}"
                )

    def _without(self, marker: str) -> str:
        """Return what is wrong with a folder without the marker of its layout, and what to name."""
        if not self.folder.is_dir():
            return f"no folder {self.folder}"
        below = sorted(self.folder.glob(f"*/{marker}"))
        if not below:
            return f"no {marker} in {self.folder}; name the folder that has it"
        folder = below[0].parents[marker.count("/")]
        return f"no {marker} in {self.folder}; name {self.layout}:{folder}"


def layout_name(path: Path) -> LayoutName | None:
    """Return the data set that a path names, None for any other path, or one that exists.

    A relative FOLDER is relative to the folder that the name is in, so that the absolute path of a
    setting means the same.
    """
    found = _NAMED.fullmatch(path.as_posix())
    if found is None or not found["folder"] or path.exists():
        return None
    base = Path(found["base"] or "")
    images = base / found["images"] if found["images"] else None
    return LayoutName(found["layout"], base / found["folder"], images)
