"""mealv2.label_set.shard and shard_file: one file, there and back, as HDF5, and every damage."""

import ast
import dataclasses
import json
import random
import struct
from collections.abc import Callable
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any
from zlib import crc32

import h5py
import numpy as np
import pytest

import mealv2
from label_sets import ENCODINGS, KEYS, encoded, flip
from mealv2.errors import LabelSetError
from mealv2.label_set import (
    Encoding,
    EncodingLoss,
    Images,
    Shard,
    ShardFile,
    StoredViews,
    boxes_sha256,
    planned_shards,
    read_shard,
    shard_ranges,
    write_shard,
)

HEAD = "<8sIIQQQ32s"
FIELDS = [  # of a shard, which its header repeats
    "plan_sha256",
    "split",
    "number",
    "first_view",
    "num_views",
    "boxes_sha256",
    "skipped",
    "counts",
    "loss",
]


def shard_of(
    encoding: Encoding = ENCODINGS["rate"],
    keys: list[str] = KEYS,
    *,
    num_views: int = 3,
    seed: int = 0,
    **parts: Any,
) -> Shard:
    """Return a shard of random labels."""
    rows = encoded(encoding, len(keys) * num_views, num_views=num_views, seed=seed)
    named = {"split": "train", "number": 0, "first_view": 0, "plan_sha256": "ab" * 32, **parts}
    return Shard(
        keys=list(keys), blocks=encoding.blocks(rows, num_views), num_views=num_views, **named
    )


def images_of(num_images: int) -> Images:
    """Return sizes beyond 16 bits, bytes beyond 32, and classes."""
    rng = np.random.default_rng(1)
    return Images(
        rng.integers(1, 100_000, (num_images, 2)),
        rng.integers(0, 2**40, num_images),
        rng.integers(0, 50, num_images),
    )


def boxes_of(num_images: int, num_views: int) -> StoredViews:
    rng = np.random.default_rng(2)
    return StoredViews(
        rng.integers(0, 65_536, (num_images, num_views, 4)),
        rng.integers(0, 2, (num_images, num_views)),
    )


SKIPPED = {"position": 3, "reason": "OSError: truncated “file”", "bytes": 17, "class": 2}
SHARDS = {
    **{name: shard_of(encoding) for name, encoding in ENCODINGS.items()},
    "skipped and counted": shard_of(
        keys=KEYS[:2],
        skipped={"猫/broken.jpg": SKIPPED},
        counts={"top1": [1, 2, 2], "top5": [2, 2, 2]},
        number=7,
        split="val",
    ),
    "with images": shard_of(images=images_of(5), boxes_sha256="cd" * 32),
    "with boxes": shard_of(stored_views=boxes_of(5, 3), images=images_of(5)),
    "added views": shard_of(first_view=16),
    "with a loss": shard_of(loss=EncodingLoss(0.0187, 9)),
    "appended": shard_of(num_views=1, views_N=np.array([5, 0, 2**40, 2**64 - 1, 3], dtype="<u8")),
    "no images": shard_of(keys=[], skipped={"a.jpg": SKIPPED}, images=images_of(0)),
    "no images, dense": shard_of(ENCODINGS["dense float16"], []),
    "no images, boxes": shard_of(keys=[], stored_views=boxes_of(0, 3)),
    "one label": shard_of(Encoding(2, topk=1), ["a"], num_views=1),
}


def arrays_of(thing: Images | StoredViews | None) -> list[np.ndarray]:
    return [] if thing is None else [getattr(thing, f.name) for f in dataclasses.fields(thing)]


def same_shard(a: Shard, b: Shard) -> bool:
    """Whether two shards say the same."""
    arrays = [
        [
            *arrays_of(x.images),
            *arrays_of(x.stored_views),
            *([] if x.views_N is None else [x.views_N]),
        ]
        for x in (a, b)
    ]
    return all(
        getattr(a, name) == getattr(b, name) for name in (*FIELDS, "keys", "blocks")
    ) and all(np.array_equal(x, y) for x, y in zip(*arrays, strict=True))


# --- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHARDS)
def test_a_shard_is_read_back_as_it_was_written(tmp_path, name):
    path = tmp_path / "train-00000.h5"
    assert write_shard(path, SHARDS[name]) is True
    assert same_shard(read_shard(path), SHARDS[name])


