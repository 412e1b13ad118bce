"""mealv2.data.image_files, bit_depth: formats by content, one call of Pillow, 16 bits, floats."""

import ast
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, TiffImagePlugin
from torchvision.transforms.v2.functional import to_dtype

from mealv2.data import image_files
from mealv2.data.bit_depth import floats_to_8_bits, integers_to_8_bits
from mealv2.data.image_files import HEAD_SIZE, extension_of, format_of, open_image
from mealv2.data.pixels import decode
from mealv2.errors import DataError
from pictures import encoded, noise, photo

ROOT = Path(__file__).parents[3]
OF_FORMAT = {
    "JPEG": ("jpg", lambda: encoded(photo(31, 20), "JPEG")),
    "PNG": ("png", lambda: encoded(photo(31, 20), "PNG")),
    "PPM": ("ppm", lambda: encoded(photo(31, 20), "PPM")),
    "BMP": ("bmp", lambda: encoded(photo(31, 20), "BMP")),
    "GIF": ("gif", lambda: encoded(photo(31, 20).quantize(64), "GIF")),
    "TIFF": ("tif", lambda: encoded(photo(31, 20), "TIFF")),
    "WEBP": ("webp", lambda: encoded(photo(31, 20), "WEBP")),
    "AVIF": ("avif", lambda: encoded(photo(31, 20), "AVIF")),
}
# A HEIC file's first box.
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)


@pytest.mark.parametrize("name", OF_FORMAT)
def test_a_format_is_found_by_its_first_bytes_and_read(name: str) -> None:
    extension, make = OF_FORMAT[name]
    data = make()
    assert format_of(data[:HEAD_SIZE]) == name
    assert extension_of(data) == extension
    assert decode(data).shape == (20, 31, 3)
    with open_image(data) as image:
        assert image.format == name


@pytest.mark.parametrize(
    "head",
    [b"", b"BMW is a car, and text", b"P1 is a name", b"GIF", b"<svg>", b"\0\0\0\x18ftypisom"],
)
def test_text_and_films_are_not_taken_for_images(head: bytes) -> None:
    assert format_of(head) is None


def test_heic_without_its_plugin_is_refused_with_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert format_of(HEIC[:HEAD_SIZE]) == "HEIF"
    for name in ("pi_heif", "pillow_heif"):
        monkeypatch.setitem(sys.modules, name, None)
    image_files._formats.cache_clear()
    try:
        with pytest.raises(DataError, match=r"pip install 'mealv2\[heic\]'"):
            decode(HEIC)
    finally:
        image_files._formats.cache_clear()


