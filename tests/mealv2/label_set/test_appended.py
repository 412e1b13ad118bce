"""mealv2.label_set.appended: rows that later jobs add beside the shards, and what readers see."""

import dataclasses
import multiprocessing
import pickle
import threading
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch

import label_sets
from cases import mostly_slow
from label_sets import ENCODINGS, Made, encoded, look_up, same
from mealv2.errors import LabelSetError
from mealv2.label_set import (
    Appender,
    LabelSet,
    Rows,
    ShardFile,
    read_shard,
    shard_name,
    write_shard,
)

KEYS = ["ant/1.jpg", "猫/写真.webp"]
NUM_VIEWS = 2
# rows that no set of these tests has: views beyond, an image of later, a view number beyond 32 bits
PLACES = [("猫/写真.webp", 5), ("ant/1.jpg", 2), ("new/ü.png", 0), ("ant/1.jpg", 2**40)]
RATE = ENCODINGS["rate"]


def make_set(folder: Path, name: str = "rate", *, seed: int = 0) -> tuple[LabelSet, Made]:
    """Write a finished set: two images, two views each."""
    made = label_sets.make_set(folder, ENCODINGS[name], KEYS, NUM_VIEWS, view_seed=seed)
    return LabelSet.open(folder), made


def outputs(num_rows: int, name: str = "rate", *, seed: int = 1) -> Rows:
    """Return answers as StoredLabels hands them over: in the set's encoding."""
    return encoded(ENCODINGS[name], num_rows, seed=seed)


def append(label_set: LabelSet, addresses: list[tuple[str, int]], rows: Rows | None = None) -> Path:
    appender = Appender(label_set)
    appender.add(*of(addresses), outputs(len(addresses)) if rows is None else rows)
    path = appender.flush()
    assert path is not None
    return path


def of(addresses: list[tuple[str, int]]) -> tuple[list[str], list[int]]:
    return [key for key, _ in addresses], [view for _, view in addresses]


def picked(rows: Rows, *order: int) -> Rows:
    return rows.rows(torch.tensor(order))


# --- written and read ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODINGS)
def test_appended_rows_come_back_to_the_bit_when_the_set_is_opened_next(tmp_path, name):
    label_set, made = make_set(tmp_path, name)
    rows = outputs(len(PLACES), name)
    append(label_set, PLACES, rows)
    opened = LabelSet.open(tmp_path)
    assert all(opened.holds(*address) for address in PLACES)
    assert same(look_up(opened, PLACES), rows)
    mixed = [PLACES[2], (KEYS[1], 1), PLACES[0]]
    expected = Rows.concat([picked(rows, 2), made.of(mixed[1:2]), picked(rows, 0)])
    assert same(look_up(opened, mixed), expected)


def test_the_file_is_named_after_its_role_and_its_own_bytes(tmp_path):
    path = append(make_set(tmp_path)[0], PLACES)
    digest = sha256(path.read_bytes()).hexdigest()
    assert path == tmp_path / f"train-more-{digest[:16]}.h5"


def test_the_file_is_a_shard_of_rows_that_name_their_views(tmp_path):
    label_set, _ = make_set(tmp_path)
    rows = outputs(len(PLACES))
    path = append(label_set, PLACES, rows)
    file, shard = ShardFile(path), read_shard(path)
    assert (shard.number, shard.skipped, shard.counts) == (0, {}, {})
    assert (shard.first_view, shard.num_views) == (0, 1)
    assert (shard.plan_sha256, shard.split) == (label_set.manifest["plan_sha256"], "train")
    assert (file.column("views").dtype, file.column("views").shape) == (np.dtype("<u8"), (4,))
    addresses = list(zip(shard.keys, shard.views_N.tolist(), strict=True))
    assert addresses == sorted(PLACES)
    for address, block in zip(addresses, shard.blocks, strict=True):
        row = picked(rows, PLACES.index(address))
        assert RATE.blocks(row, 1) == [block]


def test_rows_in_any_order_and_any_number_of_calls_give_the_same_file(tmp_path):
    label_set, _ = make_set(tmp_path / "set")
    labels = outputs(len(PLACES))
    first = append(label_set, PLACES, labels)
    appender = Appender(label_set)
    for row in (3, 1, 0, 2):
        appender.add(*of([PLACES[row]]), picked(labels, row))
    assert appender.flush() == first
    assert len(list(first.parent.glob("*more*"))) == 1


def test_manifest_plan_and_shards_stay_as_they_are(tmp_path, contents):
    label_set, _ = make_set(tmp_path)
    before = contents(tmp_path)
    path = append(label_set, PLACES)
    after = contents(tmp_path)
    assert after.pop(path.name)
    assert after == before  # and no temporary file either


