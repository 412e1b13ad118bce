"""Pictures with structure at every scale, and their files."""

import io
from pathlib import Path

import numpy as np
from PIL import Image


def noise(width: int, height: int, channels: int = 3, dtype: type = np.uint8) -> np.ndarray:
    """Pixels with structure at every scale, so that no resampling is without effect."""
    shape = (height, width, channels) if channels > 1 else (height, width)
    high = np.iinfo(dtype).max
    return np.random.default_rng(width * 9973 + height).integers(0, high, shape, dtype)


def photo(width: int, height: int) -> Image.Image:
    return Image.fromarray(noise(width, height))


def size_of(data: bytes) -> tuple[int, int]:
    """Return width and height of an encoded image."""
    with Image.open(io.BytesIO(data)) as image:
        return image.size


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def flip(path: Path, at: int | None = None) -> None:
    """Change one bit of a file, by default of its middle; the size stays."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 4
    path.write_bytes(data)
