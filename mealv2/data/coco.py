"""Images with boxes in COCO's format: a JSON file of annotations and a folder of images."""

import json
import math
from collections import Counter
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mealv2.data.coco_name import CocoSplit
from mealv2.data.folder import UnorderedSource
from mealv2.data.image_files import MAX_BYTES
from mealv2.data.layouts import file_size, key_of
from mealv2.data.left_out import LeftOut
from mealv2.data.source import UNLABELLED
from mealv2.errors import ConfigError
from mealv2.storage.json_format import parse_json
from mealv2.storage.regular_files import read_regular

# Images of the published files. The paper's Table 8 has the sums of train and val, 123,287 (of 2014
# as of 2017), and test2014, 40,775, whose annotations are not public.
PUBLISHED = {
    "train2017": 118_287,
    "val2017": 5_000,
    "train2014": 82_783,
    "val2014": 40_504,
    "test2014": 40_775,
}
_MAX_JSON_BYTES = 1 << 34
_MAX_SIDE = 1 << 20  # pixels

# left, top, right, bottom in pixels of the image, and the class id
Object = tuple[float, float, float, float, int]


class CocoImage(NamedTuple):
    """An image of a split: its id and size in the annotations, and the objects to learn from."""

    image_id: int
    width: int
    height: int
    objects: tuple[Object, ...]


class CocoSource(UnorderedSource):
    """The images of one split, sorted by key, their paths below the folder of images, in NFC.

    ``images`` are their sizes and objects: boxes are clipped to the image, those without an area
    are dropped, crowds (``iscrowd``) are left out. Class ids follow the order of the category ids,
    which may have gaps; ``category_ids`` has them. ``annotations`` is the parsed file, for
    evaluation. ``labels`` are UNLABELLED: an image has any number of classes.
    Raises ConfigError for a file that is not of this format, paths outside the folder and images
    that are missing.
    """

    def __init__(self, found: CocoSplit) -> None:
        self.name, self.split = f"{found.name} ({found.part})", found.split
        self.path, self.left_out = found.annotations, LeftOut()
        self.annotations = _read(self.path)
        self.category_ids, self.classes = _categories(self.annotations, self.path)
        images = _images(self.annotations, self.path)
        self._paths_of = {key: found.images / entry["file_name"] for key, entry in images.items()}
        sizes = self._sizes(found.images)
        objects, dropped = _objects(self.annotations, images, self.category_ids, self.path)
        self.keys = sorted(images)
        self._paths = [self._paths_of[key] for key in self.keys]
        self.sizes = self.stored_sizes = [sizes[key] for key in self.keys]
        self.labels = [UNLABELLED] * len(self.keys)
        entries = [images[key] for key in self.keys]
        self.images = [
            CocoImage(e["id"], e["width"], e["height"], tuple(objects[e["id"]])) for e in entries
        ]
        if dropped:
            boxes = ", ".join(f"{number} {reason}" for reason, number in sorted(dropped.items()))
            self.left_out.remarks.append(f"boxes left out: {boxes}")
        published = PUBLISHED.get(found.part) if found.is_published else None
        if published not in (None, len(self.keys)):
            self.left_out.remarks.append(
                f"warning: {self.name} has {len(self.keys)} images, published are {published}; "
                "average precisions cannot be compared with published ones"
            )

    def _sizes(self, folder: Path) -> dict[str, int]:
        """Return the size in bytes of every image; raises ConfigError if one is missing."""
        found = {key: file_size(path) for key, path in self._paths_of.items()}
        missing = sorted(key for key, size in found.items() if size is None)
        if missing:
            raise ConfigError(
                f"{self.path} lists {len(found)} images, of which {len(missing)} are not in "
                f"{folder} ({missing[0]}{', …' if len(missing) > 1 else ''}); add them, or remove "
                "them from the file"
            )
        return {key: size for key, size in found.items() if size is not None}

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, position: int) -> bytes:
        """Return the encoded image at ``position``; raises OSError."""
        return read_regular(self._paths[position], max_bytes=MAX_BYTES)

    def where(self, position: int) -> str:
        """Return the path of an image for messages."""
        return str(self._paths[position])

    def with_objects(self) -> list[int]:
        """Return the positions of the images with at least one object to learn from."""
        return [position for position, image in enumerate(self.images) if image.objects]

    @property
    def objects(self) -> list[CocoImage]:
        """What the fingerprint has of the labels: size and objects of each image."""
        return self.images

    @property
    def num_objects(self) -> int:
        """The number of objects to learn from."""
        return sum(len(image.objects) for image in self.images)


