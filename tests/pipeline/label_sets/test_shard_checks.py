"""pipeline.label_sets.shard_checks: any number of threads finds the same, in the same order."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from label_sets import ENCODINGS, encoded, ensemble_outputs, flip, make_set
from mealv2.codec import EncodedLabels
from mealv2.codec.encoder import encode_each_view
from mealv2.errors import LabelSetError
from mealv2.label_set import ShardFile, read_manifest
from mealv2.label_set.manifest import listed_shards
from mealv2.storage.regular_files import read_regular
from pipeline.label_sets import shard_checks
from pipeline.label_sets.shard_checks import check_files

KEYS = [f"{n}.jpg" for n in range(60)]
RATE = ENCODINGS["rate"]
Entries = list[dict[str, Any]]


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Entries]:
    """A set of 12 shards, and their entries in the manifest."""
    make_set(tmp_path / "set", RATE, KEYS, 6, shard_size=5)
    return tmp_path / "set", listed_shards(read_manifest(tmp_path / "set")["roles"])


@pytest.mark.parametrize("workers", [0, 1, 2, 7])
def test_damage_is_found_in_the_listed_order(made: tuple[Path, Entries], workers: int) -> None:
    folder, entries = made
    paths = [folder / entry["name"] for entry in entries]
    _damage(paths[1], ShardFile(paths[1]).labels_at + 2)
    paths[4].write_bytes(paths[4].read_bytes()[:-3])
    paths[7].unlink()
    _damage(paths[9], 20)
    found = list(check_files(folder, entries, RATE, workers=workers))
    assert [n for n, file in enumerate(found) if file.difference] == [1, 4, 7, 9]
    texts = [found[n].difference for n in (1, 4, 7, 9)]
    size = entries[4]["bytes"]
    assert texts == [
        "has another SHA-256 (the labels of 1 image: 5.jpg)",
        f"has {size - 3} bytes, not {size}",
        "cannot be read: No such file or directory",
        "has another SHA-256 (its head fails its SHA-256)",
    ]
    assert [len(found[n].hashes_N) for n in (0, 1, 11)] == [5, 0, 5]
    assert all(file.problem is None for file in found)


def _damage(path: Path, offset: int) -> None:
    flip(path, path.read_bytes(), 8 * offset)


def _signed(entries: Entries, paths: list[Path]) -> Entries:
    """Return entries with the SHA-256 that the files have now."""
    hashes = [sha256(path.read_bytes()).hexdigest() for path in paths]
    return [e | {"sha256": digest} for e, digest in zip(entries, hashes, strict=True)]


def test_wrong_contents_under_a_right_sha256_are_found(made: tuple[Path, Entries]) -> None:
    folder, entries = made
    paths = [folder / entry["name"] for entry in entries]
    _damage(paths[3], ShardFile(paths[3]).labels_at + 2)
    found = list(check_files(folder, _signed(entries, paths), RATE, workers=2))
    assert [n for n, file in enumerate(found) if file.problem] == [3]
    assert found[3].problem == "the labels of 1 images have another CRC-32: 15.jpg"
    # without an encoding nothing is said of the contents, nor of the heads: opening does
    found = list(check_files(folder, _signed(entries, paths), None, workers=2))
    assert not any(file.difference or file.problem for file in found)


def test_every_layout_is_checked_and_of_shared_blocks_so_many_views() -> None:
    blocks = RATE.blocks(encoded(RATE, 7 * 20, num_views=20), 20)
    assert all(block[0] for block in blocks), "all share a model"
    probs_NC, _ = ensemble_outputs(20, RATE.num_classes)
    (blocks[2],) = encode_each_view(probs_NC, RATE.rate, None, 20).blocks(20)
    assert blocks[2][0] == 0, "a record for each view"
    data, ends_N = np.frombuffer(b"".join(blocks), np.uint8), np.cumsum([*map(len, blocks)])
    for most in (1, 6, 10, 50, 1000):
        rows = RATE.rows_to_check(data, ends_N, 20, most=most)
        RATE.check(rows, most=most)
        assert isinstance(rows.labels, EncodedLabels)
        of_block = [rows.labels.view_N[rows.labels.block_N == block] for block in range(7)]
        assert all(len(set(views)) == len(views) > 0 for views in of_block)
        assert len(of_block[2]) == 20
        assert min(120, most) <= sum(map(len, of_block)) - 20 <= min(120, most + 5)
    damaged = data.copy()
    damaged[int(ends_N[4]) + 1 : int(ends_N[4]) + 3] = 255  # more classes listed than there are
    with pytest.raises(LabelSetError, match="head that is not valid"):
        RATE.check(RATE.rows_to_check(damaged, ends_N, 20, most=1), most=1)


def test_few_large_files_are_read_at_once(
    made: tuple[Path, Entries], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, entries = made
    largest = max(entry["bytes"] for entry in entries)
    reading = _watched(monkeypatch)
    for memory, most in ((3 * largest, 3), (largest // 2, 1)):
        monkeypatch.setattr(shard_checks, "_MEMORY", memory)
        assert len(list(check_files(folder, entries, RATE, workers=8))) == 12
        assert 1 <= max(reading) <= most
        reading.clear()


def test_no_further_file_is_read_when_the_caller_stops(
    made: tuple[Path, Entries], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ctrl-C does: the generator closes, and waits for the files that are being read only."""
    folder, entries = made
    first, stopped = folder / entries[0]["name"], threading.Event()
    read = list[Path]()

    def reading(path: Path, **settings: Any) -> bytes:
        read.append(path)
        assert path == first or stopped.wait(60)
        return read_regular(path, **settings)

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            stopped.set()
            super().shutdown(wait=wait)

    monkeypatch.setattr(shard_checks, "read_regular", reading)
    monkeypatch.setattr(shard_checks, "ThreadPoolExecutor", Pool)
    found: Iterator[Any] = check_files(folder, entries, RATE, workers=2)
    next(found)
    found.close()  # type: ignore[attr-defined]
    assert len(read) <= 3
    assert not [t for t in threading.enumerate() if t.name.startswith("mealv2-verify")]


def _watched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which every reading adds how many run at the same time."""
    running, reading = threading.Semaphore(0), list[int]()

    def watched(*args: Any, **settings: Any) -> bytes:
        running.release()
        reading.append(running._value)
        try:
            return read_regular(*args, **settings)
        finally:
            running.acquire()

    monkeypatch.setattr(shard_checks, "read_regular", watched)
    return reading
