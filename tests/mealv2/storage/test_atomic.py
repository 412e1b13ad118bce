"""mealv2.storage.atomic: whole under the final name, the first one wins, nothing is left behind."""

import errno
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mealv2.storage import atomic
from mealv2.storage.atomic import file_sha256, file_stamp, write_atomic
from mealv2.storage.json_format import canonical_json, json_sha256, read_json


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("data", [b"", b"\0\xff" * 100_000], ids=["empty", "200 kB"])
def test_a_file_is_written_whole_and_alone(tmp_path, replace, data):
    assert write_atomic(tmp_path / "a.bin", data, replace=replace) is True
    assert (tmp_path / "a.bin").read_bytes() == data
    assert names(tmp_path) == ["a.bin"]


def test_with_replace_the_last_one_wins(tmp_path):
    path = tmp_path / "a.json"
    assert [write_atomic(path, data) for data in (b"first, longer", b"second")] == [True, True]
    assert path.read_bytes() == b"second"


def test_a_reader_of_the_file_that_is_replaced_reads_it_to_its_end(tmp_path):
    path = tmp_path / "a.json"
    write_atomic(path, b"old" * 100_000)
    with path.open("rb") as reader:
        beginning = reader.read(10)
        write_atomic(path, b"new")
        assert beginning + reader.read() == b"old" * 100_000


def test_without_replace_the_first_one_wins(tmp_path):
    path = tmp_path / "a.h5"
    assert [write_atomic(path, d, replace=False) for d in (b"first", b"second")] == [True, False]
    assert path.read_bytes() == b"first"
    assert names(tmp_path) == ["a.h5"]


RACER = """
import sys
from pathlib import Path
from mealv2.storage.atomic import write_atomic
folder, me = Path(sys.argv[1]), sys.argv[2]
sys.stdin.readline()
won = [n for n in range(200) if write_atomic(folder / f"{n}.h5", me.encode() * 5000, replace=False)]
print(*won)
"""


