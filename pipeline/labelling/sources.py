"""Open the images that a command labels."""

from functools import partial

from mealv2.data.source import ImageSource
from pipeline.config import PrecomputeConfig
from pipeline.labelling.teachers import classes_of
from pipeline.loading.sources import held_out_of, open_images, open_split, with_extra


def open_sources(config: PrecomputeConfig) -> dict[str, ImageSource]:
    """Open the images to label by split, validation first. Raises as open_images."""
    held_out = held_out_of(config, train_split=config.train_split)
    names = partial(classes_of, config.teacher)
    split = config.train_split
    train = open_images(config, config.data_dir, split, held_out=held_out, names=names)
    val = open_split(config, config.data_dir, config.val_split, train=train, held_out=held_out)
    train = with_extra(config, train, config.extra_data, val=val)
    return {"train": train} if val is None else {"val": val, "train": train}
