"""Image folders: ROOT/SPLIT/CLASS/IMAGE, or ROOT/CLASS/IMAGE."""

import itertools
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from mealv2.data.content_hash import content_hash
from mealv2.data.image_files import EXTENSIONS, MAX_BYTES, kind_of_name
from mealv2.data.left_out import LeftOut
from mealv2.data.pack_index import ADVICE_RERUN, INDEX_NAME, Pack, PackedImage
from mealv2.data.walk import Walk
from mealv2.errors import ConfigError, DataError
from mealv2.storage.regular_files import read_regular

# What helps where a data set has no split to validate on.
ADVICE_NO_VAL = (
    "hold out a part of the training images with --val-fraction 0.2, train without validation with "
    "--val-split none, or name another split with --val-split"
)

# Folders of these names are splits, so their parent is not a folder of class folders.
_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"}


class UnorderedSource:
    """The parts of an ImageSource with one local file for each image: any order costs the same."""

    shard_starts: Sequence[int] | None = None
    groups: Sequence[int] | None = None
    left_out = LeftOut()

    def announce(self, groups: Sequence[int]) -> None:
        """Do nothing."""

    def original_hash(self, position: int, data: bytes) -> int:
        """Return the content hash of ``data``: an image that is not packed."""
        return content_hash(data)


class ImageFolder(UnorderedSource):
    """A split of an ImageFolder tree: ROOT/SPLIT/CLASS/…/IMAGE, or ``split_folder`` of it.

    Keys are POSIX paths under the split, Unicode-normalised (NFC), sorted by code point; class ids
    follow the sorted class folder names as in torchvision. ``Walk`` states what an image is;
    ``left_out`` counts the rest. Sizes of a split that `mealv2 pack` made are those of the original
    files. Raises ConfigError for a missing folder, an empty class or a link to a folder above it,
    DataError for a packed split whose files do not match its index.
    """

    def __init__(self, root: str | os.PathLike[str], split: str) -> None:
        self.folder = split_folder(Path(root), split)
        self.name = str(self.folder)
        self.split = split
        pack = Pack.read(self.folder / INDEX_NAME)
        if pack is not None:
            pack.require_finished(self.name)
        folders = class_folders(self.folder)
        self.classes = [name for name, _ in folders]
        walk = Walk(self.folder)
        rows = [
            (key, class_id, size, path)
            for class_id, (_, class_folder) in enumerate(folders)
            for key, size, path in _images_of(self.folder, class_folder, walk)
        ]
        walk.count_outside(INDEX_NAME)
        self.left_out = walk.left_out()
        rows.sort(key=lambda row: row[0])
        check_unique([(row[0], row[3]) for row in rows])
        self.keys = [row[0] for row in rows]
        self.labels = [row[1] for row in rows]
        self.sizes = self.stored_sizes = [row[2] for row in rows]
        self._paths = [row[3] for row in rows]
        self._packed: list[PackedImage] | None = None
        if pack is not None:
            pack.check(self.name, dict(zip(self.keys, self.sizes, strict=True)))
            images = pack.images()
            self._packed = [images[key] for key in self.keys]
            self.sizes = [image.original_bytes for image in self._packed]

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, position: int) -> bytes:
        """Return the encoded image at ``position``; raises OSError.

        Raises DataError for a packed image that is not the one in the index.
        """
        data = read_regular(self._paths[position], max_bytes=MAX_BYTES)
        if self._packed is not None and content_hash(data) != self._packed[position].content_hash:
            raise DataError(f"it was changed since it was packed; {ADVICE_RERUN} to repair it")
        return data

    def original_hash(self, position: int, data: bytes) -> int:
        """Return the content hash of an image before it was packed."""
        if self._packed is None:
            return content_hash(data)
        return self._packed[position].original_hash


def split_folder(root: Path, split: str) -> Path:
    """Return the folder with the class folders of a split: ROOT/SPLIT, which may be missing.

    It is ROOT for the split ``train`` of a ROOT whose folders are not named like splits.
    """
    folder = root / split
    if split != "train" or not root.is_dir() or folder.exists():
        return folder
    names = {path.name.lower() for path in root.iterdir() if path.is_dir() and path.name[0] != "."}
    return root if names and names.isdisjoint(_SPLIT_NAMES) else folder


def is_flat(root: Path) -> bool:
    """Return whether a folder has pictures and no folders, so no classes either."""
    if not root.is_dir():
        return False
    with os.scandir(root) as entries:
        shown = [entry for entry in entries if entry.name[0] != "."]
    return any(kind_of_name(entry.name) for entry in shown) and not any(
        entry.is_dir() or entry.name.endswith(".tar") for entry in shown
    )


def class_folders(folder: Path) -> list[tuple[str, Path]]:
    """List the (class name, folder) pairs of a split, sorted; names are in NFC.

    Raises ConfigError for a missing folder, or one without class folders.
    """
    if not folder.is_dir():
        raise ConfigError(_missing_split(folder))
    found = sorted(
        (key_of(path, folder), path)
        for path in folder.iterdir()
        if path.is_dir() and path.name[0] != "."
    )
    if not found:
        raise ConfigError(f"{folder} has no class folders; expected {folder}/CLASS/IMAGE.jpg")
    check_unique(found)
    return found


def _missing_split(folder: Path) -> str:
    """Return the message for a split that does not exist: what is there, and what helps."""
    root, split = folder.parent, folder.name
    if not root.is_dir():
        return (
            f"no folder {folder}; --data-dir must contain the split as ROOT/SPLIT/CLASS/IMAGE, or "
            f"as tar files ROOT/SPLIT/*.tar or ROOT/SPLIT-*.tar (there is no folder {root})"
        )
    found = ", ".join(sorted(p.name for p in root.glob("*/"))[:8]) or "nothing"
    if split == "train" or split.lower() not in _SPLIT_NAMES:
        advice = (
            "--data-dir takes ROOT/SPLIT/CLASS/IMAGE, the class folders of one split as "
            "ROOT/CLASS/IMAGE, or tar files ROOT/SPLIT/*.tar or ROOT/SPLIT-*.tar; name other "
            "splits with --train-split and --val-split"
        )
    else:
        advice = ADVICE_NO_VAL
    return f"no folder {folder}; {advice} (folders in {root}: {found})"


def check_unique(named: Sequence[tuple[str, Path | str]]) -> None:
    """Raise ConfigError for a name that appears twice in a sorted list."""
    for (name, path), (other_name, other_path) in itertools.pairwise(named):
        if name == other_name:
            raise ConfigError(
                f"{path} and {other_path} differ only in Unicode normalisation; rename one"
            )


def _images_of(folder: Path, class_folder: Path, walk: Walk) -> list[tuple[str, int, str]]:
    """List (key, size in bytes, path) of the images under a class folder, links followed."""
    found = [(key_of(path, folder), size, str(path)) for path, size in walk.images(class_folder)]
    if not found:
        raise ConfigError(
            f"class folder {class_folder} has no image ({', '.join(EXTENSIONS)}); "
            "add images, or remove the folder (a validation split may have fewer classes)"
        )
    return found


def key_of(path: Path, folder: Path) -> str:
    """Return the key of a file in a folder; raises ConfigError for a name that is not UTF-8."""
    key = unicodedata.normalize("NFC", path.relative_to(folder).as_posix())
    try:
        key.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(f"the file name {path!r} is not valid UTF-8; rename it") from None
    return key
