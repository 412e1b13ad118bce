"""mealv2.label_set.reader: views in several blocks, and with appended rows, as one table."""

import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from label_sets import ENCODINGS, KEYS, Made, encoded, look_up, make_set, same
from mealv2.errors import LabelSetError
from mealv2.label_set import Appender, LabelSet, Rows, read_manifest, shard_name, write_manifest

ENDS = (16, 32, 35)
LATE = KEYS[1]  # an image of the first block only
APPENDED = [(LATE, 20), ("new.jpg", 3), (KEYS[0], 99), (KEYS[4], 35)]


def make(folder: Path, name: str = "rate, logits", **given: Any) -> Made:
    return make_set(
        folder,
        ENCODINGS[name],
        num_views=35,
        block_ends=ENDS,
        first_block_only=[LATE],
        skipped={"bad.jpg": "the file is empty"},
        **given,
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    return make(tmp_path_factory.mktemp("labels"))


@pytest.fixture(scope="module")
def appended(tmp_path_factory) -> tuple[Made, Rows]:
    """A set with rows that another job appended, and those."""
    made = make(tmp_path_factory.mktemp("labels"))
    opened = LabelSet.open(made.folder)
    rows = encoded(opened.encoding, len(APPENDED), seed=5)
    appender = Appender(opened)
    appender.add([key for key, _ in APPENDED], [view for _, view in APPENDED], rows)
    appender.flush()
    return made, rows


def held(made: Made) -> list[tuple[str, int]]:
    """Return all places that the shards hold."""
    return [(key, view) for key, view in made.addresses() if key != LATE or view < 16]


@pytest.mark.parametrize("name", ENCODINGS)
def test_views_of_all_blocks_are_found_in_one_lookup(tmp_path, name):
    made = make(tmp_path, name)
    opened = LabelSet.open(tmp_path)
    assert (opened.num_views, len(opened)) == (35, 5)
    assert [views for views, _ in opened.blocks] == [range(16), range(16, 32), range(32, 35)]
    addresses = random.Random(0).sample(held(made), len(held(made)))
    assert same(look_up(opened, addresses), made.of(addresses))
    for view in (0, 15, 16, 31, 32, 34):  # one row, of one block
        assert same(look_up(opened, [(KEYS[4], view)]), made.of([(KEYS[4], view)]))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_rows_of_blocks_and_appended_files_come_in_the_order_asked_for(appended, data):
    made, rows = appended
    opened = LabelSet.open(made.folder)
    everything = Rows.concat([made.rows, rows])
    all_places = [*made.addresses(), *APPENDED]
    askable = sorted({*held(made), *APPENDED})
    addresses = data.draw(st.lists(st.sampled_from(askable), max_size=12))
    # what is appended comes after what was made at the same place, and hides it
    order = [len(all_places) - 1 - all_places[::-1].index(address) for address in addresses]
    assert same(look_up(opened, addresses), everything.rows(torch.tensor(order, dtype=torch.int64)))


def test_holds_says_what_lookup_finds(appended):
    made, _ = appended
    opened = LabelSet.open(made.folder)
    for key in [*KEYS, "new.jpg", "bad.jpg", "other"]:
        for view in [-1, *range(37), 99, 100]:
            expected = (key, view) in held(made) or (key, view) in APPENDED
            assert opened.holds(key, view) == expected
            if not expected:
                with pytest.raises(LabelSetError):
                    look_up(opened, [(key, view)])
    assert list(opened.keys()) == KEYS
    assert "new.jpg" not in opened


@pytest.mark.parametrize(
    ("key", "view", "message"),
    [
        (KEYS[0], -1, "no view -1 of 'ant/1.jpg'; its views are 0 to 34"),
        (KEYS[0], 35, "no view 35 of 'ant/1.jpg'; its views are 0 to 34"),
        (LATE, 17, f"no view 17 of '{LATE}'; its views are 0 to 15"),
        (LATE, 34, f"no view 34 of '{LATE}'; its views are 0 to 15"),
        (LATE, 36, f"no view 36 of '{LATE}'; its views are 0 to 15"),
        ("other", 20, "no label for 'other'; it is not an image of this set"),
        ("other", 40, "no label for 'other'; it is not an image of this set"),
        ("bad.jpg", 20, "no label for 'bad.jpg'; it was skipped: the file is empty"),
    ],
)
def test_an_error_names_the_row_that_is_not_there(made, key, view, message):
    opened = LabelSet.open(made.folder)
    for others in ([], [(KEYS[0], 16), (KEYS[3], 0)]):
        with pytest.raises(LabelSetError) as caught:
            look_up(opened, [*others, (key, view)])
        assert message in str(caught.value)
        could_not_be_read = key == LATE and view < opened.num_views
        assert ("could not be read" in str(caught.value)) == could_not_be_read


# --- the first views only -------------------------------------------------------------------------


@pytest.mark.parametrize(("num_views", "num_blocks"), [(16, 1), (32, 2), (35, 3), (None, 3)])
def test_a_set_opened_with_fewer_views_has_the_first_ones(made, num_views, num_blocks):
    opened = LabelSet.open(made.folder, num_views=num_views)
    assert opened.num_views == (num_views or 35)
    assert len(opened.blocks) == num_blocks
    addresses = [address for address in held(made) if address[1] < opened.num_views]
    for labels in (opened, pickle.loads(pickle.dumps(opened))):  # noqa: S301
        assert same(look_up(labels, addresses), made.of(addresses))
        assert not labels.holds(KEYS[0], opened.num_views)
        with pytest.raises(LabelSetError, match=rf"its views are 0 to {opened.num_views - 1}"):
            look_up(labels, [(KEYS[0], opened.num_views)])


@pytest.mark.parametrize("num_views", [-1, 0, 1, 15, 17, 33, 36])
def test_a_number_of_views_where_no_block_ends_is_refused(made, num_views):
    with pytest.raises(
        LabelSetError,
        match=rf"holds 16 or 32 or 35 views of each image, but {num_views} are needed",
    ):
        LabelSet.open(made.folder, num_views=num_views)


def test_blocks_that_are_left_out_are_not_looked_at(tmp_path):
    made = make(tmp_path)
    path = tmp_path / shard_name("train", 0, range(32, 35))
    assert path.name == "train-00000-views-32-34.h5"
    path.unlink()
    with pytest.raises(LabelSetError, match=rf"cannot read shard .*{path.name}"):
        LabelSet.open(tmp_path)
    opened = LabelSet.open(tmp_path, num_views=32)
    assert same(look_up(opened, [(KEYS[0], 31)]), made.of([(KEYS[0], 31)]))


# --- damage ---------------------------------------------------------------------------------------


def blocks_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = manifest["roles"]["train"]["blocks"]
    return blocks


@pytest.mark.parametrize(
    "change",
    [
        lambda blocks: blocks.pop(0),
        lambda blocks: blocks.pop(1),
        lambda blocks: blocks.reverse(),
        lambda blocks: blocks.append(blocks[0]),
        lambda blocks: blocks[1].update(views=[15, 32]),
        lambda blocks: blocks[1].update(views=[17, 32]),
        lambda blocks: blocks[1].update(views=[16, 16]),
    ],
    ids=["no first", "a gap", "backwards", "twice", "overlap", "one lacks", "empty"],
)
def test_blocks_that_do_not_follow_each_other_are_refused(
    tmp_path: Path, change: Callable[[list[dict[str, Any]]], object]
) -> None:
    make(tmp_path)
    manifest = read_manifest(tmp_path)
    change(blocks_of(manifest))
    write_manifest(tmp_path, manifest["plan"], roles=manifest["roles"])
    with pytest.raises(LabelSetError, match=r"manifest\.json has no valid list of shards"):
        LabelSet.open(tmp_path)


def test_a_shard_of_another_block_is_refused(tmp_path):
    make(tmp_path)
    manifest = read_manifest(tmp_path)
    first, second, _ = blocks_of(manifest)
    second["shards"][0] = first["shards"][0]
    write_manifest(tmp_path, manifest["plan"], roles=manifest["roles"])
    with pytest.raises(LabelSetError, match=r"train-00000\.h5 is not the one in the manifest"):
        LabelSet.open(tmp_path)


def test_a_flipped_bit_in_a_later_block_is_named_and_the_others_are_read(tmp_path):
    made = make(tmp_path)
    path = tmp_path / shard_name("train", 0, range(16, 32))
    (block,) = ENCODINGS["rate, logits"].blocks(made.of([(KEYS[0], v) for v in range(16, 32)]), 16)
    data = bytearray(path.read_bytes())
    data[data.index(block) + len(block) - 1] ^= 1
    path.write_bytes(data)
    opened = LabelSet.open(tmp_path)
    with pytest.raises(LabelSetError, match=rf"labels of 'ant/1.jpg' in .*{path.name} .*CRC-32"):
        look_up(opened, [(KEYS[0], 3), (KEYS[0], 20)])
    addresses = [(KEYS[0], 3), (KEYS[0], 33), (KEYS[2], 20)]
    assert same(look_up(opened, addresses), made.of(addresses))


def test_the_manifest_says_which_views_a_block_has(made):
    manifest = json.loads((made.folder / "manifest.json").read_text("utf-8"))
    assert [block["views"] for block in blocks_of(manifest)] == [[0, 16], [16, 32], [32, 35]]
    names = [shard["name"] for shard in blocks_of(manifest)[1]["shards"]]
    assert names == ["train-00000-views-16-31.h5", "train-00001-views-16-31.h5"]