def test_without_rows_nothing_is_written(tmp_path, contents):
    label_set, _ = make_set(tmp_path)
    before = contents(tmp_path)
    assert Appender(label_set).flush() is None
    assert contents(tmp_path) == before


def test_a_row_is_written_once_and_the_next_flush_holds_only_new_ones(tmp_path):
    label_set, _ = make_set(tmp_path)
    appender = Appender(label_set)
    labels = outputs(2)
    appender.add(*of(PLACES[:2]), labels)
    appender.add(*of(PLACES[:1]), outputs(1, seed=9))  # again: the first stays
    first = appender.flush()
    assert appender.flush() is None
    appender.add(*of(PLACES[2:3]), picked(labels, 0))
    second = appender.flush()
    assert [len(read_shard(path).keys) for path in (first, second)] == [2, 1]
    assert same(look_up(LabelSet.open(tmp_path), PLACES[:2]), labels)


def test_a_set_that_is_open_does_not_change_under_the_run(tmp_path):
    label_set, _ = make_set(tmp_path)
    append(label_set, PLACES)
    assert not any(label_set.holds(*address) for address in PLACES)
    with pytest.raises(LabelSetError, match="no view 5"):
        look_up(label_set, PLACES[:1])


def test_images_and_length_are_those_of_the_shards(tmp_path):
    append(make_set(tmp_path)[0], PLACES)
    opened = LabelSet.open(tmp_path)
    assert (list(opened.keys()), len(opened), opened.num_views) == (KEYS, 2, NUM_VIEWS)
    assert "new/ü.png" not in opened
    assert opened.holds("new/ü.png", 0)
    assert not opened.holds("new/ü.png", 1)
    assert not opened.holds(KEYS[0], -1)


# --- many jobs at once --------------------------------------------------------------------------


def test_two_jobs_that_append_the_same_rows_make_one_file(tmp_path):
    label_set, _ = make_set(tmp_path)
    labels = outputs(len(PLACES))
    assert append(label_set, PLACES, labels) == append(label_set, PLACES, labels)
    assert len(LabelSet.open(tmp_path).appended) == 1


def test_two_jobs_that_answer_a_row_differently_do_no_harm_and_the_first_file_counts(tmp_path):
    label_set, _ = make_set(tmp_path)
    said = [outputs(len(PLACES), seed=seed) for seed in (1, 2)]
    paths = [append(label_set, PLACES, labels) for labels in said]
    opened = LabelSet.open(tmp_path)
    assert opened.appended == sorted(path.name for path in paths)
    assert same(look_up(opened, PLACES), said[paths.index(min(paths))])


def test_jobs_that_append_at_the_same_time_lose_no_row(tmp_path):
    label_set, _ = make_set(tmp_path)
    labels = outputs(12)
    # half of the rows of every job are the next job's too
    jobs = [[("new", v % 12) for v in range(start, start + 6)] for start in range(0, 12, 3)]
    start = threading.Barrier(len(jobs))
    failed: list[BaseException] = []

    def job(addresses: list[tuple[str, int]]) -> None:
        start.wait()
        try:
            rows = torch.tensor([view for _, view in addresses])
            append(label_set, addresses, labels.rows(rows))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=job, args=(addresses,)) for addresses in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    opened = LabelSet.open(tmp_path)
    assert len(opened.appended) == len(jobs)
    assert same(look_up(opened, [("new", view) for view in range(12)]), labels)


def test_a_run_that_goes_on_sees_only_the_files_it_began_with(tmp_path):
    label_set, _ = make_set(tmp_path)
    first, second = (append(label_set, [address]) for address in PLACES[:2])
    opened = LabelSet.open(tmp_path, appended=[first.name])
    assert opened.appended == [first.name]
    assert opened.holds(*PLACES[0])
    assert not opened.holds(*PLACES[1])
    assert not LabelSet.open(tmp_path, appended=[]).holds(*PLACES[0])
    assert LabelSet.open(tmp_path).appended == sorted([first.name, second.name])


@pytest.mark.parametrize("method", mostly_slow(["spawn", "forkserver"]))
def test_a_set_handed_to_another_process_reads_appended_rows(tmp_path, method):
    append(make_set(tmp_path)[0], PLACES)
    opened = LabelSet.open(tmp_path)
    here = opened.lookup(*of(PLACES))
    assert pickle.loads(pickle.dumps(opened)).holds(*PLACES[3])  # noqa: S301
    with multiprocessing.get_context(method).Pool(1) as pool:
        there = pool.apply(opened.lookup, of(PLACES))
    assert all(np.array_equal(a, b) for a, b in zip(here, there, strict=True))


# --- damage -------------------------------------------------------------------------------------


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _text(path: Path) -> None:
    path.write_text("<html>not found</html>")


