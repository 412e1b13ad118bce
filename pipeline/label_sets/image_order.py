"""The order of a folder's images in torchvision's ImageFolder, which numbers in files refer to."""

from pathlib import Path

import numpy as np
from torchvision import datasets

from mealv2.data.folder import key_of, split_folder
from mealv2.data.source import ImageSource
from mealv2.errors import ConfigError
from mealv2.storage.urls import Location, shown


def torchvision_order(source: ImageSource, data_dir: Location, split: str) -> np.ndarray:
    """Return the position in ``source`` of each image of torchvision's ImageFolder, int64 N.

    ``source`` is the split of ``data_dir``. Raises ConfigError if it is not a folder of classes, or
    if ImageFolder lists an image that ``source`` has not.
    """
    folder = split_folder(data_dir, split) if isinstance(data_dir, Path) else None
    try:
        if folder is None:
            raise FileNotFoundError("it is not a local folder")
        paths = [Path(path) for path, _ in datasets.ImageFolder(str(folder)).samples]
    except FileNotFoundError as error:
        raise ConfigError(
            f"--data-dir {shown(data_dir)}: SRe2L's files number the images of a folder of "
            f"class folders, and {error}; give that folder"
        ) from None
    assert folder is not None
    position_of = {key: position for position, key in enumerate(source.keys)}
    keys = [key_of(path, folder) for path in paths]
    if unknown := [key for key in keys if key not in position_of]:
        raise ConfigError(
            f"torchvision's ImageFolder, whose numbers SRe2L's files use, lists {folder}/"
            f"{unknown[0]}, but mealv2 leaves it out ({len(unknown)} such); move it away, if it "
            "was not labelled"
        )
    return np.array([position_of[key] for key in keys], np.int64)
