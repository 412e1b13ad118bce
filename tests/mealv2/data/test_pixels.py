"""pixels: torchvision's pixels, to the bit with Pillow, within two levels with torch."""

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets.folder import pil_loader
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize
from torchvision.transforms import functional as tvf

from mealv2.data import image_files
from mealv2.data import pixels as mealv2_pixels
from mealv2.data.pixels import (
    RESIZES,
    centre_crop,
    cut,
    decode,
    decode_for,
    interpolation,
    probe_sha256,
    resize_of,
)
from mealv2.errors import DataError
from mealv2.views import View, view_of
from pictures import encoded, noise, photo

# --- decode ---------------------------------------------------------------------------------------


def exif_rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    return encoded(photo(31, 20), "JPEG", exif=exif)


def palette(transparency: int | bytes) -> bytes:
    image = photo(31, 20).quantize(16)
    return encoded(image, "PNG", transparency=transparency)


def animated(kind: str, **options: object) -> bytes:
    frames = [photo(31, 20), photo(31, 20).rotate(90), photo(31, 20).rotate(180)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)


IMAGES = {
    "rgb.jpg": lambda: encoded(photo(31, 20), "JPEG"),
    "progressive.jpg": lambda: encoded(photo(31, 20), "JPEG", progressive=True),
    "grey.jpg": lambda: encoded(photo(31, 20).convert("L"), "JPEG"),
    "cmyk.jpg": lambda: encoded(Image.fromarray(noise(31, 20, 4), "CMYK"), "JPEG"),
    "exif-rotated.jpg": exif_rotated,
    "palette.png": lambda: encoded(photo(31, 20).quantize(16), "PNG"),
    "palette-one-transparent.png": lambda: palette(3),
    "palette-alpha.png": lambda: palette(bytes(range(0, 256, 16))),
    "rgba.png": lambda: encoded(Image.fromarray(noise(31, 20, 4), "RGBA"), "PNG"),
    "grey-alpha.png": lambda: encoded(Image.fromarray(noise(31, 20, 2), "LA"), "PNG"),
    "one-bit.png": lambda: encoded(photo(31, 20).convert("1"), "PNG"),
    "rgba.tif": lambda: encoded(Image.fromarray(noise(31, 20, 4), "RGBA"), "TIFF"),
    "a.gif": lambda: encoded(photo(31, 20).quantize(64), "GIF"),
    "a.avif": lambda: encoded(photo(31, 20), "AVIF"),
    "cmyk.tif": lambda: encoded(Image.fromarray(noise(31, 20, 4), "CMYK"), "TIFF"),
    "multi-page.tif": lambda: animated("TIFF"),
    "animated.webp": lambda: animated("WEBP", lossless=True),
    "animated-gif.webp": lambda: animated("GIF"),
    "a.bmp": lambda: encoded(photo(31, 20), "BMP"),
    "a.ppm": lambda: encoded(photo(31, 20), "PPM"),
    "a.pgm": lambda: encoded(photo(31, 20).convert("L"), "PPM"),
    "1x1.png": lambda: encoded(photo(1, 1), "PNG"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_decode_equals_torchvisions_loader_bit_by_bit(tmp_path, name):
    data = IMAGES[name]()
    (tmp_path / name).write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PIL says of a palette with alpha
        expected = pil_loader(tmp_path / name)
        pixels_HWC = decode(data)
    assert pixels_HWC.dtype == np.uint8
    assert np.array_equal(pixels_HWC, np.asarray(expected))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="zero-byte"),
        pytest.param(b"<html>404 not found</html>", id="text named .jpg"),
        pytest.param(b"\xff\xd8\xff\xe0", id="a JPEG's first four bytes"),
        pytest.param(b"\x89PNG\r\n\x1a\n", id="a PNG's signature"),
        *(
            pytest.param(IMAGES[name]()[: int(len(IMAGES[name]()) * part)], id=f"{part} of {name}")
            for name in ("rgb.jpg", "rgba.png", "animated.webp", "multi-page.tif", "a.bmp")
            for part in (0.2, 0.6)
            if (name, part) != ("multi-page.tif", 0.6)  # its first page is whole there
        ),
    ],
)
def test_what_is_no_whole_image_raises_data_error_in_one_line(data):
    with pytest.raises(DataError) as caught:
        decode(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_decompression_bomb_raises_data_error(monkeypatch, kind):
    data = encoded(photo(31, 20), kind)
    monkeypatch.setattr(image_files, "MAX_PIXELS", 600)
    monkeypatch.setattr(mealv2_pixels, "MAX_PIXELS", 600)
    with pytest.raises(DataError, match="more than 600 pixels"):
        decode(data)


# --- from a view to pixels ------------------------------------------------------------------------

DRAWN = [("a.jpg", i, 100, 75) for i in range(24)] + [
    ("b.jpg", 0, width, height) for width, height in ((1, 1), (1, 90), (90, 1))
]
VIEWS = [
    *((w, h, view_of(key, index, seed=0, width=w, height=h)) for key, index, w, h in DRAWN),
    (500, 375, View(top=374, left=499, height=1, width=1, flip=True)),
    (500, 375, View(top=0, left=0, height=375, width=500, flip=False)),
    (500, 375, View(top=5, left=7, height=32, width=32, flip=True)),
]
SHAPES = [(500, 375), (375, 500), (256, 256), (257, 256), (256, 259), (1, 1), (3, 40), (41, 3)]


@pytest.mark.parametrize("img_size", [1, 32, 57])
def test_cut_equals_torchvisions_resized_crop_and_flip_bit_by_bit(img_size):
    for width, height, view in VIEWS:
        image = photo(width, height)
        box = view.top, view.left, view.height, view.width
        expected = tvf.resized_crop(
            image, *box, [img_size, img_size], InterpolationMode.BILINEAR, antialias=True
        )
        expected = tvf.hflip(expected) if view.flip else expected
        pixels = cut(np.asarray(image), view, img_size, resize="pil")
        assert pixels.dtype == np.uint8
        assert pixels.shape == (img_size, img_size, 3)
        assert np.array_equal(pixels, np.asarray(expected)), (width, height, view)


@pytest.mark.parametrize("img_size", [1, 6, 7, 32, 224, 380])
@pytest.mark.parametrize(("width", "height"), [*SHAPES, (333, 499)])
def test_centre_crop_equals_torchvisions_resize_and_centre_crop_bit_by_bit(width, height, img_size):
    image = photo(width, height)
    official = Compose([Resize(int(256 / 224 * img_size)), CenterCrop(img_size)])
    pixels = centre_crop(np.asarray(image), img_size, resize="pil")
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, np.asarray(official(image)))


