"""mealv2.label_set: a whole set there and back, every kind of damage, who may write where."""

import json
import multiprocessing
import pickle
import random
import shutil
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cases import mostly_slow
from label_sets import ENCODINGS, KEYS, Made, flip, look_up, make_set, plan_of, same
from mealv2.errors import ConfigError, LabelSetError
from mealv2.label_set import (
    FORMAT_VERSION,
    Encoding,
    Images,
    LabelSet,
    ShardFile,
    claim,
    read_manifest,
    read_plan,
    read_shard,
    shard_name,
    write_manifest,
)
from mealv2.storage.json_format import canonical_json
from mealv2.views import RECIPE, DrawnViews

RATE = ENCODINGS["rate"]
FLOAT16 = ENCODINGS["float16"]
SKIPPED = {"bad/1.jpg": "the file is empty"}


@pytest.fixture
def made(tmp_path) -> Made:
    """A set of three shards, one of them without images."""
    return make_set(tmp_path / "set", RATE, skipped=SKIPPED)


@pytest.fixture
def folder(made) -> Path:
    return made.folder


# --- lookups --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODINGS)
def test_every_label_is_found_by_key_and_view(tmp_path, name):
    encoding = ENCODINGS[name]
    made = make_set(tmp_path, encoding, skipped=SKIPPED)
    opened = LabelSet.open(tmp_path)
    assert opened.encoding == encoding
    assert list(opened.keys()) == KEYS
    assert len(opened) == 5
    assert KEYS[1] in opened
    assert "other" not in opened
    assert 3 not in opened
    shape = (opened.num_classes, opened.num_views, opened.img_size)
    assert shape == (encoding.num_classes, 4, 64)

    addresses = made.addresses() * 2
    random.Random(0).shuffle(addresses)
    assert same(look_up(opened, addresses), made.of(addresses))
    for address in addresses[:5]:  # and one at a time
        assert same(look_up(opened, [address]), made.of([address]))


@pytest.mark.parametrize("name", ENCODINGS)
def test_soft_labels_and_lookup_say_the_same_as_rows(tmp_path, name):
    made = make_set(tmp_path, ENCODINGS[name])
    opened = LabelSet.open(tmp_path)
    wanted = [KEYS[2], KEYS[0], KEYS[2]], [1, 3, 0]
    labels = opened.soft_labels(*wanted)
    dense = [made.dense_NVC[2, 1], made.dense_NVC[0, 3], made.dense_NVC[2, 0]]
    assert np.array_equal(labels.to_dense().numpy(), dense)
    found = opened.lookup(np.array(wanted[0]), np.array(wanted[1]))
    assert found.indices_NK.dtype == np.int64
    assert found.probs_NK.dtype == np.float32
    for ids, probs, row in zip(*found, dense, strict=True):
        kept = ids[ids >= 0]
        assert len(set(kept.tolist())) == len(kept)
        assert not probs[ids < 0].any(), "what fills a row has no mass"
        np.testing.assert_allclose(probs[ids >= 0], row[kept], rtol=2e-3)
        if opened.encoding.is_dense:
            assert kept.tolist() == list(range(6))
        else:
            assert (np.diff(probs) <= 0).all(), "most likely first"


@pytest.mark.parametrize("name", ["rate", "float16", "dense float16"])
def test_what_lookup_returns_is_the_callers_to_change(tmp_path, name):
    make_set(tmp_path, ENCODINGS[name])
    opened = LabelSet.open(tmp_path)
    wanted = [KEYS[0], KEYS[3]], [0, 1]
    before = opened.lookup(*wanted)
    rest = before.indices_NK[1].copy()
    before.probs_NK[:] = 7
    before.indices_NK[0] = 7
    assert np.array_equal(before.indices_NK[1], rest), "rows are apart"
    after = opened.lookup(*wanted)
    assert not np.array_equal(after.probs_NK, before.probs_NK)
    assert not np.array_equal(after.indices_NK, before.indices_NK)


