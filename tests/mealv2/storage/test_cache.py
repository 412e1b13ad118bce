"""The folder of copies: fetched once, kept small, left alone while in use."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from mealv2.errors import ConfigError
from mealv2.storage.cache import Cache, hold, in_use

URL = "s3://bucket/some/train-000000.tar"


def writer(data: bytes, calls: list[Path] | None = None) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        if calls is not None:
            calls.append(path)
        path.write_bytes(data)

    return write


def read(cache: Cache, url: str, fetch: Callable[[Path], None], *, size: int = 0) -> bytes:
    with os.fdopen(cache.open(url, fetch, size=size), "rb") as file:
        return file.read()


@pytest.mark.parametrize(
    ("url", "path"),
    [
        (URL, "s3/bucket/some/train-000000.tar"),
        ("https://user:pw@host:80/a/b.tar", "https/[0-9a-f]{24}/a/b.tar"),
        ("https://user:pw@host/a/b.tar", "https/host/a/b.tar"),
        ("https://host/b.tar?X-Amz-Signature=secret", "https/host/b.tar"),
        ("https://host/b.tar?versionId=3", "https/host/[0-9a-f]{24}-b.tar"),
        ("s3://bucket/../../etc/passwd", "s3/bucket/[0-9a-f]{24}/[0-9a-f]{24}/etc/passwd"),
        ("s3://bucket/.hidden/ä b.tar", "s3/bucket/[0-9a-f]{24}/[0-9a-f]{24}"),
        ("pipe:cat '/x/../y.tar'", "pipe/[0-9a-f]{24}"),
    ],
)
def test_a_copy_lies_where_a_person_looks_and_never_outside(
    url: str, path: str, tmp_path: Path
) -> None:
    import re

    found = Cache(tmp_path, 100).path_of(url).relative_to(tmp_path).as_posix()
    assert re.fullmatch(path, found)


def test_a_file_is_fetched_once_by_threads_that_want_it_at_once(tmp_path: Path) -> None:
    cache, calls, begin = Cache(tmp_path, 100), list[Path](), threading.Barrier(4)
    found = []

    def take() -> None:
        begin.wait()
        found.append(read(cache, URL, writer(b"x" * 10, calls)))

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [b"x" * 10] * 4
    assert len(calls) == 1


def test_a_fetch_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("cut off")

    cache = Cache(tmp_path, 100)
    with pytest.raises(OSError, match="cut off"):
        cache.open(URL, fail)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file() and p.stat().st_size] == []
    assert read(cache, URL, writer(b"whole")) == b"whole"


def test_another_version_of_a_file_is_fetched_anew(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 100)
    assert read(cache, URL, writer(b"old"), size=3) == b"old"
    assert read(cache, URL, writer(b"newer"), size=5) == b"newer"


def test_what_was_used_longest_ago_goes_first_and_who_reads_reads_on(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 25)
    for age, name in enumerate(["a", "b"]):
        read(cache, f"s3://bucket/{name}", writer(name.encode() * 10))
        os.utime(cache.path_of(f"s3://bucket/{name}"), (age, age))
    handle = cache.open("s3://bucket/a", writer(b""))  # used: now b is the oldest
    read(cache, "s3://bucket/c", writer(b"c" * 10))
    left = [name for name in "abc" if cache.path_of(f"s3://bucket/{name}").exists()]
    assert left == ["a", "c"]
    cache.path_of("s3://bucket/a").unlink()
    with os.fdopen(handle, "rb") as file:
        assert file.read() == b"a" * 10
    with pytest.raises(ConfigError, match=r"s3://bucket/d has 26 bytes, more than --cache-size 25"):
        cache.open("s3://bucket/d", writer(b"d" * 26), size=26)


def test_what_a_process_holds_stays_until_it_ends(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 15)
    held = tmp_path / "s3" / "bucket" / "labels"
    code = (
        "import sys; from pathlib import Path; from mealv2.storage.cache import hold\n"
        "hold(Path(sys.argv[1])); print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, held], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        (held / "train-00000.h5").write_bytes(b"x" * 10)
        assert in_use(held)
        read(cache, URL, writer(b"y" * 10))
        assert (held / "train-00000.h5").exists()
        process.kill()
    assert not in_use(held)
    read(cache, "s3://bucket/other", writer(b"z" * 10))
    assert not (held / "train-00000.h5").exists()
    os.close(hold(held))
    assert not in_use(held)


def test_what_a_killed_process_left_half_written_gives_way_after_a_day(tmp_path: Path) -> None:
    cache, others = Cache(tmp_path, 100), [f"s3://bucket/{name}.tar" for name in "ab"]
    left, being_written = (
        cache.path_of(URL).with_name(f".tmp-{name}.tar-host-1-ab") for name in ("left", "new")
    )
    left.parent.mkdir(parents=True)
    left.write_bytes(b"x" * 60)
    os.utime(left, (1, 1))
    being_written.write_bytes(b"x" * 10)

    for url in others:
        cache.make(url, writer(b"x" * 40))

    assert not left.exists()
    assert being_written.exists()
    assert all(cache.path_of(url).exists() for url in others)