def test_cut_with_torch_is_within_two_levels_of_pillows():
    worst, total, count = 0, 0, 0
    for number in range(60):
        width, height = 40 + 7 * number, 200 - 3 * number
        pixels_HWC = np.asarray(photo(width, height))
        for img_size in (32, 224):
            view = view_of("photo", number, seed=img_size, width=width, height=height)
            exact, fast = (cut(pixels_HWC, view, img_size, resize=r) for r in ("pil", "torch"))
            difference = np.abs(exact.astype(int) - fast.astype(int))
            worst, total = max(worst, int(difference.max())), total + int(difference.sum())
            count += difference.size
    assert 0 < worst <= 2
    assert total / count < 0.1


def test_centre_crop_with_torch_is_within_two_levels_of_pillows():
    for width, height in SHAPES:
        pixels_HWC = np.asarray(photo(width, height))
        exact, fast = (centre_crop(pixels_HWC, 32, resize=r).astype(int) for r in ("pil", "torch"))
        assert np.abs(exact - fast).max() <= 2


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("resize", RESIZES)
def test_rows_of_a_view_lie_one_after_the_other(resize, flip):
    pixels_HWC = np.asarray(photo(60, 50))
    view = View(top=4, left=5, height=30, width=40, flip=flip)
    assert cut(pixels_HWC, view, 32, resize=resize).flags.c_contiguous


@pytest.mark.parametrize("resize", RESIZES)
def test_views_are_whole_arrays_that_do_not_share_the_image(resize):
    pixels_HWC = np.asarray(photo(40, 40)).copy()
    view = View(top=4, left=4, height=32, width=32, flip=False)  # nothing to resize
    before = cut(pixels_HWC, view, 32, resize=resize)
    kept = before.copy()
    pixels_HWC[:] = 0
    assert np.array_equal(before, kept)


# --- the fast decoder -----------------------------------------------------------------------------

JPEGS = {
    **{
        f"4:{sampling}, {width}x{height}, q{quality}": (
            lambda s=number, w=width, h=height, q=quality: encoded(
                photo(w, h), "JPEG", subsampling=s, quality=q
            )
        )
        for number, sampling in enumerate(("4:4", "2:2", "2:0"))
        for width, height, quality in ((31, 20, 96), (1, 1, 75), (17, 33, 30), (160, 7, 100))
    },
    "RGB": lambda: encoded(photo(31, 20), "JPEG", keep_rgb=True),
    "grey": lambda: encoded(photo(31, 20).convert("L"), "JPEG"),
    "progressive": lambda: encoded(photo(31, 20), "JPEG", progressive=True, subsampling=2),
    "restart markers": lambda: encoded(photo(31, 20), "JPEG", restart_marker_blocks=1),
    "bytes behind the end": lambda: encoded(photo(31, 20), "JPEG") + b"more",
    "EXIF": exif_rotated,
}


