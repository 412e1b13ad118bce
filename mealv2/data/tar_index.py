"""The images in a tar file and where they lie: found by its headers, or read from TAR.index.

`mealv2 pack --to tar` writes TAR.index beside a tar file, so that no header is read;
docs/how-to/tar-shards.md has the format. The index of another file is detected: readers compare
the tar file's size, and the CRC of what precedes each image that they read.
"""

import re
import unicodedata
import zlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mealv2.data.content_hash import content_hash
from mealv2.data.image_files import EXTENSIONS
from mealv2.data.left_out import LeftOut
from mealv2.data.pack_index import ADVICE_RERUN
from mealv2.data.source import UNLABELLED
from mealv2.data.tar_headers import BLOCK, Archive, Member
from mealv2.data.tar_splits import INDEX_SUFFIX
from mealv2.errors import DataError
from mealv2.storage.atomic import file_sha256
from mealv2.storage.json_format import parse_sealed_json, sealed_json
from mealv2.storage.regular_files import read_regular

META = re.compile(r"__[^/]*__(/|$)")  # webdataset: folders without samples
MAX_CLASSES = 1_000_000  # without a file of names
_MAX_TEXT_SIZES = {"cls": 32, "key": 4096}  # bytes of members that are read with the headers
_KNOWN = ("mealv2-tar-index", 1)
_ADVICE = f"remove it to work without an index, or {ADVICE_RERUN}"
# the fields of the file that are fields 1 to 5 of ShardIndex, and their array types
_COLUMNS = {"classes": "q", "sizes": "q", "offsets": "q", "head_sizes": "q", "head_crc32s": "I"}


class ShardIndex(NamedTuple):
    """The images of one tar file, in file order.

    The label of a sample without ``.cls`` is ``UNLABELLED``. ``head_crc32s`` are the CRC-32 of the
    ``head_sizes`` bytes before each image; ``hashes`` are the content hashes of the images, empty
    if nobody has read them. ``original_sizes`` and ``original_hashes`` are those of the images
    before they were packed.
    ``left_out`` counts the other members.
    """

    keys: list[str]
    labels: "array[int]"
    sizes: "array[int]"
    offsets: "array[int]"
    head_sizes: "array[int]"
    head_crc32s: "array[int]"
    original_sizes: "array[int]"
    hashes: "array[int]"
    original_hashes: "array[int]"
    left_out: LeftOut


class TarIndex(NamedTuple):
    """An index: the images of a tar file, its size in bytes, and its SHA-256 (hex)."""

    images: ShardIndex
    num_bytes: int
    sha256: str


# --- by the headers -----------------------------------------------------------------------------


def index_shard(path: Path) -> ShardIndex:
    """Find the samples of a tar file by one pass over its headers.

    Raises DataError, which names file and sample, for a bad sample or a damaged tar file.
    """
    sizes = array("q")
    hashes = array("Q")
    columns = (array("q"), sizes, array("q"), array("q"), array("I"), sizes, hashes, hashes)
    index = ShardIndex([], *columns, LeftOut())
    with Archive(path) as archive:
        for sample in _samples(archive, index.left_out):
            where = f"sample {sample.name} of {path}"
            image = _image_of(sample, where)
            index.keys.append(_key_of(sample, where))
            index.labels.append(_label_of(sample, where))
            index.sizes.append(image.size)
            index.offsets.append(image.offset)
            index.head_sizes.append(BLOCK)
            index.head_crc32s.append(image.header_crc32)
    return index


def create_index(
    path: Path, original_sizes: Sequence[int], hashes: Sequence[tuple[int, int]]
) -> TarIndex:
    """Return the index of a packed tar file; CRCs cover everything between two images.

    ``hashes`` are the content hashes of each image in the file and of its original.
    """
    images = index_shard(path)
    data_end = 0
    with path.open("rb") as file:
        for number, (offset, size) in enumerate(zip(images.offsets, images.sizes, strict=True)):
            file.seek(data_end)
            images.head_sizes[number] = offset - data_end
            images.head_crc32s[number] = zlib.crc32(file.read(offset - data_end))
            data_end = offset + size + -size % BLOCK
    images = images._replace(
        original_sizes=array("q", original_sizes),
        hashes=array("Q", [found for found, _ in hashes]),
        original_hashes=array("Q", [original for _, original in hashes]),
    )
    return TarIndex(images, path.stat().st_size, file_sha256(path))


