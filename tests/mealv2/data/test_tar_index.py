"""mealv2.data.tar_index, tar_writer and keys: what lies where, and nothing wrong believed."""

import hashlib
import io
import itertools
import json
import random
import re
import tarfile
from pathlib import Path

import pytest

from mealv2.data.keys import Keys
from mealv2.data.tar import TarShards
from mealv2.data.tar_index import (
    TarIndex,
    create_index,
    index_bytes,
    index_of_bytes,
    index_path,
    index_shard,
    read_index,
)
from mealv2.data.tar_writer import pack_order, sample, sample_names, tar_writer
from mealv2.errors import DataError
from tars import write_packed, write_tar

KEYS = ["ants/00.jpg", "ants/00.png", "bees/a.b.JPEG", "猫/" + "x" * 300 + ".webp", "__m__/1.jpg"]


def packed(path: Path, keys: list[str] = KEYS, *, classes: int = 3, extra: int = 0) -> TarIndex:
    """Write a tar file and its index."""
    samples = [(key, n % classes, key.encode() * (n + 1)) for n, key in enumerate(keys)]
    return write_packed(path, samples, extra=extra)


def opened(path: Path) -> TarShards:
    return TarShards([path], name=str(path), split="train")


# --- a tar file and its index ---------------------------------------------------------------------


def test_an_index_says_what_the_headers_say(tmp_path: Path) -> None:
    index = packed(tmp_path / "a.tar")
    found = index_shard(tmp_path / "a.tar")
    assert found.keys == index.images.keys == KEYS
    for name in ("labels", "sizes", "offsets", "original_sizes"):
        assert getattr(found, name) == getattr(index.images, name), name
    data = (tmp_path / "a.tar").read_bytes()
    assert index.num_bytes == len(data)
    assert index.sha256 == hashlib.sha256(data).hexdigest()


def test_an_index_is_read_as_it_was_written_and_is_plain_json(tmp_path: Path) -> None:
    index = packed(tmp_path / "a.tar", extra=1)
    assert read_index(tmp_path / "a.tar") == index
    assert read_index(tmp_path / "b.tar") is None
    data = index_bytes(index)
    assert index_of_bytes(data, "x") == index
    assert index_path(tmp_path / "a.tar").read_bytes() == data
    value = json.loads(data)
    assert list(value) == sorted(value)
    assert value["original_sizes"] == [size + 1 for size in value["sizes"]]


def test_a_shard_with_an_index_is_opened_without_its_headers_and_reads_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed(tmp_path / "a.tar")
    bare = tmp_path / "b.tar"
    bare.write_bytes((tmp_path / "a.tar").read_bytes())
    without = opened(bare)
    monkeypatch.setattr("mealv2.data.tar.index_shard", None)
    source = opened(tmp_path / "a.tar")
    assert source.keys == without.keys == KEYS
    assert source.labels == without.labels
    assert source.sizes == without.sizes
    images = [source.read(p) for p in range(len(source))]
    assert images == [without.read(p) for p in range(len(source))]
    assert images == [key.encode() * (n + 1) for n, key in enumerate(KEYS)]


def test_sizes_are_those_of_the_originals_where_the_images_were_packed_before(
    tmp_path: Path,
) -> None:
    packed(tmp_path / "a.tar", extra=7)
    source = opened(tmp_path / "a.tar")
    assert [s - 7 for s in source.sizes] == list(source.stored_sizes)
    assert list(source.stored_sizes) == [len(source.read(p)) for p in range(len(source))]


# --- what is not believed -------------------------------------------------------------------------


def test_the_index_of_a_tar_file_of_another_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    packed(path)
    with path.open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(DataError, match=r"a\.tar\.index is the index of another file"):
        opened(path)


