"""mealv2.label_set: round trips, every kind of damage, who may write where."""

import ast
import dataclasses
import json
import multiprocessing
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import mealv2
from mealv2.errors import ConfigError, LabelSetError
from mealv2.files import canonical_json, json_sha256
from mealv2.label_set import (
    FORMAT,
    FORMAT_VERSION,
    LabelSet,
    Shard,
    claim,
    class_id_type,
    describe_file,
    num_label_bytes,
    read_manifest,
    read_plan,
    read_shard,
    shard_name,
    shard_ranges,
    write_manifest,
    write_shard,
)

KEYS = ["ant/1.jpg", "größe/ü ñ.png", "猫/写真🐈.webp", "z/with\nnewline.png", "zz/" + "x" * 300]


def labels_of(
    keys: list[str], *, num_views: int, k: int, num_classes: int, dtype: str = "<f2", seed: int = 0
) -> tuple[np.ndarray | None, np.ndarray]:
    """Return (indices or None when dense, probs): random labels of every view of every key."""
    rng = np.random.default_rng(seed)
    shape = (len(keys), num_views, k)
    probs = np.sort(rng.random(shape))[..., ::-1].astype(dtype)
    if k == num_classes:
        return None, probs
    rows = [rng.permutation(num_classes)[:k] for _ in range(len(keys) * num_views)]
    ids = np.array(rows, dtype=np.int64).reshape(shape)
    return ids.astype(class_id_type(num_classes)), probs


def shard_of(
    keys: list[str], *, number: int = 0, plan_sha256: str = "ab" * 32, **shape: Any
) -> Shard:
    named = {name: shape.pop(name) for name in ("skipped", "counts") if name in shape}
    indices, probs = labels_of(keys, **{"num_views": 3, "k": 4, "num_classes": 1000, **shape})
    rest = None if indices is None else probs[..., 0] / 8
    return Shard(plan_sha256, "train", number, list(keys), probs, indices, rest, **named)


def same(a: Shard, b: Shard) -> bool:
    """Whether two shards say the same, types of numbers included."""
    arrays = ((a.indices, b.indices), (a.probs, b.probs), (a.rest, b.rest))
    equal = all(
        x is y is None or (x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes())
        for x, y in arrays
    )
    names = ("plan_sha256", "role", "number", "keys", "skipped", "counts")
    return equal and all(getattr(a, name) == getattr(b, name) for name in names)


# --- one shard ------------------------------------------------------------------------------------

SHARDS = {
    "uint16 ids": shard_of(KEYS),
    "uint32 ids": shard_of(KEYS, num_classes=70_000),
    "float32": shard_of(KEYS, dtype="<f4"),
    "dense": shard_of(KEYS, k=7, num_classes=7, dtype="<f4"),
    "skipped and counted": shard_of(
        KEYS[:2],
        skipped={"猫/broken.jpg": "OSError: truncated “file”"},
        counts={"top1": [1, 2, 2], "top5": [2, 2, 2]},
    ),
    "no images": shard_of([], skipped={"a.jpg": "the file is empty"}),
    "no images, dense": shard_of([], k=7, num_classes=7),
    "one label": shard_of(["a"], num_views=1, k=1),
}


@pytest.mark.parametrize("name", SHARDS)
def test_a_shard_is_read_back_as_it_was_written(tmp_path, name):
    path = tmp_path / "train-00000.h5"
    assert write_shard(path, SHARDS[name]) is True
    assert same(read_shard(path), SHARDS[name])


def test_ids_have_the_smallest_type_that_holds_every_class():
    types = {n: class_id_type(n) for n in (2, 65_536, 65_537)}
    assert types == {2: np.dtype("<u2"), 65_536: np.dtype("<u2"), 65_537: np.dtype("<u4")}
    assert [num_label_bytes(5, n, "float16") for n in (5, 1000, 70_000)] == [10, 22, 32]


@pytest.mark.parametrize("name", SHARDS)
def test_a_shard_written_twice_has_equal_bytes(tmp_path, name):
    for file in "ab":
        write_shard(tmp_path / file, SHARDS[name])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("name", SHARDS)
def test_a_shard_bears_no_time_that_would_make_the_next_one_differ(tmp_path, name):
    write_shard(tmp_path / "a.h5", SHARDS[name])
    with h5py.File(tmp_path / "a.h5") as file:
        for thing in (file, *file.values()):
            info = h5py.h5o.get_info(thing.id)
            assert (info.atime, info.btime, info.ctime, info.mtime) == (0, 0, 0, 0)


