"""Open the images of a split, local or remote."""

from mealv2.data.open import open_source
from mealv2.data.source import ImageSource
from mealv2.data.tar import TarShards
from mealv2.errors import ConfigError
from mealv2.storage.cache import Cache
from mealv2.storage.urls import Location, shown
from pipeline.config import NO_SPLIT, CacheConfig
from pipeline.runtime import env


def cache_of(config: CacheConfig) -> Cache:
    """Return the cache for copies of remote files."""
    return Cache(config.cache_dir or env.cache_folder(), config.cache_bytes)


def open_images(config: CacheConfig, data_dir: Location, split: str) -> ImageSource:
    """Open a split of a data set. Raises ConfigError, DataError and RemoteError."""
    return open_source(data_dir, split, cache=cache_of(config))


def open_split(
    config: CacheConfig, data_dir: Location, split: str, *, classes: list[str]
) -> ImageSource | None:
    """Open a validation split, None for ``none``; raises ConfigError for other ``classes``."""
    if split == NO_SPLIT:
        return None
    source = open_images(config, data_dir, split)
    if source.classes != classes:
        unmatched = sorted(set(source.classes) ^ set(classes))
        advice = "; name them in classes.txt" if isinstance(source, TarShards) else ""
        raise ConfigError(
            f"split {split} of {shown(data_dir)} has different classes from the training data: "
            f"{', '.join(unmatched[:4])}{advice}"
        )
    return source
