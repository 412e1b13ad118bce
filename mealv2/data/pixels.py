"""Decode, crop, resize and flip: from an image file and a view to pixels.

All full JPEG decoders of the libjpeg-turbo family give the same bits, so the fast one is used if it
is installed. The resize is torch's or Pillow's; the two differ by up to 2 of 255.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from importlib import resources
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from mealv2.data.bit_depth import rgb_pixels
from mealv2.data.image_files import MAX_PIXELS, open_image
from mealv2.data.jpeg_restart import PACKED_MARKS, PACKED_MARKS_END, read_header
from mealv2.data.operations import apply_operations
from mealv2.errors import DataError
from mealv2.view_recipe import ViewRecipe
from mealv2.views import View, evaluation_resize

try:
    import simplejpeg
except ImportError:  # Pillow decodes to the same bits
    simplejpeg = None

# The library, bilinear unless it is named, always antialiased; torch is three times as fast.
Resize = Literal["torch", "pil", "torch-bicubic", "pil-bicubic"]
RESIZES: tuple[Resize, ...] = get_args(Resize)

_FAST_COLOURS = ("Gray", "YCbCr", "RGB")  # those that simplejpeg decodes as Pillow does
_JPEG = b"\xff\xd8\xff"


def interpolation(resize: Resize) -> str:
    """Return a plan's text for a resize."""
    library, _, filter_name = resize.partition("-")
    return f"{filter_name or 'bilinear'}, antialias ({'PIL' if library == 'pil' else library})"


def resize_of(text: object) -> Resize:
    """Return the resize of a plan's text; Pillow's for imported labels and any other text."""
    return next((resize for resize in RESIZES if interpolation(resize) == text), "pil")


def decode(data: bytes) -> np.ndarray:
    """Decode an encoded image to RGB, uint8 H x W x 3, as torchvision's ImageFolder loader does.

    The first frame, ``convert("RGB")``, no EXIF rotation; ``rgb_pixels`` states how 16 bits and
    floats are scaled. Raises DataError with the reason for bytes that are not an image, are
    truncated or have more than MAX_PIXELS pixels.
    """
    if not data:
        raise DataError("the file is empty")
    pixels_HWC = _decode_jpeg(data) if data.startswith(_JPEG) else None
    return _decode_with_pillow(data) if pixels_HWC is None else pixels_HWC


def _decode_jpeg(data: bytes) -> np.ndarray | None:
    """Decode a plain JPEG; None for one that needs Pillow."""
    if simplejpeg is None:
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in _FAST_COLOURS or height * width > MAX_PIXELS:
            return None
        pixels_HWC: np.ndarray = simplejpeg.decode_jpeg(data, "RGB")
        return pixels_HWC
    except ValueError:  # damaged, or only a warning of libjpeg: Pillow decides
        return None


def _decode_with_pillow(data: bytes) -> np.ndarray:
    try:
        with open_image(data) as image:
            return rgb_pixels(image)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # PIL's plugins raise OSError, SyntaxError, struct.error, …
        raise DataError(f"{type(error).__name__}: {error}".replace("\n", " ")) from None


# Some views of an image as a function of its width and height.
ViewsOf = Callable[[int, int], Sequence[View]]


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """A decoded image of ``width`` x ``height`` pixels, or a part that starts at (top, left)."""

    pixels_HWC: np.ndarray
    width: int
    height: int
    top: int = 0
    left: int = 0

    @property
    def is_complete(self) -> bool:
        """Whether all pixels of the image are there."""
        return self.pixels_HWC.shape[:2] == (self.height, self.width)

    def cut(self, view: View, img_size: int, *, resize: Resize) -> np.ndarray:
        """Return the pixels of a view inside the part; see ``cut``."""
        inside = replace(view, top=view.top - self.top, left=view.left - self.left)
        return cut(self.pixels_HWC, inside, img_size, resize=resize)


def decode_for(data: bytes, views_of: ViewsOf | None) -> DecodedImage:
    """Decode an image; of a JPEG with restart markers only the part that contains its views.

    ``views_of(width, height)`` are the views; None needs the full image. The pixels are equal.
    """
    is_packed = any(data.find(mark, 0, PACKED_MARKS_END) >= 0 for mark in PACKED_MARKS)
    file = read_header(data) if views_of and is_packed else None
    if views_of and file and file.frame.width * file.frame.height <= MAX_PIXELS:
        frame = file.frame
        views = views_of(frame.width, frame.height)
        # a padded crop may leave the image
        top = max(0, min(view.top for view in views))
        left = max(0, min(view.left for view in views))
        height = min(frame.height, max(view.top + view.height for view in views)) - top
        width = min(frame.width, max(view.left + view.width for view in views)) - left
        is_empty = height < 1 or width < 1  # a box may be all padding
        if not is_empty and (part := file.region(top, left, height, width)) is not None:
            return DecodedImage(decode(part.data), frame.width, frame.height, part.top, part.left)
    pixels_HWC = decode(data)
    height, width, _ = pixels_HWC.shape
    return DecodedImage(pixels_HWC, width, height)