def test_the_first_whole_shard_stays(tmp_path):
    path = tmp_path / "train-00000.h5"
    assert write_shard(path, SHARDS["uint16 ids"]) is True
    assert write_shard(path, SHARDS["float32"]) is False
    assert same(read_shard(path), SHARDS["uint16 ids"])
    assert write_shard(path, SHARDS["float32"], replace=True) is True
    assert same(read_shard(path), SHARDS["float32"])


def test_ids_without_the_rest_are_never_written_as_a_dense_label(tmp_path):
    torn = dataclasses.replace(SHARDS["uint16 ids"], rest=None)
    try:
        write_shard(tmp_path / "a.h5", torn)
    except ValueError:
        return
    assert read_shard(tmp_path / "a.h5").indices is not None


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.999])
def test_a_truncated_shard_is_refused_by_name(tmp_path, kept):
    path = tmp_path / "train-00007.h5"
    write_shard(path, SHARDS["uint16 ids"])
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept) if isinstance(kept, float) else kept])
    with pytest.raises(LabelSetError, match=r"train-00007\.h5 is damaged") as caught:
        read_shard(path)
    assert caught.value.exit_code == 3


def test_a_missing_shard_raises_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_shard(tmp_path / "train-00000.h5")


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "a.h5").write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(LabelSetError, match=r"a\.h5 is damaged"):
        read_shard(tmp_path / "a.h5")


@pytest.mark.parametrize(
    ("num_images", "shard_size", "expected"),
    [(0, 4, []), (3, 4, [(0, 3)]), (4, 4, [(0, 4)]), (9, 4, [(0, 4), (4, 8), (8, 9)])],
)
def test_shards_hold_every_image_once_and_in_order(num_images, shard_size, expected):
    assert [(r.start, r.stop) for r in shard_ranges(num_images, shard_size)] == expected


# --- a whole set ----------------------------------------------------------------------------------


def plan_of(
    *, k: int = 3, num_classes: int = 50, num_views: int = 4, **changes: Any
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "classes": [f"class {n}" for n in range(num_classes)],
        "teachers": [{"model": "resnet50.a1_in1k", "weights_sha256": "00" * 32}],
        "img_size": 64,
        "topk": k,
        "roles": {"train": {"num_views": num_views, "views": {"seed": 0}}},
        **changes,
    }


def make_set(folder: Path, plan: dict[str, Any], *, seed: int = 0) -> list[Shard]:
    """Write a finished set of three shards, one of them without images; return the shards."""
    claim(folder, plan)
    shape = {
        "num_views": plan["roles"]["train"]["num_views"],
        "k": plan["topk"],
        "num_classes": len(plan["classes"]),
    }
    skipped = {"bad/1.jpg": "the file is empty"}
    shards = [
        shard_of(keys, number=n, plan_sha256=json_sha256(plan), seed=seed + n, skipped=why, **shape)
        for n, (keys, why) in enumerate([(KEYS[:3], {}), ([], skipped), (KEYS[3:], {})])
    ]
    for n, shard in enumerate(shards):
        write_shard(folder / shard_name("train", n), shard)
    listed = [
        describe_file(folder / shard_name("train", n), num_images=len(shard.keys))
        for n, shard in enumerate(shards)
    ]
    write_manifest(folder, plan, roles={"train": {"shards": listed, "skipped": skipped}})
    return shards


@pytest.fixture
def folder(tmp_path) -> Path:
    make_set(tmp_path / "set", plan_of())
    return tmp_path / "set"


