"""Tar files of images, as WebDataset lays them out, each with an index beside it.

Images are put in as they lie, in the order of a hash of their keys: a source in the order of its
classes would make every file one class. SPLIT.pack.json (mealv2.packed_tars) says what the files
are of; that it lists them is written last.
"""

import re
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from mealv2.errors import ConfigError, DataError
from mealv2.files import file_sha256, whole_file, write_whole
from mealv2.images import ImageSource, fingerprint, fingerprint_of, open_source
from mealv2.label_set import shard_ranges
from mealv2.packed_tars import SUFFIX as PACK_SUFFIX
from mealv2.packed_tars import PackedTar, TarPack, pack_path
from mealv2.tar_index import SUFFIX as INDEX_SUFFIX
from mealv2.tar_index import TarIndex, read_index, write_index
from mealv2.tar_shards import TarShards
from mealv2.tar_writing import TarWriter, pack_order, sample_names
from pipeline import logs
from pipeline.config import PackConfig
from pipeline.pack.places import refuse_file, refuse_overlap, splits_of, strange
from pipeline.pack.reading import in_threads, read_image

_CLASSES = "classes.txt"


def run(config: PackConfig) -> dict[str, Any]:
    """Pack a data set into tar files; return the report. Raises MealError and OSError."""
    began = time.monotonic()
    sources = {name: open_source(config.data_dir, name) for name in splits_of(config)}
    refuse_overlap(config.data_dir, config.output)
    _refuse_what_is_no_pack(config.output)
    classes = _class_lines(list(sources.values()))
    num_made, shards = 0, []
    for source in sources.values():
        before = _claim(config, source, classes)
        listed, made = _pack_split(config, source, before)
        shards += listed
        num_made += made
    report: dict[str, Any] = {
        "data_dir": str(config.data_dir),
        "out": str(config.output),
        "splits": list(sources),
        "images": sum(shard.images for shard in shards),
        "shards": len(shards),
        "made_now": num_made,
        "bytes": sum(shard.bytes for shard in shards),
        "seconds": round(time.monotonic() - began, 3),
    }
    logs.say(
        f"{logs.count(report['images'], 'image')} in {logs.count(report['shards'], 'tar file')}, "
        f"{logs.size_of(report['bytes'])}"
    )
    return report


# --- where to -----------------------------------------------------------------------------------


def _refuse_what_is_no_pack(out: Path) -> None:
    """Raise ConfigError where --output holds anything but packed tar files and their indexes."""
    refuse_file(out)
    names = [path.name for path in strange(out)]
    splits = [name.removesuffix(PACK_SUFFIX) for name in names if name.endswith(PACK_SUFFIX)]
    either = "|".join(map(re.escape, splits))
    tar = rf"({either})-\d+\.tar({re.escape(INDEX_SUFFIX)})?" if splits else "(?!)"
    for name in names:
        is_ours = name == _CLASSES or name.endswith(PACK_SUFFIX) or re.fullmatch(tar, name)
        if not is_ours:
            raise ConfigError(
                f"--output {out} is not empty, and {name} is not packed; give a new folder"
            )


def _class_lines(sources: Sequence[ImageSource]) -> bytes:
    """Return classes.txt; raises ConfigError where splits differ, or a name has several lines."""
    first = sources[0]
    for other in sources[1:]:
        if other.classes != first.classes:
            raise ConfigError(
                f"{first.name} and {other.name} have other classes, and tar files of one folder "
                "share a list of them; pack each split (--split) into a folder of its own"
            )
    if name := next((name for name in first.classes if name.splitlines() != [name]), None):
        raise ConfigError(f"the class name {name!r} has a line break in it; rename the class")
    return "".join(f"{name}\n" for name in first.classes).encode()


def _claim(config: PackConfig, source: ImageSource, classes: bytes) -> TarPack:
    """Make --output the place of a split's tar files; return what is known of them.

    Raises ConfigError where it holds others.
    """
    stored = zip(source.labels, source.keys, source.stored_sizes, strict=True)
    wanted = TarPack(
        fingerprint(source), fingerprint_of(source.classes, stored), config.num_per_shard
    )
    found = TarPack.read(config.output, source.split)
    path = config.output / _CLASSES
    if path.is_file() and path.read_bytes() != classes:
        raise ConfigError(f"{path} lists other classes than {source.name} has; give a new --output")
    if found is None:
        config.output.mkdir(parents=True, exist_ok=True)
        write_whole(path, classes)
        write_whole(pack_path(config.output, source.split), wanted.to_bytes())
        return wanted
    if (what := _difference(found, wanted)) is not None:
        raise ConfigError(f"{config.output} holds {what.format(source.name)}; give a new --output")
    return found


