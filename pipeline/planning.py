"""What stage one labels, and the part of its plan that needs no teacher: images and shards."""

import itertools
from typing import Any

from mealv2 import label_set
from mealv2.errors import ConfigError
from mealv2.images import ImageSource
from pipeline.config import DEFAULT_SHARD_SIZE, PrecomputeConfig
from pipeline.sources import open_images, open_split


def open_roles(config: PrecomputeConfig) -> dict[str, ImageSource]:
    """Open the splits to label by role, validation first. Raises as open_images."""
    train = open_images(config, config.data_dir, config.split)
    val = open_split(config, config.data_dir, config.val_split, classes=list(train.classes))
    return {"train": train} if val is None else {"val": val, "train": train}


def shards_plan(config: PrecomputeConfig, roles: dict[str, ImageSource]) -> dict[str, Any]:
    """Return what a plan says of its shards; label_set.planned_shards reads it.

    Raises ConfigError for a --shard-size that has no effect.
    """
    num_views = {"train": config.num_views, "val": 1}
    return {
        "format_version": label_set.FORMAT_VERSION,
        **_shard_size(config, list(roles.values())),
        "roles": {
            name: {
                "num_images": len(source),
                "num_views": num_views[name],
                **_shard_sizes(source),
            }
            for name, source in roles.items()
        },
    }


def _shard_size(config: PrecomputeConfig, sources: list[ImageSource]) -> dict[str, int]:
    """Return what the plan says of shards that follow no tar files; raises ConfigError."""
    if any(source.shard_starts is None for source in sources):
        return {"shard_size": config.shard_size or DEFAULT_SHARD_SIZE}
    if config.shard_size is not None:
        raise ConfigError(
            "--shard-size has no effect on tar shards: each has a shard of labels of its own"
        )
    return {}


def _shard_sizes(source: ImageSource) -> dict[str, list[int]]:
    """Return what the plan says of shards that follow tar files: how many images each has."""
    if source.shard_starts is None:
        return {}
    ends = [*source.shard_starts, len(source)]
    return {"shard_sizes": [b - a for a, b in itertools.pairwise(ends)]}