@pytest.mark.parametrize("name", SHARDS)
def test_a_shard_written_twice_has_equal_bytes(tmp_path, name):
    for file in "ab":
        write_shard(tmp_path / file, SHARDS[name])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("name", SHARDS)
def test_a_shard_bears_no_time_that_would_make_the_next_one_differ(tmp_path, name):
    write_shard(tmp_path / "a.h5", SHARDS[name])
    with h5py.File(tmp_path / "a.h5") as file:
        for thing in (file, *file.values()):
            info = h5py.h5o.get_info(thing.id)
            assert (info.atime, info.btime, info.ctime, info.mtime) == (0, 0, 0, 0)


def test_the_first_whole_shard_stays(tmp_path):
    path = tmp_path / "train-00000.h5"
    assert write_shard(path, SHARDS["rate"]) is True
    assert write_shard(path, SHARDS["float16"]) is False
    assert same_shard(read_shard(path), SHARDS["rate"])
    assert write_shard(path, SHARDS["float16"], replace=True) is True
    assert same_shard(read_shard(path), SHARDS["float16"])


def test_a_shard_is_looked_at_without_its_labels(tmp_path):
    shard = SHARDS["with images"]
    write_shard(tmp_path / "a.h5", shard)
    file = ShardFile(tmp_path / "a.h5")
    assert (file.num_images, file.num_views, file.first_view) == (5, 3, 0)
    assert file.keys() == KEYS
    assert file.stored_views is None
    assert np.array_equal(file.images.sizes_N2, shard.images.sizes_N2)
    assert file.images.sizes_N2.dtype == np.uint32
    assert file.has_column("classes")
    assert not file.has_column("boxes")
    with pytest.raises(KeyError):
        file.column("boxes")
    with pytest.raises(ValueError, match="read-only"):
        file.column("crc32")[:] = 0


def test_the_same_file_is_read_from_memory(tmp_path):
    write_shard(tmp_path / "a.h5", SHARDS["with boxes"])
    data = (tmp_path / "a.h5").read_bytes()
    there = ShardFile(tmp_path / "elsewhere.h5", data)
    assert same_shard(there.shard(), SHARDS["with boxes"])


def test_blocks_come_with_their_keys_and_whether_they_are_whole(tmp_path):
    shard, path = SHARDS["rate"], tmp_path / "a.h5"
    write_shard(path, shard)
    data = bytearray(path.read_bytes())
    data[data.index(shard.blocks[2]) + 1] ^= 4
    path.write_bytes(data)
    found = list(ShardFile(path).blocks())
    assert [key.decode() for key, _, _ in found] == KEYS
    assert [whole for _, _, whole in found] == [True, True, False, True, True]
    assert [bytes(block) == b for (_, block, _), b in zip(found, shard.blocks, strict=True)] == [
        True, True, False, True, True,
    ]  # fmt: skip


def test_the_hash_of_boxes_is_over_their_numbers():
    boxes = np.arange(30).reshape(2, 3, 5)
    expected = sha256(struct.pack("<30I", *range(30))).hexdigest()
    assert boxes_sha256(boxes) == boxes_sha256(boxes.astype("<i2")) == expected
    assert boxes_sha256(np.asfortranarray(boxes)) == expected


@pytest.mark.parametrize(
    ("num_images", "shard_size", "expected"),
    [(0, 4, []), (3, 4, [(0, 3)]), (4, 4, [(0, 4)]), (9, 4, [(0, 4), (4, 8), (8, 9)])],
)
def test_shards_hold_every_image_once_and_in_order(num_images, shard_size, expected):
    assert [(r.start, r.stop) for r in shard_ranges(num_images, shard_size)] == expected


def plan_of_shards(**split: object) -> dict[str, Any]:
    return {"format_version": 2, "shard_size": 4, "roles": {"train": {"num_views": 2, **split}}}


def test_a_plan_says_its_shards_by_a_size_or_one_by_one():
    plans = (
        plan_of_shards(num_images=9),
        plan_of_shards(num_images=9, shard_sizes=[1, 6, 2]),
    )
    images = [[shard.images for shard in planned_shards(plan)] for plan in plans]
    assert images[0] == [range(4), range(4, 8), range(8, 9)]
    assert images[1] == [range(1), range(1, 7), range(7, 9)]


@pytest.mark.parametrize("sizes", [[], [4, 4], [10, -1], [9, 0], ["9"], 9, [None, 9]])
def test_a_plan_whose_shards_are_not_all_of_its_images_is_refused(sizes):
    with pytest.raises(LabelSetError, match="its plan does not define its shards"):
        planned_shards(plan_of_shards(num_images=9, shard_sizes=sizes))