@pytest.mark.parametrize(("k", "num_classes"), [(3, 50), (3, 70_000), (6, 6)])
def test_every_label_is_found_by_key_and_view(tmp_path, k, num_classes):
    shards = make_set(tmp_path, plan_of(k=k, num_classes=num_classes))
    opened = LabelSet.open(tmp_path)
    assert list(opened.keys()) == KEYS
    assert len(opened) == 5
    assert KEYS[1] in opened
    assert "other" not in opened
    assert (opened.num_classes, opened.num_views, opened.img_size) == (num_classes, 4, 64)

    places = [(s, row, view) for s in shards for row in range(len(s.keys)) for view in range(4)]
    random.Random(0).shuffle(places)
    wanted = [s.keys[row] for s, row, _ in places], [view for _, _, view in places]
    found, labels = opened.lookup(*wanted), opened.soft_labels(*wanted)
    assert np.array_equal(labels.indices_NK, found.indices_NK)
    assert np.array_equal(labels.probs_NK, found.probs_NK)
    rest = [0 if s.rest is None else s.rest[row, view] for s, row, view in places]
    assert np.array_equal(labels.rest_N, np.array(rest, dtype=np.float32))
    assert labels.num_classes == num_classes
    assert found.indices_NK.dtype == np.int64
    assert found.probs_NK.dtype == np.float32
    for (shard, row, view), indices, probs in zip(places, *found, strict=True):
        expected = np.arange(k) if shard.indices is None else shard.indices[row, view]
        assert np.array_equal(indices, expected)
        assert np.array_equal(probs, shard.probs[row, view].astype(np.float32))


def test_what_lookup_returns_is_the_callers_to_change(folder):
    opened = LabelSet.open(folder)
    before = opened.lookup(KEYS[:1], [0])
    before.probs_NK[:] = 7
    before.indices_NK[:] = 7
    after = opened.lookup(KEYS[:1], [0])
    assert not np.array_equal(after.probs_NK, before.probs_NK)
    assert not np.array_equal(after.indices_NK, before.indices_NK)


def test_a_lookup_of_nothing_is_empty(folder):
    found = LabelSet.open(folder).lookup([], [])
    assert found.indices_NK.shape == found.probs_NK.shape == (0, 3)


def test_lookup_names_the_key_that_is_not_there(folder):
    with pytest.raises(LabelSetError, match=r"no label for 'no/such\.jpg'; it is not an image"):
        LabelSet.open(folder).lookup([KEYS[0], "no/such.jpg"], [0, 0])


def test_lookup_of_a_skipped_image_says_why_it_was_skipped(folder):
    opened = LabelSet.open(folder)
    assert opened.skipped == {"bad/1.jpg": "the file is empty"}
    assert "bad/1.jpg" not in opened
    with pytest.raises(LabelSetError, match=r"'bad/1\.jpg'; it was skipped: the file is empty"):
        opened.lookup(["bad/1.jpg"], [0])


@pytest.mark.parametrize("view", [-1, 4, 2**40])
def test_lookup_of_a_view_out_of_range_says_how_many_there_are(folder, view):
    with pytest.raises(LabelSetError, match=rf"no view {view} of 'ant/1.jpg'; it holds 4, from 0"):
        LabelSet.open(folder).lookup([KEYS[0]], [view])


def test_keys_and_views_of_different_number_raise_value_error(folder):
    with pytest.raises(ValueError, match="zip"):
        LabelSet.open(folder).lookup(KEYS[:2], [0])


def test_a_role_that_is_not_there_is_named(folder):
    with pytest.raises(LabelSetError, match=r"no val labels \(it has train\)"):
        LabelSet.open(folder, role="val")


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_an_open_set_answers_in_another_process(folder, method):
    opened = LabelSet.open(folder)
    here = opened.lookup(KEYS, [0, 1, 2, 3, 0])  # its memory maps are open now
    with multiprocessing.get_context(method).Pool(1) as pool:
        there = pool.apply(opened.lookup, (KEYS, [0, 1, 2, 3, 0]))
    assert all(np.array_equal(a, b) for a, b in zip(here, there, strict=True))


def test_a_pickled_set_holds_no_labels_and_answers_the_same(folder):
    opened = LabelSet.open(folder)
    before = len(pickle.dumps(opened))
    expected = opened.lookup(KEYS, [3] * 5)
    data = pickle.dumps(opened)
    assert len(data) == before
    found = pickle.loads(data).lookup(KEYS, [3] * 5)  # noqa: S301
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


# --- damage ---------------------------------------------------------------------------------------


def columns_of(path: Path) -> dict[str, range]:
    """Return where the bytes of each column lie in a shard file, found by what they must be."""
    shard, data = read_shard(path), path.read_bytes()
    contents = {
        "keys": "".join(shard.keys).encode(),
        "key_ends": np.cumsum([len(key.encode()) for key in shard.keys], dtype="<u8").tobytes(),
        "indices": shard.indices.tobytes(),
        "probs": shard.probs.tobytes(),
        "rest": shard.rest.tobytes(),
    }
    assert all(data.count(content) == 1 for content in contents.values())
    starts = {name: data.find(content) for name, content in contents.items()}
    return {name: range(starts[name], starts[name] + len(contents[name])) for name in contents}


