"""Settings of `mealv2 pack`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mealv2.errors import ConfigError
from pipeline.config.base import DEFAULT_SHARD_SIZE, Settings
from pipeline.config.fields import at_least, required, setting, without_effect


@dataclass(frozen=True, kw_only=True)
class PackConfig(Settings):
    """Copy a data set into a form that is faster to read; label sets of DATA fit OUTPUT too.

    To a folder: JPEGs are repacked without loss, so that a view is cut out before it is decoded;
    needs jpegtran. To tar: a few large files; images unchanged, in random order.
    """

    example = "mealv2 pack --data-dir imagenet --to tar --output shards"

    data_dir: Path = required(
        "Data set: ROOT/SPLIT/CLASS/IMAGE, or tar shards.", group="Data", path="data set"
    )
    output: Path = required(
        "Folder to write; created if missing, continued if unfinished.",
        group="Data",
        aliases=("out",),
        path="new folder",
    )
    to: Literal["folder", "tar"] = setting(
        "folder",
        "A tree OUTPUT/SPLIT/CLASS/IMAGE, or tar shards OUTPUT/SPLIT-000000.tar, ….",
        group="Data",
    )
    split: tuple[str, ...] = setting(
        (),
        "Split of --data-dir to pack; repeat it for several.",
        group="Data",
        shown="all with classes",
    )
    images_per_shard: int | None = setting(
        None,
        "With --to tar: images per tar file.",
        group="Data",
        shown=str(DEFAULT_SHARD_SIZE),
    )
    workers: int = setting(4, "Images that are read and packed at the same time.", group="Hardware")

    def __post_init__(self) -> None:
        at_least(self, 1, "workers")
        if self.to != "tar":
            without_effect(self, "without --to tar", "images_per_shard")
        elif self.images_per_shard is not None:
            at_least(self, 1, "images_per_shard")
        for name in self.split:
            if not name or Path(name).name != name or name[0] == ".":
                raise ConfigError(f"--split {name!r} must be the name of a folder under --data-dir")

    @property
    def num_per_shard(self) -> int:
        """How many images a tar file gets."""
        return self.images_per_shard or DEFAULT_SHARD_SIZE
