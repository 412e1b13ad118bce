"""Open the images of a split, local or remote, and state what was found."""

from collections.abc import Sequence
from functools import cache

import numpy as np

from mealv2.data.open import open_source
from mealv2.data.source import ImageSource
from mealv2.data.tar import TarShards
from mealv2.errors import ConfigError
from mealv2.storage.cache import Cache
from mealv2.storage.urls import Location, shown
from pipeline import console
from pipeline.config import NO_SPLIT, CacheConfig, SourceConfig
from pipeline.runtime import env


def cache_of(config: CacheConfig) -> Cache:
    """Return the cache for copies of remote files."""
    return Cache(config.cache_dir or env.cache_folder(), config.cache_bytes)


def open_images(config: SourceConfig, data_dir: Location, split: str) -> ImageSource:
    """Open a split of a data set and show its summary.

    Raises ConfigError, also for files that are left out with --strict; DataError, RemoteError.
    """
    source = open_source(data_dir, split, cache=cache_of(config))
    show_summary(source, strict=config.strict)
    return source


def show_summary(source: ImageSource, *, strict: bool) -> None:
    """Show the line of a source once in a process.

    Raises ConfigError with ``strict`` if files are left out or found twice.
    """
    left_out, name = source.left_out, source.name or "the folders"
    if strict and (number := left_out.counts.total()):
        raise ConfigError(
            f"--strict: {console.count(number, 'file')} of {name} left out: "
            f"{', '.join(left_out.examples)}{', …' if number > len(left_out.examples) else ''}; "
            "move them away, or run without --strict"
        )
    if strict and left_out.remarks:
        raise ConfigError(f"--strict: {name}: {left_out.remarks[0]}")
    if not env.is_child_process():
        _show(summary(source))


@cache
def _show(text: str) -> None:
    console.info(text)


def summary(source: ImageSource) -> str:
    """Return one line: images, classes with the smallest and largest, what was left out and why."""
    parts = [f"{' '.join(['data', source.name]).strip()}: {console.count(len(source), 'image')}"]
    if len(source.classes):
        parts[0] += f" of {_num_classes(len(source.classes))}"
        parts[0] += _class_sizes(source.labels, source.classes)
    left_out = source.left_out
    if number := left_out.counts.total():
        reasons = [f"{count} {reason}" for reason, count in left_out.counts.most_common(8)]
        more = ", …" if len(left_out.counts) > len(reasons) else ""
        parts.append(f"left out {console.count(number, 'file')}: {', '.join(reasons)}{more}")
    if left_out.num_metadata:
        parts.append(f"metadata of samples: {console.count(left_out.num_metadata, 'member')}")
    return "; ".join([*parts, *left_out.remarks[:3]])


def _num_classes(number: int) -> str:
    return f"{number} class{'' if number == 1 else 'es'}"


def _class_sizes(labels: Sequence[int], classes: Sequence[str]) -> str:
    sizes = np.bincount(np.asarray(labels), minlength=len(classes))
    low, high = int(sizes.argmin()), int(sizes.argmax())
    if sizes[low] == sizes[high]:
        return f", {sizes[low]} each"
    return f", from {sizes[low]} ({classes[low]}) to {sizes[high]} ({classes[high]})"


def open_split(
    config: SourceConfig, data_dir: Location, split: str, *, classes: list[str]
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