def _read(path: Path) -> dict[str, Any]:
    """Return the annotations of a file; raises ConfigError unless they have COCO's three lists."""
    try:
        value = parse_json(read_regular(path, max_bytes=_MAX_JSON_BYTES))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read the annotations {path}: {reason}") from None
    for name in ("images", "annotations", "categories"):
        rows = value.get(name) if isinstance(value, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ConfigError(f"{path} is not in COCO's format: it has no list {name!r} of objects")
    return dict(value)


def _categories(annotations: dict[str, Any], path: Path) -> tuple[list[int], list[str]]:
    """Return category ids, ascending, and their names."""
    names: dict[int, str] = {}
    for row in annotations["categories"]:
        number, name = row.get("id"), row.get("name")
        if type(number) is not int or not isinstance(name, str) or number in names:
            raise ConfigError(f"{path}: a category needs an id of its own and a name: {_text(row)}")
        names[number] = name
    if len(set(names.values())) != len(names):
        twice = Counter(names.values()).most_common(1)[0][0]
        raise ConfigError(f"{path} has two categories of the name {twice!r}")
    if not names:
        raise ConfigError(f"{path} has no categories")
    ids = sorted(names)
    return ids, [names[number] for number in ids]


def _images(annotations: dict[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    """Return the entries of images by key; raises ConfigError."""
    found: dict[str, dict[str, Any]] = {}
    ids = set()
    for row in annotations["images"]:
        sides = row.get("width"), row.get("height")
        is_valid = all(type(side) is int and 0 < side <= _MAX_SIDE for side in sides)
        if type(row.get("id")) is not int or not isinstance(row.get("file_name"), str):
            raise ConfigError(f"{path}: an image needs an id and a file_name: {_text(row)}")
        if not is_valid:
            raise ConfigError(f"{path}: an image needs its width and height: {_text(row)}")
        key = key_of(row["file_name"], str(path))
        if key in found or row["id"] in ids:
            raise ConfigError(f"{path} lists image {row['id']}, {key}, twice; remove one")
        ids.add(row["id"])
        found[key] = row
    if not found:
        raise ConfigError(f"{path} has no images")
    return found


def _objects(
    annotations: dict[str, Any],
    images: dict[str, dict[str, Any]],
    category_ids: list[int],
    path: Path,
) -> tuple[dict[int, list[Object]], Counter[str]]:
    """Return the objects to learn from by image id, and how many others there are, by reason."""
    size_of = {row["id"]: (row["width"], row["height"]) for row in images.values()}
    class_of = {number: class_id for class_id, number in enumerate(category_ids)}
    found: dict[int, list[Object]] = {image_id: [] for image_id in size_of}
    dropped: Counter[str] = Counter()
    for row, (left, top, width, height) in _boxes(annotations, path):
        image_id = _known_id(row, "image_id", size_of, path)
        class_id = class_of[_known_id(row, "category_id", class_of, path)]
        if row.get("iscrowd"):
            dropped["of crowds"] += 1
            continue
        image_width, image_height = size_of[image_id]
        right, bottom = min(left + width, image_width), min(top + height, image_height)
        left, top = max(left, 0.0), max(top, 0.0)
        if right <= left or bottom <= top:
            dropped["without an area inside the image"] += 1
            continue
        found[image_id].append((left, top, right, bottom, class_id))
    return found, dropped


def _known_id(row: dict[str, Any], name: str, known: Container[int], path: Path) -> int:
    """Return an id of an annotation; raises ConfigError for an unknown one."""
    found = row.get(name)
    if type(found) is not int or found not in known:
        raise ConfigError(f"{path}: an annotation has an unknown {name}: {_text(row)}")
    return found


def _boxes(
    annotations: dict[str, Any], path: Path
) -> Iterator[tuple[dict[str, Any], tuple[float, float, float, float]]]:
    """Yield annotations and their boxes: left, top, width, height; raises ConfigError."""
    for row in annotations["annotations"]:
        box = row.get("bbox")
        is_box = isinstance(box, list) and len(box) == 4
        if not is_box or not all(
            type(side) in (int, float) and math.isfinite(side) and abs(side) < _MAX_SIDE
            for side in box
        ):
            raise ConfigError(
                f"{path}: an annotation needs a bbox [left, top, width, height]: {_text(row)}"
            )
        left, top, width, height = map(float, box)
        yield row, (left, top, width, height)


def _text(row: dict[str, Any]) -> str:
    """Return the beginning of an entry for a message."""
    return json.dumps(row, ensure_ascii=True)[:120]
