"""Open the images of a split, local or remote, and state what was found."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mealv2.data.coco import CocoSource
from mealv2.data.extra import WithExtra, open_unlabelled
from mealv2.data.held_out import HeldOut, by_name
from mealv2.data.image_table import is_table
from mealv2.data.open import download, open_source
from mealv2.data.source import ClassNames, ImageSource, is_unlabelled, multi_labels_of
from mealv2.data.subset import Subset
from mealv2.data.tar_splits import read_class_map
from mealv2.errors import ConfigError
from mealv2.storage.cache import Cache
from mealv2.storage.urls import Location, shown
from pipeline import console
from pipeline.config import NO_SPLIT, CacheConfig, ExtraDataConfig, HeldOutConfig, SourceConfig
from pipeline.runtime import env


def cache_of(config: CacheConfig) -> Cache:
    """Return the cache for copies of remote files."""
    return Cache(config.cache_dir or env.cache_folder(), config.cache_bytes)


def held_out_of(config: HeldOutConfig, *, train_split: str) -> HeldOut | None:
    """Return what --val-fraction holds out of a split."""
    if config.val_fraction is None:
        return None
    return HeldOut(config.val_fraction, config.split_seed, train_split, config.val_split)


def open_labelled(
    config: SourceConfig, data_dir: Location, plan: dict[str, Any], split: str
) -> ImageSource:
    """Open the images of a label set's ``train`` or ``val``, by the plan of the set.

    Raises as open_images.
    """
    entry = plan["roles"][split]
    extra = check_extra(entry, config.extra_data if isinstance(config, ExtraDataConfig) else ())
    held_out = HeldOut.from_json(entry.get("held_out"))
    source = open_images(
        config, data_dir, entry["split"], held_out=held_out, names=lambda: plan["classes"]
    )
    return with_extra(config, by_name(source, plan["classes"]) or source, extra)


def with_extra(
    config: SourceConfig,
    source: ImageSource,
    folders: Sequence[Path],
    *,
    val: ImageSource | None = None,
) -> ImageSource:
    """Return a source joined with folders of unlabelled pictures, and show their summaries.

    Raises ConfigError as WithExtra.
    """
    if not folders:
        return source
    extra = [open_unlabelled(folder, classes=source.classes) for folder in folders]
    for each in extra:
        show_summary(each, strict=config.strict)
    return WithExtra(source, extra, val=val)


def check_extra(entry: dict[str, Any], folders: tuple[Path, ...]) -> tuple[Path, ...]:
    """Return the folders of --extra-data that a split of a label set needs.

    ``entry`` describes the split in the plan. Raises ConfigError if the plan names other folders.
    """
    names = [extra["name"] for extra in entry.get("extra", ())]
    if len(names) != len(folders) and names:
        raise ConfigError(
            f"the label set has labels of {console.count(len(names), 'folder')} of unlabelled "
            f"pictures too ({console.first_names(names)}); give each with --extra-data"
        )
    return folders if names else ()


def open_images(
    config: SourceConfig,
    data_dir: Location,
    split: str,
    *,
    held_out: HeldOut | None = None,
    names: ClassNames | None = None,
    multi_label: bool = False,
) -> ImageSource:
    """Open a split of a data set and show its summary; ``names`` as for open_source.

    Images with several classes are an error unless ``multi_label``. Raises ConfigError, also for
    files that are left out with --strict; DataError, RemoteError.
    """
    if config.download:
        download(data_dir)
    cache = cache_of(config)
    source = open_source(data_dir, split, cache=cache, held_out=held_out, names=names)
    if multi_labels_of(source) is not None and not multi_label:
        raise ConfigError(
            f"{source.name} has images of several classes: only `mealv2 transfer` trains on them, "
            "and evaluate measures such a run"
        )
    if config.class_map is not None:
        if is_unlabelled(source):
            raise ConfigError(
                f"--class-map has no effect on {shown(data_dir)}, whose pictures have no classes: "
                "they have those of the teachers"
            )
        source = _with_class_map(source, config.class_map)
    show_summary(source, strict=config.strict)
    return source


def _with_class_map(source: ImageSource, path: Path) -> ImageSource:
    """Return a source with the class ids of --class-map.

    Raises ConfigError for a class that the file does not list.
    """
    classes = read_class_map(path)
    mapped = by_name(source, classes)
    if mapped is None:
        unknown = sorted(set(source.classes) - set(classes))
        raise ConfigError(
            f"--class-map {path} does not list {console.first_names(unknown)} of {source.name}; "
            "add the missing names, or move their images away"
        )
    return mapped


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
    if isinstance(source, CocoSource):
        objects = console.count(source.num_objects, "object")
        parts[0] += f" with {objects} of {_num_classes(len(source.classes))}"
    elif is_unlabelled(source):
        parts[0] += ", unlabelled"
    elif len(source.classes):
        parts[0] += f" of {_num_classes(len(source.classes))}"
        is_multi_label = multi_labels_of(source) is not None
        sizes = ", several per image" if is_multi_label else None
        parts[0] += sizes or _class_sizes(source.labels, source.classes)
    if isinstance(source, Subset) and source.note:
        parts[0] += f" ({source.note})"
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
    config: SourceConfig,
    data_dir: Location,
    split: str,
    *,
    train: ImageSource,
    held_out: HeldOut | None = None,
    multi_label: bool = False,
) -> ImageSource | None:
    """Open a validation split, None for ``none``.

    Its class ids are those of its class names among those of ``train``; shows a warning for classes
    without images. Raises ConfigError for a class that is not among them, and for a table that
    lists an image for both splits.
    """
    if split == NO_SPLIT:
        return None
    source = open_images(config, data_dir, split, held_out=held_out, multi_label=multi_label)
    classes = list(train.classes)
    matched = by_name(source, classes)
    if matched is None:
        unknown = sorted(set(source.classes) - set(classes))
        advice = f"; the training data has {', '.join(classes[:4])}{', …' * (len(classes) > 4)}"
        if source.shard_starts is not None:
            advice += "; name the classes in classes.txt"
        raise ConfigError(
            f"split {split} of {shown(data_dir)} has different classes from the training data: "
            f"{', '.join(unknown[:4])}{advice}"
        )
    if missing := sorted(set(classes) - {matched.classes[label] for label in set(matched.labels)}):
        warn_missing(split, data_dir, missing)
    if isinstance(data_dir, Path) and is_table(data_dir) and train.split != split:
        _check_disjoint(data_dir, train, matched)
    return matched


def _check_disjoint(table: Path, train: ImageSource, val: ImageSource) -> None:
    if shared := set(train.keys) & set(val.keys):
        raise ConfigError(
            f"{table} lists {console.count(len(shared), 'image')} for {train.split} and for "
            f"{val.split}, which would be validated on images of the training "
            f"({console.first_names(sorted(shared))}); remove one of the rows of each"
        )


def warn_missing(split: str, data_dir: Location, missing: Sequence[str]) -> None:
    """Show a warning for classes of which a split has no image."""
    if not env.is_child_process():
        _show(
            f"warning: split {split} of {shown(data_dir)} has no image of "
            f"{_num_classes(len(missing))} ({console.first_names(missing)}): "
            "its accuracy is not measured for them"
        )


def warn_single_class(source: ImageSource) -> None:
    """Show a warning for training images of one class, which leave nothing to learn."""
    if len(source.classes) == 1 and not env.is_child_process():
        _show(
            f"warning: {source.name} has one class ({source.classes[0]}): nothing is learned, and "
            "its accuracy is 100 for any model"
        )