@pytest.mark.parametrize("name", ENCODINGS)
def test_a_lookup_of_nothing_is_empty(tmp_path, name):
    encoding = ENCODINGS[name]
    for folder, keys, ends in (("some", KEYS, ()), ("none", [], ()), ("blocks", KEYS, (2, 4))):
        make_set(tmp_path / folder, encoding, keys, block_ends=ends, skipped=SKIPPED)
        opened = LabelSet.open(tmp_path / folder)
        assert opened.soft_labels([], []).to_dense().shape == (0, encoding.num_classes)
        assert (opened.rows([], []).logits is None) == (not encoding.logits)
        found = opened.lookup([], [])
        assert len(found.indices_NK) == len(found.probs_NK) == 0
        assert opened.has_labels([]).shape == (0,)


def test_a_set_without_any_image_knows_none(tmp_path):
    make_set(tmp_path, RATE, [], skipped=SKIPPED)
    opened = LabelSet.open(tmp_path)
    assert (len(opened), list(opened.keys())) == (0, [])
    assert KEYS[0] not in opened
    with pytest.raises(LabelSetError, match="it is not an image of this set"):
        opened.lookup(KEYS[:1], [0])


def test_has_labels_says_which_of_many_keys_are_there(tmp_path):
    keys = [f"n{n:05d}/ü{n}.jpg" for n in range(3000)]
    make_set(tmp_path, Encoding(2, topk=1), keys, 1, shard_size=700)
    opened = LabelSet.open(tmp_path)
    order = random.Random(0).sample(range(6000), 6000)
    asked = [keys[n] if n < 3000 else f"other/{n}.jpg" for n in order]
    found = opened.has_labels(asked)
    assert found.dtype == np.bool_
    assert found.tolist() == [n < 3000 for n in order]
    there = [key for key, has in zip(asked, found, strict=True) if has]
    assert len(opened.soft_labels(there, [0] * 3000)) == 3000


ODD = [
    "e\u0301", "\u00e9",  # one letter to a reader, two keys
    "A", "a", " a", "a ", "", "\0", "a\0", "../a", "/a", "a//b",
    "\u202egpj.a", "\U0010ffff", "\ufeffa", "\n",
]  # fmt: skip


def test_odd_keys_are_told_apart(tmp_path):
    made = make_set(tmp_path, FLOAT16, ODD, 2)
    opened = LabelSet.open(tmp_path)
    assert list(opened.keys()) == ODD
    assert same(look_up(opened, made.addresses()), made.rows)
    for near in ("e", "b", "\0\0", "a/b", "ﬀ"):
        assert near not in opened


def test_a_key_that_is_no_utf8_is_not_there(made):
    opened = LabelSet.open(made.folder)
    for key in ("\udcff", "\ud800", "ant/1.jpg\udc80"):
        assert key not in opened
        assert opened.has_labels([key, KEYS[0]]).tolist() == [False, True]
        assert not opened.holds(key, 0)
        with pytest.raises(LabelSetError, match="it is not an image of this set"):
            opened.lookup([key], [0])


@pytest.mark.parametrize("bits", [0, 1, 3])
def test_keys_with_the_same_hash_are_told_apart(tmp_path, monkeypatch, bits):
    def few(keys: Sequence[bytes]) -> np.ndarray:
        return np.array([sum(key) & ((1 << bits) - 1) for key in keys], "<u8")

    for module in ("index", "shard"):
        monkeypatch.setattr(f"mealv2.label_set.{module}.key_hashes", few)
    keys = [f"{n}.jpg" for n in range(40)]
    made = make_set(tmp_path, RATE, keys, 2, shard_size=7)
    hashes = ShardFile(tmp_path / shard_name("train", 0)).column("key_hashes")
    assert len(set(hashes.tolist())) <= 1 << bits, "they do collide"
    opened = LabelSet.open(tmp_path)
    addresses = random.Random(0).sample(made.addresses(), 80)
    assert same(look_up(opened, addresses), made.of(addresses))
    assert not opened.has_labels([f"{n}.png" for n in range(40)]).any()


def test_lookup_names_the_key_that_is_not_there(folder):
    with pytest.raises(LabelSetError, match=r"no label for 'no/such\.jpg'; it is not an image"):
        LabelSet.open(folder).lookup([KEYS[0], "no/such.jpg"], [0, 0])


