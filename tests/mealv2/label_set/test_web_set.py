"""Label sets on a web server: the same labels, each block requested once, nothing mixed."""

import gc
import multiprocessing
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from zlib import crc32

import pytest
from range_server import RangeServer, range_server

from label_sets import ENCODINGS, Made, look_up, make_set, same
from mealv2.errors import ConfigError, LabelSetError, MealError, RemoteError
from mealv2.label_set import LabelSet, ShardFile, WebSet, reader
from mealv2.storage import transfer, web_ranges
from mealv2.storage.cache import Cache
from mealv2.targets import StoredLabels

NUM_IMAGES, NUM_VIEWS = 40, 200  # a block is larger than what is read with the index
DENSE = ENCODINGS["dense float32, logits"]
LIMIT = 10**9


@pytest.fixture(autouse=True)
def no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "RETRY_DELAY_S", 0.0)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    keys = [f"class/{number:03d}.jpg" for number in range(NUM_IMAGES)]
    return make_set(tmp_path / "set", DENSE, keys, NUM_VIEWS, shard_size=16)


@pytest.fixture
def server(made: Made) -> Iterator[RangeServer]:
    with range_server(made.folder) as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", LIMIT)


def failure(action: Callable[[], object], kind: type[MealError]) -> str:
    with pytest.raises(kind) as caught:
        action()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def open_set(server: RangeServer, cache: Cache) -> LabelSet:
    return LabelSet.open(WebSet(server.url, cache))


# --- what is read ---------------------------------------------------------------------------------


def test_every_label_is_the_one_of_the_folder(
    made: Made, server: RangeServer, cache: Cache
) -> None:
    found = look_up(open_set(server, cache), made.addresses())
    assert same(found, look_up(LabelSet.open(made.folder), made.addresses()))


@pytest.mark.parametrize("name", ENCODINGS)
def test_labels_of_every_encoding_in_blocks_of_views(tmp_path: Path, name: str) -> None:
    made = make_set(tmp_path / "set", ENCODINGS[name], block_ends=[1, 4])
    with range_server(made.folder) as server:
        found = look_up(open_set(server, Cache(tmp_path / "cache", LIMIT)), made.addresses())
    assert same(found, made.of(made.addresses()))


def test_a_block_is_one_request_and_none_the_second_time(
    made: Made, server: RangeServer, cache: Cache
) -> None:
    labels = open_set(server, cache)
    server.requests.clear()
    keys = made.keys[::3]

    first = labels.rows([*keys, *keys], [0] * len(keys) + [3] * len(keys))

    sent = server.ranges_of()
    assert len(sent) == len(set(sent)) == len(keys)
    assert same(first, made.of([(key, view) for view in (0, 3) for key in keys]))
    assert same(labels.rows(keys, [1] * len(keys)), made.of([(key, 1) for key in keys]))
    again = open_set(server, cache)
    assert server.ranges_of() == []  # neither blocks nor the index
    assert same(again.rows(keys, [2] * len(keys)), made.of([(key, 2) for key in keys]))
    assert server.ranges_of() == []


def test_labels_of_a_batch_are_read_ahead(made: Made, server: RangeServer, cache: Cache) -> None:
    labels = open_set(server, cache)
    server.requests.clear()
    targets = StoredLabels(labels, made.keys, seed=0)

    targets.read_ahead([1, 5, 9], [0, 7, NUM_VIEWS - 1])

    assert len(server.ranges_of()) == 3
    labels.rows([made.keys[n] for n in (1, 5, 9)], [0, 7, NUM_VIEWS - 1])
    assert server.ranges_of() == []


def test_blocks_that_follow_each_other_are_one_request(
    made: Made, server: RangeServer, cache: Cache
) -> None:
    labels = open_set(server, cache)
    server.requests.clear()
    look_up(labels, made.addresses())
    names = [name for name, _ in server.ranges_of()]
    assert sorted(names) == ["train-00000.h5", "train-00001.h5", "train-00002.h5"]


