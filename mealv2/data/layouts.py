"""Data sets in their published layouts: VOC2007, CUB-200-2011, Birdsnap, lists of images."""

import os
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mealv2.data.folder import UnorderedSource
from mealv2.data.image_files import MAX_BYTES
from mealv2.data.layout_name import LayoutName
from mealv2.data.left_out import LeftOut
from mealv2.data.source import ImageSource
from mealv2.data.tar_splits import read_class_names
from mealv2.errors import ConfigError
from mealv2.storage.regular_files import read_regular

# Images of the published train (VOC: trainval) and test splits (paper, Table 8).
PUBLISHED = {
    "voc2007": {"trainval": 5011, "test": 4952},
    "cub200": {"train": 5994, "test": 5794},
    "birdsnap": {"train": 47386, "test": 2443},
}
_MAX_LIST_BYTES = 1 << 30
_VOC_LABELS = {"1": 1, "0": 0, "-1": -1}


class Entry(NamedTuple):
    """An image of a list: its path below the folder of the images, and its class or classes."""

    path: str
    label: int
    several: tuple[int, ...] | None = None


class ListedSource(UnorderedSource):
    """The images that list files name, sorted by path; keys are the paths, in NFC.

    A listed image without a file is left out and counted; another number of images than the
    published one is a remark, which --strict makes an error. ``multi_labels`` are 1, 0 (ignored)
    and -1 of every class, for layouts with several classes per image. Raises ConfigError for a
    path outside the folder or listed twice, and if no image exists.
    """

    def __init__(
        self,
        named: LayoutName,
        split: str,
        folder: Path,
        entries: Iterable[Entry],
        classes: Sequence[str],
    ) -> None:
        self.name, self.split = f"{named.name} ({named.splits[split]})", split
        self.classes, self.left_out = list(classes), LeftOut()
        found: dict[str, tuple[Entry, int]] = {}
        for entry in entries:
            key = key_of(entry.path, self.name)
            if key in found:
                raise ConfigError(f"{self.name} lists {key} twice; remove one")
            if (size := file_size(folder / entry.path)) is None:
                self.left_out.add(key, "listed, but missing")
            else:
                found[key] = entry, size
        if not found:
            raise ConfigError(f"{self.name}: none of the listed images is in {folder}")
        self.keys = sorted(found)
        ordered = [found[key] for key in self.keys]
        self.labels = [entry.label for entry, _ in ordered]
        self.sizes = self.stored_sizes = [size for _, size in ordered]
        self._paths = [folder / entry.path for entry, _ in ordered]
        several = [entry.several for entry, _ in ordered if entry.several is not None]
        self.multi_labels: list[tuple[int, ...]] | None = several or None
        self._compare_size(PUBLISHED.get(named.layout, {}).get(named.splits[split]))

    def _compare_size(self, published: int | None) -> None:
        if published not in (None, len(self.keys)):
            self.left_out.remarks.append(
                f"warning: {self.name} has {len(self.keys)} images, published are {published}; "
                "accuracies cannot be compared with published ones"
            )

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, position: int) -> bytes:
        """Return the encoded image at ``position``; raises OSError."""
        return read_regular(self._paths[position], max_bytes=MAX_BYTES)

    def where(self, position: int) -> str:
        """Return the path of an image for messages."""
        return str(self._paths[position])


def open_layout(named: LayoutName, split: str) -> ImageSource:
    """Open a split of a data set in a published layout; raises ConfigError."""
    named.check([split])
    return _OPEN[named.layout](named, split)


def key_of(path: str, name: str) -> str:
    """Return the key of a listed path; raises ConfigError for one that leaves the folder."""
    normal = os.path.normpath(path)
    is_inside = path and "\0" not in path and not Path(normal).is_absolute()
    if not is_inside or normal in ("..", ".") or normal.startswith("../"):
        raise ConfigError(f"{name} lists {path!r}, which is not a path in its folder of images")
    return unicodedata.normalize("NFC", Path(normal).as_posix())


def file_size(path: Path) -> int | None:
    """Return the size of a file, None without a regular one."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield number and text of the lines of a list file that are not empty; raises ConfigError."""
    try:
        text = read_regular(path, max_bytes=_MAX_LIST_BYTES).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read {path}: {reason}") from None
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, line