def test_lookup_of_a_skipped_image_says_why_it_was_skipped(folder):
    opened = LabelSet.open(folder)
    assert opened.skipped == SKIPPED
    assert "bad/1.jpg" not in opened
    with pytest.raises(LabelSetError, match=r"'bad/1\.jpg'; it was skipped: the file is empty"):
        opened.lookup(["bad/1.jpg"], [0])


@pytest.mark.parametrize("view", [-1, 4, 2**40, 2**63, 2**64 - 1, -(2**70)])
def test_lookup_of_a_view_out_of_range_says_how_many_there_are(folder, view):
    opened = LabelSet.open(folder)
    assert not opened.holds(KEYS[0], view)
    for wanted in ([view], [0, view]):
        keys = KEYS[1:2] * (len(wanted) - 1) + KEYS[:1]
        with pytest.raises(
            LabelSetError, match=rf"no view {view} of 'ant/1.jpg'; its views are 0 to 3"
        ):
            opened.lookup(keys, wanted)


def test_holds_says_which_views_are_there(folder):
    opened = LabelSet.open(folder)
    assert [opened.holds(KEYS[2], view) for view in range(-1, 6)] == [
        False,
        *[True] * 4,
        *[False] * 2,
    ]
    assert not opened.holds("bad/1.jpg", 0)


def test_keys_and_views_of_different_number_raise_value_error(folder):
    with pytest.raises(ValueError, match="2 keys and 1 views"):
        LabelSet.open(folder).lookup(KEYS[:2], [0])


def test_a_role_that_is_not_there_is_named(folder):
    with pytest.raises(LabelSetError, match=r"no val labels \(it has train\)"):
        LabelSet.open(folder, split="val")


def test_the_views_are_those_of_the_plans_recipe_and_seed(folder, tmp_path):
    assert LabelSet.open(folder).views() == DrawnViews(0)
    recipe = plan_of(RATE)["roles"]["train"]["views"]
    for n, other in enumerate([{**recipe, "version": 2}, {**recipe, "seed": None}, {}]):
        splits = {"train": {"num_views": 4, "views": other}}
        make_set(tmp_path / str(n), RATE, roles=splits)
        with pytest.raises(LabelSetError, match="which this mealv2 does not know"):
            LabelSet.open(tmp_path / str(n)).views()


def test_what_is_known_of_images_is_in_the_shards(tmp_path):
    images = Images(np.arange(10).reshape(5, 2) + 70_000, np.arange(5) + 2**33, np.arange(5) % 3)
    make_set(tmp_path, RATE, images=images)
    ((views, files),) = LabelSet.open(tmp_path).blocks
    assert views == range(4)
    for name in ("sizes_N2", "file_bytes_N", "classes_N"):
        found = np.concatenate([getattr(file.images, name) for file in files])
        assert np.array_equal(found, getattr(images, name))


# --- other processes ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", mostly_slow(["spawn", "forkserver", "fork"]))
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_an_open_set_answers_in_another_process(made, method):
    opened = LabelSet.open(made.folder)
    wanted = KEYS, [0, 1, 2, 3, 0]
    here = opened.lookup(*wanted)  # its memory maps are open now
    with multiprocessing.get_context(method).Pool(1) as pool:
        there = pool.apply(opened.lookup, wanted)
    assert all(np.array_equal(a, b) for a, b in zip(here, there, strict=True))


def test_a_pickled_set_holds_no_labels_and_answers_the_same(made):
    opened = LabelSet.open(made.folder)
    before = len(pickle.dumps(opened))
    expected = look_up(opened, made.addresses())
    data = pickle.dumps(opened)
    assert len(data) == before < 1000
    assert same(look_up(pickle.loads(data), made.addresses()), expected)  # noqa: S301


@pytest.mark.parametrize("name", ENCODINGS)
def test_looked_up_rows_can_be_pickled_and_moved(tmp_path, name):
    made = make_set(tmp_path, ENCODINGS[name])
    rows = look_up(LabelSet.open(tmp_path), made.addresses())
    again = pickle.loads(pickle.dumps(rows))  # noqa: S301
    assert same(again, rows)
    assert same(rows.to(torch.device("cpu")), rows)
    assert same(again.rows(torch.arange(20)), rows)
    for tensor in vars(rows.to(torch.device("meta")).labels).values():
        assert not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta"


