"""Pack a data set into tar files as WebDataset lays them out, each with an index beside it.

Images are copied unchanged, in the order of a hash of their keys: in a source's own order every
file would have images of one class. SPLIT.pack.json (mealv2.data.pack_index) lists the files and is
completed last.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from mealv2.data.content_hash import content_hash
from mealv2.data.pack_index import SUFFIX as PACK_SUFFIX
from mealv2.data.pack_index import Pack, PackedTar
from mealv2.data.source import ImageSource, fingerprint, fingerprint_of
from mealv2.data.tar import TarShards
from mealv2.data.tar_index import TarIndex, create_index, index_bytes, index_path, read_index
from mealv2.data.tar_splits import INDEX_SUFFIX
from mealv2.data.tar_writer import pack_order, sample, sample_names, tar_writer
from mealv2.errors import ConfigError, DataError
from mealv2.label_set import shard_ranges
from mealv2.storage.atomic import atomic_file, file_sha256, write_atomic
from pipeline import console
from pipeline.config import PackConfig
from pipeline.pack.common import (
    changed_error,
    check_output,
    claim,
    in_threads,
    other_picture,
    read_image,
)

_CLASSES = "classes.txt"
_Tars = dict[str, PackedTar]


class _Image(NamedTuple):
    """An encoded image, its content hash, and that of its original."""

    data: bytes
    content_hash: int
    original_hash: int


def pack_tars(config: PackConfig, sources: Sequence[ImageSource]) -> dict[str, Any]:
    """Pack splits into tar files; return their part of the report."""
    check_output(config, _is_packed(config.output))
    classes = _class_lines(sources)
    num_made = 0
    tars: _Tars = {}
    for source in sources:
        listed, made = _pack_split(config, source, _claim(config, source, classes))
        tars |= listed
        num_made += made
    num_bytes = sum(tar.bytes for tar in tars.values())
    console.info(
        f"{console.count(sum(map(len, sources)), 'image')} in "
        f"{console.count(len(tars), 'tar file')}, {console.size_of(num_bytes)}"
    )
    return {"shards": len(tars), "made_now": num_made, "bytes": num_bytes}


def _is_packed(out: Path) -> Callable[[Path], bool]:
    """Return a function that recognises files of packs: tar files, indices and class names."""
    splits = [path.name.removesuffix(PACK_SUFFIX) for path in out.glob(f"*{PACK_SUFFIX}")]
    tar = rf"({'|'.join(map(re.escape, splits))})-\d+\.tar({re.escape(INDEX_SUFFIX)})?"
    names = re.compile(rf"{re.escape(_CLASSES)}|.*{re.escape(PACK_SUFFIX)}|{tar}")
    return lambda path: names.fullmatch(path.name) is not None


def _class_lines(sources: Sequence[ImageSource]) -> bytes:
    """Return classes.txt; raises ConfigError for splits that differ or a name of several lines."""
    first = sources[0]
    for other in sources[1:]:
        if other.classes != first.classes:
            raise ConfigError(
                f"{first.name} and {other.name} have different classes, and the tar files of a "
                "folder share one list; pack each split (--split) into a folder of its own"
            )
    if name := next((name for name in first.classes if name.splitlines() != [name.strip()]), None):
        raise ConfigError(
            f"the class name {name!r} contains a line break, or blanks at an end; rename the class"
        )
    return "".join(f"{name}\n" for name in first.classes).encode()


def _claim(config: PackConfig, source: ImageSource, classes: bytes) -> Pack:
    """Claim --output for a split's tar files; return the index of its pack, complete or not.

    Raises ConfigError if it holds others.
    """
    stored = zip(source.labels, source.keys, source.stored_sizes, strict=True)
    settings: dict[str, str | int] = {
        "images_per_shard": config.images_per_shard,
        "stored_sha256": fingerprint_of(source.classes, stored),
        "classes_sha256": sha256(classes).hexdigest(),
    }
    path = config.output / _CLASSES
    if path.is_file() and path.read_bytes() != classes:
        raise ConfigError(
            f"{path} lists other classes than those of {source.name}; give a new --output"
        )
    pack = claim(_index_of(config, source), Pack(fingerprint(source), settings), source)
    if not path.is_file():
        write_atomic(path, classes)
    return pack


def _index_of(config: PackConfig, source: ImageSource) -> Path:
    return config.output / f"{source.split}{PACK_SUFFIX}"


def _pack_split(config: PackConfig, source: ImageSource, before: Pack) -> tuple[_Tars, int]:
    """Make the missing tar files; return all by name, and how many were made."""
    order = pack_order(source.keys)
    tars: _Tars = {}
    complete: dict[int, tuple[Path, int]] = {}  # by position: the tar file, the original's hash
    missing: dict[Path, list[int]] = {}
    for number, positions in enumerate(shard_ranges(len(order), config.images_per_shard)):
        path = config.output / f"{source.split}-{number:06d}.tar"
        part = [order[position] for position in positions]
        if (index := _complete_tar(path, source, part, before)) is None:
            missing[path] = part
        else:
            tars[path.name] = PackedTar(index.num_bytes, index.sha256)
            hashes = index.images.original_hashes
            complete |= {p: (path, found) for p, found in zip(part, hashes, strict=True)}
    _compare(config, source, complete)
    positions_to_read = [position for part in missing.values() for position in part]
    images = in_threads(
        lambda position: _image(source, position), positions_to_read, workers=config.workers
    )
    shown = console.progress(
        images, total=len(positions_to_read), what=f"packing {source.split}", unit="images"
    )
    for path, part in missing.items():
        index = _write(path, source, part, islice(shown, len(part)), before)
        tars[path.name] = PackedTar(index.num_bytes, index.sha256)
    tars = dict(sorted(tars.items()))
    _finish(config, source, before, tars)
    return tars, len(missing)


def _compare(
    config: PackConfig, source: ImageSource, complete: dict[int, tuple[Path, int]]
) -> None:
    """Raise ConfigError if an image is not the one in its complete tar file."""
    read = in_threads(
        lambda position: _image(source, position).original_hash, complete, workers=config.workers
    )
    what = f"comparing {source.split}"
    shown = console.progress(read, total=len(complete), what=what, unit="images")
    for position, found in zip(complete, shown, strict=True):
        path, original = complete[position]
        if found != original:
            raise other_picture(path, source, source.keys[position])


def _image(source: ImageSource, position: int) -> _Image:
    data = read_image(source, position)
    if len(data) != source.stored_sizes[position]:
        raise changed_error(source)
    return _Image(data, content_hash(data), source.original_hash(position, data))


def _write(
    path: Path, source: ImageSource, part: Sequence[int], images: Iterator[_Image], before: Pack
) -> TarIndex:
    """Write a tar file, then its index; return the index.

    Raises ConfigError if a finished pack had another file.
    """
    keys = [source.keys[position] for position in part]
    hashes = []
    with atomic_file(path) as temporary:
        with temporary.open("xb") as stream, tar_writer(stream) as writer:
            samples = zip(part, keys, sample_names(keys), images, strict=True)
            for position, key, name, image in samples:
                writer.write(sample(name, key, source.labels[position], image.data))
                hashes.append((image.content_hash, image.original_hash))
        index = create_index(temporary, [source.sizes[position] for position in part], hashes)
        made = PackedTar(index.num_bytes, index.sha256)
        if before.files is not None and made != before.files.get(path.name, made):
            raise ConfigError(
                f"{path} was packed from other pictures than those of {source.name} now; give a "
                "new folder as --output"
            )
    write_atomic(index_path(path), index_bytes(index))
    return index


def _complete_tar(
    path: Path, source: ImageSource, part: Sequence[int], before: Pack
) -> TarIndex | None:
    """Return the index of a tar file if both are complete, else None.

    In a finished pack its size is checked, in an unfinished one its SHA-256.
    """
    try:
        index = read_index(path)
        if index is None or path.stat().st_size != index.num_bytes:
            return None
    except (DataError, FileNotFoundError):
        return None
    if index.images.keys != [source.keys[position] for position in part]:
        return None
    if before.files is not None:
        found = PackedTar(index.num_bytes, index.sha256)
        return index if found == before.files.get(path.name) else None
    return index if file_sha256(path) == index.sha256 else None


def _finish(config: PackConfig, source: ImageSource, before: Pack, tars: _Tars) -> None:
    """Open all tar files and complete the index of the pack; raises DataError."""
    opened = TarShards(
        [config.output / name for name in tars],
        name=str(config.output),
        split=source.split,
        classes=list(source.classes),
    )
    if fingerprint(opened) != before.data_sha256:
        raise changed_error(source)
    pack = replace(before, files=tars)
    pack.check(str(config.output), {name: (config.output / name).stat().st_size for name in tars})
    if pack != before:
        write_atomic(_index_of(config, source), pack.to_bytes())
