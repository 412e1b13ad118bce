"""Synthetic JPEGs, about as large and as slow to decode as those of ImageNet."""

import io
import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from mealv2.data.image_files import open_image

# Fraction of the images, width and height; some are then turned upright.
SIZES = (
    (0.62, 500, 375),
    (0.16, 500, 333),
    (0.08, 400, 300),
    (0.06, 320, 240),
    (0.06, 640, 480),
    (0.02, 1024, 768),
)
UPRIGHT = 0.2
# Cumulative fraction, and Pillow's name of the chroma subsampling; the rest is grey.
SUBSAMPLINGS = ((0.70, "4:4:4"), (0.70 + 0.26, "4:2:0"), (0.70 + 0.26 + 0.025, "4:2:2"))
PROGRESSIVE = 0.02
QUALITIES = (96, 96, 96, 95, 94, 92, 90)
_MIN_IMAGES_PARALLEL = 64
_MAX_PROCESSES = 16
_SPECTRUM_EXPONENT = 1.4  # amplitude over frequency; 1 in nature, and lenses blur fine detail
_FINE_NOISE = (0.5, 3.0)  # range of the standard deviation, in 255ths


@dataclass(frozen=True)
class ImageStats:
    """The number of images, and their mean size in bytes and in pixels."""

    num_images: int
    mean_bytes: float
    mean_pixels: float


def draw_jpeg(seed: int, *, size: tuple[int, int] | None = None) -> bytes:
    """Return a JPEG: noise with a 1/f spectrum, textured shapes, and fine noise.

    Equal seeds give equal bytes with the same libraries. The average is 500 x 375 pixels and 110
    kB; ``size``, width and height, replaces the random size.
    """
    rng = np.random.default_rng(seed)
    width, height = size or _size(rng)
    image = Image.fromarray(_clouds(rng, width, height).clip(0, 255).astype(np.uint8))
    _draw_shapes(rng, image)
    pixels = np.asarray(image, np.float32)
    pixels = pixels + rng.uniform(*_FINE_NOISE) * rng.standard_normal(pixels.shape, np.float32)
    return _encode(rng, Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))


def write_image_folder(
    folder: Path, *, num_images: int, num_classes: int = 10, size: tuple[int, int] | None = None
) -> ImageStats:
    """Write synthetic images as FOLDER/CLASS/NUMBER.JPEG, with one process per core."""
    classes = [folder / f"class-{number:03d}" for number in range(min(num_classes, num_images))]
    for path in classes:
        path.mkdir(parents=True, exist_ok=True)

    paths = [classes[n % len(classes)] / f"{n:05d}.JPEG" for n in range(num_images)]
    write = partial(_write_jpeg, size=size)
    if num_images < _MIN_IMAGES_PARALLEL:
        num_bytes = [write(path, n) for n, path in enumerate(paths)]
    else:
        context = multiprocessing.get_context("spawn")  # a fork would copy locks that threads hold
        num_processes = min(os.cpu_count() or 1, _MAX_PROCESSES)
        with ProcessPoolExecutor(num_processes, mp_context=context) as processes:
            num_bytes = list(processes.map(write, paths, range(num_images), chunksize=8))
    return ImageStats(
        num_images, float(np.mean(num_bytes)), mean_pixels(map(Path.read_bytes, paths))
    )


def _write_jpeg(path: Path, seed: int, *, size: tuple[int, int] | None) -> int:
    return path.write_bytes(draw_jpeg(seed, size=size))


def mean_pixels(files: Iterable[bytes]) -> float:
    """Return the mean number of pixels of encoded images."""
    areas = []
    for data in files:
        with open_image(data) as image:
            areas.append(image.width * image.height)
    return float(np.mean(areas))


def _size(rng: np.random.Generator) -> tuple[int, int]:
    probabilities = [probability for probability, _, _ in SIZES]
    _, width, height = SIZES[rng.choice(len(SIZES), p=probabilities)]
    return (height, width) if rng.random() < UPRIGHT else (width, height)


def _clouds(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Return noise whose amplitude falls with frequency, in three correlated channels."""
    down = np.fft.fftfreq(height)[:, None]
    across = np.fft.rfftfreq(width)[None, :]
    lowest = 1.0 / max(width, height)
    falling = np.maximum(np.hypot(down, across), lowest) ** -_SPECTRUM_EXPONENT
    falling[0, 0] = 0.0
    layers = []
    for _ in range(3):
        spectrum = np.fft.rfft2(rng.standard_normal((height, width))) * falling
        noise = np.fft.irfft2(spectrum, (height, width))
        layers.append(noise / noise.std())
    mixing = np.array([[1.0, 0.3, 0.1], [1.0, 0.0, -0.2], [1.0, -0.3, 0.2]])
    colour = rng.uniform(70, 180, 3)
    clouds: np.ndarray = colour + 42.0 * np.stack(layers, axis=-1) @ mixing.T
    return clouds


def _draw_shapes(rng: np.random.Generator, image: Image.Image) -> None:
    """Draw ellipses, rectangles and polygons on an image, half of them with stripes."""
    reach = min(image.size) // 3
    for _ in range(int(rng.integers(5, 12))):
        across, down = (int(rng.integers(max(2, reach // 5), max(3, reach))) for _ in range(2))
        left, top = (int(rng.integers(-reach // 2, side)) for side in image.size)
        mask = Image.new("L", (across, down))
        draw = ImageDraw.Draw(mask)
        shape = int(rng.integers(3))
        if shape < 2:
            box = (0, 0, across - 1, down - 1)
            (draw.ellipse if shape else draw.rectangle)(box, fill=255)
        else:
            corners = rng.integers(0, [across, down], (4, 2))
            draw.polygon([(int(a), int(b)) for a, b in corners], fill=255)
        image.paste(_filling(rng, across, down), (left, top), mask)


def _filling(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    colour = rng.uniform(0, 255, 3)
    pixels = np.broadcast_to(colour, (height, width, 3))
    if rng.random() < 0.5:
        y, x = np.mgrid[0:height, 0:width]
        angle, period = rng.uniform(0, np.pi), rng.uniform(3, 20)
        wave = np.sin((np.cos(angle) * x + np.sin(angle) * y) * (2 * np.pi / period))
        pixels = pixels + rng.uniform(10, 45) * wave[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _encode(rng: np.random.Generator, image: Image.Image) -> bytes:
    drawn = rng.random()
    subsampling = next((name for fraction, name in SUBSAMPLINGS if drawn < fraction), None)
    if subsampling is None:
        image, subsampling = image.convert("L"), "4:4:4"
    file = io.BytesIO()
    image.save(
        file,
        "JPEG",
        quality=int(rng.choice(QUALITIES)),
        subsampling=subsampling,
        progressive=bool(rng.random() < PROGRESSIVE),
    )
    return file.getvalue()