# --- damage ---------------------------------------------------------------------------------------


def test_no_flipped_bit_in_a_shard_ever_gives_wrong_labels(tmp_path):
    made = make_set(tmp_path, RATE, num_views=100)  # most of the file is labels
    path = tmp_path / shard_name("train", 0)
    whole, shard = path.read_bytes(), read_shard(path)
    begin = whole.index(b"".join(shard.blocks))
    of_block = np.repeat(np.arange(3), [*map(len, shard.blocks)])
    elsewhere, views = made.keys[3:], [0] * 2
    expected = made.of([(key, 0) for key in elsewhere])
    outcomes = {"open": 0, "lookup": 0, "HDF5's own": 0}
    for bit in random.Random(20200923).sample(range(8 * len(whole)), 300):
        flip(path, whole, bit)
        try:
            opened = LabelSet.open(tmp_path)
        except LabelSetError as error:
            outcome, reason = "open", str(error)
        else:
            outcome, reason = "HDF5's own", path.name
            at = bit // 8 - begin
            if 0 <= at < len(of_block):  # a label: named by its key, and the others are read
                outcome, key = "lookup", shard.keys[of_block[at]]
                with pytest.raises(LabelSetError, match="CRC-32") as caught:
                    opened.lookup([key], [random.Random(bit).randrange(100)])
                reason = str(caught.value)
                assert f"the labels of {key!r} in {path} are damaged" in reason
            rest = [
                address for address in made.addresses() if outcome != "lookup" or address[0] != key
            ]
            assert same(look_up(opened, rest), made.of(rest))
            assert same(opened.rows(elsewhere, views), expected)
        outcomes[outcome] += 1
        assert path.name in reason
        assert "\n" not in reason
    assert all(outcomes.values()), outcomes
    path.write_bytes(whole)
    assert same(look_up(LabelSet.open(tmp_path), made.addresses()), made.rows)


def test_labels_in_each_others_place_are_found(folder):
    """The CRC of a block is of its key too."""
    path = folder / shard_name("train", 0)
    shard, data = read_shard(path), path.read_bytes()
    sizes = [*map(len, shard.blocks)]
    begin = data.index(b"".join(shard.blocks))
    path.write_bytes(data[:begin] + shard.blocks[1] + data[begin + sizes[1] :])
    with pytest.raises(LabelSetError, match=r"labels of 'ant/1\.jpg' in .* \(CRC-32\)"):
        LabelSet.open(folder).lookup(KEYS[:1], [0])


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_missing_or_truncated_shard_is_named_when_the_set_is_opened(folder, number):
    path = folder / shard_name("train", number)
    data = path.read_bytes()
    again = "; run the same `mealv2 precompute` again"
    path.write_bytes(data[:-1])
    with pytest.raises(
        LabelSetError, match=rf"{path.name} is damaged: it has .* bytes of.*{again}"
    ):
        LabelSet.open(folder)
    path.unlink()
    with pytest.raises(
        LabelSetError, match=rf"cannot read shard .*{path.name}: No such file.*{again}"
    ):
        LabelSet.open(folder)
    path.mkdir()
    with pytest.raises(LabelSetError, match=rf"cannot read shard .*{path.name}: Is a dir"):
        LabelSet.open(folder)


def test_shards_in_each_others_place_are_refused(folder):
    first, last = (folder / shard_name("train", n) for n in (0, 2))
    data = first.read_bytes()
    first.write_bytes(last.read_bytes())
    last.write_bytes(data)
    with pytest.raises(LabelSetError, match="is not the one in the manifest"):
        LabelSet.open(folder)


def test_the_manifest_of_another_set_is_refused(folder, tmp_path):
    make_set(tmp_path / "other", RATE, seed=100)
    shutil.copy(tmp_path / "other" / "manifest.json", folder)
    with pytest.raises(LabelSetError, match="is not the one in the manifest"):
        LabelSet.open(folder)