# --- as its specification says --------------------------------------------------------------------


@pytest.mark.parametrize("name", SHARDS)
def test_the_head_says_where_everything_is(tmp_path, name):
    write_shard(tmp_path / "a.h5", SHARDS[name])
    data = (tmp_path / "a.h5").read_bytes()
    magic, version, zero, size, at, length, digest = struct.unpack_from(HEAD, data)
    assert struct.calcsize(HEAD) == 72
    assert (magic, version, zero, size) == (b"MEALV2\x1a\n", 2, 0, len(data))
    assert data[72:104] == sha256(data[:72]).digest()
    assert data[104:512] == bytes(408)
    assert data[512:520] == b"\x89HDF\r\n\x1a\n"
    text = data[at : at + length]
    assert sha256(text).digest() == digest
    header = json.loads(text)
    shard = SHARDS[name]
    for field in FIELDS:
        if field != "loss":
            assert header["role" if field == "split" else field] == getattr(shard, field)
    loss = None if shard.loss is None else {"kl": 0.0187, "num_views": 9}
    assert header.get("encoding_loss") == loss
    for name, where in header["columns"].items():
        content = data[where["offset"] :][: int(np.prod(where["shape"])) * int(where["type"][-1])]
        if name == "labels":
            assert "sha256" not in where
            assert content == b"".join(shard.blocks)
        else:
            assert sha256(content).hexdigest() == where["sha256"]


@pytest.mark.parametrize("name", SHARDS)
def test_an_hdf5_reader_finds_the_columns_where_the_header_says(tmp_path, name):
    write_shard(tmp_path / "a.h5", SHARDS[name])
    data = (tmp_path / "a.h5").read_bytes()
    _, _, _, _, at, length, _ = struct.unpack_from(HEAD, data)
    columns = json.loads(data[at : at + length])["columns"]
    with h5py.File(tmp_path / "a.h5", "r") as file:
        assert file.userblock_size == 512
        assert set(file) == {*columns, "header"}
        assert file["header"][()].tobytes() == data[at : at + length]
        for name, where in columns.items():
            dataset = file[name]
            assert dataset.chunks is None
            assert dataset.compression is None
            assert dataset.dtype == np.dtype(where["type"])
            assert list(dataset.shape) == where["shape"]
            if dataset.size:
                assert dataset.id.get_offset() == where["offset"]
            content = data[where["offset"] : where["offset"] + dataset.nbytes]
            assert dataset[()].tobytes() == content


def test_keys_are_found_by_their_hash_and_labels_checked_with_their_key(tmp_path):
    shard = SHARDS["rate"]
    write_shard(tmp_path / "a.h5", shard)
    with h5py.File(tmp_path / "a.h5", "r") as file:
        columns = {name: file[name][()] for name in file}
    keys = [key.encode() for key in KEYS]
    assert columns["keys"].tobytes() == b"".join(keys)
    assert columns["key_ends"].tolist() == np.cumsum([*map(len, keys)]).tolist()
    assert columns["label_ends"].tolist() == np.cumsum([*map(len, shard.blocks)]).tolist()
    hashes = [int.from_bytes(blake2b(key, digest_size=8).digest(), "little") for key in keys]
    assert columns["key_hashes"].tolist() == hashes
    pairs = zip(keys, shard.blocks, strict=True)
    assert columns["crc32"].tolist() == [crc32(key + block) for key, block in pairs]


# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 1, 100, 511, 512, 0.5, 0.999, -1])
def test_a_truncated_shard_is_refused_by_name(tmp_path, kept):
    path = tmp_path / "train-00007.h5"
    write_shard(path, SHARDS["rate"])
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept) if isinstance(kept, float) else kept])
    with pytest.raises(LabelSetError, match=r"train-00007\.h5 is damaged") as caught:
        read_shard(path)
    assert caught.value.exit_code == 3


def test_a_shard_with_something_behind_it_is_refused(tmp_path):
    write_shard(tmp_path / "a.h5", SHARDS["rate"])
    size = (tmp_path / "a.h5").stat().st_size
    with (tmp_path / "a.h5").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(LabelSetError, match=rf"it has {size + 1} bytes of {size}"):
        read_shard(tmp_path / "a.h5")


def test_a_missing_shard_raises_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_shard(tmp_path / "train-00000.h5")


