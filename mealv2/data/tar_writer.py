"""Tar files of images as WebDataset lays them out: names of samples, and bytes that repeat."""

import zlib
from array import array
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import webdataset

from mealv2.data.source import EXTENSIONS, extension_of
from mealv2.data.tar import META, index_shard
from mealv2.data.tar_headers import BLOCK
from mealv2.data.tar_index import TarIndex
from mealv2.storage.atomic import file_sha256


def tar_writer(stream: BinaryIO) -> Any:
    """Return a webdataset.TarWriter of bytes, whose files have no time and no owner.

    So equal samples give equal bytes, on any machine and at any time.
    """
    return webdataset.TarWriter(
        stream, user="", group="", mode=0o644, mtime=0, encoder=False, format="GNU_FORMAT"
    )


def sample(name: str, key: str, class_id: int, image: bytes, **more: bytes) -> dict[str, Any]:
    """Return the sample of an image; the extension is the key's own or that of the image."""
    suffix = PurePosixPath(key).suffix.lower()
    suffix = suffix[1:] if suffix in EXTENSIONS else extension_of(image)
    suffix = "jpg" if suffix == "jpeg" else suffix
    return {
        "__key__": name,
        suffix: image,
        "cls": str(class_id).encode(),
        "key": key.encode(),
        **more,
    }


def index_of(path: Path, original_sizes: Sequence[int]) -> TarIndex:
    """Return the index of a tar file that was written here; it covers all between two images."""
    images = index_shard(path)
    data_end = 0
    with path.open("rb") as file:
        for number, (offset, size) in enumerate(zip(images.offsets, images.sizes, strict=True)):
            file.seek(data_end)
            images.head_sizes[number] = offset - data_end
            images.head_crc32s[number] = zlib.crc32(file.read(offset - data_end))
            data_end = offset + size + -size % BLOCK
    images = images._replace(original_sizes=array("q", original_sizes))
    return TarIndex(images, path.stat().st_size, file_sha256(path))


def pack_order(keys: Sequence[str]) -> list[int]:
    """Return the positions of keys sorted by a hash: mixed, and the same whatever their order."""
    hashes = [blake2b(key.encode(), digest_size=8).digest() for key in keys]
    return sorted(range(len(keys)), key=hashes.__getitem__)


def sample_names(keys: Sequence[str]) -> list[str]:
    """Return the names of the samples of a tar file: the keys without extension.

    A sample's name ends at the first dot, and two samples may not have the same one: where that
    would not be so, a hash of the key makes the name.
    """
    stems = [PurePosixPath(key).with_suffix("").as_posix() for key in keys]
    uses = Counter(stems)
    return [
        stem if uses[stem] == 1 and _is_name(stem) else _hashed(stem, key)
        for stem, key in zip(stems, keys, strict=True)
    ]


def _is_name(stem: str) -> bool:
    return "." not in stem.rpartition("/")[2] and not META.match(stem)


def _hashed(stem: str, key: str) -> str:
    name = stem.replace(".", "-").replace("__", "--")
    return f"{name}-{blake2b(key.encode(), digest_size=8).hexdigest()}"