def create_plain_index(path: Path) -> TarIndex:
    """Return the index of a tar file that holds original images, with their content hashes.

    Raises as ``index_shard``, FileNotFoundError.
    """
    images, hashes = index_shard(path), array("Q")
    with path.open("rb") as file:
        for offset, size in zip(images.offsets, images.sizes, strict=True):
            file.seek(offset)
            hashes.append(content_hash(file.read(size)))
    images = images._replace(hashes=hashes, original_hashes=hashes)
    return TarIndex(images, path.stat().st_size, file_sha256(path))


class _Sample(NamedTuple):
    """The members with one name, by extension, and the text of small ones."""

    name: str
    members: dict[str, Member]
    texts: dict[str, bytes]


def _samples(archive: Archive, left_out: LeftOut) -> Iterator[_Sample]:
    """Yield the samples of each run of members with one name up to the first dot."""
    sample = _Sample("", {}, {})
    for member in archive.members():
        folder, slash, base = member.name.rpartition("/")
        stem, dot, extension = base.partition(".")
        # webdataset: names without a dot, and members below __some__/, are not samples
        if not (stem and dot) or (folder[:2] == "__" and META.match(folder)):
            reason = "no extension" if stem and not dot else "hidden" if dot else "below __…__"
            left_out.add(member.name, reason if folder[:2] != "__" else "below __…__")
            continue
        if (name := folder + slash + stem) != sample.name:
            yield from _divided(sample, left_out)
            sample = _Sample(name, {}, {})
        extension = extension.lower()
        if extension in sample.members:
            raise DataError(f"sample {name} of {archive.path} has two members .{extension}")
        sample.members[extension] = member
        last = extension.rpartition(".")[2]
        if (max_size := _MAX_TEXT_SIZES.get(last)) is not None:  # while it is in the window
            if member.size > max_size:
                raise DataError(
                    f"{member.name} in {archive.path} has {member.size} bytes, more than {max_size}"
                )
            sample.texts[extension] = archive.read(member.offset, member.size)
    yield from _divided(sample, left_out)


def _divided(sample: _Sample, left_out: LeftOut) -> list[_Sample]:
    """Return the samples in the members with one name up to the first dot, by place of the image.

    webdataset's sample is all of them. Members with dots in their names are samples of their own,
    named up to the last dot, where an image and a class have that name: ``cat.v0.jpg`` with
    ``cat.v0.cls``, but not ``cat.mask.png`` beside ``cat.jpg``.
    """
    parts: dict[str, _Sample] = {}
    for extension, member in sample.members.items():
        inner, dot, last = extension.rpartition(".")
        part = parts.setdefault(inner, _Sample(f"{sample.name}{dot and '.'}{inner}", {}, {}))
        part.members[last] = member
        if extension in sample.texts:
            part.texts[last] = sample.texts[extension]
    inner_names = [inner for inner, part in parts.items() if inner and _is_complete(part)]
    own = [parts[inner] for inner in inner_names]
    prefixes = tuple(f"{inner}." for inner in inner_names)
    rest = {
        extension: member
        for extension, member in sample.members.items()
        if not extension.startswith(prefixes)
    }
    if "cls" in rest or any(f".{extension}" in EXTENSIONS for extension in rest):
        own.append(_Sample(sample.name, rest, sample.texts))
    elif orphans := [m for ext, m in rest.items() if f".{ext.rpartition('.')[2]}" in EXTENSIONS]:
        raise DataError(f"{orphans[0].name} has no class: add a member of its name with .cls")
    else:
        for extension, member in rest.items():
            left_out.add(member.name, f".{extension.rpartition('.')[2]}")
    used = sum(1 + len(part.members.keys() & {"cls", "key"}) for part in own)  # 1: the image
    left_out.num_metadata += len(sample.members) - used if own else 0
    return sorted(own, key=lambda part: min(member.offset for member in part.members.values()))


def _is_complete(sample: _Sample) -> bool:
    images = [extension for extension in sample.members if f".{extension}" in EXTENSIONS]
    return bool(images) and "cls" in sample.members


def _image_of(sample: _Sample, where: str) -> Member:
    """Return the image of a sample; raises DataError unless it has one."""
    images = [member for ext, member in sample.members.items() if f".{ext}" in EXTENSIONS]
    if len(images) > 1:
        names = ", ".join(member.name for member in images)
        raise DataError(f"{where} has {len(images)} images: {names}; one is needed")
    if not images:
        found = ", ".join(f".{ext}" for ext in list(sample.members)[:8])
        raise DataError(f"{where} has no image, for example .jpg or .png (it has {found})")
    return images[0]


def _label_of(sample: _Sample, where: str) -> int:
    if "cls" not in sample.texts:
        return UNLABELLED
    digits = sample.texts["cls"].strip()
    if not digits.isdigit():
        raise DataError(f"the .cls of {where} is {digits!r}; it must be a class id, counted from 0")
    return min(int(digits), MAX_CLASSES)  # TarShards raises for this one


