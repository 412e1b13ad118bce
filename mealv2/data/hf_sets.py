"""Data sets of Hugging Face's `datasets` as image sources, read from its local cache."""

import contextlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import huggingface_hub

from mealv2.data.folder import UnorderedSource
from mealv2.data.hf_name import HfName
from mealv2.data.image_files import MAX_BYTES
from mealv2.data.tar_splits import own_split
from mealv2.errors import ConfigError, DataError, RemoteError
from mealv2.storage.hub_cache import hub_offline
from mealv2.storage.reachable import require_reachable
from mealv2.storage.regular_files import read_regular

_OTHER_NAMES = {"val": "validation"}  # of splits


class HfSet(UnorderedSource):
    """A split of a data set; ``val`` is ``validation`` if it has no ``val``.

    Keys are the positions in the split, an image is its encoded bytes in the data set, class names
    are those of the column of class labels. Raises ConfigError for a data set that is not in the
    cache, a missing split, and columns that are missing or ambiguous.
    """

    def __init__(self, named: HfName, split: str) -> None:
        sets = _splits(named)
        found = sets.get(split, sets.get(_OTHER_NAMES.get(split, split)))
        if found is None:
            raise ConfigError(_missing_split(named, split, list(sets)))
        self.name, self.split = f"{named} ({split})", split
        image, label = _columns(named, found.features)
        self.classes: list[str] = list(found.features[label].names)
        rows = found.flatten_indices() if found._indices is not None else found
        self._images = rows.data.column(image)
        self.labels = [
            -1 if label is None else label for label in rows.data.column(label).to_pylist()
        ]
        if without := sum(not 0 <= label < len(self.classes) for label in self.labels):
            raise ConfigError(
                f"{self.name}: {without} of {len(self.labels)} images have no class; name another "
                "split, or write them to a folder and give it as --extra-data"
            )
        width = len(str(max(0, len(self.labels) - 1)))
        self.keys = [f"{position:0{width}d}" for position in range(len(self.labels))]
        self.sizes = self.stored_sizes = _sizes(self._images)

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, position: int) -> bytes:
        """Return the encoded image at ``position``; raises OSError, DataError if there is none."""
        image: dict[str, Any] = self._images[position].as_py() or {}
        if (data := image.get("bytes")) is not None:
            return bytes(data)
        if (path := image.get("path")) is None:
            raise DataError("the data set has no image in this row")
        return read_regular(Path(path), max_bytes=MAX_BYTES)


def require_no_split(named: HfName, split: str) -> None:
    """Raise ConfigError if a data set has a split that --val-fraction is to make."""
    if {split, _OTHER_NAMES.get(split, split)} & set(_splits(named)):
        raise ConfigError(own_split(Path(str(named)), split))


def download(named: HfName) -> None:
    """Download a data set of the Hub into the cache of `datasets`, unless it is there.

    Raises RemoteError if the Hub cannot be reached, ConfigError if it has no such data set.
    """
    if named.folder is not None:
        return
    with contextlib.suppress(ConfigError):
        _splits(named)
        return
    require_reachable(huggingface_hub.constants.ENDPOINT, "check the network")
    _load(named)


@lru_cache(maxsize=4)
def _splits(named: HfName) -> dict[str, Any]:
    """Return the local data sets by split; raises ConfigError."""
    named.check()
    with _datasets_offline():
        return _load(named)


def _load(named: HfName) -> dict[str, Any]:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        if named.name == "disk":
            found = datasets.load_from_disk(str(named.folder))
        elif named.folder is not None:
            found = datasets.load_dataset(named.name, data_dir=str(named.folder))
        else:
            found = datasets.load_dataset(named.name, named.config)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise _not_loaded(named, error) from None
    return dict(found) if isinstance(found, Mapping) else {str(found.split or "train"): found}


def _not_loaded(named: HfName, error: Exception) -> ConfigError | RemoteError:
    reason = " ".join(str(error).strip().split("\n")[0].split())
    if named.folder is not None:
        return ConfigError(f"{named} cannot be read: {reason}")
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        config = f" (config {named.config})" if named.config else ""
        return ConfigError(
            f"{named}{config} is not in the cache of `datasets`; add --download, or see "
            f"https://huggingface.co/datasets/{named.name} for its configs (hfds/NAME,config=…)"
        )
    return RemoteError(f"cannot download {named}: {reason}")


@contextlib.contextmanager
def _datasets_offline() -> Iterator[None]:
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        with hub_offline():
            yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _columns(named: HfName, features: Mapping[str, Any]) -> tuple[str, str]:
    """Return the columns of images and of class labels; raises ConfigError."""
    import datasets

    kinds = (("image", named.image, datasets.Image), ("label", named.label, datasets.ClassLabel))
    found = []
    for option, given, kind in kinds:
        known = [name for name, feature in features.items() if isinstance(feature, kind)]
        chosen = given or (option if option in known else known[0] if len(known) == 1 else None)
        if chosen not in known:
            what = f"no column {given}" if given else f"{len(known) or 'no'} columns"
            what += f" of type {kind.__name__}"
            listed = ", ".join(known or features)
            raise ConfigError(
                f"{named} has {what}; name one with hfds/NAME,{option}=COLUMN (columns: {listed})"
            )
        found.append(str(chosen))
    return found[0], found[1]


def _sizes(images: Any) -> list[int]:
    """Return the bytes of each image, from the offsets of the table or the sizes of the files."""
    import pyarrow.compute

    sizes: list[int] = []
    for chunk in images.chunks:
        lengths = pyarrow.compute.binary_length(chunk.field("bytes")).to_pylist()
        for length, path in zip(lengths, chunk.field("path").to_pylist(), strict=True):
            if length is None:
                length = Path(path).stat().st_size if path and Path(path).is_file() else 0
            sizes.append(length)
    return sizes


def _missing_split(named: HfName, split: str, splits: list[str]) -> str:
    if split == "train":
        advice = "name the split of the training images with --train-split"
    else:
        advice = (
            "name another split with --val-split, hold out a part of the training images with "
            "--val-fraction 0.2, or train without validation with --val-split none"
        )
    return f"{named} has the splits {', '.join(splits)}, not {split}; {advice}"
