"""A tree of FKD's label files, matched to images."""

import os
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mealv2.errors import LabelSetError

SUFFIX = ".tar"  # FKD's suffix, although the files are not tar archives


@dataclass(frozen=True)
class MatchedFiles:
    """Label files by image key, and the unmatched images and files, sorted."""

    paths: dict[str, Path]
    without_label: list[str]  # keys of images
    without_image: list[str]  # label files, named as by find_files

    def require_all(self) -> None:
        """Raise LabelSetError if an image has no label file."""
        if not self.without_label:
            return
        raise LabelSetError(
            f"{len(self.without_label)} of {len(self.paths) + len(self.without_label)} images have "
            f"no label file (first: {', '.join(self.without_label[:3])}); "
            f"{len(self.without_image)} label files have no image "
            f"(first: {', '.join(self.without_image[:3]) or 'none'})"
        )


def find_files(folder: Path, *, split: str = "train") -> dict[str, Path]:
    """Return the label files of a split by name, ``CLASS/STEM``, sorted.

    Their paths are ROOT/DATA_SET/SPLIT/CLASS/STEM.tar; ``folder`` is ROOT, DATA_SET or SPLIT. Names
    are in NFC, like keys; hidden files are ignored. Raises LabelSetError for no file, or several
    splits of this name.
    """
    split_folder = _split_folder(folder, split)
    files: dict[str, Path] = {}
    for path in _walk(split_folder):
        name = path.relative_to(split_folder).as_posix().removesuffix(SUFFIX)
        name = unicodedata.normalize("NFC", name)
        if name in files:
            raise LabelSetError(f"{path} and {files[name]} are label files of the same image")
        files[name] = path
    if not files:
        raise LabelSetError(f"no label files in {folder}; expected {split_folder}/CLASS/STEM.tar")
    return dict(sorted(files.items()))


def match_files(keys: Iterable[str], files: dict[str, Path]) -> MatchedFiles:
    """Match ``find_files``' label files to images by the name up to the first dot.

    Raises LabelSetError if two images share a label file.
    """
    named = {path.removesuffix(SUFFIX): key for key, path in label_names(keys).items()}
    return MatchedFiles(
        paths={key: files[name] for name, key in named.items() if name in files},
        without_label=sorted(key for name, key in named.items() if name not in files),
        without_image=sorted(files.keys() - named.keys()),
    )


def label_names(keys: Iterable[str]) -> dict[str, str]:
    """Return the path of every image's label file in its split, CLASS/STEM.tar, by key.

    Raises LabelSetError if two images share one.
    """
    taken: dict[str, str] = {}
    for key in keys:
        name = _label_name(key)
        if name in taken:
            raise LabelSetError(
                f"images {taken[name]} and {key} share the label file {name}{SUFFIX}: only "
                "the name up to the first dot counts; rename one of them and label it again"
            )
        taken[name] = key
    return {key: name + SUFFIX for name, key in taken.items()}


def _label_name(key: str) -> str:
    path = PurePosixPath(key)
    return (path.parent / path.name.split(".")[0]).as_posix()


def _split_folder(folder: Path, split: str) -> Path:
    """Return the folder itself, the split in it, or the split of the only data set in it."""
    if folder.name == split:
        return folder
    if (folder / split).is_dir():
        return folder / split
    found = sorted(path for path in folder.glob(f"*/{split}") if path.is_dir())
    if len(found) > 1:
        names = ", ".join(str(path) for path in found)
        raise LabelSetError(f"{folder} holds labels of several data sets; give one of {names}")
    return found[0] if found else folder


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the visible label files in a folder in order; follows links."""
    for where, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        for name in sorted(files):
            if name[0] != "." and name.endswith(SUFFIX):
                yield Path(where, name)