def _key_of(sample: _Sample, where: str) -> str:
    try:
        key = sample.texts["key"].decode("utf-8-sig") if "key" in sample.texts else sample.name
    except UnicodeDecodeError:
        key = ""
    if not key or "\0" in key:
        raise DataError(f"the .key of {where} is not a text in UTF-8")
    if not _is_key(key):
        raise DataError(f"{where} has the key {key!r}, which leads out of its folder")
    return unicodedata.normalize("NFC", key)


def _is_key(key: object) -> bool:
    """Return whether a value can be a key: a text that is not a path out of a folder."""
    if not isinstance(key, str) or not key or "\0" in key:
        return False
    return key[0] != "/" and ".." not in key.split("/")


# --- TAR.index ----------------------------------------------------------------------------------


def index_path(tar: Path) -> Path:
    """Return the path of a tar file's index."""
    return tar.with_name(tar.name + INDEX_SUFFIX)


def read_index(tar: Path) -> TarIndex | None:
    """Read the index beside a tar file, None if there is none; raises as ``index_of_bytes``."""
    path = index_path(tar)
    try:
        return index_of_bytes(read_regular(path), str(path))
    except FileNotFoundError:
        return None


def index_bytes(index: TarIndex) -> bytes:
    """Return the file of an index; equal indices give equal bytes."""
    images = index.images
    columns = zip(_COLUMNS, images[1:6], strict=True)
    value = {"bytes": index.num_bytes, "sha256": index.sha256, "keys": images.keys}
    value |= {name: column.tolist() for name, column in columns}
    is_packed = images.original_sizes != images.sizes
    value["original_sizes"] = images.original_sizes.tolist() if is_packed else None
    value["hashes"] = _hex(images.hashes)
    is_packed = images.original_hashes != images.hashes
    value["original_hashes"] = _hex(images.original_hashes) if is_packed else None
    if (left_out := images.left_out.as_json()) is not None:
        value["left_out"] = left_out
    return sealed_json(_KNOWN, value)


def index_of_bytes(data: bytes, name: str) -> TarIndex:
    """Parse an index file called ``name``; raises DataError for a damaged one.

    The caller compares it with the tar file.
    """
    what = "an index of a tar file"
    index = _parsed(parse_sealed_json(data, name, what=what, known=_KNOWN, advice=_ADVICE))
    if index is None:
        raise DataError(f"{name} is damaged: it does not describe a tar file; {_ADVICE}")
    return index


def _parsed(value: dict[str, Any]) -> TarIndex | None:
    """Return the index in a JSON object, None for impossible values."""
    keys, num_bytes, sha256 = (value.get(name) for name in ("keys", "bytes", "sha256"))
    if not (isinstance(keys, list) and all(map(_is_key, keys))):
        return None
    if type(num_bytes) is not int or not isinstance(sha256, str):
        return None
    try:
        columns = [array(kind, value[name]) for name, kind in _COLUMNS.items()]
        originals = value["original_sizes"]
        columns.append(columns[1] if originals is None else array("q", originals))
        hashes, original_hashes = _of_hex(value["hashes"]), value["original_hashes"]
        originals_Q = hashes if original_hashes is None else _of_hex(original_hashes)
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    tables = [np.asarray(column) for column in columns]
    if any(len(t) != len(keys) or (t > 1 << 62).any() for t in tables):
        return None
    if (tables[0] < UNLABELLED).any() or any((t < 0).any() for t in tables[1:]):
        return None
    if not len(hashes) == len(originals_Q) == len(keys):
        return None
    _, sizes_N, offsets_N, heads_N, *_ = tables
    if (heads_N > offsets_N).any() or (offsets_N + sizes_N > num_bytes).any():
        return None
    if (left_out := LeftOut.from_json(value.get("left_out"))) is None:
        return None
    labels, sizes, offsets, heads, crcs, original_sizes = columns
    before_packing = original_sizes, hashes, originals_Q
    images = ShardIndex(keys, labels, sizes, offsets, heads, crcs, *before_packing, left_out)
    return TarIndex(images, num_bytes, sha256)


def _hex(hashes: "array[int]") -> str:
    """Return content hashes as one text, 16 hex digits each."""
    return np.asarray(hashes, np.uint64).astype(">u8").tobytes().hex()


def _of_hex(text: str) -> "array[int]":
    """Return the content hashes in a text; raises ValueError, TypeError."""
    return array("Q", np.frombuffer(bytes.fromhex(text), ">u8").astype(np.uint64).tobytes())
