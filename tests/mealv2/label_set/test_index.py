"""mealv2.label_set.index: rows by key and places of blocks, and what opening costs."""

import resource
from pathlib import Path

import numpy as np
import pytest

from label_sets import ENCODINGS, make_set
from mealv2.errors import LabelSetError
from mealv2.label_set import LabelSet, ShardFile, shard_name
from mealv2.label_set.index import Index
from mealv2.label_set.opening import max_open_files

KEYS = [f"{n:03d}-{'x' * (n % 7)}.jpg" for n in range(50)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[ShardFile]:
    """Shards of 8, 8, …, 2 images."""
    made = make_set(tmp_path_factory.mktemp("set"), ENCODINGS["rate"], KEYS, 3, shard_size=8)
    return LabelSet.open(made.folder).blocks[0][1]


def test_locations_are_those_of_the_blocks_in_their_files(files: list[ShardFile]) -> None:
    index = Index(files)
    assert index.num_rows == 50
    blocks = [bytes(block) for file in files for _, block, _ in file.blocks()]
    rows_N = np.random.default_rng(0).permutation(50)
    for row, number, at, size, crc in zip(rows_N, *index.locate(rows_N), strict=True):
        data = files[number].path.read_bytes()
        assert data[at : at + size] == blocks[row]
        assert files[number].column("crc32")[row - 8 * number] == crc


def test_keys_are_found_in_any_order_and_unknown_ones_are_not(files: list[ShardFile]) -> None:
    index = Index(files)
    keys = [key.encode() for key in KEYS]
    assert index.rows([*keys[::-1], b"other", keys[7]]).tolist() == [*range(49, -1, -1), -1, 7]
    assert index.rows([]).tolist() == []
    assert Index([]).rows([b"any"]).tolist() == [-1]


def test_the_index_of_a_file_in_memory_is_the_same(files: list[ShardFile]) -> None:
    in_memory = [ShardFile(file.path, file.path.read_bytes()) for file in files]
    rows_N = np.arange(50)
    for one, other in zip(
        Index(files).locate(rows_N), Index(in_memory).locate(rows_N), strict=True
    ):
        assert np.array_equal(one, other)


def test_a_file_that_became_shorter_since_its_check_is_refused(tmp_path: Path) -> None:
    make_set(tmp_path, ENCODINGS["rate"], KEYS, 3)
    path = tmp_path / shard_name("train", 0)
    file = ShardFile(path)
    path.write_bytes(path.read_bytes()[: file.labels_at])
    with pytest.raises(LabelSetError, match="became shorter"):
        Index([file])
    path.unlink()
    with pytest.raises(LabelSetError, match="No such file"):
        Index([file])


def test_opening_maps_no_file(tmp_path: Path) -> None:
    make_set(tmp_path, ENCODINGS["rate"], KEYS, 3)
    labels = LabelSet.open(tmp_path)
    labels.lookup(KEYS, [2] * 50)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(tmp_path) not in maps.read_text()


def test_a_table_keeps_all_shards_of_imagenet_open_where_the_limit_allows() -> None:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert max_open_files(1) == max(1, min(4096, limit // 4 - 16))