def _difference(found: TarPack, wanted: TarPack) -> str | None:
    if found.data_sha256 != wanted.data_sha256:
        return "other images than {}, or what that was before it changed"
    if found.stored_sha256 != wanted.stored_sha256:
        return "the images of {} as they were before, or after, `mealv2 pack` re-packed them"
    if found.images_per_shard != wanted.images_per_shard:
        return (
            f"shards of {found.images_per_shard} images of {{}}, and these would have "
            f"{wanted.images_per_shard}"
        )
    return None


# --- packing ------------------------------------------------------------------------------------


def _pack_split(
    config: PackConfig, source: ImageSource, before: TarPack
) -> tuple[list[PackedTar], int]:
    """Make what is not there yet; return all tar files and how many were made."""
    order = pack_order(source.keys)
    parts = [
        [order[place] for place in part] for part in shard_ranges(len(order), config.num_per_shard)
    ]
    paths = [config.output / f"{source.split}-{number:06d}.tar" for number in range(len(parts))]
    shards = [
        _whole_tar(path, source, part, before) for path, part in zip(paths, parts, strict=True)
    ]
    missing = [number for number, shard in enumerate(shards) if shard is None]
    images = in_threads(
        lambda position: _image(source, position),
        (position for number in missing for position in parts[number]),
        workers=config.workers,
    )
    shown = logs.progress(
        images,
        total=sum(len(parts[number]) for number in missing),
        what=f"packing {source.split}",
        unit="images",
    )
    for number in missing:
        part = parts[number]
        index = _write(paths[number], source, part, islice(shown, len(part)))
        shards[number] = PackedTar(paths[number].name, len(part), index.num_bytes, index.sha256)
    done = [shard for shard in shards if shard is not None]
    _finish(config.output, source, before, done)
    return done, len(missing)


def _image(source: ImageSource, position: int) -> bytes:
    data = read_image(source, position)
    if len(data) != source.stored_sizes[position]:
        raise _changed(source)
    return data


def _changed(source: ImageSource) -> DataError:
    return DataError(f"{source.name} changed while it was packed; pack it into a new folder")


def _write(
    path: Path, source: ImageSource, part: Sequence[int], images: Iterator[bytes]
) -> TarIndex:
    """Write a tar file whole, then its index; return it."""
    keys = [source.keys[position] for position in part]
    with whole_file(path) as temporary, temporary.open("xb") as stream:
        writer = TarWriter(stream)
        samples = zip(part, keys, sample_names(keys), images, strict=True)
        for position, key, name, image in samples:
            label, size = source.labels[position], source.sizes[position]
            writer.add(name, key, label, image, original_size=size)
        index = writer.finish()
    write_index(path, index)
    return index


def _whole_tar(
    path: Path, source: ImageSource, part: Sequence[int], before: TarPack
) -> PackedTar | None:
    """Return a tar file that is there whole with its index, None where it must be made.

    Of a pack that came to its end the size is enough; else the contents are hashed.
    """
    try:
        index = read_index(path)
        if index is None or path.stat().st_size != index.num_bytes:
            return None
    except (DataError, FileNotFoundError):
        return None
    found = PackedTar(path.name, len(index.images.keys), index.num_bytes, index.sha256)
    if before.shards is not None:
        return found if found in before.shards else None
    is_ours = index.images.keys == [source.keys[position] for position in part]
    return found if is_ours and file_sha256(path) == index.sha256 else None


def _finish(out: Path, source: ImageSource, before: TarPack, shards: list[PackedTar]) -> None:
    """Write that all tar files are there, having opened them; raises DataError."""
    tars = TarShards(
        [out / shard.name for shard in shards],
        name=str(out),
        split=source.split,
        classes=list(source.classes),
    )
    if fingerprint(tars) != before.data_sha256:
        raise _changed(source)
    pack = TarPack(before.data_sha256, before.stored_sha256, before.images_per_shard, shards)
    pack.check(str(out), {shard.name: (out / shard.name).stat().st_size for shard in shards})
    if pack != before:
        write_whole(pack_path(out, source.split), pack.to_bytes())