def test_shards_of_another_plan_are_refused_though_the_manifest_lists_them(folder):
    manifest = read_manifest(folder)
    write_manifest(folder, plan_of(RATE, img_size=65), roles=manifest["roles"])
    with pytest.raises(LabelSetError, match="is not the one in the manifest"):
        LabelSet.open(folder)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[1, 2]", b"\xff\xfe", b"null", b'{"plan": 3}', b"{}", b"[" * 100_000]
)
@pytest.mark.parametrize("name", ["manifest.json", "plan.json"])
def test_a_damaged_json_file_is_refused_by_name(folder, name, data):
    (folder / name).write_bytes(data)
    with pytest.raises(LabelSetError, match=rf"{name} (is damaged|does not describe)"):
        (LabelSet.open if name == "manifest.json" else read_plan)(folder)


@pytest.mark.parametrize("name", ["manifest.json", "plan.json"])
def test_a_folder_in_the_place_of_a_json_file_is_named(folder, name):
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(LabelSetError, match=rf"{name} is a folder"):
        (LabelSet.open if name == "manifest.json" else read_plan)(folder)


def test_no_flipped_bit_in_a_manifest_goes_unseen(folder):
    path = folder / "manifest.json"
    whole = path.read_bytes()
    for bit in random.Random(1).sample(range(8 * len(whole)), 300):
        flip(path, whole, bit)
        with pytest.raises(LabelSetError, match=r"manifest\.json"):
            read_manifest(folder)


def test_the_plan_in_the_place_of_the_manifest_is_refused(folder):
    shutil.copy(folder / "plan.json", folder / "manifest.json")
    with pytest.raises(LabelSetError, match=r"manifest\.json is damaged"):
        LabelSet.open(folder)


def change_manifest(folder: Path, **changes: Any) -> None:
    """Change a manifest by hand: its own hash is not right any more."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    (folder / "manifest.json").write_text(canonical_json({**manifest, **changes}), encoding="utf-8")


def forge_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest, all of its hashes right."""
    manifest = read_manifest(folder)
    del manifest["manifest_sha256"], manifest["plan_sha256"]
    change(manifest)
    write_manifest(folder, manifest.pop("plan"), **manifest)


@pytest.mark.parametrize(
    "changes",
    [
        {"plan": plan_of(RATE, img_size=65)},
        {"plan_sha256": "00" * 32},
        {"roles": None},
        {"plan_sha256": None},
        {"manifest_sha256": "00" * 32},
        {"manifest_sha256": None},
        {"manifest_sha256": ""},
        {"more": 1},
    ],
)
def test_a_manifest_changed_by_hand_is_refused(folder, changes):
    change_manifest(folder, **changes)
    with pytest.raises(LabelSetError, match=r"manifest\.json is damaged: .* own SHA-256"):
        LabelSet.open(folder)


def _block(folder: dict[str, Any]) -> dict[str, Any]:
    return folder["roles"]["train"]["blocks"][0]


def _shard(folder: dict[str, Any]) -> dict[str, Any]:
    return _block(folder)["shards"][0]


