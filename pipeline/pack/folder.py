"""An ImageFolder tree with the same pixels in JPEGs that views are cut out of.

Restart markers are put into every JPEG (mealv2.data.jpeg_restart says what for); what cannot be
packed, or would not decode to the same pixels, is copied as it is. An index in each split
(mealv2.data.jpeg_pack), written last, says what the originals were.
"""

import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from mealv2.data.jpeg_pack import INDEX_NAME, Pack, PackedImage
from mealv2.data.jpeg_restart import is_packed
from mealv2.data.jpegtran import UNREADABLE, Jpegtran, decodes_to, packed
from mealv2.data.open import open_source
from mealv2.data.pixels import decode
from mealv2.data.source import EXTENSIONS, ImageSource, fingerprint
from mealv2.data.tar import TarShards
from mealv2.errors import ConfigError, DataError
from mealv2.storage.atomic import write_atomic
from pipeline import console
from pipeline.config import PackConfig
from pipeline.pack.places import check_out, claim, foreign_files, splits_of
from pipeline.pack.reading import in_threads, read_image


def run(config: PackConfig) -> dict[str, Any]:
    """Pack a data set; return the report. Raises MealError and OSError."""
    began = time.monotonic()
    program = Jpegtran.find()
    sources = {name: open_source(config.data_dir, name) for name in splits_of(config)}
    for source in sources.values():
        if isinstance(source, TarShards):
            _check_class_folders(source)
    check_out(config, _is_ours)
    images: list[PackedImage] = []
    num_made = 0
    for name, source in sources.items():
        wanted = Pack(fingerprint(source), {"jpegtran": program.version})
        pack = claim(config.output / name / INDEX_NAME, wanted, source)
        made, num_new = _pack_split(config, source, program, pack)
        images += made.values()
        num_made += num_new
    kept = Counter(image.kept for image in images if image.kept)
    report = {
        "data_dir": str(config.data_dir),
        "output": str(config.output),
        "splits": list(sources),
        "images": len(images),
        "packed": len(images) - kept.total(),
        "kept": dict(sorted(kept.items())),
        "made_now": num_made,
        "bytes_before": sum(image.original_bytes for image in images),
        "bytes_after": sum(image.bytes for image in images),
        "jpegtran": program.version,
        "seconds": round(time.monotonic() - began, 3),
    }
    console.info(_print_summary(report))
    return report


# --- where to -----------------------------------------------------------------------------------


def _is_ours(path: Path) -> bool:
    """Return whether what is in --output is a packed split, finished or not, or an empty folder."""
    return path.is_dir() and ((path / INDEX_NAME).is_file() or not any(foreign_files(path)))


def _check_class_folders(tars: TarShards) -> None:
    """Raise ConfigError for tar files whose images cannot be a tree with the same keys."""
    for key, label in zip(tars.keys, tars.labels, strict=True):
        name = tars.classes[label]
        if not (key.startswith(f"{name}/") and key.lower().endswith(EXTENSIONS)):
            raise ConfigError(
                f"{tars.name}: the key {key!r} is not {name}/…/IMAGE.jpg, so that it has no place "
                "in a tree; pack it with --to tar"
            )
    if tars.classes != sorted(tars.classes) or len(set(tars.labels)) < len(tars.classes):
        raise ConfigError(
            f"{tars.name}: a tree numbers its classes by name, and needs an image of each; pack it "
            "with --to tar"
        )


# --- packing ------------------------------------------------------------------------------------


def _pack_split(
    config: PackConfig, source: ImageSource, program: Jpegtran, before: Pack
) -> tuple[dict[str, PackedImage], int]:
    """Make what is not there yet; return all images by key and how many were made."""
    folder = config.output / source.split
    folders = before.images()
    images: dict[str, PackedImage] = {}
    num_made = 0
    results = in_threads(
        lambda position: _pack_image(source, position, folder, program, folders),
        range(len(source)),
        workers=config.workers,
    )
    shown = console.progress(
        results, total=len(source), what=f"packing {source.split}", unit="images"
    )
    for position, (size, reason, is_made) in enumerate(shown):
        key = source.keys[position]
        images[key] = PackedImage(size, source.sizes[position], reason or "")
        num_made += is_made
        if reason == UNREADABLE and is_made:
            console.info(f"cannot be read, copied as it is: {Path(source.name) / key}")
    pack = replace(before, files=images)
    if pack != before:
        write_atomic(folder / INDEX_NAME, pack.to_bytes())
    packed = open_source(config.output, source.split)  # raises where it holds other files
    if fingerprint(packed) != pack.data_sha256:
        raise DataError(f"{source.name} changed while it was packed; pack it into a new folder")
    return images, num_made


def _pack_image(
    source: ImageSource,
    position: int,
    folder: Path,
    program: Jpegtran,
    folders: dict[str, PackedImage],
) -> tuple[int, str | None, bool]:
    """Make one file unless it is there; return its size, why it is a copy, and if it was made."""
    key = source.keys[position]
    path = folder / key
    if folders and path.is_file() and path.stat().st_size == folders[key].bytes:
        return folders[key].bytes, folders[key].kept, False
    data = read_image(source, position)
    if not folders and (size := _size_of_packed(path, data)):
        return size, None, False  # an earlier run, that did not come to its end, made it
    made, reason = packed(data, program)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, made)
    return len(made), reason, True


def _size_of_packed(path: Path, original: bytes) -> int:
    """Return the size of a file that an earlier run left, 0 where it must be made (again)."""
    if not path.is_file():
        return 0
    data = path.read_bytes()
    try:
        is_whole = is_packed(data) and decodes_to(data, decode(original))
    except DataError:
        return 0
    return len(data) if is_whole else 0


def _print_summary(report: dict[str, Any]) -> str:
    """Return the report as a person says it."""
    before, after = report["bytes_before"], report["bytes_after"]
    kept = ", ".join(f"{count} {reason}" for reason, count in report["kept"].items())
    return (
        f"{report['packed']} of {console.count(report['images'], 'image')} packed, the same "
        f"pixels in "
        f"{console.size_of(after)} instead of {console.size_of(before)}"
        + (f"; copied as they are: {kept}" if kept else "")
    )
