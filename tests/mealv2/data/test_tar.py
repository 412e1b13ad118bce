"""mealv2.data.tar and its parts: the samples that webdataset sees, and no damage accepted."""

import contextlib
import io
import json
import os
import pickle
import random
import re
import signal
import tarfile
import threading
import unicodedata
import zlib
from pathlib import Path

import braceexpand
import pytest
from webdataset.tariterators import base_plus_ext

from mealv2.data import tar_splits
from mealv2.data.folder import ImageFolder
from mealv2.data.open import open_source
from mealv2.data.source import fingerprint, is_unlabelled
from mealv2.data.tar import TarShards
from mealv2.data.tar_headers import BLOCK, Archive
from mealv2.data.tar_index import create_plain_index, index_bytes, index_path, index_shard
from mealv2.errors import ConfigError, DataError
from mealv2.storage.atomic import OpenFiles
from tars import Files, tar_of, tar_tree, write_tar, write_with_webdataset

LONG = "n01440764/" + "a-long-folder-name/" * 12 + "x" * 120
NAMES = ["ants/00", "ants/01", "0000123", "./dot/1", "猫/写真", LONG, "l" * 99, "b/" + "m" * 150]

FOR_USTAR = ["ants/00", "l" * 95, "a-folder/" * 17 + "m" * 90]


def sample(name: str, label: int, image: bytes = b"pixels", suffix: str = "jpg") -> Files:
    return [(f"{name}.{suffix}", image), (f"{name}.cls", str(label).encode())]


def many(names: list[str]) -> Files:
    return [
        file
        for number, name in enumerate(names)
        for file in sample(name, number % 3, name.encode() * (number * 40), "png")
    ]


def opened(path: Path, files: Files | bytes, **more: object) -> TarShards:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(files if isinstance(files, bytes) else tar_of(files))
    return TarShards([path], name=str(path), split="train", **more)


# --- what is read -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_finds(tmp_path: Path, kind: int) -> None:
    names = NAMES if kind != tarfile.USTAR_FORMAT else FOR_USTAR
    path = write_tar(tmp_path / "a.tar", many(names), kind=kind)
    with tarfile.open(path) as theirs, Archive(path) as ours:
        expected = [(m.name, m.offset_data, m.size) for m in theirs]
        assert [member[:3] for member in ours.members()] == expected
        assert len(expected) == 2 * len(names)


@pytest.mark.parametrize("by_webdataset", [False, True])
def test_samples_have_webdatasets_keys_and_the_bytes_written(
    tmp_path: Path, by_webdataset: bool
) -> None:
    write = write_with_webdataset if by_webdataset else write_tar
    files = [*many(NAMES[:4]), *many(NAMES[4:])]
    path = write(tmp_path / "train-0.tar", files)
    source = TarShards([path], name="here", split="train", classes=["a", "b", "c"])
    images = {base_plus_ext(name)[0]: data for name, data in files if name.endswith(".png")}
    assert source.keys == list(images)
    assert [source.read(p) for p in range(len(source))] == list(images.values())
    assert list(source.sizes) == [len(data) for data in images.values()]
    assert list(source.labels) == [0, 1, 2, 0, 0, 1, 2, 0]
    assert (source.name, source.split, source.classes) == ("here", "train", ["a", "b", "c"])


def test_keys_end_at_the_first_dot_and_case_of_extensions_is_nothing(tmp_path: Path) -> None:
    files = [
        ("a.b/c.JPEG", b"1"),
        ("a.b/c.CLS", b" 7\n"),
        ("a.b/c.json", b"{}"),
        ("a.b/c.seg.png", b"2"),
        ("d.Webp", b"3"),
        ("d.cls", b"0"),
    ]
    source = opened(tmp_path / "a.tar", files)
    assert source.keys == ["a.b/c", "d"]
    assert [source.read(0), source.read(1)] == [b"1", b"3"]
    assert list(source.labels) == [7, 0]
    assert source.keys == list(dict.fromkeys(base_plus_ext(name)[0] for name, _ in files))


def test_a_member_key_says_what_the_image_is_called(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "é/00.jpg")
    source = opened(tmp_path / "a.tar", [*sample("1", 0), ("1.key", decomposed.encode())])
    assert source.keys == [unicodedata.normalize("NFC", "é/00.jpg")]