def _pairs(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield number, first word and rest of every line; raises ConfigError without a rest."""
    for number, line in _lines(path):
        words = line.split(maxsplit=1)
        if len(words) != 2:
            raise ConfigError(f"{path}, line {number}: two words are needed, found {line!r}")
        yield number, words[0], words[1].strip()


# --- PASCAL VOC 2007: several classes per image ---------------------------------------------------


def _open_voc(named: LayoutName, split: str) -> ListedSource:
    """ImageSets/Main/CLASS_SPLIT.txt: 1 present, -1 absent, 0 present but difficult (ignored)."""
    published = named.splits[split]
    lists = named.folder / "ImageSets" / "Main"
    suffix = f"_{published}.txt"
    names = sorted(path.name.removesuffix(suffix) for path in lists.glob(f"*{suffix}"))
    if not names:
        raise ConfigError(f"{named.name}: no CLASS{suffix} in {lists}")
    columns = [dict(_voc_list(lists / f"{name}{suffix}")) for name in names]
    for name, column in zip(names, columns, strict=True):
        if column.keys() != columns[0].keys():
            raise ConfigError(f"{lists}: {name}{suffix} lists other images than {names[0]}{suffix}")
    entries = []
    for image in columns[0]:
        labels = tuple(column[image] for column in columns)
        first = labels.index(1) if 1 in labels else 0  # of an image of difficult objects only
        entries.append(Entry(f"{image}.jpg", first, labels))
    return ListedSource(named, split, named.folder / "JPEGImages", entries, names)


def _voc_list(path: Path) -> Iterator[tuple[str, int]]:
    for number, image, label in _pairs(path):
        if label not in _VOC_LABELS:
            raise ConfigError(f"{path}, line {number}: the label must be 1, 0 or -1: {label!r}")
        yield image, _VOC_LABELS[label]


# --- CUB-200-2011 ---------------------------------------------------------------------------------


def _open_cub(named: LayoutName, split: str) -> ListedSource:
    """images.txt, image_class_labels.txt and train_test_split.txt by image id; classes.txt."""
    folder, in_train = named.folder, "1" if named.splits[split] == "train" else "0"
    files = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")
    columns = [{first: rest for _, first, rest in _pairs(folder / name)} for name in files]
    paths, class_of, part_of, classes = columns
    id_of = {class_id: number for number, class_id in enumerate(classes)}
    entries = []
    for image, path in paths.items():
        class_id = class_of.get(image)
        if class_id not in id_of or part_of.get(image) not in ("0", "1"):
            raise ConfigError(
                f"{named.name}: image {image} has no class of classes.txt, or neither 0 nor 1 in "
                "train_test_split.txt"
            )
        if part_of[image] == in_train:
            entries.append(Entry(path, id_of[class_id]))
    return ListedSource(named, split, folder / "images", entries, list(classes.values()))


# --- Birdsnap -------------------------------------------------------------------------------------


def _open_birdsnap(named: LayoutName, split: str) -> ListedSource:
    """images.txt (path, species_id), species.txt (id, dir) and test_images.txt (path): tables."""
    folder, is_test = named.folder, named.splits[split] == "test"
    names = {cells[0]: cells[1] for cells in _columns(folder / "species.txt", "id", "dir")}
    id_of = {species: number for number, species in enumerate(names)}
    tested = {path for (path,) in _columns(folder / "test_images.txt", "path")}
    entries = []
    for path, species in _columns(folder / "images.txt", "path", "species_id"):
        if species not in id_of:
            raise ConfigError(f"{named.name}: {path} is of species {species}, not in species.txt")
        if (path in tested) == is_test:
            entries.append(Entry(path, id_of[species]))
    # get_birdsnap.py downloads to download/images
    folders = (folder / "images", folder / "download" / "images")
    images = next((path for path in folders if path.is_dir()), folders[0])
    return ListedSource(named, split, images, entries, list(names.values()))


def _columns(path: Path, *names: str) -> Iterator[tuple[str, ...]]:
    """Yield the named columns of a table with tabs and a header; raises ConfigError."""
    at: list[int] = []
    for number, line in _lines(path):
        cells = [cell.strip() for cell in line.split("\t")]
        if not at:
            if missing := set(names) - set(cells):
                raise ConfigError(f"{path} has no column {sorted(missing)[0]} in its first line")
            at = [cells.index(name) for name in names]
        elif len(cells) <= max(at):
            raise ConfigError(f"{path}, line {number}: {len(cells)} cells are too few")
        else:
            yield tuple(cells[index] for index in at)


# --- lists of images: a file for each split -------------------------------------------------------


def _open_list(named: LayoutName, split: str) -> ListedSource:
    """FOLDER/SPLIT.txt or FOLDER.SPLIT, a line PATH CLASS each (OmniBenchmark).

    Class ids are those of the classes of all splits.
    """
    rows = {name: list(_list_rows(named, name)) for name in named.splits}
    found = {label for every in rows.values() for _, label in every}
    are_numbers = all(label.isdecimal() and label.isascii() for label in found)
    names = sorted(found, key=(lambda label: (int(label), label)) if are_numbers else None)
    id_of = {label: number for number, label in enumerate(names)}
    known = read_class_names(named.folder) if named.folder.is_dir() else None
    if known is not None and are_numbers and all(int(label) < len(known) for label in found):
        id_of, names = {label: int(label) for label in found}, known
    entries = [Entry(path, id_of[label]) for path, label in rows[split]]
    images = named.images or (named.folder if named.folder.is_dir() else named.folder.parent)
    return ListedSource(named, split, images, entries, names)


def _list_rows(named: LayoutName, split: str) -> Iterator[tuple[str, str]]:
    path = named.list_file(split)
    assert path is not None, "the split was checked"
    for number, line in _lines(path):
        words = line.rsplit(maxsplit=1)
        if len(words) != 2:
            raise ConfigError(f"{path}, line {number}: PATH CLASS is needed, found {line!r}")
        yield words[0].strip(), words[1]


_OPEN = {
    "voc2007": _open_voc,
    "cub200": _open_cub,
    "birdsnap": _open_birdsnap,
    "list": _open_list,
}
