"""An ImageFolder tree with the same pixels in JPEGs that views are cut out of.

Restart markers are put into every JPEG (mealv2.restart says what for); what cannot be packed, or
would not decode to the same pixels, is copied as it is. An index in each split (mealv2.packed),
written last, says what the originals were.
"""

import time
from collections import Counter
from pathlib import Path
from typing import Any

from mealv2.errors import ConfigError, DataError
from mealv2.files import write_whole
from mealv2.images import EXTENSIONS, ImageSource, fingerprint, open_source
from mealv2.packed import INDEX_NAME, PackIndex
from mealv2.pixels import decode
from mealv2.restart import is_packed
from mealv2.tar_shards import TarShards
from pipeline import logs
from pipeline.config import PackConfig
from pipeline.jpegtran import UNREADABLE, Jpegtran, decodes_to, packed
from pipeline.pack.places import refuse_file, refuse_overlap, splits_of, strange
from pipeline.pack.reading import in_threads, read_image


def run(config: PackConfig) -> dict[str, Any]:
    """Pack a data set; return the report. Raises MealError and OSError."""
    began = time.monotonic()
    program = Jpegtran.find()
    sources = {name: open_source(config.data_dir, name) for name in splits_of(config)}
    for source in sources.values():
        if isinstance(source, TarShards):
            _refuse_no_tree(source)
    refuse_overlap(config.data_dir, config.output)
    _refuse_what_is_no_pack(config.output)
    indices = {}
    num_made = 0
    for name, source in sources.items():
        index = _claim(config.output, source, program)
        indices[name], made = _pack_split(config, source, program, index)
        num_made += made
    images = [sizes for index in indices.values() for sizes in (index.images or {}).values()]
    kept = Counter(reason for index in indices.values() for reason in index.kept.values())
    report = {
        "data_dir": str(config.data_dir),
        "out": str(config.output),
        "splits": list(indices),
        "images": len(images),
        "packed": len(images) - kept.total(),
        "kept": dict(sorted(kept.items())),
        "made_now": num_made,
        "bytes_before": sum(before for before, _ in images),
        "bytes_after": sum(after for _, after in images),
        "jpegtran": program.version,
        "seconds": round(time.monotonic() - began, 3),
    }
    logs.say(_told(report))
    return report


# --- where to -----------------------------------------------------------------------------------


def _refuse_what_is_no_pack(out: Path) -> None:
    """Raise ConfigError where --output holds anything but packed splits, finished or not."""
    refuse_file(out)
    for path in strange(out):
        if not path.is_dir() or (not (path / INDEX_NAME).is_file() and any(strange(path))):
            raise ConfigError(
                f"--output {out} is not empty, and {path.name} is not packed; give a new folder"
            )


def _refuse_no_tree(tars: TarShards) -> None:
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


def _claim(out: Path, source: ImageSource, program: Jpegtran) -> PackIndex:
    """Make a folder the place of a split's packed images; return its index, finished or not.

    Raises ConfigError where it holds others, or those of another jpegtran.
    """
    folder = out / source.split
    wanted = PackIndex(program.version, fingerprint(source))
    found = PackIndex.read(folder)
    if found is None:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / INDEX_NAME, wanted.to_bytes())
        return wanted
    if found.data_sha256 != wanted.data_sha256:
        raise ConfigError(
            f"{folder} holds other images than {source.name}, or what that was before it "
            "changed; give a new folder as --output"
        )
    if found.jpegtran != wanted.jpegtran:
        raise ConfigError(
            f"{folder} is made by {found.jpegtran}, and here is {wanted.jpegtran}; "
            "give a new folder as --output"
        )
    return found


# --- packing ------------------------------------------------------------------------------------


def _pack_split(
    config: PackConfig, source: ImageSource, program: Jpegtran, before: PackIndex
) -> tuple[PackIndex, int]:
    """Make what is not there yet; return the finished index and how many images were made."""
    folder = config.output / source.split
    images, kept = {}, {}
    num_made = 0
    results = in_threads(
        lambda position: _pack_image(source, position, folder, program, before),
        range(len(source)),
        workers=config.workers,
    )
    shown = logs.progress(results, total=len(source), what=f"packing {source.split}", unit="images")
    for position, (size, reason, is_made) in enumerate(shown):
        key = source.keys[position]
        images[key] = (source.sizes[position], size)
        num_made += is_made
        if reason is not None:
            kept[key] = reason
        if reason == UNREADABLE and is_made:
            logs.say(f"cannot be read, copied as it is: {Path(source.name) / key}")
    index = PackIndex(before.jpegtran, before.data_sha256, images, kept)
    if index != before:
        write_whole(folder / INDEX_NAME, index.to_bytes())
    packed = open_source(
        config.output, source.split
    )  # raises, saying what is there that is not ours
    if fingerprint(packed) != index.data_sha256:
        raise DataError(f"{source.name} changed while it was packed; pack it into a new folder")
    return index, num_made


def _pack_image(
    source: ImageSource, position: int, folder: Path, program: Jpegtran, before: PackIndex
) -> tuple[int, str | None, bool]:
    """Make one file unless it is there; return its size, why it is a copy, and if it was made."""
    key = source.keys[position]
    path = folder / key
    if before.images is not None and path.is_file():
        size = before.images[key][1]
        if path.stat().st_size == size:
            return size, before.kept.get(key), False
    data = read_image(source, position)
    if before.images is None and (size := _size_of_packed(path, data)):
        return size, None, False  # an earlier run, that did not come to its end, made it
    made, reason = packed(data, program)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, made)
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


def _told(report: dict[str, Any]) -> str:
    """Return the report as a person says it."""
    before, after = report["bytes_before"], report["bytes_after"]
    kept = ", ".join(f"{count} {reason}" for reason, count in report["kept"].items())
    return (
        f"{report['packed']} of {logs.count(report['images'], 'image')} packed, the same pixels in "
        f"{logs.size_of(after)} instead of {logs.size_of(before)}"
        + (f"; copied as they are: {kept}" if kept else "")
    )