def test_a_folder_in_the_place_of_a_shard_is_refused(tmp_path):
    with pytest.raises(LabelSetError, match=r"cannot read shard .*: Is a directory"):
        read_shard(tmp_path)


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "a.h5").write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(LabelSetError, match=r"a\.h5 is damaged"):
        read_shard(tmp_path / "a.h5")


@pytest.mark.parametrize("name", ["with boxes", "curve of 300", "appended"])
def test_no_flipped_bit_ever_changes_what_a_shard_says(tmp_path, name):
    path, shard = tmp_path / "a.h5", SHARDS[name]
    write_shard(path, shard)
    whole = path.read_bytes()
    covered = bytearray(len(whole))  # 1 for every byte that must be covered by a check
    _, _, _, _, at, length, _ = struct.unpack_from(HEAD, whole)
    addresses = [(0, 512), (at, length)]
    for where in json.loads(whole[at : at + length])["columns"].values():
        size = int(np.prod(where["shape"])) * int(where["type"][-1])
        addresses.append((where["offset"], size))
    for begin, size in addresses:
        covered[begin : begin + size] = b"\1" * size
    for bit in random.Random(20200923).sample(range(8 * len(whole)), 500):
        flip(path, whole, bit)
        if covered[bit // 8]:
            with pytest.raises(LabelSetError, match=r"a\.h5"):
                read_shard(path)
        else:  # HDF5's own, which is never read
            assert same_shard(read_shard(path), shard)


def columns_of(path: Path) -> dict[str, tuple[int, int]]:
    """Return where the bytes of each column lie, and how many."""
    data = path.read_bytes()
    _, _, _, _, at, length, _ = struct.unpack_from(HEAD, data)
    return {
        name: (where["offset"], int(np.prod(where["shape"])) * int(where["type"][-1]))
        for name, where in json.loads(data[at : at + length])["columns"].items()
    }


INDEX = ["keys", "key_ends", "key_hashes", "label_ends", "crc32", "image_sizes", "file_bytes"]


@pytest.mark.parametrize("column", [*INDEX, "classes", "boxes", "flips"])
def test_a_flipped_bit_in_any_index_column_is_found_when_the_file_is_opened(tmp_path, column):
    path = tmp_path / "a.h5"
    write_shard(path, SHARDS["with boxes"])
    (begin, size), data = columns_of(path)[column], path.read_bytes()
    for byte in (begin, begin + size // 2, begin + size - 1):
        flip(path, data, 8 * byte)
        with pytest.raises(LabelSetError, match=rf"a\.h5 is damaged: the column {column} fails"):
            ShardFile(path)


def test_a_flipped_bit_in_the_labels_is_found_when_they_are_read(tmp_path):
    path = tmp_path / "a.h5"
    write_shard(path, SHARDS["with boxes"])
    (begin, size), data = columns_of(path)["labels"], path.read_bytes()
    for byte, key in ((begin, KEYS[0]), (begin + size - 1, KEYS[-1])):
        flip(path, data, 8 * byte)
        file = ShardFile(path)
        with pytest.raises(LabelSetError) as caught:
            file.shard()
        assert f"the labels of {key!r} in {path} are damaged (CRC-32)" in str(caught.value)


def test_a_changed_header_is_found(tmp_path):
    path = tmp_path / "a.h5"
    write_shard(path, SHARDS["no images"])
    data = path.read_bytes()
    assert b"truncated" in data
    path.write_bytes(data.replace(b"truncated", b"TRUNCATED"))
    with pytest.raises(LabelSetError, match="its header fails its SHA-256"):
        ShardFile(path)


def with_header(data: bytes, text: bytes) -> bytes:
    """Return a shard with another header, put behind it, and all of its hashes right."""
    head = struct.pack(
        HEAD,
        b"MEALV2\x1a\n",
        2,
        0,
        len(data) + len(text),
        len(data),
        len(text),
        sha256(text).digest(),
    )
    return (head + sha256(head).digest()).ljust(512, b"\0") + data[512:] + text


def forged(data: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """Return a shard whose header was changed, and all of its hashes right."""
    _, _, _, _, at, length, _ = struct.unpack_from(HEAD, data)
    header = json.loads(data[at : at + length])
    change(header)
    return with_header(data, json.dumps(header).encode())


def _column(name: str, **changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["columns"][name].update(changes)


def _with(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header.update(changes)


def _without(*names: str) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        place = header
        for name in names[:-1]:
            place = place[name]
        del place[names[-1]]

    return change


@pytest.mark.parametrize(
    "change",
    [
        _column("labels", offset=10**30),
        _column("labels", offset=-1),
        _column("labels", shape=[10**30]),
        _column("labels", shape=[1]),
        _column("labels", shape=[]),
        _column("labels", shape=None),
        _column("labels", type="<f8"),
        _column("crc32", shape=[2, 2]),
        _column("key_ends", shape=[4]),
        _column("key_ends", shape=["5"]),
        _column("keys", offset="512"),
        _column("image_sizes", shape=[10]),
        _without("columns", "classes", "sha256"),
        _without("columns", "crc32"),
        _without("columns", "labels"),
        _without("columns", "file_bytes"),
        _without("columns", "flips"),
        _without("columns"),
        _without("role"),
        _without("boxes_sha256"),
        _with(columns=[]),
        _with(columns={"other": {"offset": 0, "shape": [0], "type": "|u1"}}),
        _with(encoding_loss=None),
        _with(encoding_loss={"kl": 0.1}),
        _with(encoding_loss={"kl": -0.1, "num_views": 6}),
        _with(encoding_loss={"kl": float("inf"), "num_views": 6}),
        _with(encoding_loss={"kl": float("nan"), "num_views": 6}),
        _with(encoding_loss={"kl": "0.1", "num_views": 6}),
        _with(encoding_loss={"kl": 0.1, "num_views": 0}),
        _with(encoding_loss={"kl": 0.1, "num_views": 6, "other": 1}),
        _with(num_views=0),
        _with(num_views=2),
        _with(num_views=10**30),
        _with(num_views=-3),
        _with(num_views="3"),
        _with(first_view=-1),
        _with(role=None),
        _with(skipped=[]),
    ],
)
def test_a_header_that_no_writer_writes_is_refused(tmp_path, change):
    path = tmp_path / "a.h5"
    write_shard(path, SHARDS["with boxes"])
    data = path.read_bytes()
    path.write_bytes(forged(data, lambda header: None))
    assert same_shard(read_shard(path), SHARDS["with boxes"])
    path.write_bytes(forged(data, change))
    with pytest.raises(LabelSetError, match=r"a\.h5 is damaged"):
        ShardFile(path)


@pytest.mark.parametrize("column", ["key_ends", "label_ends"])
def test_ends_that_do_not_rise_are_refused(tmp_path, column):
    path = tmp_path / "a.h5"
    write_shard(path, SHARDS["with boxes"])
    data = bytearray(path.read_bytes())
    begin, size = columns_of(path)[column]
    ends = np.frombuffer(bytes(data[begin : begin + size]), "<u8").copy()
    ends[:2] = ends[1::-1]
    data[begin : begin + size] = ends.tobytes()
    digest = sha256(ends.tobytes()).hexdigest()
    path.write_bytes(forged(bytes(data), _column(column, sha256=digest)))
    with pytest.raises(LabelSetError, match=f"the column {column} does not match"):
        ShardFile(path)


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"{", b"\xff", b"[" * 100_000])
def test_a_header_that_is_no_header_is_refused(tmp_path, text):
    path = tmp_path / "a.h5"
    write_shard(path, SHARDS["rate"])
    data = path.read_bytes()
    path.write_bytes(with_header(data, text))
    with pytest.raises(LabelSetError, match=r"a\.h5 is damaged"):
        ShardFile(path)


def test_another_format_version_is_named(tmp_path):
    path = tmp_path / "a.h5"
    write_shard(path, SHARDS["rate"])
    data = path.read_bytes()
    head = data[:8] + struct.pack("<I", 3) + data[12:72]
    path.write_bytes((head + sha256(head).digest()).ljust(512, b"\0") + data[512:])
    with pytest.raises(LabelSetError, match="format version 3; this mealv2 reads 2"):
        ShardFile(path)


# --- rooms ----------------------------------------------------------------------------------------


def imported_names(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}


def test_only_the_label_sets_room_imports_h5py():
    package = Path(mealv2.__file__).parent
    files = [
        *package.rglob("*.py"),
        *package.parent.glob("pipeline/**/*.py"),
        package.parent / "cli.py",
    ]
    importers = {
        path for path in files if any(n.split(".")[0] == "h5py" for n in imported_names(path))
    }
    assert {path.parent for path in importers} == {package / "label_set"}
