"""Propose CIFAR's crop for images that a crop of 8 % of the area makes unreadable."""

from mealv2.data.image_files import open_image
from mealv2.data.source import ImageSource
from mealv2.errors import DataError
from mealv2.storage.urls import Location, is_url
from pipeline import console
from pipeline.config import ViewsConfig
from pipeline.runtime import env

SMALL = 64  # pixels


def propose_crop(config: ViewsConfig, source: ImageSource, data_dir: Location) -> None:
    """Show a line if no --crop is given and the first image has a side below 64 pixels.

    Nothing is read through a network.
    """
    if config.crop is not None or config.scale is not None or is_url(data_dir) or not len(source):
        return
    if env.is_child_process():
        return
    try:
        with open_image(source.read(0)) as image:
            width, height = image.size
    except (DataError, OSError):  # who reads the views reports it
        return
    if min(width, height) < SMALL:
        console.info(
            f"image {source.keys[0]} has {width} x {height} pixels; for images below {SMALL} "
            "pixels --crop pad (CIFAR's crop) keeps more of them than the default, random boxes "
            "from 8 % of the area; --crop rrc keeps the default without this line"
        )