def _flip_a_view(path: Path) -> None:
    data = bytearray(path.read_bytes())
    views = read_shard(path).views_N.tobytes()
    assert data.count(views) == 1
    data[data.find(views)] ^= 1
    path.write_bytes(bytes(data))


def _flip_a_key(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index("".join(read_shard(path).keys).encode())] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [_flip_a_key, _truncate, _empty, _text, _flip_a_view])
def test_a_damaged_file_is_named_with_what_to_do(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    path = append(make_set(tmp_path)[0], PLACES)
    damage(path)
    with pytest.raises(
        LabelSetError, match=rf"{path.name} is damaged.*; remove the file"
    ) as caught:
        LabelSet.open(tmp_path)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3
    path.unlink()
    assert len(LabelSet.open(tmp_path)) == 2


def test_a_flipped_bit_in_a_label_is_named_when_it_is_read(tmp_path):
    label_set, made = make_set(tmp_path)
    path = append(label_set, PLACES)
    data = bytearray(path.read_bytes())
    blocks = read_shard(path).blocks  # in the order of the places
    data[data.index(b"".join(blocks)) + len(blocks[0])] ^= 1
    path.write_bytes(bytes(data))
    opened = LabelSet.open(tmp_path)
    first, damaged, *others = sorted(PLACES)
    assert damaged == ("ant/1.jpg", 2**40)
    with pytest.raises(
        LabelSetError,
        match=rf"labels of 'ant/1.jpg' in .*{path.name} are damaged \(CRC-32\).*remove the file",
    ):
        look_up(opened, [damaged])
    assert len(look_up(opened, [first, *others, (KEYS[0], 1)]).labels) == 4
    assert same(look_up(opened, made.addresses()), made.rows)


def test_a_file_of_another_role_is_named(tmp_path):
    path = append(make_set(tmp_path)[0], PLACES)
    shard = read_shard(path)
    other = tmp_path / "train-more-0123456789abcdef.h5"
    write_shard(other, dataclasses.replace(shard, split="val"))
    with pytest.raises(LabelSetError, match=rf"{other.name} holds rows of another label set"):
        LabelSet.open(tmp_path)


def test_a_row_that_comes_twice_in_a_batch_is_written_once(tmp_path):
    label_set, _ = make_set(tmp_path)
    rows = outputs(1)
    path = append(label_set, PLACES[:1] * 3, picked(rows, 0, 0, 0))
    assert len(read_shard(path).keys) == 1
    assert same(look_up(LabelSet.open(tmp_path), PLACES[:1] * 2), picked(rows, 0, 0))


def test_the_largest_view_number_there_is(tmp_path):
    label_set, _ = make_set(tmp_path)
    addresses = [("ant/1.jpg", 2**64 - 1), ("ant/1.jpg", 2**63)]
    rows = outputs(2)
    append(label_set, addresses, rows)
    opened = LabelSet.open(tmp_path)
    assert opened.holds(*addresses[0])
    assert same(look_up(opened, addresses), rows)


def test_a_file_of_another_set_is_named(tmp_path):
    path = append(make_set(tmp_path / "other", seed=5)[0], PLACES)
    make_set(tmp_path / "set")
    path.rename(tmp_path / "set" / path.name)
    with pytest.raises(LabelSetError, match=rf"{path.name} holds rows of another label set"):
        LabelSet.open(tmp_path / "set")


def test_a_shard_under_an_appended_files_name_is_refused(tmp_path):
    make_set(tmp_path)
    shard = tmp_path / shard_name("train", 0)
    (tmp_path / "train-more-0123456789abcdef.h5").write_bytes(shard.read_bytes())
    with pytest.raises(LabelSetError, match="more-0123456789abcdef"):
        LabelSet.open(tmp_path)


def test_a_vanished_file_that_a_run_began_with_is_named(tmp_path):
    path = append(make_set(tmp_path)[0], PLACES)
    path.unlink()
    with pytest.raises(LabelSetError, match=rf"{path.name} is missing") as caught:
        LabelSet.open(tmp_path, appended=[path.name])
    assert caught.value.exit_code == 3


def test_a_temporary_file_of_a_killed_job_is_overlooked(tmp_path):
    path = append(make_set(tmp_path)[0], PLACES)
    (tmp_path / f".tmp-{path.name}-host-1-00").write_bytes(b"half")
    assert LabelSet.open(tmp_path).appended == [path.name]


def test_a_read_only_folder_is_named_with_the_flag_to_leave_out(tmp_path, monkeypatch):
    label_set, _ = make_set(tmp_path)

    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.link", refuse)  # root may write anywhere, so no chmod would do
    monkeypatch.setattr("os.replace", refuse)
    monkeypatch.setattr("mealv2.storage.atomic._RETRY_DELAYS_S", ())
    with pytest.raises(LabelSetError, match="no permission; leave out --write-back"):
        append(label_set, PLACES)