def flip(path: Path, data: bytes, bit: int) -> None:
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    path.write_bytes(flipped)


def test_no_flipped_bit_in_a_shard_ever_gives_wrong_labels(tmp_path):
    make_set(tmp_path, plan_of(num_views=300))  # most of the file is labels
    path = tmp_path / shard_name("train", 0)
    whole, shard, columns = path.read_bytes(), read_shard(path), columns_of(path)
    for bit in random.Random(20200923).sample(range(8 * len(whole)), 300):
        flip(path, whole, bit)
        with pytest.raises(LabelSetError, match=r"shard .*train-00000\.h5"):
            LabelSet.open(tmp_path)
        try:  # alone, a shard may miss only bits of HDF5's own that change nothing
            read = read_shard(path)
        except LabelSetError:
            continue
        assert same(read, shard)
        assert not any(bit // 8 in column for column in columns.values())
    path.write_bytes(whole)
    assert len(LabelSet.open(tmp_path)) == 5


@pytest.mark.parametrize("column", ["keys", "key_ends", "indices", "probs", "rest"])
def test_a_flipped_bit_in_any_column_is_found_by_the_shards_own_checksum(folder, column):
    path = folder / shard_name("train", 0)
    place, data = columns_of(path)[column], path.read_bytes()
    for byte in (place[0], place[len(place) // 2], place[-1]):
        flip(path, data, 8 * byte)
        with pytest.raises(LabelSetError, match=r"train-00000\.h5 is damaged"):
            read_shard(path)


def test_a_changed_header_is_found_by_the_shards_own_checksum(folder):
    path = folder / shard_name("train", 1)
    data = path.read_bytes()
    assert b"the file is empty" in data
    path.write_bytes(data.replace(b"the file is empty", b"the file is EMPTY"))
    with pytest.raises(LabelSetError, match="fail their SHA-256"):
        read_shard(path)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_missing_or_truncated_shard_is_named_when_the_set_is_opened(folder, number):
    path = folder / shard_name("train", number)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(LabelSetError, match=rf"{path.name} is not the one in the manifest"):
        LabelSet.open(folder)
    path.unlink()
    with pytest.raises(LabelSetError, match=rf"cannot read shard .*{path.name}: No such file"):
        LabelSet.open(folder)


def test_shards_in_each_others_place_are_refused(folder):
    first, last = (folder / shard_name("train", n) for n in (0, 2))
    data = first.read_bytes()
    first.write_bytes(last.read_bytes())
    last.write_bytes(data)
    with pytest.raises(LabelSetError, match="is not the one in the manifest"):
        LabelSet.open(folder)


def test_the_manifest_of_another_set_is_refused(folder, tmp_path):
    make_set(tmp_path / "other", plan_of(), seed=100)
    shutil.copy(tmp_path / "other" / "manifest.json", folder)
    with pytest.raises(LabelSetError, match="is not the one in the manifest"):
        LabelSet.open(folder)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[1, 2]", b"\xff\xfe", b"null", b'{"plan": 3}', b"{}"]
)
@pytest.mark.parametrize("name", ["manifest.json", "plan.json"])
def test_a_damaged_json_file_is_refused_by_name(folder, name, data):
    (folder / name).write_bytes(data)
    with pytest.raises(LabelSetError, match=rf"{name} (is damaged|does not describe)"):
        (LabelSet.open if name == "manifest.json" else read_plan)(folder)


def change_manifest(folder: Path, **changes: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    (folder / "manifest.json").write_text(canonical_json({**manifest, **changes}), encoding="utf-8")


@pytest.mark.parametrize(
    "changes",
    [
        {"plan": plan_of(img_size=65)},
        {"plan_sha256": "00" * 32},
        {"roles": None},
        {"plan_sha256": None},
    ],
    ids=["another plan", "another hash", "no roles", "no hash"],
)
def test_a_changed_manifest_is_refused(folder, changes):
    change_manifest(folder, **changes)
    with pytest.raises(LabelSetError, match=r"manifest\.json (was changed|lacks)"):
        LabelSet.open(folder)


@pytest.mark.parametrize(
    "roles",
    [{"train": {}}, {"train": {"shards": [{}], "skipped": {}}}, {"train": None}],
    ids=["no shards", "shard without a name", "null"],
)
def test_a_manifest_whose_roles_are_damaged_is_refused(folder, roles):
    change_manifest(folder, roles=roles)
    with pytest.raises(LabelSetError, match=r"manifest\.json"):
        LabelSet.open(folder)


def test_a_newer_format_is_refused_with_both_versions(folder):
    change_manifest(folder, plan=plan_of(format_version=FORMAT_VERSION + 1))
    with pytest.raises(LabelSetError, match=rf"format version {FORMAT_VERSION + 1}; .* reads 1"):
        read_manifest(folder)


def test_an_unfinished_set_and_no_set_are_told_apart(folder, tmp_path):
    (folder / "manifest.json").unlink()
    with pytest.raises(LabelSetError, match="not finished; run the same `mealv2 precompute`"):
        LabelSet.open(folder)
    for nowhere in (tmp_path / "nowhere", folder / "plan.json"):
        with pytest.raises(LabelSetError, match="no label set there"):
            LabelSet.open(nowhere)


# --- claiming a folder ----------------------------------------------------------------------------


def test_a_folder_is_claimed_once_and_again_by_the_same_plan(tmp_path):
    plan = plan_of()
    claim(tmp_path / "deep" / "set", plan)
    before = (tmp_path / "deep" / "set" / "plan.json").read_bytes()
    claim(tmp_path / "deep" / "set", plan)
    assert (tmp_path / "deep" / "set" / "plan.json").read_bytes() == before
    assert read_plan(tmp_path / "deep" / "set") == plan


TEACHERS = plan_of()["teachers"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"img_size": 96}, "img_size is 64 there and 96 here"),
        ({"topk": 5}, "topk is 3 there and 5 here"),
        (
            {"roles": {"train": {"num_views": 4, "views": {"seed": 1}}}},
            "roles.train.views.seed is 0",
        ),
        ({"teachers": TEACHERS * 2}, "teachers is 1 entries there and 2 entries here"),
        (
            {"teachers": [{**TEACHERS[0], "model": "resnet18.a1_in1k"}]},
            r"teachers\[0\].model is resnet50.a1_in1k there and resnet18.a1_in1k here",
        ),
        ({"tail": "uniform"}, "tail is None there and uniform here"),
    ],
)
def test_another_plan_is_refused_naming_the_difference(tmp_path, changes, named):
    claim(tmp_path, plan_of())
    before = (tmp_path / "plan.json").read_bytes()
    with pytest.raises(LabelSetError, match=f"another label set: {named}") as caught:
        claim(tmp_path, plan_of(**changes))
    assert caught.value.exit_code == 3
    assert (tmp_path / "plan.json").read_bytes() == before


