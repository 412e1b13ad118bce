"""How a view becomes pixels: decode, crop, resize, flip; and a probe that says whether today's
libraries still give the same pixels.

Every full JPEG decoder of the libjpeg-turbo family gives the same bits, so the fast one is used
where it is installed; the resize is torch's or Pillow's, which differ by up to 2 of 255.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from importlib import resources
from typing import Literal, get_args

import numpy as np
import PIL
import torch
from PIL import Image
from torch.nn import functional as F

from mealv2.data import jpeg_restart
from mealv2.errors import DataError
from mealv2.views import View, evaluation_resize

try:
    import simplejpeg
except ImportError:  # then Pillow decodes to the same bits
    simplejpeg = None

# What resizes: both are antialiased and bilinear, torch is three times as fast.
Resize = Literal["torch", "pil"]
RESIZES: tuple[Resize, ...] = get_args(Resize)

_INTERPOLATION = "bilinear, antialias"  # what a plan says, before who did it
_FAST_COLOURS = ("Gray", "YCbCr", "RGB")  # simplejpeg's names of what it decodes as Pillow does
_JPEG = b"\xff\xd8\xff"


def interpolation(resize: Resize) -> str:
    """Return what a plan says about how a box became pixels."""
    return f"{_INTERPOLATION} ({'PIL' if resize == 'pil' else resize})"


def resize_of(interpolation: object) -> Resize:
    """Return who resized, of what a plan says; Pillow did before plans said it."""
    return "torch" if interpolation == f"{_INTERPOLATION} (torch)" else "pil"


def decode(data: bytes) -> np.ndarray:
    """Decode an encoded image to RGB, uint8 H x W x 3, as torchvision's ImageFolder loader does.

    The first frame, ``convert("RGB")``, no EXIF rotation. Raises DataError with the reason when the
    bytes are no image, end too early or unpack to a decompression bomb; the caller knows the name.
    """
    if not data:
        raise DataError("the file is empty")
    pixels_HWC = _decode_jpeg(data) if data.startswith(_JPEG) else None
    return _decode_with_pillow(data) if pixels_HWC is None else pixels_HWC


def _decode_jpeg(data: bytes) -> np.ndarray | None:
    """Decode a plain JPEG; None for one that Pillow has to look at."""
    if simplejpeg is None:
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in _FAST_COLOURS or height * width > (Image.MAX_IMAGE_PIXELS or 0):
            return None
        pixels_HWC: np.ndarray = simplejpeg.decode_jpeg(data, "RGB")
        return pixels_HWC
    except ValueError:  # damaged, or what libjpeg only warns of: Pillow knows which
        return None


def _decode_with_pillow(data: bytes) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.array(image.convert("RGB"))
    except PIL.UnidentifiedImageError:
        raise DataError("not an image that PIL can read") from None
    except MemoryError:
        raise
    except Exception as error:
        # PIL's plugins raise OSError, SyntaxError, ValueError, struct.error, …
        raise DataError(f"{type(error).__name__}: {error}".replace("\n", " ")) from None


# Some views of an image, given its width and height.
ViewsOf = Callable[[int, int], Sequence[View]]


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """A decoded image of ``width`` x ``height`` pixels, or the part of it from (top, left) on."""

    pixels_HWC: np.ndarray
    width: int
    height: int
    top: int = 0
    left: int = 0

    def cut(self, view: View, img_size: int, *, resize: Resize) -> np.ndarray:
        """Return a view of the image, which is inside the part; see ``cut``."""
        inside = replace(view, top=view.top - self.top, left=view.left - self.left)
        return cut(self.pixels_HWC, inside, img_size, resize=resize)


def decode_for(data: bytes, views_of: ViewsOf | None) -> DecodedImage:
    """Decode an image, or a part that holds its views where restart markers allow it.

    ``views_of(width, height)`` are the views; None takes the whole. The pixels are the same.
    """
    file = None if views_of is None else jpeg_restart.opened(data)
    if views_of is not None and file is not None:
        views = views_of(file.width, file.height)
        top, left = min(view.top for view in views), min(view.left for view in views)
        height = max(view.top + view.height for view in views) - top
        width = max(view.left + view.width for view in views) - left
        part = file.region(top, left, height, width)
        if part is not None:
            corner = top - part.top, left - part.left
            return DecodedImage(decode(part.data), file.width, file.height, *corner)
    pixels_HWC = decode(data)
    height, width, _ = pixels_HWC.shape
    return DecodedImage(pixels_HWC, width, height)


def cut(
    pixels_HWC: np.ndarray, view: View, img_size: int, *, resize: Resize = "torch"
) -> np.ndarray:
    """Return a view of a decoded image as uint8 (img_size, img_size, 3).

    Crop first, then the antialiased bilinear resize, then the flip: torchvision's order.
    """
    rows = slice(view.top, view.top + view.height)
    columns = slice(view.left, view.left + view.width)
    resized_SSC = _resized(pixels_HWC[rows, columns], img_size, img_size, resize)
    return _flipped(resized_SSC) if view.flip else resized_SSC


def centre_crop(pixels_HWC: np.ndarray, img_size: int, *, resize: Resize = "torch") -> np.ndarray:
    """Return the evaluation view as uint8 (img_size, img_size, 3).

    Resize the shorter side to int(256 / 224 * size), crop the centre (official get_val_loader).
    """
    height, width, _ = pixels_HWC.shape
    short = evaluation_resize(img_size)
    # torchvision: the longer side is int(short * long / short side)
    if width <= height:
        new_height, new_width = max(short, int(short * height / width)), short
    else:
        new_height, new_width = short, max(short, int(short * width / height))
    resized_HWC = _resized(pixels_HWC, new_height, new_width, resize)
    top, left = round((new_height - img_size) / 2), round((new_width - img_size) / 2)
    return resized_HWC[top : top + img_size, left : left + img_size]


def _resized(pixels_HWC: np.ndarray, height: int, width: int, resize: Resize) -> np.ndarray:
    # a crop's rows lie apart: NumPy joins them in this thread, torch would ask others to help
    pixels_HWC = np.require(pixels_HWC, requirements=["C", "W"])
    if resize == "pil":
        image = Image.fromarray(pixels_HWC)
        return np.array(image.resize((width, height), Image.Resampling.BILINEAR))
    # channels-last by its strides, that of the batch included: so is the result then, in half the
    # time, and it need not be transposed to lie in a batch
    pixels_1CHW = torch.from_numpy(pixels_HWC.reshape(1, *pixels_HWC.shape)).permute(0, 3, 1, 2)
    resized_1CHW = F.interpolate(pixels_1CHW, (height, width), mode="bilinear", antialias=True)
    return _as_array(resized_1CHW[0])


def _flipped(pixels_HWC: np.ndarray) -> np.ndarray:
    # ten times as fast as NumPy's reversed pixels of three bytes
    return _as_array(torch.from_numpy(pixels_HWC).permute(2, 0, 1).flip(2))


def _as_array(pixels_CHW: torch.Tensor) -> np.ndarray:
    pixels_HWC: np.ndarray = pixels_CHW.permute(1, 2, 0).numpy()
    return pixels_HWC


_PROBE_SIZE = 32
_PROBE_VIEWS = (  # of a picture of 61 x 47: larger, smaller, taller and wider than the result
    View(0, 0, 47, 61, False),
    View(3, 7, 11, 9, True),
    View(1, 20, 45, 17, False),
    View(30, 2, 13, 58, False),
)


@cache
def probe_sha256(resize: Resize) -> str:
    """Return a SHA-256 (hex) of a picture's views, as this machine's libraries cut them.

    Two machines with the same one cut the same pixels of any JPEG, whatever their versions.
    """
    pixels_HWC = decode(resources.files("mealv2.data").joinpath("probe.jpg").read_bytes())
    cuts = [cut(pixels_HWC, view, _PROBE_SIZE, resize=resize) for view in _PROBE_VIEWS]
    cuts.append(centre_crop(pixels_HWC, _PROBE_SIZE, resize=resize))
    return sha256(b"".join(pixels.tobytes() for pixels in cuts)).hexdigest()