@pytest.mark.parametrize("what", ["class", "key", "name", "size", "order"])
def test_a_stale_index_gives_no_image_however_alike_the_tar_files_are(
    tmp_path: Path, what: str
) -> None:
    """The same number of bytes, members at the same places: only what they say is different."""
    path, other = tmp_path / "a.tar", tmp_path / "b.tar"
    keys = ["a/1.jpg", "a/2.jpg"]
    index = packed(path, keys)
    changed = {"key": ["a/1.jpg", "a/3.jpg"], "name": ["b/1.jpg", "a/2.jpg"]}.get(what, keys)
    if what in ("key", "name"):
        packed(other, changed)
    else:
        packed(other, keys[::-1] if what == "order" else keys, classes=1)
    data = other.read_bytes()
    if what == "size":  # an image that is one byte shorter, in blocks as many
        place = index.images.offsets[0] - 512
        header = bytearray(data[place : place + 512])
        header[124:135] = b"%011o" % (int(header[124:135], 8) - 1)
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        data = data[:place] + header + data[place + 512 :]
    assert len(data) == path.stat().st_size
    path.write_bytes(data)
    source = opened(path)
    wrong = 1 if what in ("class", "key") else 0
    with pytest.raises(DataError, match="was changed since it was opened or indexed"):
        source.read(wrong)


def test_no_byte_of_an_index_can_change_unnoticed(tmp_path: Path) -> None:
    data = index_bytes(packed(tmp_path / "a.tar"))
    for place, bit in itertools.product(range(0, len(data), 7), (1, 16, 128)):
        changed = bytearray(data)
        changed[place] ^= bit
        with pytest.raises(DataError, match=r"^here ") as error:
            index_of_bytes(bytes(changed), "here")
        assert "\n" not in str(error.value)
    for length in (0, 1, len(data) // 2, len(data) - 1):
        with pytest.raises(DataError, match=r"^here "):
            index_of_bytes(data[:length], "here")


def sealed(value: object) -> bytes:
    """Return a file with a right hash of itself, whatever it says."""
    data = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    digest = hashlib.sha256(re.sub(rb'(?<="index_sha256":")\w+', b"0" * 64, data)).hexdigest()
    return re.sub(rb'(?<="index_sha256":")\w+', digest.encode(), data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "x"}, "is not an index of a tar file"),
        ({"format_version": 2}, "format version 2; this mealv2 reads version 1"),
        ({"keys": ["a"]}, "does not describe a tar file"),
        ({"keys": ["a", 1]}, "does not describe a tar file"),
        ({"keys": ["a", "../b"]}, "does not describe a tar file"),
        ({"keys": ["a", "/b"]}, "does not describe a tar file"),
        ({"keys": ["a", ""]}, "does not describe a tar file"),
        ({"bytes": None}, "does not describe a tar file"),
        ({"bytes": 700}, "does not describe a tar file"),
        ({"sha256": 3}, "does not describe a tar file"),
        ({"sizes": [1, -1]}, "does not describe a tar file"),
        ({"sizes": [1, 1 << 70]}, "does not describe a tar file"),
        ({"sizes": [1, "2"]}, "does not describe a tar file"),
        ({"sizes": [1, 2.5]}, "does not describe a tar file"),
        ({"offsets": [512]}, "does not describe a tar file"),
        ({"offsets": None}, "does not describe a tar file"),
        ({"head_sizes": [512, 99999]}, "does not describe a tar file"),
        ({"head_crc32s": [1, -1]}, "does not describe a tar file"),
        ({"classes": [0, -2]}, "does not describe a tar file"),
        ({"original_sizes": [1]}, "does not describe a tar file"),
        ({"hashes": "00" * 8}, "does not describe a tar file"),
        ({"hashes": "xx" * 16}, "does not describe a tar file"),
        ({"hashes": None}, "does not describe a tar file"),
        ({"original_hashes": "00" * 8}, "does not describe a tar file"),
    ],
)
def test_an_index_that_cannot_be_true_is_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    value = json.loads(index_bytes(packed(tmp_path / "a.tar", ["a/1.jpg", "a/2.jpg"])))
    assert index_of_bytes(sealed(value), "here")
    with pytest.raises(DataError, match=message):
        index_of_bytes(sealed({**value, **change}), "here")


