"""Pictures to measure with: drawn on the spot, about as big and as hard to decode as ImageNet's."""

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

# Share of pictures, width and height before a draw turns some upright.
SIZES = (
    (0.62, 500, 375),
    (0.16, 500, 333),
    (0.08, 400, 300),
    (0.06, 320, 240),
    (0.06, 640, 480),
    (0.02, 1024, 768),
)
UPRIGHT = 0.2
# Share, and what PIL calls the chroma subsampling; the rest is gray.
SUBSAMPLINGS = ((0.70, "4:4:4"), (0.26, "4:2:0"), (0.025, "4:2:2"))
PROGRESSIVE = 0.02
QUALITIES = (96, 96, 96, 95, 94, 92, 90)
_WORTH_PROCESSES = 64  # pictures
_MOST_PROCESSES = 16
_FALL = 1.4  # exponent: amplitude over frequency; 1 in nature, a lens takes some of the finest
_FINE_NOISE = (0.5, 3.0)  # standard deviation in 255ths, drawn per picture


@dataclass(frozen=True)
class Drawn:
    """What a tree of pictures came to: how many, their mean size in bytes, and in pixels."""

    num_images: int
    mean_bytes: float
    mean_pixels: float


def draw_picture(seed: int, *, size: tuple[int, int] | None = None) -> bytes:
    """Return a JPEG: clouds with a 1/f spectrum, shapes with textures and edges, fine noise.

    The same for a seed, on the same libraries; about 500 x 375 pixels and 110 kB on average.
    ``size`` is width and height where they are to be given.
    """
    rng = np.random.default_rng(seed)
    width, height = size or _size(rng)
    image = Image.fromarray(_clouds(rng, width, height).clip(0, 255).astype(np.uint8))
    _draw_shapes(rng, image)
    pixels = np.asarray(image, np.float32)
    pixels = pixels + rng.uniform(*_FINE_NOISE) * rng.standard_normal(pixels.shape, np.float32)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return _encoded(rng, image)


def draw_tree(
    folder: Path, *, num_images: int, num_classes: int = 10, size: tuple[int, int] | None = None
) -> Drawn:
    """Write pictures as FOLDER/CLASS/NUMBER.JPEG, drawn by as many processes as there are cores."""
    classes = [folder / f"class-{number:03d}" for number in range(min(num_classes, num_images))]
    for path in classes:
        path.mkdir(parents=True, exist_ok=True)

    paths = [classes[n % len(classes)] / f"{n:05d}.JPEG" for n in range(num_images)]
    write = partial(_write_picture, size=size)
    if num_images < _WORTH_PROCESSES:
        num_bytes = [write(path, n) for n, path in enumerate(paths)]
    else:
        # new interpreters, that import this module alone: a fork would take threads' locks along
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(
            min(os.cpu_count() or 1, _MOST_PROCESSES), mp_context=context
        ) as processes:
            num_bytes = list(processes.map(write, paths, range(num_images), chunksize=8))
    return Drawn(num_images, float(np.mean(num_bytes)), mean_pixels(map(Path.read_bytes, paths)))


def _write_picture(path: Path, seed: int, *, size: tuple[int, int] | None) -> int:
    return path.write_bytes(draw_picture(seed, size=size))


def mean_pixels(files: Iterable[bytes]) -> float:
    """Return the mean number of pixels of encoded images."""
    areas = []
    for data in files:
        with Image.open(io.BytesIO(data)) as image:
            areas.append(image.width * image.height)
    return float(np.mean(areas))


def _size(rng: np.random.Generator) -> tuple[int, int]:
    probabilities = [probability for probability, _, _ in SIZES]
    _, width, height = SIZES[rng.choice(len(SIZES), p=probabilities)]
    return (height, width) if rng.random() < UPRIGHT else (width, height)


def _clouds(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Return noise whose amplitude falls with frequency, in three channels that go together."""
    down = np.fft.fftfreq(height)[:, None]
    across = np.fft.rfftfreq(width)[None, :]
    lowest = 1.0 / max(width, height)
    falling = np.maximum(np.hypot(down, across), lowest) ** -_FALL
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
    """Put discs, boxes and polygons on a picture, half of them filled with stripes."""
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


def _encoded(rng: np.random.Generator, image: Image.Image) -> bytes:
    draw = rng.random()
    subsampling = next((name for probability, name in _summed() if draw < probability), None)
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


def _summed() -> list[tuple[float, str]]:
    total, summed = 0.0, []
    for probability, name in SUBSAMPLINGS:
        total += probability
        summed.append((total, name))
    return summed
