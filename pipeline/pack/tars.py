"""Tar files of images, as WebDataset lays them out, each with an index beside it.

Images are put in as they lie, in the order of a hash of their keys: a source in the order of its
classes would make every file one class. SPLIT.pack.json (mealv2.packed_tars) says what the files
are of; that it lists them is written last.
"""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from mealv2.data.jpeg_pack import SUFFIX as PACK_SUFFIX
from mealv2.data.jpeg_pack import Pack, PackedTar
from mealv2.data.open import open_source
from mealv2.data.source import ImageSource, fingerprint, fingerprint_of
from mealv2.data.tar import TarShards
from mealv2.data.tar_index import SUFFIX as INDEX_SUFFIX
from mealv2.data.tar_index import TarIndex, read_index, write_index
from mealv2.data.tar_writer import index_of, pack_order, sample, sample_names, tar_writer
from mealv2.errors import ConfigError, DataError
from mealv2.label_set import shard_ranges
from mealv2.storage.atomic import atomic_file, file_sha256, write_atomic
from pipeline import console
from pipeline.config import PackConfig
from pipeline.pack.places import check_out, claim, splits_of
from pipeline.pack.reading import in_threads, read_image

_CLASSES = "classes.txt"
_Tars = dict[str, PackedTar]


def run(config: PackConfig) -> dict[str, Any]:
    """Pack a data set into tar files; return the report. Raises MealError and OSError."""
    began = time.monotonic()
    sources = {name: open_source(config.data_dir, name) for name in splits_of(config)}
    check_out(config, _are_ours(config.output))
    classes = _class_lines(list(sources.values()))
    num_made = 0
    tars: _Tars = {}
    for source in sources.values():
        listed, made = _pack_split(config, source, _claim(config, source, classes))
        tars |= listed
        num_made += made
    report: dict[str, Any] = {
        "data_dir": str(config.data_dir),
        "output": str(config.output),
        "splits": list(sources),
        "images": sum(map(len, sources.values())),
        "shards": len(tars),
        "made_now": num_made,
        "bytes": sum(tar.bytes for tar in tars.values()),
        "seconds": round(time.monotonic() - began, 3),
    }
    console.info(
        f"{console.count(report['images'], 'image')} in "
        f"{console.count(report['shards'], 'tar file')}, "
        f"{console.size_of(report['bytes'])}"
    )
    return report


# --- where to -----------------------------------------------------------------------------------


def _are_ours(out: Path) -> Callable[[Path], bool]:
    """Return what tells the files of packs in a folder: tar files, indices and class names."""
    splits = [path.name.removesuffix(PACK_SUFFIX) for path in out.glob(f"*{PACK_SUFFIX}")]
    tar = rf"({'|'.join(map(re.escape, splits))})-\d+\.tar({re.escape(INDEX_SUFFIX)})?"
    ours = re.compile(rf"{re.escape(_CLASSES)}|.*{re.escape(PACK_SUFFIX)}|{tar}")
    return lambda path: ours.fullmatch(path.name) is not None


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


def _claim(config: PackConfig, source: ImageSource, classes: bytes) -> Pack:
    """Make --output the folder of a split's tar files; return its index, finished or not.

    Raises ConfigError where it holds others.
    """
    stored = zip(source.labels, source.keys, source.stored_sizes, strict=True)
    settings: dict[str, str | int] = {
        "images_per_shard": config.images_per_shard,
        "stored_sha256": fingerprint_of(source.classes, stored),
    }
    path = config.output / _CLASSES
    if path.is_file() and path.read_bytes() != classes:
        raise ConfigError(f"{path} lists other classes than {source.name} has; give a new --output")
    pack = claim(_index_of(config, source), Pack(fingerprint(source), settings), source)
    if not path.is_file():
        write_atomic(path, classes)
    return pack


def _index_of(config: PackConfig, source: ImageSource) -> Path:
    return config.output / f"{source.split}{PACK_SUFFIX}"


# --- packing ------------------------------------------------------------------------------------


def _pack_split(config: PackConfig, source: ImageSource, before: Pack) -> tuple[_Tars, int]:
    """Make what is not there yet; return all tar files by name, and how many were made."""
    order = pack_order(source.keys)
    parts = [
        [order[index_in_order] for index_in_order in part]
        for part in shard_ranges(len(order), config.images_per_shard)
    ]
    paths = [config.output / f"{source.split}-{number:06d}.tar" for number in range(len(parts))]
    tars = {
        path.name: _complete_tar(path, source, part, before)
        for path, part in zip(paths, parts, strict=True)
    }
    missing = [
        (path, part) for path, part in zip(paths, parts, strict=True) if tars[path.name] is None
    ]
    images = in_threads(
        lambda position: _image(source, position),
        (position for _, part in missing for position in part),
        workers=config.workers,
    )
    shown = console.progress(
        images,
        total=sum(len(part) for _, part in missing),
        what=f"packing {source.split}",
        unit="images",
    )
    for path, part in missing:
        index = _write(path, source, part, islice(shown, len(part)))
        tars[path.name] = PackedTar(index.num_bytes, index.sha256)
    done = {name: tar for name, tar in tars.items() if tar is not None}
    _finish(config, source, before, done)
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
    with atomic_file(path) as temporary:
        with temporary.open("xb") as stream, tar_writer(stream) as writer:
            samples = zip(part, keys, sample_names(keys), images, strict=True)
            for position, key, name, image in samples:
                writer.write(sample(name, key, source.labels[position], image))
        index = index_of(temporary, [source.sizes[position] for position in part])
    write_index(path, index)
    return index


def _complete_tar(
    path: Path, source: ImageSource, part: Sequence[int], before: Pack
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
    found = PackedTar(index.num_bytes, index.sha256)
    if before.files is not None:
        return found if found == before.files.get(path.name) else None
    is_ours = index.images.keys == [source.keys[position] for position in part]
    return found if is_ours and file_sha256(path) == index.sha256 else None


def _finish(config: PackConfig, source: ImageSource, before: Pack, tars: _Tars) -> None:
    """Write that all tar files are there, having opened them; raises DataError."""
    opened = TarShards(
        [config.output / name for name in tars],
        name=str(config.output),
        split=source.split,
        classes=list(source.classes),
    )
    if fingerprint(opened) != before.data_sha256:
        raise _changed(source)
    pack = replace(before, files=tars)
    pack.check(str(config.output), {name: (config.output / name).stat().st_size for name in tars})
    if pack != before:
        write_atomic(_index_of(config, source), pack.to_bytes())