def test_of_two_processes_that_race_exactly_one_wins_each_file(tmp_path):
    racers = {
        me: subprocess.Popen(
            [sys.executable, "-c", RACER, str(tmp_path), me],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for me in "ab"
    }
    for racer in racers.values():
        racer.stdin.write("go\n")
        racer.stdin.flush()
    won = {me: set(map(int, racer.communicate()[0].split())) for me, racer in racers.items()}
    assert all(racer.returncode == 0 for racer in racers.values())
    assert won["a"] | won["b"] == set(range(200))
    assert not won["a"] & won["b"]
    for me, mine in won.items():
        assert all((tmp_path / f"{n}.h5").read_bytes() == me.encode() * 5000 for n in mine)
    assert len(names(tmp_path)) == 200


# a write beyond the limit fails half way, as on a full disk
SMALL_DISK = """
import errno, resource, sys
from pathlib import Path
from mealv2.storage.atomic import write_atomic
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_atomic(Path(sys.argv[1]), bytes(5000), replace=sys.argv[2] == "replace")
except OSError as error:
    print(errno.errorcode[error.errno])
"""


@pytest.mark.parametrize("how", ["replace", "first"])
@pytest.mark.parametrize("there", [None, b"old"], ids=["new file", "file there"])
def test_a_write_that_fails_half_way_leaves_what_was_there_and_nothing_else(tmp_path, how, there):
    path = tmp_path / "a.h5"
    if there is not None:
        path.write_bytes(there)
    before = names(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", SMALL_DISK, str(path), how],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "EFBIG"
    assert names(tmp_path) == before
    assert there is None or path.read_bytes() == there


def test_a_folder_that_is_not_there_raises_and_is_not_made(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "no" / "a.json", b"x")
    assert names(tmp_path) == []


@pytest.mark.parametrize("replace", [True, False])
def test_a_folder_in_the_files_place_stays_and_no_temporary_file_does(tmp_path, replace):
    (tmp_path / "a.json" / "inside").mkdir(parents=True)
    if replace:
        with pytest.raises(IsADirectoryError):
            write_atomic(tmp_path / "a.json", b"x")
    else:
        assert write_atomic(tmp_path / "a.json", b"x", replace=False) is False
    assert names(tmp_path) == ["a.json"]
    assert names(tmp_path / "a.json") == ["inside"]


def test_others_temporary_files_are_left_alone(tmp_path):
    (tmp_path / ".tmp-a.json-otherhost-1-00").write_bytes(b"theirs")
    write_atomic(tmp_path / "a.json", b"mine")
    assert names(tmp_path) == [".tmp-a.json-otherhost-1-00", "a.json"]


def test_canonical_json_of_equal_values_has_equal_bytes():
    a = {"b": [1, 2.5, None, True], "a": {"ü": "猫", "x": 1e-7}}
    b = {"a": {"x": 1e-7, "ü": "猫"}, "b": [1, 2.5, None, True]}
    assert canonical_json(a) == canonical_json(b)
    assert json_sha256(a) == json_sha256(b) != json_sha256({**a, "c": 0})
    # frozen: hashes in label sets depend on it
    assert canonical_json({"b": 1, "a": ["é"]}) == '{\n  "a": [\n    "é"\n  ],\n  "b": 1\n}\n'


def test_canonical_json_refuses_what_json_does_not_have():
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json({"loss": float("nan")})


def test_json_read_back_is_what_was_written(tmp_path):
    value = {"ü": [1, 2.5, "猫", None, True, 0.1 + 0.2, 2**64]}
    write_atomic(tmp_path / "a.json", canonical_json(value).encode())
    assert read_json(tmp_path / "a.json") == value


@pytest.mark.parametrize("data", [b"", b"{", b'{"a": 1} x', b"\xff\xfe{}"])
def test_what_is_no_json_in_utf8_raises_value_error(tmp_path, data):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"."):
        read_json(tmp_path / "a.json")


def test_file_sha256_is_that_of_the_bytes(tmp_path):
    data = os.urandom(300_000)
    (tmp_path / "a").write_bytes(data)
    assert file_sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()


# --- shares that lose replies, and two jobs at one damaged file -----------------------------------


def failing(monkeypatch, name, *errors, done=True):
    """Let os.link or os.replace fail so often, each time after it did its work, or without."""
    real, left = getattr(os, name), list(errors)

    def put(source, target, **settings):
        if not left:
            return real(source, target, **settings)
        if done and len(left) == len(errors):
            real(source, target, **settings)
        error = left.pop(0)
        raise OSError(error, os.strerror(error), str(source), None, str(target))

    monkeypatch.setattr(atomic.os, name, put)
    return left


@pytest.fixture
def waits(monkeypatch):
    """How long it would have waited."""
    waited = []
    monkeypatch.setattr(atomic.time, "sleep", waited.append)
    return waited


@pytest.mark.parametrize(("name", "replace"), [("link", False), ("replace", True)])
@pytest.mark.parametrize("error", [errno.ENOENT, errno.EEXIST, errno.EIO, errno.ESTALE])
def test_a_lost_reply_is_no_error(tmp_path, monkeypatch, waits, name, replace, error):
    left = failing(monkeypatch, name, error)
    assert write_atomic(tmp_path / "a.h5", b"mine", replace=replace) is True
    assert (left, waits) == ([], [])
    assert (tmp_path / "a.h5").read_bytes() == b"mine"
    assert names(tmp_path) == ["a.h5"]


def test_a_lost_reply_is_no_error_where_inodes_are_made_up(tmp_path, monkeypatch, waits):
    def replace(source, target):
        shutil.copy2(source, target)  # of the same time and size, by another inode
        source.unlink()
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(source))

    monkeypatch.setattr(atomic.os, "replace", replace)
    assert write_atomic(tmp_path / "a.h5", b"mine") is True
    assert (waits, names(tmp_path)) == ([], ["a.h5"])