BROKEN: dict[str, Callable[[dict[str, Any]], object]] = {
    "no roles": lambda m: m.pop("roles"),
    "roles null": lambda m: m.update(roles=None),
    "role null": lambda m: m["roles"].update(train=None),
    "role empty": lambda m: m["roles"].update(train={}),
    "role of format 1": lambda m: m["roles"]["train"].update(m["roles"]["train"].pop("blocks")[0]),
    "no blocks": lambda m: m["roles"]["train"].update(blocks=[]),
    "blocks null": lambda m: m["roles"]["train"].update(blocks=None),
    "block null": lambda m: m["roles"]["train"].update(blocks=[None]),
    "no skipped": lambda m: m["roles"]["train"].pop("skipped"),
    "no views": lambda m: _block(m).pop("views"),
    "one view": lambda m: _block(m).update(views=[0]),
    "text for views": lambda m: _block(m).update(views=["0", "4"]),
    "negative views": lambda m: _block(m).update(views=[-4, 0]),
    "views backwards": lambda m: _block(m).update(views=[4, 0]),
    "views from 1": lambda m: _block(m).update(views=[1, 4]),
    "no view": lambda m: _block(m).update(views=[0, 0]),
    "views beyond all": lambda m: _block(m).update(views=[0, 10**40]),
    "no shards": lambda m: _block(m).pop("shards"),
    "shard empty": lambda m: _block(m).update(shards=[{}]),
    "shard without a name": lambda m: _shard(m).pop("name"),
    "a name that is a number": lambda m: _shard(m).update(name=7),
    "a path": lambda m: _shard(m).update(name="../other/train-00000.h5"),
    "an absolute path": lambda m: _shard(m).update(name="/etc/passwd"),
    "text for bytes": lambda m: _shard(m).update(bytes="10"),
    "no sha256": lambda m: _shard(m).pop("sha256"),
    "no classes": lambda m: m["plan"].pop("classes"),
    "numbers for classes": lambda m: m["plan"].update(classes=[1, 2]),
    "no img_size": lambda m: m["plan"].pop("img_size"),
    "no roles in the plan": lambda m: m["plan"].pop("roles"),
    "no num_views": lambda m: m["plan"]["roles"]["train"].pop("num_views"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_manifest_that_no_writer_writes_is_refused(folder, what):
    forge_manifest(folder, BROKEN[what])
    with pytest.raises(LabelSetError, match=r"manifest\.json has no valid (plan|list of shards)"):
        LabelSet.open(folder)


UNLIKE: dict[str, Callable[[dict[str, Any]], object]] = {
    "no head_sha256": lambda m: _shard(m).pop("head_sha256"),
    "another head_sha256": lambda m: _shard(m).update(head_sha256="00" * 32),
    "null for head_sha256": lambda m: _shard(m).update(head_sha256=None),
    "more views": lambda m: _block(m).update(views=[0, 5]),
    "fewer views": lambda m: _block(m).update(views=[0, 3]),
    "no name": lambda m: _shard(m).update(name=""),
    "the folder above": lambda m: _shard(m).update(name=".."),
    "a name with a null": lambda m: _shard(m).update(name="a\0b"),
    "the plan": lambda m: _shard(m).update(name="plan.json"),
}


@pytest.mark.parametrize("what", UNLIKE)
def test_a_manifest_that_is_unlike_the_shards_is_refused(folder, what):
    forge_manifest(folder, UNLIKE[what])
    with pytest.raises(LabelSetError, match="shard"):
        LabelSet.open(folder)


@pytest.mark.parametrize("version", [FORMAT_VERSION - 1, FORMAT_VERSION + 1, None])
def test_another_format_version_is_refused_with_both_versions(folder, version):
    change_manifest(folder, plan=plan_of(RATE, format_version=version))
    with pytest.raises(LabelSetError, match="own SHA-256"):
        read_manifest(folder)
    write_manifest(folder, plan_of(RATE, format_version=version), roles={})
    with pytest.raises(
        LabelSetError, match=rf"format version {version}; this mealv2 reads {FORMAT_VERSION};"
    ):
        read_manifest(folder)


def test_an_unfinished_set_and_no_set_are_told_apart(folder, tmp_path):
    (folder / "manifest.json").unlink()
    with pytest.raises(LabelSetError, match="not finished; run the same `mealv2 precompute`"):
        LabelSet.open(folder)
    for nowhere in (tmp_path / "nowhere", folder / "plan.json"):
        with pytest.raises(LabelSetError, match="not a label set"):
            LabelSet.open(nowhere)


def test_two_manifests_of_the_same_set_have_equal_bytes_and_a_hash_of_their_own(folder):
    path = folder / "manifest.json"
    before = path.read_bytes()
    forge_manifest(folder, lambda manifest: None)
    assert path.read_bytes() == before
    own = json.loads(before)["manifest_sha256"]
    blank = before.replace(own.encode(), b"0" * 64)
    assert before.count(own.encode()) == 1
    assert sha256(blank).hexdigest() == own


# --- claiming a folder ----------------------------------------------------------------------------


def test_a_folder_is_claimed_once_and_again_by_the_same_plan(tmp_path):
    plan = plan_of(RATE)
    claim(tmp_path / "deep" / "set", plan)
    before = (tmp_path / "deep" / "set" / "plan.json").read_bytes()
    claim(tmp_path / "deep" / "set", plan)
    assert (tmp_path / "deep" / "set" / "plan.json").read_bytes() == before
    assert read_plan(tmp_path / "deep" / "set") == plan


TEACHERS = plan_of(RATE)["teachers"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"img_size": 96}, "img_size is 64 in the set and 96 in this run"),
        ({"labels": FLOAT16.plan()}, "labels.form is curve in the set and float16 in this run"),
        (
            {"roles": {"train": {"num_views": 4, "views": {**RECIPE, "seed": 1}}}},
            "roles.train.views.seed is 0",
        ),
        ({"teachers": TEACHERS * 2}, "teachers is 1 entries in the set and 2 entries in this run"),
        (
            {"teachers": [{**TEACHERS[0], "model": "resnet18.a1_in1k"}]},
            r"teachers\[0\].model is resnet50.a1_in1k in the set and resnet18.a1_in1k in this run",
        ),
        ({"tail": "uniform"}, "tail is None in the set and uniform in this run"),
    ],
)
def test_another_plan_is_refused_naming_the_difference(tmp_path, changes, named):
    claim(tmp_path, plan_of(RATE))
    before = (tmp_path / "plan.json").read_bytes()
    with pytest.raises(LabelSetError, match=f"another label set: {named}") as caught:
        claim(tmp_path, plan_of(RATE, **changes))
    assert caught.value.exit_code == 3
    assert (tmp_path / "plan.json").read_bytes() == before


