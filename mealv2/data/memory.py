"""Images in memory, or behind any Python sequence, as an image source."""

from collections.abc import Sequence

from mealv2.data.folder import UnorderedSource
from mealv2.errors import ConfigError

# A key, the encoded image, and its class: a name, or an id with ``classes``.
KeyedImage = tuple[str, bytes, str | int]


class ImageSequence(UnorderedSource):
    """The images of a sequence of (key, encoded image, class), in its order.

    The sequence is read once for keys, classes and sizes, then image by image in any order, by
    several threads. Classes are names, whose ids follow their sorted order, or ids of ``classes``.
    Raises ConfigError for a key that is found twice, and for a class without a name.
    """

    def __init__(
        self,
        images: Sequence[KeyedImage],
        *,
        split: str = "train",
        classes: Sequence[str] | None = None,
    ) -> None:
        self.name = f"images in memory, {split}"
        self.split = split
        self._images = images
        self.keys: list[str] = []
        self.sizes: list[int] = []
        found: list[str | int] = []
        for key, data, label in images:
            self.keys.append(key)
            self.sizes.append(len(data))
            found.append(label)
        self.stored_sizes = self.sizes
        if len(set(self.keys)) != len(self.keys):
            twice = next(key for key in self.keys if self.keys.count(key) > 1)
            raise ConfigError(f"the key {twice!r} is found twice; every image needs its own")
        names = [label for label in found if isinstance(label, str)]
        self.classes = sorted(set(names)) if classes is None else list(classes)
        ids = {name: number for number, name in enumerate(self.classes)}
        self.labels = [self._class_id(label, ids) for label in found]

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, position: int) -> bytes:
        """Return the encoded image at ``position``."""
        return self._images[position][1]

    def _class_id(self, label: str | int, ids: dict[str, int]) -> int:
        if isinstance(label, str) and label in ids:
            return ids[label]
        if not isinstance(label, str) and 0 <= label < len(self.classes):
            return label
        raise ConfigError(f"the class {label!r} has no name; give the names of all as classes")