@pytest.mark.parametrize("name", JPEGS)
def test_jpegs_decode_to_pillows_bits_without_pillow(monkeypatch, name):
    assert mealv2_pixels.simplejpeg is not None, "the fast decoder is installed"
    data = JPEGS[name]()
    with monkeypatch.context() as patch:
        patch.setattr(mealv2_pixels, "simplejpeg", None)
        expected = decode(data)
    monkeypatch.delattr(mealv2_pixels, "_decode_with_pillow")
    assert np.array_equal(decode(data), expected)


@pytest.mark.parametrize("name", ["4:4:4, 31x20, q96", "progressive", "grey"])
def test_damaged_jpegs_are_what_pillow_says_they_are(monkeypatch, name):
    data = JPEGS[name]()
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(data)
        damaged[rng.integers(2, len(data))] ^= 1 << int(rng.integers(8))
        told = []
        for decoder in (mealv2_pixels.simplejpeg, None):
            with monkeypatch.context() as patch, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                patch.setattr(mealv2_pixels, "simplejpeg", decoder)
                try:
                    told.append(decode(bytes(damaged)).tobytes())
                except DataError as error:
                    told.append(str(error))
        assert told[0] == told[1]


@pytest.mark.slow
def test_package_works_without_the_fast_decoder():
    code = (
        "import sys; sys.modules['simplejpeg'] = None; from mealv2.data import pixels; "
        "assert pixels.simplejpeg is None; print(pixels.probe_sha256('torch'))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(mealv2_pixels.__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.strip() == probe_sha256("torch")


# --- what a label set says of its pixels ----------------------------------------------------------


@pytest.mark.parametrize("resize", RESIZES)
def test_who_resized_is_read_from_what_a_plan_says(resize):
    assert resize_of(interpolation(resize)) == resize


def test_plans_that_do_not_say_who_resized_are_of_pillow():
    assert resize_of("bilinear") == resize_of(None) == resize_of(7) == "pil"


def test_probe_notices_other_pixels(monkeypatch):
    probe = probe_sha256.__wrapped__
    known = {resize: probe(resize) for resize in RESIZES}
    assert len(set(known.values())) == len(RESIZES)
    real = mealv2_pixels.resized
    with monkeypatch.context() as patch:
        # one level, in one pixel of one view
        def off_by_one(*args):
            pixels = real(*args).copy()
            pixels[-1, -1, -1] ^= 1
            return pixels

        patch.setattr(mealv2_pixels, "resized", off_by_one)
        assert all(probe(resize) != known[resize] for resize in RESIZES)
    assert all(probe(resize) == known[resize] for resize in RESIZES)


# --- parts of files with restart markers ----------------------------------------------------------


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("num_views", [1, 3])
def test_views_of_a_part_are_those_of_the_whole(resize, num_views):
    data = encoded(photo(160, 120), "JPEG", subsampling=2, restart_marker_blocks=2)
    whole_HWC = decode(data)
    num_parts = 0
    for first in range(0, 30, num_views):
        views = [
            view_of("photo", first + n, seed=1, width=160, height=120) for n in range(num_views)
        ]
        sizes = []
        decoded_image = decode_for(data, lambda *size, s=sizes, v=views: s.append(size) or v)
        assert (decoded_image.width, decoded_image.height) == (160, 120)
        assert sizes == [(160, 120)]
        num_parts += decoded_image.pixels_HWC.shape != whole_HWC.shape
        for view in views:
            expected = cut(whole_HWC, view, 32, resize=resize)
            assert np.array_equal(decoded_image.cut(view, 32, resize=resize), expected)
    assert num_parts > 5


def test_files_without_restart_markers_and_complete_images_are_decoded_whole():
    plain = encoded(photo(160, 120), "JPEG")
    view = View(top=50, left=60, height=20, width=20, flip=False)
    assert decode_for(plain, lambda *_: [view]).pixels_HWC.shape == (120, 160, 3)
    packed = encoded(photo(160, 120), "JPEG", restart_marker_blocks=2)
    assert decode_for(packed, None).pixels_HWC.shape == (120, 160, 3)
    assert decode_for(packed, lambda *_: [view]).pixels_HWC.shape < (120, 160, 3)
