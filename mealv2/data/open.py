"""Open a split of a data set, whatever its form: folder, tar files, URL."""

from pathlib import Path

from mealv2.data.folder import ImageFolder
from mealv2.data.remote_tar import open_remote
from mealv2.data.source import ImageSource
from mealv2.data.tar import TarShards
from mealv2.data.tar_splits import find_split
from mealv2.storage.cache import Cache
from mealv2.storage.urls import Location, is_url


def open_source(data_dir: Location, split: str, *, cache: Cache | None = None) -> ImageSource:
    """Open a split of a data set, whatever its form: an ImageFolder tree, or tar files.

    A URL needs a ``cache`` for copies of its tar files. Raises ConfigError where there is no such
    split, DataError for a damaged tar file, RemoteError.
    """
    if is_url(data_dir):
        assert cache is not None, "remote files need a cache"
        return open_remote(str(data_dir), split, cache)
    data_dir = Path(data_dir)
    if (tars := find_split(data_dir, split)) is None:
        return ImageFolder(data_dir, split)
    return TarShards(tars.paths, name=tars.name, split=split, classes=tars.classes)
