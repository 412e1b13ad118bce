"""What an image file is: its format by content; the one place that opens files with Pillow.

Pillow has plugins for some forty formats; the one for PostScript starts the program ``gs``. Only
the formats listed here are ever tried, whatever a file is called.
"""

import io
import re
from contextlib import suppress
from functools import cache
from pathlib import PurePosixPath

from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
    features,
)

from mealv2.errors import DataError

with suppress(ImportError):  # Pillow >= 11.3
    from PIL import AvifImagePlugin  # noqa: F401  # it registers itself

# The names of files that are images without a look inside; what they hold decides when they are
# read. torchvision's list is the first line.
EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),
    *(".jpe", ".jfif", ".pbm", ".pnm", ".gif", ".avif", ".heic", ".heif"),
)
# Files that are never images, or copies of images: they are not opened.
_OTHER_EXTENSIONS = {
    *(".txt", ".md", ".rst", ".html", ".htm", ".xml", ".json", ".jsonl", ".yaml", ".yml", ".toml"),
    *(".csv", ".tsv", ".ini", ".cfg", ".log", ".cls", ".key", ".mat", ".npy", ".npz", ".pkl"),
    *(".pt", ".pth", ".h5", ".hdf5", ".parquet", ".db", ".sqlite", ".py", ".ipynb", ".sh"),
    *(".lnk", ".url", ".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar"),
    *(".pdf", ".ps", ".eps", ".svg", ".ai", ".psd", ".doc", ".docx"),
    *(".mp4", ".mov", ".avi", ".mkv", ".webm", ".mp3", ".wav"),
    *(".bak", ".orig", ".old", ".tmp", ".temp", ".swp", ".part", ".partial", ".crdownload"),
    *(".download", ".aria2"),
    # raw files of cameras, TIFF by their first bytes, and the thumbnails beside their films
    *(
        ".dng",
        ".nef",
        ".nrw",
        ".cr2",
        ".cr3",
        ".arw",
        ".orf",
        ".rw2",
        ".pef",
        ".srw",
        ".raf",
        ".thm",
    ),
}
_OTHER_ENDINGS = ("~", "_original")  # of copies that editors and exiftool keep

# Pillow's names of the formats that are read.
_FORMATS = {
    "JPEG": JpegImagePlugin,
    "PNG": PngImagePlugin,
    "PPM": PpmImagePlugin,
    "BMP": BmpImagePlugin,
    "GIF": GifImagePlugin,
    "TIFF": TiffImagePlugin,
    "WEBP": WebPImagePlugin,
}
_READ = "JPEG, PNG, PPM, BMP, GIF, TIFF, WebP, AVIF or HEIC"
_NEEDS = {
    "AVIF": "AVIF needs Pillow 11.3 or newer: pip install --upgrade pillow",
    "HEIF": "HEIC needs a plugin of Pillow: pip install 'mealv2[heic]'",
}

# Width x height; Pillow's own limit for an error. A larger image is refused before it is decoded.
MAX_PIXELS = 178_956_970
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
# Of an encoded image; a larger file is refused before it is read. Without compression, MAX_PIXELS
# of 16-bit RGB take half of it.
MAX_BYTES = 1 << 31

HEAD_SIZE = 64  # bytes that format_of needs
_STARTS = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
}
_PPM = re.compile(rb"P[1-6]\s+(#|\d+\s)")
_BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)  # sizes of what follows the first 14 bytes
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_SUFFIXES = {"JPEG": "jpg", "TIFF": "tif", "HEIF": "heic"}
_PPM_SUFFIXES = {b"1": "pbm", b"2": "pgm", b"4": "pbm", b"5": "pgm"}
# What files that are not images often are.
_OTHERS = {
    b"%!PS": "PostScript",
    b"\xc5\xd0\xd3\xc6": "PostScript",
    b"%PDF": "a PDF",
    b"<svg": "an SVG",
    b"<?xml": "XML",
    b"<!DOCTYPE": "a web page",
    b"<!doctype": "a web page",
    b"<html": "a web page",
    b"version https://git-lfs": "a Git LFS pointer: run `git lfs pull`",
    b"PK\x03\x04": "a zip file",
    b"\x1f\x8b": "a gzip file",
}

# --- by content -----------------------------------------------------------------------------------


def format_of(head: bytes) -> str | None:
    """Return Pillow's name of an image's format from its first bytes, None if it has none."""
    for start, name in _STARTS.items():
        if head.startswith(start):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        brands = {head[i : i + 4] for i in range(8, HEAD_SIZE, 4)}
        if brands & {b"avif", b"avis"}:
            return "AVIF"
        return "HEIF" if head[8:12] in _HEIF_BRANDS else None
    if head[:2] == b"BM" and head[14:18] in [size.to_bytes(4, "little") for size in _BMP_HEADERS]:
        return "BMP"
    return "PPM" if _PPM.match(head) else None


def extension_of(data: bytes) -> str:
    """Return the extension of an encoded image, without a dot; ``jpg`` if unknown."""
    name = format_of(data[:HEAD_SIZE]) or "JPEG"
    if name == "PPM":
        return _PPM_SUFFIXES.get(data[1:2], "ppm")
    return _SUFFIXES.get(name, name.lower())


def kind_of_name(name: str) -> bool | None:
    """Return whether a file is an image by its name; None if its first bytes must decide."""
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in EXTENSIONS:
        return True
    is_other = suffix in _OTHER_EXTENSIONS or name.endswith(_OTHER_ENDINGS)
    return False if is_other else None


def reason_of_name(name: str) -> str:
    """Return why a file is left out that is not an image: its extension."""
    return PurePosixPath(name).suffix.lower() or "no extension"


# --- opening --------------------------------------------------------------------------------------


@cache
def _formats() -> tuple[str, ...]:
    """Return the formats that this machine reads."""
    found = list(_FORMATS)
    if features.check("avif"):
        found.append("AVIF")
    if _register_heif():
        found.append("HEIF")
    return tuple(found)


def _register_heif() -> bool:
    try:
        import pi_heif as plugin  # decodes only, so its wheels have no code under the GPL
    except ImportError:
        try:
            import pillow_heif as plugin
        except ImportError:
            return False
    plugin.register_heif_opener()
    return True


def open_image(data: bytes) -> Image.Image:
    """Identify an encoded image by its content and read its header; the first frame is selected.

    Raises DataError for other formats, a damaged header, or more than MAX_PIXELS pixels.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=_formats())
    except UnidentifiedImageError:
        raise DataError(_unidentified(data)) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(_too_large()) from None
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise DataError(_too_large())
    return image


def _too_large() -> str:
    return f"it has more than {MAX_PIXELS} pixels, the most that are decoded; make it smaller"


def _unidentified(data: bytes) -> str:
    name = format_of(data[:HEAD_SIZE])
    if name in _NEEDS and name not in _formats():
        return _NEEDS[name]
    if name is not None:
        return f"a damaged image: its first bytes are those of a {name} file"
    start = data[:HEAD_SIZE].lstrip()
    what = next((what for begin, what in _OTHERS.items() if start.startswith(begin)), None)
    return f"not an image: {what}" if what else f"not an image that is read ({_READ})"