def test_many_differences_are_counted(tmp_path):
    claim(tmp_path, plan_of())
    changes = dict.fromkeys("abcde", 1)
    with pytest.raises(
        LabelSetError, match=r"a is None .*b is .*c is .*; and 2 more\. Give another"
    ):
        claim(tmp_path, plan_of(**changes))


def test_a_folder_of_something_else_is_refused_and_stays_as_it_is(tmp_path):
    (tmp_path / "thesis.tex").write_text("all my work")
    with pytest.raises(ConfigError, match=r"no label set and not empty \(thesis\.tex"):
        claim(tmp_path, plan_of())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_temporary_file_left_by_a_killed_run_does_not_hinder_a_claim(tmp_path):
    (tmp_path / ".tmp-plan.json-host-1-00").write_bytes(b"{")
    claim(tmp_path, plan_of())
    assert read_plan(tmp_path) == plan_of()


# --- rooms ----------------------------------------------------------------------------------------


def imported_names(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}


def test_only_the_label_sets_room_imports_h5py():
    package = Path(mealv2.__file__).parent
    files = [
        *package.rglob("*.py"),
        *package.parent.glob("pipeline/**/*.py"),
        package.parent / "cli.py",
    ]
    importers = {
        path for path in files if any(n.split(".")[0] == "h5py" for n in imported_names(path))
    }
    assert {path.parent for path in importers} == {package / "label_set"}


def test_a_set_of_many_shards_needs_no_descriptor_for_each(done, precompute_flags, tmp_path):
    resource = pytest.importorskip("resource")
    out = tmp_path / "set"
    done(*precompute_flags, "--shard-size", 1, "--out", out)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    labels = LabelSet.open(out)
    keys = list(labels.keys())
    assert len(keys) == 36
    in_use = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 8, before[1]))
    try:
        labels.soft_labels(keys, [0] * len(keys))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
