"""Settings of `mealv2 pack`."""

from pathlib import Path
from typing import Literal

from pipeline.config.base import DEFAULT_SHARD_SIZE, NEW_FOLDER, StrictConfig
from pipeline.config.fields import REQUIRED, frozen, in_data, in_hardware, require, without_effect


@frozen
class PackConfig(StrictConfig):
    """Copy a data set into a form that is faster to read. Label sets of the original fit the copy.

    To a folder: JPEGs are repacked without loss, so that only the crop of a view is decoded; needs
    jpegtran. To tar: a few large files, with the images unchanged and in random order.
    """

    example = "mealv2 pack --data-dir imagenet --to tar --output shards"

    data_dir: Path = in_data(
        REQUIRED, "Data set: ROOT/SPLIT/CLASS/IMAGE, or tar shards.", path="data set"
    )
    output: Path = in_data(REQUIRED, NEW_FOLDER, alias="out", path="new folder")
    to: Literal["folder", "tar"] = in_data(
        "folder", "A tree OUTPUT/SPLIT/CLASS/IMAGE, or tar shards OUTPUT/SPLIT-000000.tar, …."
    )
    split: tuple[str, ...] = in_data(
        (), "Split of --data-dir to pack; repeat it for several.", shown="all with classes"
    )
    images_per_shard: int = in_data(
        DEFAULT_SHARD_SIZE, "With --to tar: images per tar file.", low=1
    )
    workers: int = in_hardware(4, "Number of images to read and pack in parallel.", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.to != "tar":
            without_effect(self, "without --to tar", "images_per_shard")
        for name in self.split:
            is_name = name and Path(name).name == name and name[0] != "."
            require(is_name, f"--split {name!r} must be the name of a folder under --data-dir")