def test_heic_is_in_the_list_where_its_plugin_is_installed() -> None:
    pytest.importorskip("pi_heif")
    assert "HEIF" in image_files._formats()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not an image: PostScript"),
        (b"<!DOCTYPE html><html>404", "not an image: a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"hello", r"not an image that is read \(JPEG, PNG"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "a damaged image: .* PNG file"),
    ],
)
def test_what_is_not_an_image_is_named(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        decode(data)


# --- one door to Pillow ---------------------------------------------------------------------------


def calls_of_open(code: str) -> Iterator[str]:
    """Yield where code opens images with Pillow: Image.open, or its name imported."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Image.open"):
            yield ast.unparse(node)
        if isinstance(node, ast.ImportFrom) and (node.module or "").endswith("PIL.Image"):
            yield ast.unparse(node)
        is_name = isinstance(node, ast.Name | ast.Attribute)
        if is_name and ast.unparse(node).endswith(("pil_loader", "default_loader")):
            yield ast.unparse(node)


def test_one_call_opens_images_and_has_a_list_of_formats() -> None:
    paths = [*ROOT.glob("mealv2/**/*.py"), *ROOT.glob("pipeline/**/*.py")]
    paths += [ROOT / "cli.py", ROOT / "hubconf.py"]
    found = [
        (path.relative_to(ROOT).as_posix(), call)
        for path in paths
        for call in calls_of_open(path.read_text(encoding="utf-8"))
    ]
    assert [name for name, _ in found] == ["mealv2/data/image_files.py"]
    assert "formats=_formats()" in found[0][1]
    assert list(calls_of_open("PIL.Image.open(x)")) == ["PIL.Image.open(x)"]
    assert list(calls_of_open("from PIL.Image import open"))


def test_postscript_named_jpg_starts_no_program(tmp_path: Path) -> None:
    marker, program = tmp_path / "started", tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n: > {marker}\n")
    program.chmod(0o755)
    eps = tmp_path / "x.jpg"
    eps.write_bytes(encoded(photo(31, 20), "EPS"))
    environment = {"PATH": f"{program.parent}:/usr/bin:/bin", "PYTHONPATH": str(ROOT)}

    def run(code: str) -> None:
        argv = [sys.executable, "-c", code, str(eps)]
        subprocess.run(argv, env=environment, capture_output=True, check=False, cwd=ROOT)

    run(
        "import sys; from pathlib import Path\n"
        "from mealv2.data.image_files import open_image\n"
        "open_image(Path(sys.argv[1]).read_bytes()).load()"
    )
    assert not marker.exists()
    run("import sys; from PIL import Image; Image.open(sys.argv[1]).load()")
    assert marker.exists(), "Pillow without the list starts it: the test can fail"


def test_a_png_that_claims_a_million_by_a_million_pixels_is_a_bad_image() -> None:
    data = encoded(photo(31, 20), "PNG")
    for width, height in ((1 << 20, 1 << 20), (1 << 14, 1 << 14)):
        head = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
        claimed = data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with pytest.raises(DataError, match="more than 178956970 pixels"):
                decode(claimed)


# --- 16 bits and floats ---------------------------------------------------------------------------


def ramp() -> np.ndarray:
    return np.linspace(0, 65535, 31 * 20).astype(np.uint16).reshape(20, 31)


def test_integers_are_scaled_as_torchvision_scales_them() -> None:
    values = np.arange(1 << 16, dtype=np.uint16)
    expected = to_dtype(torch.from_numpy(values), torch.uint8, scale=True)
    assert np.array_equal(integers_to_8_bits(values), expected.numpy())
    assert np.array_equal(integers_to_8_bits(values), values // 256)  # NumPy, by the formula


def test_floats_are_scaled_as_torchvision_scales_them() -> None:
    values = np.linspace(0, 1, 100_001, dtype=np.float32)
    expected = to_dtype(torch.from_numpy(values), torch.uint8, scale=True)
    assert np.array_equal(floats_to_8_bits(values), expected.numpy())
    assert floats_to_8_bits(values).max() == 255


def tiff(values: np.ndarray, **tags: int) -> bytes:
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for name, value in tags.items():
        info[{"photometric": 262, "sample_format": 339}[name]] = value
    return encoded(Image.fromarray(values), "TIFF", tiffinfo=info)


@pytest.mark.parametrize("make", [tiff, lambda v: encoded(Image.fromarray(v), "PNG")])
def test_16_bit_gray_keeps_its_steps(make: Callable[[np.ndarray], bytes]) -> None:
    pixels_HWC = decode(make(ramp()))
    assert np.array_equal(pixels_HWC, np.repeat((ramp() >> 8)[:, :, None], 3, axis=2))


def test_16_bit_pgm_and_float_tiff_keep_their_steps() -> None:
    pgm = b"P5 31 20 65535\n" + ramp().astype(">u2").tobytes()
    assert np.array_equal(decode(pgm)[..., 0], ramp() >> 8)
    floats = (ramp() / np.float32(65535)).astype(np.float32)
    assert np.array_equal(decode(tiff(floats))[..., 0], floats_to_8_bits(floats))


def raw_tiff(values: np.ndarray, *, photometric: int, bits: int, sample_format: int) -> bytes:
    """Write an uncompressed TIFF by hand, with tags that Pillow would not write."""
    entries = [(256, values.shape[1]), (257, values.shape[0]), (258, bits), (259, 1)]
    entries += [(262, photometric), (273, 8), (277, 1), (278, values.shape[0])]
    entries += [(279, values.nbytes), (339, sample_format)]
    body = values.tobytes()
    head = b"II*\0" + struct.pack("<I", 8 + len(body))
    rows = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return head + body + struct.pack("<H", len(entries)) + rows + bytes(4)


def test_white_is_zero_inverts_16_bits() -> None:
    data = raw_tiff(ramp(), photometric=0, bits=16, sample_format=1)
    assert np.array_equal(decode(data)[..., 0], 255 - (ramp() >> 8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: encoded(Image.fromarray(ramp() >> 4), "PNG"), "16-bit pixels of at most 4095"),
        (lambda: tiff(ramp().astype(np.float32)), "float pixels from 0 to 6.*only 0 to 1"),
        (lambda: tiff(np.full((20, 31), np.nan, np.float32)), "float pixels from nan"),
        (lambda: tiff(ramp().astype(np.int32)), "integer pixels of unknown range"),
        (
            lambda: raw_tiff(noise(31, 20, 1), photometric=1, bits=8, sample_format=2),
            "signed bytes",
        ),
    ],
)
def test_values_of_unknown_range_are_refused_by_name(
    make: Callable[[], bytes], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        decode(make())


def test_16_bit_colours_that_would_be_black_are_refused() -> None:
    def png(high: int) -> bytes:
        colours = np.linspace(0, high, 31 * 20 * 3).astype(">u2").reshape(20, 31 * 3)
        raw = b"".join(b"\0" + row.tobytes() for row in colours)

        def chunk(kind: bytes, data: bytes) -> bytes:
            crc = struct.pack(">I", zlib.crc32(kind + data))
            return struct.pack(">I", len(data)) + kind + data + crc

        head = struct.pack(">IIBBBBB", 31, 20, 16, 2, 0, 0, 0)
        parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
        return b"\x89PNG\r\n\x1a\n" + parts

    assert decode(png(65535)).max() == 255
    with pytest.raises(DataError, match="16-bit pixels of at most 4095"):
        decode(png(4095))


def test_a_tiff_file_that_begins_with_a_thumbnail_is_refused() -> None:
    """As raw files of cameras do."""
    small, large = photo(31, 20), photo(62, 40)
    thumbnail = TiffImagePlugin.ImageFileDirectory_v2()
    thumbnail[254] = 1
    data = BytesIO()
    small.save(data, "TIFF", tiffinfo=thumbnail, save_all=True, append_images=[large])
    with pytest.raises(DataError, match="its first image is a thumbnail"):
        decode(data.getvalue())


def test_the_first_frame_of_a_gif_is_read() -> None:
    frames = [photo(31, 20).quantize(64), photo(31, 20).rotate(180).quantize(64)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    with Image.open(BytesIO(data)) as image:
        assert isinstance(image, ImageFile.ImageFile)
        assert np.array_equal(decode(data), np.asarray(image.convert("RGB")))