@pytest.mark.parametrize(("name", "replace"), [("link", False), ("replace", True)])
def test_what_did_not_happen_is_tried_four_times_more(tmp_path, monkeypatch, waits, name, replace):
    left = failing(monkeypatch, name, *[errno.ESTALE] * 4, done=False)
    assert write_atomic(tmp_path / "a.h5", b"mine", replace=replace) is True
    assert (left, len(waits)) == ([], 4)
    assert sum(waits) > 3.0, "shares show folders as they were three seconds ago"
    assert names(tmp_path) == ["a.h5"]

    failing(monkeypatch, name, *[errno.EIO] * 5, done=False)
    with pytest.raises(OSError, match=r"Input/output error: .*b\.h5"):
        write_atomic(tmp_path / "b.h5", b"mine", replace=replace)
    assert names(tmp_path) == ["a.h5"]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize(("name", "replace"), [("link", False), ("replace", True)])
def test_a_full_disk_is_not_waited_for(tmp_path, monkeypatch, waits, name, replace, error):
    left = failing(monkeypatch, name, error, error, done=False)
    with pytest.raises(OSError, match=r"a\.h5"):
        write_atomic(tmp_path / "a.h5", b"mine", replace=replace)
    assert (len(left), waits, names(tmp_path)) == (1, [], [])


@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOTSUP, errno.EMLINK])
def test_without_hard_links_it_is_renamed(tmp_path, monkeypatch, waits, error):
    failing(monkeypatch, "link", error, done=False)
    assert write_atomic(tmp_path / "a.h5", b"mine", replace=False) is True
    assert (waits, names(tmp_path)) == ([], ["a.h5"])


def test_anothers_file_that_a_link_met_with_an_odd_error_stays(tmp_path, monkeypatch, waits):
    (tmp_path / "a.h5").write_bytes(b"theirs")
    failing(monkeypatch, "link", errno.ENOENT, done=False)
    assert write_atomic(tmp_path / "a.h5", b"mine", replace=False) is False
    assert (tmp_path / "a.h5").read_bytes() == b"theirs"
    assert waits == []


def test_a_damaged_file_gives_way_and_a_whole_one_does_not(tmp_path):
    path = tmp_path / "a.h5"
    path.write_bytes(b"damaged")
    seen = file_stamp(path)
    assert write_atomic(path, b"first whole", damaged=seen) is True
    assert write_atomic(path, b"second whole", damaged=seen) is False
    assert path.read_bytes() == b"first whole"
    assert names(tmp_path) == ["a.h5"]


@pytest.mark.parametrize("link", ["nowhere", "a.h5"])
def test_a_dead_link_gives_way(tmp_path, link):
    path = tmp_path / "a.h5"
    path.symlink_to(link)
    assert write_atomic(path, b"whole", damaged=file_stamp(path)) is True
    assert not path.is_symlink()
    assert names(tmp_path) == ["a.h5"]


def test_a_folder_does_not_give_way(tmp_path):
    (tmp_path / "a.h5" / "mine").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        write_atomic(tmp_path / "a.h5", b"whole", damaged=file_stamp(tmp_path / "a.h5"))
    assert names(tmp_path) == ["a.h5"]


def test_a_file_that_another_put_there_between_look_and_rename_comes_back(tmp_path, monkeypatch):
    """Split brain: a job is held up for as long as it likes between any two of its calls."""
    path = tmp_path / "a.h5"
    path.write_bytes(b"damaged")
    seen, rename = file_stamp(path), Path.rename

    def late(self, target):
        if self == path:
            monkeypatch.setattr(Path, "rename", rename)
            assert write_atomic(path, b"first whole", damaged=seen) is True
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    assert write_atomic(path, b"second whole", damaged=seen) is False
    assert path.read_bytes() == b"first whole"
    assert names(tmp_path) == ["a.h5"]
