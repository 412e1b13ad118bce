"""Pack an ImageFolder tree: the same pixels in JPEGs with restart markers.

A file that cannot be packed, or would not decode to the same pixels, is copied. The index of each
split (mealv2.data.pack_index) is written last and identifies the original files.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mealv2.data.jpeg_restart import is_packed
from mealv2.data.jpegtran import UNREADABLE, Jpegtran, decodes_to, packed
from mealv2.data.open import open_source
from mealv2.data.pack_index import INDEX_NAME, Pack, PackedImage
from mealv2.data.pixels import decode
from mealv2.data.source import EXTENSIONS, ImageSource, fingerprint
from mealv2.data.tar import TarShards
from mealv2.errors import ConfigError, DataError
from mealv2.storage.atomic import list_folder, write_atomic
from pipeline import console
from pipeline.config import PackConfig
from pipeline.pack.common import (
    changed_error,
    check_output,
    claim,
    in_threads,
    read_image,
)


def pack_folder(
    config: PackConfig, sources: Sequence[ImageSource], program: Jpegtran
) -> dict[str, Any]:
    """Pack splits into folders; return their part of the report."""
    for source in sources:
        if isinstance(source, TarShards):
            _check_class_folders(source)
    check_output(config, _is_packed_split)
    images: list[PackedImage] = []
    num_made = 0
    for source in sources:
        wanted = Pack(fingerprint(source), {"jpegtran": program.version})
        index = claim(config.output / source.split / INDEX_NAME, wanted, source)
        made, num_new = _pack_split(config, source, program, index)
        images += made.values()
        num_made += num_new
    kept = Counter(image.kept for image in images if image.kept)
    report: dict[str, Any] = {
        "packed": len(images) - kept.total(),
        "kept": dict(sorted(kept.items())),
        "made_now": num_made,
        "bytes_before": sum(image.original_bytes for image in images),
        "bytes_after": sum(image.bytes for image in images),
        "jpegtran": program.version,
    }
    copied = ", ".join(f"{count} {reason}" for reason, count in report["kept"].items())
    console.info(
        f"{report['packed']} of {console.count(len(images), 'image')} packed: the same pixels in "
        f"{console.size_of(report['bytes_after'])} instead of "
        f"{console.size_of(report['bytes_before'])}{copied and f'; copied unchanged: {copied}'}"
    )
    return report


def _is_packed_split(path: Path) -> bool:
    """Return whether a path in --output is a packed split, complete or not, or an empty folder."""
    return path.is_dir() and ((path / INDEX_NAME).is_file() or not list_folder(path))


def _check_class_folders(tars: TarShards) -> None:
    """Raise ConfigError for tar files whose images cannot be a tree with the same keys."""
    for key, label in zip(tars.keys, tars.labels, strict=True):
        name = tars.classes[label]
        if not (key.startswith(f"{name}/") and key.lower().endswith(EXTENSIONS)):
            raise ConfigError(
                f"{tars.name}: the key {key!r} is not {name}/…/IMAGE.jpg and cannot be a path in "
                "a tree; pack it with --to tar"
            )
    if tars.classes != sorted(tars.classes) or len(set(tars.labels)) < len(tars.classes):
        raise ConfigError(
            f"{tars.name}: a tree numbers its classes by name, and needs an image of each; pack it "
            "with --to tar"
        )


def _pack_split(
    config: PackConfig, source: ImageSource, program: Jpegtran, before: Pack
) -> tuple[dict[str, PackedImage], int]:
    """Make the missing files; return all images by key, and how many were made."""
    folder = config.output / source.split
    existing = before.images()
    images: dict[str, PackedImage] = {}
    num_made = 0
    results = in_threads(
        lambda position: _pack_image(source, position, folder, program, existing),
        range(len(source)),
        workers=config.workers,
    )
    shown = console.progress(
        results, total=len(source), what=f"packing {source.split}", unit="images"
    )
    for position, (size, reason, is_new) in enumerate(shown):
        key = source.keys[position]
        images[key] = PackedImage(size, source.sizes[position], reason or "")
        num_made += is_new
        if reason == UNREADABLE and is_new:
            console.info(f"cannot be decoded, copied unchanged: {Path(source.name) / key}")
    pack = replace(before, files=images)
    if pack != before:
        write_atomic(folder / INDEX_NAME, pack.to_bytes())
    if fingerprint(open_source(config.output, source.split)) != pack.data_sha256:
        raise changed_error(source)
    return images, num_made


def _pack_image(
    source: ImageSource,
    position: int,
    folder: Path,
    program: Jpegtran,
    existing: dict[str, PackedImage],
) -> tuple[int, str | None, bool]:
    """Make a missing file; return its size, why it is a copy, and whether it was made."""
    key = source.keys[position]
    path = folder / key
    if existing and path.is_file() and path.stat().st_size == existing[key].bytes:
        return existing[key].bytes, existing[key].kept, False
    data = read_image(source, position)
    if not existing and (size := _size_of_packed(path, data)):
        return size, None, False  # made by an earlier run that did not finish
    made, reason = packed(data, program)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, made)
    return len(made), reason, True


def _size_of_packed(path: Path, original: bytes) -> int:
    """Return the size of a packed file of an earlier run, 0 if it is missing or wrong."""
    if not path.is_file():
        return 0
    data = path.read_bytes()
    try:
        return len(data) if is_packed(data) and decodes_to(data, decode(original)) else 0
    except DataError:
        return 0
