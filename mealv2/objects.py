"""The objects in an image, as a detector sees it: boxes and classes on the resized image."""

from typing import NamedTuple

from torch import Tensor, device


class ImageObjects(NamedTuple):
    """The size of a resized image, height and width in pixels, and the objects in it.

    ``boxes_N4`` are left, top, right and bottom in its pixels, float32; ``classes_N`` class ids.
    """

    size: tuple[int, int]
    boxes_N4: Tensor
    classes_N: Tensor

    def to(self, target: device) -> "ImageObjects":
        """Return the objects on a device."""
        return ImageObjects(self.size, self.boxes_N4.to(target), self.classes_N.to(target))