def test_many_differences_are_counted(tmp_path):
    claim(tmp_path, plan_of(RATE))
    changes = dict.fromkeys("abcde", 1)
    with pytest.raises(
        LabelSetError, match=r"a is None .*b is .*c is .*; and 2 more\. Use another"
    ):
        claim(tmp_path, plan_of(RATE, **changes))


def test_a_folder_of_something_else_is_refused_and_stays_as_it_is(tmp_path):
    (tmp_path / "thesis.tex").write_text("all my work")
    with pytest.raises(ConfigError, match=r"not a label set and not empty \(thesis\.tex"):
        claim(tmp_path, plan_of(RATE))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_temporary_file_left_by_a_killed_run_does_not_hinder_a_claim(tmp_path):
    (tmp_path / ".tmp-plan.json-host-1-00").write_bytes(b"{")
    claim(tmp_path, plan_of(RATE))
    assert read_plan(tmp_path) == plan_of(RATE)


def test_a_damaged_plan_that_is_all_there_is_is_written_anew(tmp_path):
    (tmp_path / "plan.json").write_bytes(b"{")
    claim(tmp_path, plan_of(RATE))
    assert read_plan(tmp_path) == plan_of(RATE)


@pytest.mark.parametrize(
    "changes",
    [
        {"roles": {"train": 0.5}},
        {"roles": {"train": {"num_views": 10**30}}},
        {"roles": {"train": {"num_views": 2, "shard_sizes": [0]}}},
        {"shard_size": "8"},
        {"teachers": [4]},
        {"classes": 3},
        {"derived": "labels merge"},
        {"derived": {"how": "x", "from": [], "command": []}},
    ],
)
def test_a_plan_that_no_writer_writes_is_refused(tmp_path, changes):
    (tmp_path / "plan.json").write_text(canonical_json({**plan_of(RATE), **changes}))
    with pytest.raises(LabelSetError, match=r"plan\.json is damaged: .*; restore it"):
        read_plan(tmp_path)


# --- many shards ----------------------------------------------------------------------------------


def test_a_set_of_many_shards_needs_no_descriptor_for_each(tmp_path):
    resource = pytest.importorskip("resource")
    keys = [f"{n}.jpg" for n in range(36)]
    made = make_set(tmp_path, FLOAT16, keys, 2, shard_size=1)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = len(list(Path("/proc/self/fd").iterdir()))
    # a quarter of the limit is left, whatever other tests keep open
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use * 4 // 3 + 8, before[1]))
    try:
        labels = LabelSet.open(tmp_path)
        assert same(look_up(labels, made.addresses()), made.rows)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert len(labels.blocks[0][1]) == 36