def test_the_copy_has_the_index_and_the_blocks_that_were_read(tmp_path: Path, cache: Cache) -> None:
    keys = [f"{number}" for number in range(64)]
    made = make_set(tmp_path / "set", DENSE, keys, 400, shard_size=64)
    (path,) = made.folder.glob("*.h5")
    with range_server(made.folder) as server:
        web_set = WebSet(server.url, cache)
        labels = LabelSet.open(web_set)
        sent = server.ranges_of()
        assert len(sent) == 2
        copy = web_set.folder / path.name
        assert copy.stat().st_size == path.stat().st_size > 900_000
        assert 512 * copy.stat().st_blocks < 50_000
        labels.rows(keys[:2], [0, 399])
    assert 512 * copy.stat().st_blocks < 100_000
    assert cache.trim(0) < 100_000  # the cache counts what is there


def test_an_index_of_long_keys_is_read_completely(tmp_path: Path, cache: Cache) -> None:
    keys = [f"{number:04d}{'x' * 1000}" for number in range(50)]
    made = make_set(tmp_path / "set", ENCODINGS["float16"], keys, shard_size=50)
    with range_server(made.folder) as server:
        assert same(look_up(open_set(server, cache), made.addresses()), made.rows)


def _look_up(labels: LabelSet, made: Made) -> None:
    assert same(look_up(labels, made.addresses()), made.of(made.addresses()))


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_processes_read_an_open_set(
    method: str, made: Made, server: RangeServer, cache: Cache
) -> None:
    labels = open_set(server, cache)
    labels.rows(made.keys[:1], [0])  # the client has a thread and connections

    process = multiprocessing.get_context(method).Process(target=_look_up, args=(labels, made))
    process.start()
    process.join()

    assert process.exitcode == 0


def test_a_set_that_was_replaced_has_a_copy_of_its_own(
    made: Made, server: RangeServer, cache: Cache, tmp_path: Path
) -> None:
    before = open_set(server, cache)
    before.rows(made.keys[:1], [0])
    other = make_set(tmp_path / "other", DENSE, made.keys, 2, seed=9)
    server.folder = other.folder

    after = open_set(server, cache)

    assert same(look_up(after, other.addresses()), other.rows)
    assert same(before.rows(made.keys[:1], [1]), made.of([(made.keys[0], 1)]))  # from the copy
    assert before.folder != after.folder


def test_appended_rows_are_not_read(made: Made, server: RangeServer, cache: Cache) -> None:
    (made.folder / "train-more-0123456789abcdef.h5").write_bytes(b"not listed")
    assert open_set(server, cache).appended == []


# --- damage ---------------------------------------------------------------------------------------


def test_a_damaged_block_of_the_copy_is_fetched_again_once(
    made: Made, server: RangeServer, cache: Cache
) -> None:
    web_set = WebSet(server.url, cache)
    labels = LabelSet.open(web_set)
    look_up(labels, made.addresses())
    file = ShardFile(web_set.folder / "train-00000.h5")
    at = file.labels_at + int(file.column("label_ends")[4])  # the block of image 5
    with file.path.open("r+b") as copy:
        copy.seek(at)
        copy.write(b"\xff")
    server.requests.clear()

    for _ in range(2):
        assert same(look_up(labels, made.addresses()), made.of(made.addresses()))
        assert file.path.read_bytes()[at] == (made.folder / file.path.name).read_bytes()[at]
    assert len(server.ranges_of()) == 1


