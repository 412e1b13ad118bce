"""Write tar files of images as WebDataset lays them out: sample names, and reproducible bytes."""

from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import webdataset

from mealv2.data.image_files import EXTENSIONS, extension_of
from mealv2.data.tar_index import META


def tar_writer(stream: BinaryIO) -> Any:
    """Return a webdataset.TarWriter without times and owners: equal samples give equal bytes."""
    return webdataset.TarWriter(
        stream, user="", group="", mode=0o644, mtime=0, encoder=False, format="GNU_FORMAT"
    )


def sample(name: str, key: str, class_id: int, image: bytes, **more: bytes) -> dict[str, Any]:
    """Return the sample of an image; the extension is the key's own or that of the image."""
    suffix = PurePosixPath(key).suffix.lower()
    suffix = suffix[1:] if suffix in EXTENSIONS else extension_of(image)
    suffix = "jpg" if suffix in ("jpeg", "jpe", "jfif") else suffix
    members = {suffix: image, "cls": str(class_id).encode(), "key": key.encode()}
    return {"__key__": name, **members, **more}


def pack_order(keys: Sequence[str]) -> list[int]:
    """Return the positions of keys sorted by a hash: mixed, and the same for the same keys."""
    hashes = [_hash(key).digest() for key in keys]
    return sorted(range(len(keys)), key=hashes.__getitem__)


def sample_names(keys: Sequence[str]) -> list[str]:
    """Return the sample names of a tar file: keys without extension.

    A name ends at the first dot and must be unique; a hash of the key replaces other names.
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
    return f"{stem.replace('.', '-').replace('__', '--')}-{_hash(key).hexdigest()}"


def _hash(key: str) -> blake2b:
    return blake2b(key.encode(), digest_size=8)
