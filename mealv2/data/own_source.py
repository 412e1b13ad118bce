"""Data sets of the user's own code: ``package.module:function``, and torch Datasets as sources."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from PIL import Image

from mealv2.data.folder import UnorderedSource
from mealv2.data.source import UNLABELLED, ImageSource
from mealv2.errors import ConfigError, DataError, MealError
from mealv2.own_code import folder_first, import_function, is_function_name, reason_of

# What an ImageSource has; UnorderedSource gives those of the second line.
_MEMBERS = (
    *("name", "split", "keys", "labels", "sizes", "stored_sizes", "classes", "read", "__len__"),
    *("shard_starts", "groups", "left_out", "announce", "original_hash"),
)
_HEADS = {"L": b"P5", "RGB": b"P6"}
_RGB = ("1", "P", "PA", "LA", "La", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")


class ImageDataset(Protocol):
    """A map-style torch Dataset: items (PIL image or encoded bytes, class id), and class names.

    Class ids come from ``targets`` if the data set has this list, otherwise from a pass over all
    items. Keys come from ``keys``, a list of unique texts; without it they are the positions.
    """

    @property
    def classes(self) -> Sequence[str]:
        """The class names, by class id."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Any, Any]: ...


class OwnSource(NamedTuple):
    """A function that returns a data set, and the folder in which its module is looked up first."""

    name: str
    folder: Path

    def open(self, split: str) -> ImageSource:
        """Call the function with a split; return what it returns as an ImageSource.

        Raises ConfigError for a function that is missing or fails, and for another result.
        """
        what = f"data set {self.name}"
        with folder_first(self.folder):
            function = import_function(self.name, what)
            try:
                found = function(split)
            except (MemoryError, MealError):
                raise
            except Exception as error:  # of the user's code: every kind
                raise ConfigError(
                    f"{what} has no split {split}: {reason_of(error)}; without validation images, "
                    "use --val-split none or --val-fraction 0.2"
                ) from error
            source = as_source(found, f"{self.name} ({split})", split=split)
        if min(source.labels) == UNLABELLED:
            raise ConfigError(
                f"{source.name} has images without a class; give them as --extra-data"
            )
        return source


def own_source(path: Path) -> OwnSource | None:
    """Return the function that a path names, None for any other path, or one that exists.

    The module is looked up in the path's folder, so that the absolute path of a setting means the
    same from every folder.
    """
    if not is_function_name(path.name) or path.exists():
        return None
    return OwnSource(path.name, path.absolute().parent)


def as_source(found: Any, name: str, *, split: str) -> ImageSource:
    """Return an ImageSource as it is, and an ImageDataset as a source.

    Raises ConfigError for anything else, and for a source or data set that contradicts itself.
    """
    missing = [member for member in _MEMBERS if not hasattr(found, member)]
    if "read" not in missing:
        if missing:
            raise ConfigError(
                f"{name} has read, but no {missing[0]}: mealv2.ImageSource lists what an image "
                "source has; derive it from mealv2.UnorderedSource"
            )
        source: ImageSource = found
    elif all(hasattr(found, member) for member in ("__getitem__", "__len__", "classes")):
        source = DatasetSource(found, name, split=split)
    else:
        raise ConfigError(
            f"{name} is a {type(found).__name__}; an ImageSource is needed, or a map-style Dataset "
            "of (PIL image or encoded bytes, class id) with classes"
        )
    _check(source, name)
    return source


def _check(source: ImageSource, name: str) -> None:
    """Raise ConfigError for a source whose columns do not belong together."""
    lengths = {len(source.keys), len(source.labels), len(source.sizes), len(source.stored_sizes)}
    if lengths != {len(source)}:
        raise ConfigError(f"{name} has {len(source)} images, but other numbers of keys, labels, …")
    if not len(source):
        raise ConfigError(f"{name} has no images")
    if len(set(source.keys)) < len(source.keys):
        raise ConfigError(f"{name} has a key twice; every image needs a key of its own")
    if not all(isinstance(key, str) for key in source.keys):
        raise ConfigError(f"{name} has keys that are not text")
    lowest = 0 if isinstance(source, DatasetSource) else UNLABELLED
    if min(source.labels) < lowest or max(source.labels) >= len(source.classes):
        raise ConfigError(f"{name} has class ids outside 0 to {len(source.classes) - 1}")


class DatasetSource(UnorderedSource):
    """The images of an ImageDataset; several threads read its items.

    A PIL image becomes binary PPM, PGM if gray; sizes are 0, because they would need a pass over
    the images. Raises ConfigError for class ids that are not integers.
    """

    def __init__(self, images: ImageDataset, name: str, *, split: str) -> None:
        self.name, self.split = name, split
        self.classes = [str(each) for each in images.classes]
        self._images = images
        keys = getattr(images, "keys", None)
        width = len(str(max(0, len(images) - 1)))
        self.keys: Sequence[str] = (
            [f"{position:0{width}d}" for position in range(len(images))]
            if keys is None or callable(keys)
            else list(keys)
        )
        targets: Iterable[Any] | None = getattr(images, "targets", None)
        if targets is None:
            targets = (images[position][1] for position in range(len(images)))
        try:
            self.labels = [_integer(target) for target in targets]
        except Exception as error:  # of the user's code: every kind
            raise ConfigError(
                f"{name}: its class ids cannot be read: {reason_of(error)}"
            ) from error
        self.sizes = self.stored_sizes = [0] * len(images)

    def __len__(self) -> int:
        return len(self._images)

    def read(self, position: int) -> bytes:
        """Return the encoded image at ``position``; raises DataError."""
        try:
            image = self._images[position][0]
        except (MemoryError, MealError, OSError):
            raise
        except Exception as error:  # of the user's code: every kind
            raise DataError(f"the data set fails: {reason_of(error)}") from error
        if isinstance(image, bytes | bytearray | memoryview):
            return bytes(image)
        if isinstance(image, Image.Image):
            return _encoded(image)
        raise DataError(
            f"the data set has a {type(image).__name__}; it must give PIL images or encoded bytes, "
            "without transforms"
        )


def _integer(target: Any) -> int:
    if int(target) != target:
        raise ValueError(f"{target!r} is not an integer")
    return int(target)


def _encoded(image: Image.Image) -> bytes:
    """Return an image as PPM or PGM, whose bytes depend on the pixels only."""
    if image.mode in _RGB:  # as torchvision's loader
        image = image.convert("RGB")
    if image.mode not in _HEADS:
        raise DataError(f"a PIL image of mode {image.mode}; give its encoded bytes instead")
    head = b"%s\n%d %d\n255\n" % (_HEADS[image.mode], *image.size)
    return head + image.tobytes()