# --- writing --------------------------------------------------------------------------------------


def test_tar_files_are_the_same_bytes_on_any_machine_and_read_by_tarfile(tmp_path: Path) -> None:
    index = packed(tmp_path / "a.tar")
    assert index.sha256 == "c78ff907967327c46f581344019df8273d8432f468a970a51e01e40248baaef5"
    with tarfile.open(tmp_path / "a.tar") as tar:
        members = tar.getmembers()
        names = sample_names(KEYS)
        suffixes = [f"{name}.{s}" for name in names for s in ("cls", "key")]
        assert [m.name for m in members if m.name[-3:] in ("cls", "key")] == suffixes
        images = [m.name.rpartition(".")[2] for m in members if m.name[-3:] not in ("cls", "key")]
        assert images == ["jpg", "png", "jpg", "webp", "jpg"]
        owners = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members}
        assert owners == {(0, 0, 0, "", "", 0o644)}
        keys = [m for m in members if m.name.endswith(".key")]
        assert [tar.extractfile(m).read().decode() for m in keys] == KEYS


def test_sample_names_are_the_keys_where_they_can_be_and_differ() -> None:
    keys = ["a/1.jpg", "a/2.jpg", "a/2.png", "a/3.x.jpg", "a.b/4.jpg", "__a__/5.jpg", "a/noext"]
    names = sample_names(keys)
    assert len(set(names)) == len(names)
    assert [names[i] for i in (0, 4, 6)] == ["a/1", "a.b/4", "a/noext"]
    for name in names:
        folder, _, base = name.rpartition("/")
        assert "." not in base
        assert not folder.startswith("__")
    assert sample_names(["a/2.jpg"]) == ["a/2"]


def test_the_order_of_a_pack_is_of_the_keys_alone_and_mixes_them() -> None:
    keys = [f"{c}/{n:03d}.jpg" for c in "ab" for n in range(500)]
    order = pack_order(keys)
    assert sorted(order) == list(range(1000))
    shuffled = random.Random(3).sample(keys, 1000)
    assert [keys[p] for p in order] == [shuffled[p] for p in pack_order(shuffled)]
    assert [keys[p] for p in order][:2] == ["a/172.jpg", "a/102.jpg"]
    first_half = sum(p < 500 for p in order[:500])
    assert 200 < first_half < 300  # fair draws lie between 210 and 290 but once in 100,000


# --- keys -----------------------------------------------------------------------------------------


def test_compact_keys_are_the_sequence_that_they_were_made_of() -> None:
    texts = ["a/1.jpg", "", "猫/写真.png", "b" * 300]
    keys = Keys.concat([Keys.of(texts[:2]), Keys.of([]), Keys.of(texts[2:])])
    assert list(keys) == texts
    assert keys == texts
    assert keys != texts[:3]
    assert keys != [*texts[:3], "c"]
    assert [keys[i] for i in range(-4, 4)] == texts * 2
    assert keys[1:3] == texts[1:3]
    assert keys[::-1] == texts[::-1]
    assert len(keys) == 4
    assert "猫/写真.png" in keys
    assert not Keys.of([])
    with pytest.raises(IndexError):
        keys[4]


def test_a_stream_is_written_and_not_read(tmp_path: Path) -> None:
    """Any stream will do: nothing is sought in it."""

    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

    stream = Pipe()
    with tar_writer(stream) as writer:
        writer.write(sample("a", "a.jpg", 0, b"x" * 1000))
    assert len(stream.getvalue()) == 10240


def test_what_was_left_out_is_in_the_index(tmp_path: Path) -> None:
    files = [("README", b""), ("a.jpg", b"1"), ("a.cls", b"0"), ("a.json", b"{}")]
    index = create_index(write_tar(tmp_path / "a.tar", files), [1], [(2, 3)])
    found = index_of_bytes(index_bytes(index), "a").images.left_out
    assert found == index.images.left_out
    assert (found.counts, found.num_metadata) == ({"no extension": 1}, 1)
