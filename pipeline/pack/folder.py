"""Pack an ImageFolder tree: the same pixels in JPEGs with restart markers.

A file that cannot be packed, or would not decode to the same pixels, is copied. The index of each
split (mealv2.data.pack_index) is written last and identifies the original files.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mealv2.data.content_hash import content_hash
from mealv2.data.folder import ImageFolder
from mealv2.data.image_files import EXTENSIONS
from mealv2.data.jpeg_restart import is_packed
from mealv2.data.jpegtran import UNREADABLE, Jpegtran, decodes_to, packed
from mealv2.data.open import open_source
from mealv2.data.pack_index import INDEX_NAME, Pack, PackedImage
from mealv2.data.pixels import decode
from mealv2.data.source import ImageSource, fingerprint
from mealv2.errors import ConfigError, DataError
from mealv2.storage.atomic import list_folder, write_atomic
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


def pack_folder(
    config: PackConfig, sources: Sequence[ImageSource], program: Jpegtran
) -> dict[str, Any]:
    """Pack splits into folders; return their part of the report."""
    for source in sources:
        if not isinstance(source, ImageFolder):
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


def _check_class_folders(source: ImageSource) -> None:
    """Raise ConfigError for a source whose images cannot be a tree with the same keys."""
    for key, label in zip(source.keys, source.labels, strict=True):
        name = source.classes[label]
        if not (key.startswith(f"{name}/") and key.lower().endswith(EXTENSIONS)):
            raise ConfigError(
                f"{source.name}: the key {key!r} is not {name}/…/IMAGE.jpg and cannot be a path in "
                "a tree; pack it with --to tar"
            )
    if source.classes != sorted(source.classes) or len(set(source.labels)) < len(source.classes):
        raise ConfigError(
            f"{source.name}: a tree numbers its classes by name, and needs an image of each; pack "
            "it with --to tar"
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
    for position, (image, is_new) in enumerate(shown):
        key = source.keys[position]
        images[key] = image
        num_made += is_new
        if image.kept == UNREADABLE and is_new:
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
) -> tuple[PackedImage, bool]:
    """Make a missing or damaged file; return its entry, and whether it was made.

    Raises ConfigError for an image that is not the one that a finished pack has.
    """
    key = source.keys[position]
    path = folder / key
    found = path.read_bytes() if path.is_file() else None
    data = read_image(source, position)
    original = source.original_hash(position, data)
    if existing and original != existing[key].original_hash:
        raise other_picture(folder, source, key)
    if existing and found is not None and content_hash(found) == existing[key].content_hash:
        return existing[key], False
    if not existing and found is not None and _is_packed_from(found, data):
        # made by an earlier run that did not finish
        entry = PackedImage(len(found), source.sizes[position], content_hash(found), original)
        return entry, False
    made, reason = packed(data, program)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, made)
    hashes = content_hash(made), original
    return PackedImage(len(made), source.sizes[position], *hashes, reason or ""), True


def _is_packed_from(data: bytes, original: bytes) -> bool:
    """Return whether a file of an earlier run has the pixels of an original."""
    try:
        return is_packed(data) and decodes_to(data, decode(original))
    except DataError:
        return False