def test_what_is_no_sample_is_passed_over(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        folder = tarfile.TarInfo("ants")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        tar.pax_headers = {"comment": "made by hand"}
        for name in ("README", "ants/._00.jpg", "__meta__/a.jpg", "notes.txt", "dataset.json"):
            tar.addfile(tarfile.TarInfo(name))
        for name, data in sample("ants/00", 0):
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = len(data), {"comment": "x"}
            tar.addfile(member, io.BytesIO(data))
    assert opened(tmp_path / "a.tar", stream.getvalue()).keys == ["ants/00"]


def test_classes_without_names_are_numbers_that_sort(tmp_path: Path) -> None:
    classes = opened(tmp_path / "a.tar", [*sample("a", 3), *sample("b", 100)]).classes
    assert len(classes) == 101
    assert classes[3] == "003"
    assert classes == sorted(classes)


def test_the_same_images_have_one_fingerprint_as_folder_and_as_tar_files(
    data_dir: Path, tmp_path: Path
) -> None:
    tree = tar_tree(data_dir, tmp_path / "tars", keys=True)
    for split in ("train", "val"):
        folder, tars = ImageFolder(data_dir, split), open_source(tree, split)
        assert fingerprint(tars) == fingerprint(folder)
        assert [tars.read(p) for p in range(3)] == [folder.read(p) for p in range(3)]


# --- which files ------------------------------------------------------------------------------

# files, --data-dir below the folder, split, what is opened (ROOT stands for the folder)
CHOICES = {
    "beside": (["train-1.tar", "train-0.tar", "val-0.tar"], "", "train", "train-0 train-1"),
    "inside": (["train/1.tar", "train/0.tar", "val/0.tar"], "", "val", "val/0"),
    "in the middle": (["in1k-train-00.tar", "in1k-val-00.tar"], "", "val", "in1k-val-00"),
    "one for all": (["train.tar", "val.tar"], "", "val", "val"),
    "hidden": (["train-0.tar", ".train-1.tar", ".tmp-train-2.tar"], "", "train", "train-0"),
    "braces": (["train-0.tar", "train-1.tar"], "train-{0..1}.tar", "train", "train-0 train-1"),
    "some": (["train-0.tar", "train-1.tar"], "train-{1,1}.tar", "train", "train-1"),
    "glob": (["train-0.tar", "train-1.tar", "val-0.tar"], "*-[01].tar", "train", "train-0 train-1"),
    "twice": (["train-0.tar"], "{train,train}-?.tar", "train", "train-0"),
    "both": (["train-0.tar", "val-0.tar"], "{train-{0..0},val-{0..0}}.tar", "val", "val-0"),
    "file": (["val-0.tar"], "val-0.tar", "val", "val-0"),
    "folder by pattern": (["train/0.tar", "val/0.tar"], "*/*.tar", "val", "val/0"),
    "braces in a real name": (["{x}/train-0.tar"], "{x}", "train", "{x}/train-0"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHOICES)
def test_the_shards_of_a_split_are_found(tmp_path: Path, case: str) -> None:
    names, below, split, expected = CHOICES[case]
    for name in names:
        write_tar(tmp_path / name, sample(name.removesuffix(".tar"), 0))
    source = open_source(tmp_path / below, split)
    assert isinstance(source, TarShards)
    assert source.keys == expected.split()
    assert source.split == split


REFUSED = {
    "missing": (["train-0.tar"], "train-{0..4}.tar", r"no file .*train-1\.tar and 3 more$"),
    "no match": ([], "train-*.tar", r"train-\*\.tar: there is no such file"),
    "other split": (["val-0.tar"], "val-0.tar", "none of its 1 tar files is of the split train"),
    "part of a word": (["training-0.tar"], "*.tar", "is of the split train"),
    "end of a word": (["retrain-0.tar"], "*.tar", "is of the split train"),
    "compressed": (["train-0.tar.gz"], "", "train-0.tar.gz is compressed.* unpack"),
    "compressed, by name": (["train-0.tgz"], "train-{0..0}.tgz", "train-0.tgz is compressed"),
    "both layouts": (["train/0.tar", "train-0.tar"], "", "both .*train/0.tar and .*train-0.tar"),
    "two series": (["train-0.tar", "train-v2-0.tar"], "", "two series.*train-0.tar and train-v2"),
    "no tar": (["train-0.zip"], "train-*", "train-0.zip is not a .tar file"),
    "endless": ([], "train-{0..99999999999}.tar", "more than 100000 files"),
    "nothing": (["val-0.tar"], "", r"no folder .*/train; .*SPLIT-\*\.tar"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unclear_shards_are_refused_in_one_line(tmp_path: Path, case: str) -> None:
    names, below, message = REFUSED[case]
    for name in names:
        write_tar(tmp_path / name, sample("a", 0))
    with pytest.raises(ConfigError, match=message) as error:
        open_source(tmp_path / below, "train")
    assert "\n" not in str(error.value)


def test_class_folders_go_before_tar_files(data_dir: Path, own_data: Path) -> None:
    write_tar(own_data / "train" / "n01440764.tar", [])
    write_tar(own_data / "train-0.tar", [])
    assert isinstance(open_source(own_data, "train"), ImageFolder)


@pytest.mark.parametrize(
    "pattern",
    ["a", "{0..3}", "{08..11}", "{1..09..4}", "{3..1}", "x{a,b}y{0..1}", "{a,{b,c}d}", "{,a}",
     "{a{0..1},b}{x}", "{}", "a{b", "a}b{c,d}", "{x{1,2}}"],
)  # fmt: skip
def test_braces_stand_for_what_webdataset_takes_them_for(pattern: str) -> None:
    try:
        expected = list(braceexpand.braceexpand(pattern))
    except braceexpand.UnbalancedBracesError:  # stands for itself, as in bash
        expected = [pattern]
    assert tar_splits.expand_braces(pattern) == expected


@pytest.mark.parametrize(
    ("name", "text"), [("classes.txt", "b\r\na\n"), ("classes.json", '["b", "a"]')]
)
@pytest.mark.parametrize("below", ["", "*/*.tar"])
def test_class_names_come_from_a_file_beside_the_shards(
    tmp_path: Path, name: str, text: str, below: str
) -> None:
    write_tar(tmp_path / "train" / "0.tar", sample("a", 1))
    (tmp_path / name).write_text(text)
    assert open_source(tmp_path / below, "train").classes == ["b", "a"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"classes.txt": b"a\n"}, "class id 1, but only 1 classes"),
        ({"classes.txt": b"a\n\nb\n"}, "none of them empty"),
        ({"classes.txt": b"a\na\n"}, "the class a twice"),
        ({"classes.txt": b"\xff\n"}, "cannot read .*classes.txt"),
        ({"classes.json": b'{"a": 1}'}, "list of class names"),
        ({"classes.json": b"[1, 2]"}, "list of class names"),
        ({"classes.json": b"["}, "cannot read .*classes.json"),
        ({"classes.json": b"[]"}, "list of class names"),
        ({"classes.json": b'["a"]', "classes.txt": b"a"}, "both name the classes"),
    ],
)
def test_a_bad_list_of_classes_is_refused(
    tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    write_tar(tmp_path / "train-0.tar", sample("a", 1))
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        open_source(tmp_path, "train")


@pytest.mark.parametrize("kind", ["pipe", "folder", "link"])
def test_what_is_no_file_of_classes_is_not_passed_over(tmp_path: Path, kind: str) -> None:
    write_tar(tmp_path / "train-0.tar", sample("a", 0))
    path = tmp_path / "classes.txt"
    make = {"pipe": os.mkfifo, "folder": os.mkdir, "link": lambda path: path.symlink_to("gone")}
    make[kind](path)
    reason = {"pipe": "a named pipe", "folder": "Is a directory", "link": "a link to nothing"}
    with pytest.raises(ConfigError, match=rf"classes\.txt: .*{reason[kind]}.*; remove it"):
        open_source(tmp_path, "train")


def test_samples_without_classes_are_unlabelled_where_their_names_are_known(tmp_path: Path) -> None:
    files = [("a/1.jpg", b"x"), ("a/2.png", b"yy"), ("a/2.json", b"{}")]
    source = opened(tmp_path / "a.tar", files, names=lambda: ["ants", "bees"])
    assert is_unlabelled(source)
    assert (source.keys, source.classes) == (["a/1", "a/2"], ["ants", "bees"])
    assert source.read(1) == b"yy"
    index_path(tmp_path / "a.tar").write_bytes(index_bytes(create_plain_index(tmp_path / "a.tar")))
    again = TarShards([tmp_path / "a.tar"], name="", split="train", names=lambda: ["ants"])
    assert is_unlabelled(again)
    labelled = opened(tmp_path / "b.tar", sample("1", 1), names=lambda: ["ants"])
    assert (list(labelled.labels), labelled.classes) == ([1], ["0", "1"])
    with pytest.raises(DataError, match=r"sample 2 of .*has no class"):
        opened(tmp_path / "c.tar", [*sample("1", 0), ("2.jpg", b"")], names=lambda: ["ants"])


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("a/1.jpg", b"x")], r"sample a/1 of .*bad\.tar has no class: add a member \.cls"),
        ([("a/1.cls", b"0"), ("a/1.mp4", b"x")], r"sample a/1 .* no image.*\.cls, \.mp4"),
        ([*sample("1", 0), ("1.png", b"y")], r"2 images: 1\.jpg, 1\.png"),
        ([*sample("1", 0), ("1.JPG", b"y")], r"two members \.jpg"),
        ([("1.jpg", b""), ("2.jpg", b""), ("1.cls", b"0")], r"sample 1 .*has no image.*\.cls"),
        ([*sample("1", 0), *sample("2", 0), *sample("1", 0)], "sample 1 is twice in .*bad.tar"),
        ([("1.jpg", b""), ("1.cls", b"-1")], r"b'-1'; it must be a class id"),
        ([("1.jpg", b""), ("1.cls", b"cat")], "b'cat'"),
        ([("1.jpg", b""), ("1.cls", b"")], "b''"),
        ([("1.jpg", b""), ("1.cls", b"1" * 33)], "33 bytes"),
        ([("1.jpg", b""), ("1.cls", b"9" * 20)], "class id 1000000"),
        ([*sample("1", 0), ("1.key", b"\xff")], "not a text"),
        ([*sample("1", 0), ("1.key", b"")], "not a text"),
        (sample("../1", 0), "leads out"),
        (sample("/etc/1", 0), "leads out"),
        ([*sample("1", 0), ("1.key", b"a/../../b.jpg")], "leads out"),
    ],
)
def test_bad_samples_are_refused_by_name(tmp_path: Path, files: Files, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        opened(tmp_path / "bad.tar", files)
    assert "bad.tar" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_key_in_two_shards_is_refused_with_both(tmp_path: Path) -> None:
    for number in (0, 1):
        write_tar(tmp_path / f"train-{number}.tar", [*sample(f"{number}", 0), *sample("same", 0)])
    with pytest.raises(DataError, match=r"sample same is in .*train-0\.tar and in .*train-1\.tar"):
        open_source(tmp_path, "train")


def test_shards_without_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no samples"):
        opened(tmp_path / "a.tar", [("n01440764.tar", b"of a class")])


def with_header(data: bytes, at: int, field: bytes, *, header: int = 0) -> bytes:
    """Change bytes of a header and make its checksum right again."""
    block = bytearray(data[header : header + BLOCK])
    block[at : at + len(field)] = field
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return data[:header] + block + data[header + BLOCK :]


PLAIN = tar_of(sample("a", 0))
PAX = tar_of(sample("ü" * 200, 0), kind=tarfile.PAX_FORMAT)
LONG_NAME = tar_of(sample("a" * 200, 0))
DAMAGE = {
    "empty": (b"", "byte 0: it is truncated"),
    "text": (b"hello " * 400, "byte 0: there is no header"),
    "compressed": (b"\x1f\x8b" + PLAIN[2:], "it is compressed; unpack"),
    "checksum": (PLAIN.replace(b"a.jpg", b"b.jpg", 1), "byte 0: there is no header"),
    "two joined": (PLAIN + PLAIN, "data after the end"),
    "link": (with_header(PLAIN, 156, b"2"), "a.jpg is a symbolic link"),
    "hard link": (with_header(PLAIN, 156, b"1"), "a.jpg is a hard link"),
    "sparse": (with_header(PLAIN, 156, b"S"), "a.jpg is a sparse file"),
    "device": (with_header(PLAIN, 156, b"3"), "kind b'3'"),
    "pax sparse": (PAX.replace(b" path=" + "ü".encode() * 6, b" GNU.sparse.x=1234"), "sparse"),
    "size too large": (with_header(PLAIN, 124, b"77777777777\0"), "truncated within a.jpg"),
    "size of 2**80": (with_header(PLAIN, 124, b"\x80\0" + b"\xff" * 10), "truncated within a.jpg"),
    "size below 0": (with_header(PLAIN, 124, b"\xff" * 12), "there is no header"),
    "size with a sign": (with_header(PLAIN, 124, b"-0000000001\0"), "there is no header"),
    "size that int() takes": (with_header(PLAIN, 124, b"0_0000001\0"), "there is no header"),
    "size of digits 8": (with_header(PLAIN, 124, b"00000000008\0"), "there is no header"),
    "no name": (with_header(PLAIN, 0, bytes(100)), "name b'' is not"),
    "name not UTF-8": (with_header(PLAIN, 0, b"\xff"), "not UTF-8"),
    "name too long": (with_header(LONG_NAME, 124, b"00077777777\0"), "a name or record of"),
    "name without a file": (LONG_NAME[:1024] + bytes(1024), "a long name has no file"),
    "pax length": (PAX.replace(b" path=", b"0path="), "damaged pax"),
    "pax NUL": (re.sub("path=ü".encode(), b"path=\0\0", PAX), "not UTF-8 text"),
    "pax for all": (with_header(PAX, 156, b"g"), "gives all members one name"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_tar_files_are_refused_by_name_and_place(tmp_path: Path, case: str) -> None:
    data, message = DAMAGE[case]
    with pytest.raises(DataError, match=message) as error:
        opened(tmp_path / "bad.tar", data)
    assert "bad.tar" in str(error.value)
    assert "\n" not in str(error.value)


def test_headers_of_other_programs_are_read(tmp_path: Path) -> None:
    assert opened(tmp_path / "a.tar", with_header(PLAIN, 124, b"\x80" + bytes(10) + b"\6"))
    assert opened(tmp_path / "a.tar", with_header(PLAIN, 257, bytes(8)))  # before ustar
    assert opened(tmp_path / "a.tar", with_header(PLAIN, 156, b"\0"))
    signed = bytearray(with_header(tar_of(sample("ü", 0)), 0, b""))
    high = sum(byte > 127 for byte in signed[:BLOCK])
    signed[148:154] = b"%06o" % (int(signed[148:154], 8) - 256 * high)
    assert opened(tmp_path / "a.tar", bytes(signed)).keys == ["ü"]


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "train-0.tar")
    with pytest.raises(DataError, match="not a tar file"):
        open_source(tmp_path, "train")


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_file_cut_off_anywhere_is_refused(tmp_path: Path, kind: int) -> None:
    data = tar_of(many(["a", "b" * 150, "ü"]), kind=kind)
    end = len(data.rstrip(b"\0")) // BLOCK * BLOCK + BLOCK  # of the last member
    for length in [*range(0, end + BLOCK, 128), end - 1, end + 1, end + BLOCK - 1]:
        with pytest.raises(DataError, match=r"bad\.tar is damaged at byte"):
            opened(tmp_path / "bad.tar", data[:length])
    assert len(opened(tmp_path / "bad.tar", data[: end + BLOCK])) == 3


def test_mutated_tar_files_are_read_or_refused_and_nothing_else(tmp_path: Path) -> None:
    wholes = [
        tar_of(many([*FOR_USTAR, *NAMES[:5]]), kind=tarfile.USTAR_FORMAT),
        tar_of(many(NAMES), kind=tarfile.GNU_FORMAT),
        tar_of(many(NAMES), kind=tarfile.PAX_FORMAT),
    ]
    rng = random.Random(20)
    said = []
    for _ in range(400):
        data = bytearray(rng.choice(wholes))
        heads = [at for at in range(0, len(data), BLOCK) if data[at + 257 : at + 262] == b"ustar"]
        for _ in range(rng.choice([1, 1, 3, 30])):
            place = rng.choice([*heads, rng.randrange(len(data) - BLOCK)])
            data[place + rng.randrange(BLOCK)] ^= 1 << rng.randrange(8)
        for head in heads:  # half of the damaged headers have a right checksum
            if rng.random() < 0.5:
                data = bytearray(with_header(bytes(data), 0, b"", header=head))
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        try:
            source = opened(tmp_path / "a.tar", bytes(data))
            assert all(len(source.read(p)) == source.sizes[p] for p in range(len(source)))
            said.append("")
        except (DataError, ConfigError) as error:
            said.append(str(error))
    assert all("a.tar" in line and "\n" not in line for line in said if line)
    assert 40 < said.count("") < 360


# --- reading ----------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path) -> TarShards:
    """200 images in 100 shards."""
    for number in range(100):
        files = [*sample(f"{number}/a", 0, b"a%d" % number), *sample(f"{number}/b", 0, b"b" * 9999)]
        write_tar(tmp_path / "train" / f"{number:03d}.tar", files)
    source = open_source(tmp_path, "train")
    assert isinstance(source, TarShards)
    return source


def num_open(folder: Path) -> int:
    """Return how many descriptors are of files in a folder; other threads may close their own."""
    links = []
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            links.append(path.readlink())
    return sum(link.is_relative_to(folder) for link in links)


def test_threads_read_the_right_bytes_through_few_files(shards: TarShards, tmp_path: Path) -> None:
    wrong = list[int]()
    shards._files = OpenFiles(shards._tar_files, most=3)

    def read_all(seed: int) -> None:
        order = list(range(0, 200, 2)) * 5
        random.Random(seed).shuffle(order)
        wrong.extend(p for p in order if shards.read(p) != b"a%d" % (p // 2))

    threads = [threading.Thread(target=read_all, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert 1 <= num_open(tmp_path) <= 3
    del shards._files
    assert num_open(tmp_path) == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # threads are about: that is the point
def test_a_forked_process_reads_though_its_parent_was_reading(shards: TarShards) -> None:
    is_opening, may_open = threading.Event(), threading.Event()

    class Slow:
        def open(self) -> int:
            is_opening.set()
            may_open.wait(30)
            return shards._tar_files[1].open()

    shards.read(0)
    shards._files = OpenFiles([shards._tar_files[0], Slow(), *shards._tar_files[2:]], most=2)
    thread = threading.Thread(target=shards._files.read, args=(1, 1, 0))
    thread.start()
    is_opening.wait(30)
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # ends it, should it wait for the parent's thread
        try:
            os._exit(0 if shards.read(4) == b"a2" else 1)
        finally:
            os._exit(2)
    may_open.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_copy_for_another_process_reads_the_same(shards: TarShards) -> None:
    shards.read(0)
    copy = pickle.loads(pickle.dumps(shards))  # noqa: S301
    assert [copy.read(p) for p in (0, 7, 199)] == [shards.read(p) for p in (0, 7, 199)]
    assert (copy.keys, copy.classes) == (shards.keys, shards.classes)


def test_a_shard_that_is_no_longer_the_same_is_an_error_of_its_images(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    files = [*sample("1", 0, b"x" * 900), *sample("2", 0, b"y" * 900)]
    source = opened(path, files)
    whole = path.read_bytes()
    with path.open("r+b") as file:  # in place, while it is open
        assert source.read(1) == b"y" * 900
        file.truncate(3500)
        assert source.read(0) == b"x" * 900
        with pytest.raises(DataError, match=r"a\.tar was changed"):
            source.read(1)
        file.write(tar_of(files, mtime=1))
        file.flush()
    with pytest.raises(DataError, match=r"a\.tar was changed"):
        source.read(0)
    path.write_bytes(whole)
    assert source.read(1) == b"y" * 900
    path.unlink()
    with pytest.raises(FileNotFoundError):
        pickle.loads(pickle.dumps(source)).read(0)  # noqa: S301


def test_a_member_larger_than_any_image_is_never_read(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    size = 3 << 30
    header = tarfile.TarInfo("1.jpg")
    header.size = size
    data = tar_of([("1.cls", b"0")])[:1024] + header.tobuf()
    path.write_bytes(data)
    os.truncate(path, len(data) + size + 1024)  # sparse
    with pytest.raises(DataError, match="it has 3221225472 bytes, more than the 2147483648"):
        TarShards([path], name="a", split="train").read(0)


def test_an_index_says_where_the_images_lie(tmp_path: Path) -> None:
    data = write_tar(tmp_path / "a.tar", many(NAMES)).read_bytes()
    index = index_shard(tmp_path / "a.tar")
    for number, (offset, size) in enumerate(zip(index.offsets, index.sizes, strict=True)):
        assert data[offset : offset + size] == NAMES[number].encode() * (number * 40)
        assert zlib.crc32(data[offset - BLOCK : offset]) == index.head_crc32s[number]
    assert json.loads(json.dumps(list(index.labels))) == [n % 3 for n in range(len(NAMES))]


# --- members with dots in their names, and what is left out -----------------------------------


def test_no_sample_with_dots_in_its_name_is_lost(tmp_path: Path) -> None:
    names = [f"ants/cat.v{n // 3}.photo{n}" for n in range(10)]
    files = [
        (f"{name}{ext}", data)
        for n, name in enumerate(names)
        for ext, data in ((".CLS", str(n).encode()), (".jpg", b"%d" % n), (".json", b"{}"))
    ]
    source = opened(tmp_path / "a.tar", files)
    assert source.keys == names
    assert list(source.labels) == list(range(10))
    assert [source.read(i) for i in range(10)] == [b"%d" % n for n in range(10)]
    assert (source.left_out.counts.total(), source.left_out.num_metadata) == (0, 10)


def test_images_first_and_classes_after_them_make_the_same_samples(tmp_path: Path) -> None:
    files = [(f"set.{n}.jpg", b"%d" % n) for n in range(3)]
    files += [(f"set.{n}.cls", b"%d" % n) for n in range(3)]
    source = opened(tmp_path / "a.tar", files)
    assert source.keys == ["set.0", "set.1", "set.2"]
    assert [source.read(i) for i in range(3)] == [b"0", b"1", b"2"]


def test_a_second_image_of_a_sample_stays_metadata_but_one_with_a_class_is_a_sample(
    tmp_path: Path,
) -> None:
    files = [*sample("cat", 1), ("cat.mask.png", b"m"), ("cat.v0.png", b"v"), ("cat.v0.cls", b"2")]
    files += [("cat.v0.more.json", b"{}")]
    source = opened(tmp_path / "a.tar", files)
    assert source.keys == ["cat", "cat.v0"]
    assert list(source.labels) == [1, 2]
    assert source.left_out.num_metadata == 2


def test_an_image_with_dots_and_without_a_class_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cat\.v0\.jpg has no class"):
        opened(tmp_path / "a.tar", [*sample("a", 0), ("cat.v0.jpg", b"x")])


def test_members_that_are_not_of_a_sample_are_counted(tmp_path: Path) -> None:
    files = [("README", b""), ("a/._0.jpg", b""), ("__meta__/a.jpg", b""), ("notes.txt", b"")]
    source = opened(tmp_path / "a.tar", [*files, *sample("a/0", 0)])
    expected = {"no extension": 1, "hidden": 1, "below __…__": 1, ".txt": 1}
    assert source.left_out.counts == expected


@pytest.mark.parametrize(
    ("data", "classes"),
    [
        ("\ufeffant\nbee\n".encode(), ["ant", "bee"]),
        (b"ant \r\nbee\t\r\n\r\n", ["ant", "bee"]),
        (b"ant\nbee", ["ant", "bee"]),
    ],
)
def test_class_names_are_read_as_editors_save_them(
    tmp_path: Path, data: bytes, classes: list[str]
) -> None:
    write_tar(tmp_path / "train-0.tar", sample("a", 1))
    (tmp_path / "classes.txt").write_bytes(data)
    assert open_source(tmp_path, "train").classes == classes


def test_class_names_in_utf_16_are_refused_in_one_line(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", sample("a", 1))
    (tmp_path / "classes.txt").write_bytes("ant\nbee\n".encode("utf-16"))
    with pytest.raises(ConfigError, match=r"classes.txt: it is UTF-16; save it as UTF-8"):
        open_source(tmp_path, "train")
