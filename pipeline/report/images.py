"""Write small JPEGs of images and of their views, as the teachers saw them."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mealv2.data.pixels import decode
from mealv2.data.source import ImageSource
from mealv2.errors import DataError
from mealv2.label_set import LabelSet
from pipeline.labelling.compatibility import view_reader

IMAGE_FOLDER = "images"
_MAX_IMAGE, _MAX_CROP = 320, 128  # pixels of the longer side
_QUALITY = 80


def write_images(
    output: Path, labels: LabelSet, source: ImageSource, records: list[dict[str, Any]]
) -> None:
    """Write the images of records below ``output``; add their paths to the records.

    A record gets ``image`` and ``shown_size`` (width, height), and each of its views ``crop`` and
    ``crop_side``. One whose image is missing or cannot be read gets ``problem`` instead.
    """
    (output / IMAGE_FOLDER).mkdir(exist_ok=True)
    reader = view_reader(labels, source)
    wanted = {record["key"] for record in records}
    positions = {key: at for at, key in enumerate(source.keys) if key in wanted}
    for number, record in enumerate(records):
        stem = f"{IMAGE_FOLDER}/{number:04d}"
        position = positions.get(record["key"])
        if position is None:
            record["problem"] = "it is not in the data set"
            continue
        views = tuple(view["view"] for view in record["views"])
        batch = reader.read([(position, views)])
        if batch.failed:
            record["problem"] = batch.failed[position]
            continue
        try:
            pixels_HWC = decode(source.read(position))
        except (DataError, OSError) as error:
            record["problem"] = getattr(error, "strerror", None) or str(error)
            continue
        record["image"] = f"{stem}.jpg"
        record["size"] = (pixels_HWC.shape[1], pixels_HWC.shape[0])
        record["shown_size"] = _write(output / record["image"], pixels_HWC, _MAX_IMAGE)
        crops_VHWC = batch.images_BCHW.permute(0, 2, 3, 1).numpy()
        for view, crop_HWC in zip(record["views"], crops_VHWC, strict=True):
            view["crop"] = f"{stem}-view-{view['view']}.jpg"
            view["crop_side"], _ = _write(output / view["crop"], crop_HWC, _MAX_CROP)


def _write(path: Path, pixels_HWC: np.ndarray, most: int) -> tuple[int, int]:
    """Write a JPEG whose longer side has at most ``most`` pixels; return its width and height."""
    image = Image.fromarray(np.ascontiguousarray(pixels_HWC))
    image.thumbnail((most, most))  # never enlarges
    image.save(path, "JPEG", quality=_QUALITY)
    return image.size