def cut(
    pixels_HWC: np.ndarray, view: View, img_size: int, *, resize: Resize = "torch"
) -> np.ndarray:
    """Return a view of a decoded image as uint8 (img_size, img_size, 3).

    Crop first, then the antialiased resize, then the flips: torchvision's order. Then come the
    operations of the view.
    """
    if view.is_centre:
        cropped_SSC = centre_crop(pixels_HWC, img_size, resize=resize)
        resized_SSC = np.require(cropped_SSC, requirements=["C", "W"])
    else:
        resized_SSC = resized(_box_pixels(pixels_HWC, view), img_size, img_size, resize)
    flips = [axis for axis, is_flipped in ((1, view.vflip), (2, view.flip)) if is_flipped]
    if flips:  # ten times as fast as NumPy's reversed rows of three-byte pixels
        resized_SSC = _as_array(torch.from_numpy(resized_SSC).permute(2, 0, 1).flip(flips))
    return apply_operations(resized_SSC, view.operations)


def _box_pixels(pixels_HWC: np.ndarray, view: View) -> np.ndarray:
    """Return the box of a view, black outside of the image."""
    height, width, _ = pixels_HWC.shape
    bottom, right = view.top + view.height, view.left + view.width
    if view.top >= 0 and view.left >= 0 and bottom <= height and right <= width:
        return pixels_HWC[view.top : bottom, view.left : right]
    box_HWC = np.zeros((view.height, view.width, 3), dtype=np.uint8)
    top, left = max(0, view.top), max(0, view.left)
    inside_HWC = pixels_HWC[top : max(0, bottom), left : max(0, right)]
    rows, columns = top - view.top, left - view.left
    box_HWC[rows : rows + inside_HWC.shape[0], columns : columns + inside_HWC.shape[1]] = inside_HWC
    return box_HWC


def centre_side(side: int, other: int, img_size: int) -> tuple[int, int]:
    """Return the length to resize a side to for the centre crop, and where the crop starts in it.

    ``other`` is the length of the other side.
    """
    short = evaluation_resize(img_size)
    # torchvision: the longer side is int(short * long / short side)
    length = short if side <= other else max(short, int(short * side / other))
    return length, round((length - img_size) / 2)


def centre_crop(pixels_HWC: np.ndarray, img_size: int, *, resize: Resize = "torch") -> np.ndarray:
    """Return the evaluation view as uint8 (img_size, img_size, 3).

    Resize the shorter side to int(256 / 224 * size), crop the centre (official get_val_loader).
    """
    height, width, _ = pixels_HWC.shape
    new_height, top = centre_side(height, width, img_size)
    new_width, left = centre_side(width, height, img_size)
    resized_HWC = resized(pixels_HWC, new_height, new_width, resize)
    return resized_HWC[top : top + img_size, left : left + img_size]


def resized(pixels_HWC: np.ndarray, height: int, width: int, resize: Resize) -> np.ndarray:
    """Return an image resized to other sides, uint8, antialiased."""
    # the rows of a crop are not contiguous; NumPy copies them in this thread, torch would use more
    pixels_HWC = np.require(pixels_HWC, requirements=["C", "W"])
    library, _, filter_name = resize.partition("-")
    if library == "pil":
        image, resampling = Image.fromarray(pixels_HWC), Image.Resampling
        kind = resampling.BICUBIC if filter_name == "bicubic" else resampling.BILINEAR
        return np.array(image.resize((width, height), kind))
    # channels-last strides, also of the batch dimension: the result has them too, in half the time
    pixels_1CHW = torch.from_numpy(pixels_HWC.reshape(1, *pixels_HWC.shape)).permute(0, 3, 1, 2)
    mode = filter_name or "bilinear"
    resized_1CHW = F.interpolate(pixels_1CHW, (height, width), mode=mode, antialias=True)
    return _as_array(resized_1CHW[0])


def _as_array(pixels_CHW: torch.Tensor) -> np.ndarray:
    pixels_HWC: np.ndarray = pixels_CHW.permute(1, 2, 0).numpy()
    return pixels_HWC


_PROBE_SIZE = 32
_PROBE_VIEWS = (  # of an image of 61 x 47: larger, smaller, taller and wider than the result
    View(0, 0, 47, 61, False),
    View(3, 7, 11, 9, True),
    View(1, 20, 45, 17, False),
    View(30, 2, 13, 58, False),
)


@cache
def probe_sha256(resize: Resize) -> str:
    """Return a SHA-256 (hex) of the views of probe.jpg, as this machine's libraries cut them.

    Machines with equal hashes cut equal pixels from any JPEG, whatever their library versions.
    """
    pixels_HWC = decode(resources.files("mealv2.data").joinpath("probe.jpg").read_bytes())
    cuts = [cut(pixels_HWC, view, _PROBE_SIZE, resize=resize) for view in _PROBE_VIEWS]
    cuts.append(centre_crop(pixels_HWC, _PROBE_SIZE, resize=resize))
    return sha256(b"".join(pixels.tobytes() for pixels in cuts)).hexdigest()


@cache
def operations_sha256() -> str:
    """Return a SHA-256 (hex) of probe.jpg after all operations, by this machine's libraries."""
    pixels_HWC = decode(resources.files("mealv2.data").joinpath("probe.jpg").read_bytes())
    recipe = ViewRecipe(color_jitter=0.4, aa="rand-m9-n2-p1-mstd1", reprob=0.5, remode="pixel")
    increasing = replace(recipe, aa="rand-m9-n2-p1-mstd1-inc1", remode="rand")
    changed = [
        cut(pixels_HWC, replace(_PROBE_VIEWS[0], operations=operations), _PROBE_SIZE, resize="pil")
        for drawn in (recipe, increasing)
        for operations in (drawn.operations("probe.jpg", 0, index) for index in range(60))
    ]
    return sha256(b"".join(pixels.tobytes() for pixels in changed)).hexdigest()