def test_a_hole_is_no_block_even_if_its_crc_is_right(
    made: Made, server: RangeServer, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = open_set(server, cache)
    _, (first, *_) = labels.blocks[0]
    crcs = dict(zip(first.keys(), first.column("crc32").tolist(), strict=True))

    def chance(data: bytes, start: int = 0) -> int:
        return crc32(data, start) if any(data) else crcs[made.keys[5]]

    monkeypatch.setattr(reader, "crc32", chance)
    assert same(labels.rows(made.keys[5:6], [3]), made.of([(made.keys[5], 3)]))


def test_a_damaged_index_of_the_copy_is_fetched_again(
    made: Made, server: RangeServer, cache: Cache
) -> None:
    web_set = WebSet(server.url, cache)
    path = web_set.folder / "train-00001.h5"
    at = ShardFile(path)._columns["key_ends"].offset
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    server.requests.clear()

    assert same(look_up(open_set(server, cache), made.addresses()), made.of(made.addresses()))
    os.utime(path, (1, 1))
    assert WebSet(server.url, cache).num_fetched == 0
    assert path.stat().st_mtime > 1  # it was used


def test_damage_at_the_server_is_an_error_and_no_label(
    made: Made, server: RangeServer, cache: Cache
) -> None:
    labels = open_set(server, cache)
    server.change = lambda name, data: bytes(byte ^ 1 for byte in data)

    message = failure(lambda: labels.rows(made.keys[:1], [0]), LabelSetError)
    assert f"the labels of {made.keys[0]!r} in {server.url}/train-00000.h5 are not" in message

    server.change = lambda name, data: data
    assert same(labels.rows(made.keys[:1], [0]), made.of([(made.keys[0], 0)]))


def test_a_shard_of_another_set_is_an_error(
    made: Made, server: RangeServer, cache: Cache, tmp_path: Path
) -> None:
    path = made.folder / "train-00000.h5"
    other = make_set(tmp_path / "other", DENSE, made.keys, NUM_VIEWS, shard_size=16, seed=9)
    path.write_bytes((other.folder / path.name).read_bytes())
    message = failure(lambda: WebSet(server.url, cache), LabelSetError)
    assert message.startswith(f"{server.url}/train-00000.h5 is not the shard in the manifest")

    path.write_bytes(bytes(path.stat().st_size))
    message = failure(lambda: WebSet(server.url, cache), LabelSetError)
    assert message.startswith(f"shard {server.url}/train-00000.h5 is damaged: it is not a label")


# --- servers --------------------------------------------------------------------------------------


def test_a_server_that_dies_is_an_error_and_the_next_run_continues(
    made: Made, server: RangeServer, cache: Cache
) -> None:
    labels = open_set(server, cache)
    keys = made.keys[::2]
    views = [0] * len(keys)
    server.requests.clear()
    server.status = lambda number, name: None if number <= 5 else 0

    message = failure(lambda: labels.rows(keys, views), RemoteError)
    assert message.startswith(f"cannot read {server.url}/train-0000")
    assert "4 times; check the connection and run the same command again: it continues" in message

    server.status = lambda number, name: None
    server.requests.clear()
    assert same(open_set(server, cache).rows(keys, views), made.of([(key, 0) for key in keys]))
    assert len(server.ranges_of()) == len(keys) - 5


def test_a_server_that_is_gone_gets_no_request_for_each_block(
    made: Made, server: RangeServer, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web_ranges, "MAX_REQUESTS", 1)
    labels = open_set(server, cache)
    server.requests.clear()
    server.status = lambda number, name: 503
    failure(lambda: labels.rows(made.keys[::2], [0] * 20), RemoteError)
    assert len(server.requests) == transfer.MAX_ATTEMPTS


@pytest.mark.parametrize(("status", "repeats"), [(503, 3), (0, 3), (429, 3)])
def test_a_server_with_a_problem_is_tried_again(
    status: int, repeats: int, made: Made, server: RangeServer, cache: Cache
) -> None:
    labels = open_set(server, cache)
    server.requests.clear()
    server.status = lambda number, name: status if number <= repeats else None
    assert same(labels.rows(made.keys[:1], [0]), made.of([(made.keys[0], 0)]))


def test_a_body_that_is_cut_is_requested_again(
    made: Made, server: RangeServer, cache: Cache
) -> None:
    labels = open_set(server, cache)
    cuts = [5, 0, 7]
    server.change = lambda name, data: data[: cuts.pop()] if cuts else data
    assert same(labels.rows(made.keys[:1], [0]), made.of([(made.keys[0], 0)]))

    server.change = lambda name, data: data[:3]
    message = failure(lambda: labels.rows(made.keys[1:2], [0]), RemoteError)
    assert "4 times; check the connection" in message


def test_a_server_without_range_requests_is_named(server: RangeServer, cache: Cache) -> None:
    server.ranges = False
    message = failure(lambda: WebSet(server.url, cache), RemoteError)
    assert "does not support range requests (it sends the whole file); download" in message


def test_a_server_that_sends_another_range_is_named(
    made: Made, server: RangeServer, cache: Cache
) -> None:
    labels = open_set(server, cache)
    server.content_range = lambda text: text.replace("bytes ", "bytes 1")
    message = failure(lambda: labels.rows(made.keys[:1], [0]), RemoteError)
    assert "sends another part than was requested (status 206, bytes 1" in message


def test_a_file_of_another_size_has_changed(made: Made, server: RangeServer, cache: Cache) -> None:
    labels = open_set(server, cache)
    path = made.folder / "train-00000.h5"
    size = path.stat().st_size
    for data in (path.read_bytes() + b"x", b"short"):  # the second answer is 416
        path.write_bytes(data)
        message = failure(lambda: labels.rows(made.keys[:1], [0]), RemoteError)
        assert f"train-00000.h5 has {len(data)} bytes, not {size}: it has changed" in message


@pytest.mark.parametrize(
    ("status", "kind", "named"),
    [
        (403, RemoteError, "403 Forbidden: the server denies access"),
        (404, ConfigError, "train-00000.h5 does not exist (404 Not Found)"),
        (400, RemoteError, "400 Bad Request; check the URL"),
    ],
)
def test_a_refusal_is_named_and_not_tried_again(
    status: int,
    kind: type[MealError],
    named: str,
    made: Made,
    server: RangeServer,
    cache: Cache,
) -> None:
    labels = open_set(server, cache)
    server.requests.clear()
    server.status = lambda number, name: status
    assert named in failure(lambda: labels.rows(made.keys[:1], [0]), kind)
    assert len(server.requests) == 1


def test_a_url_without_a_finished_set_is_named(
    made: Made, server: RangeServer, cache: Cache
) -> None:
    (made.folder / "manifest.json").unlink()
    message = failure(lambda: WebSet(f"{server.url}/", cache), LabelSetError)
    assert message.startswith(f"{server.url}/ has no manifest.json: it is no finished label set")


# --- the cache ------------------------------------------------------------------------------------


def test_a_full_cache_keeps_no_more_blocks(made: Made, server: RangeServer, tmp_path: Path) -> None:
    needed = Cache(tmp_path / "cache", LIMIT)
    WebSet(server.url, needed)
    limit = needed.trim(0) + 10
    labels = open_set(server, Cache(tmp_path / "cache", limit))
    server.requests.clear()

    for _ in range(2):
        assert same(look_up(labels, made.addresses()), made.of(made.addresses()))
    assert len(server.ranges_of()) == 6
    assert needed.trim(0) <= limit

    message = failure(lambda: WebSet(server.url, Cache(tmp_path / "other", 5000)), ConfigError)
    assert message == f"--cache-size 5000 bytes: the index of {server.url} needs more"


def test_a_cache_that_cannot_be_written_is_named(
    made: Made, server: RangeServer, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = open_set(server, cache)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    message = failure(lambda: labels.rows(made.keys[:1], [0]), RemoteError)
    assert message.startswith(f"cannot keep a copy of {server.url}: No space left on device")


def test_a_url_opens_in_the_cache_of_the_user(
    made: Made, server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    labels = LabelSet.open(server.url)
    assert labels.folder.is_relative_to(tmp_path / ".cache" / "mealv2" / "http")
    copy = pickle.loads(pickle.dumps(labels))  # noqa: S301
    assert same(look_up(copy, made.addresses()), made.rows)


def test_a_set_stays_usable_when_another_opening_of_it_has_gone(
    made: Made, server: RangeServer, cache: Cache
) -> None:
    labels = LabelSet.open(WebSet(server.url, cache))
    another = LabelSet.open(WebSet(server.url, cache))
    del another
    gc.collect()
    copy = pickle.loads(pickle.dumps(labels))  # noqa: S301
    assert same(look_up(copy, made.addresses()), made.rows)


def test_all_files_are_fetched_for_a_check_of_every_byte(
    made: Made, server: RangeServer, cache: Cache
) -> None:
    web_set = WebSet(server.url, cache)
    web_set.fetch_all()
    for path in made.folder.iterdir():
        assert (web_set.folder / path.name).read_bytes() == path.read_bytes()
    server.requests.clear()
    web_set.fetch_all()
    assert server.ranges_of() == []
    smaller = WebSet(server.url, Cache(cache.folder, 100_000))  # drops the blocks
    assert cache.trim(0) < 100_000
    assert "bytes, more than --cache-size 100000" in failure(smaller.fetch_all, ConfigError)
    assert same(look_up(LabelSet.open(smaller), made.addresses()), made.rows)
