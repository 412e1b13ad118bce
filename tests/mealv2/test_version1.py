"""mealv2.label_set.version1: sets of format 1 give the labels that format 1 gave."""

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
import torch

from label_sets import encoded, flip, look_up, same
from mealv2.errors import LabelSetError
from mealv2.files import canonical_json, file_sha256, json_sha256
from mealv2.label_set import Appender, Encoding, LabelSet, claim, read_manifest
from mealv2.soft_labels import SoftLabels
from mealv2.targets import StoredLabels
from mealv2.views import DrawnViews

GOLDEN = Path(__file__).parents[1] / "golden"
ROWS: dict[str, list[float]] = json.loads((GOLDEN / "label_set_v1.json").read_text("utf-8"))
TRAIN = [(name.split("|")[0], int(name.split("|")[1])) for name in ROWS if "val|" not in name]
APPENDED = [("class0/a.png", 7)]
FILES = sorted(path.name for path in (GOLDEN / "label_set_v1").glob("*.h5"))
TRAIN_FILES = [name for name in FILES if name.startswith("train")]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of a set that the last mealv2 of format 1 wrote."""
    return Path(shutil.copytree(GOLDEN / "label_set_v1", tmp_path / "set"))


def dense(labels: LabelSet, places: list[tuple[str, int]]) -> np.ndarray:
    return look_up(labels, places).labels.to_dense().numpy()


def test_every_row_is_what_format_1_gave(folder):
    opened = LabelSet.open(folder)
    order = random.Random(0).sample(TRAIN, len(TRAIN))
    expected = [ROWS[f"{key}|{view}"] for key, view in order]
    assert len(order) == 7
    np.testing.assert_array_equal(dense(opened, order), np.array(expected, dtype=np.float32))
    for place in TRAIN:
        assert opened.holds(*place)
        expected = np.array([ROWS[f"{place[0]}|{place[1]}"]], dtype=np.float32)
        np.testing.assert_array_equal(dense(opened, [place]), expected)
    val = LabelSet.open(folder, role="val")
    (name,) = [name for name in ROWS if "val|" in name]
    _, key, view = name.split("|")
    assert dense(val, [(key, int(view))]).tolist() == [pytest.approx(ROWS[name], abs=0)]


def test_what_a_set_says_of_itself(folder):
    opened = LabelSet.open(folder)
    assert str(opened.encoding) == "top-3, float16"
    assert (opened.num_views, opened.num_classes, opened.img_size) == (2, 5, 32)
    assert list(opened.keys()) == ["class0/a.png", "class1/bü.png", "class4/c.png"]
    assert opened.skipped == {"class3/bad.png": "the file is empty"}
    assert opened.appended == ["train-more-7a8f5cd9c659ffd0.h5"]
    assert opened.views() == DrawnViews(0)
    assert opened.has_labels(["class4/c.png", "class3/bad.png"]).tolist() == [True, False]
    ((views, files),) = opened.blocks
    assert (views, [file.num_images for file in files]) == (range(2), [2, 1])
    assert files[0].images is None
    assert str(LabelSet.open(folder, role="val").encoding) == "top-3, float16"


def test_appended_rows_are_seen_or_left_out(folder):
    assert not LabelSet.open(folder, appended=[]).holds(*APPENDED[0])
    with pytest.raises(LabelSetError, match=r"no view 7 of 'class0/a.png'; it holds 2, from 0"):
        look_up(LabelSet.open(folder, appended=[]), APPENDED)
    with pytest.raises(LabelSetError, match="it was skipped: the file is empty"):
        look_up(LabelSet.open(folder), [("class3/bad.png", 0)])


def test_rows_can_be_appended_to_an_old_set(folder):
    label_set = LabelSet.open(folder)
    before = dense(label_set, TRAIN)
    rows = encoded(label_set.encoding, 2)
    places = [("class0/a.png", 9), ("new.png", 0)]
    appender = Appender(label_set)
    appender.add([key for key, _ in places], [view for _, view in places], rows)
    path = appender.flush()
    opened = LabelSet.open(folder)
    assert opened.appended == sorted(["train-more-7a8f5cd9c659ffd0.h5", path.name])
    assert same(look_up(opened, places), rows)
    assert np.array_equal(dense(opened, TRAIN), before)


def test_it_answers_a_training_run(folder):
    opened = LabelSet.open(folder)
    targets = StoredLabels(opened, ["class4/c.png", "class0/a.png"], seed=0)
    answer = targets.batch([1, 0], [1, 0], torch.empty(0))
    expected = [ROWS["class0/a.png|1"], ROWS["class4/c.png|0"]]
    assert answer.kept_logits is None
    np.testing.assert_array_equal(answer.soft.to_dense().numpy(), np.float32(expected))


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_an_old_set_answers_in_another_process(folder, method):
    opened = LabelSet.open(folder)
    keys, views = [key for key, _ in TRAIN], [view for _, view in TRAIN]
    here = opened.lookup(keys, views)
    assert len(pickle.dumps(opened)) < 1000
    with multiprocessing.get_context(method).Pool(1) as pool:
        there = pool.apply(opened.lookup, (keys, views))
    assert all(np.array_equal(a, b) for a, b in zip(here, there, strict=True))


@pytest.mark.parametrize("num_views", [1, 3])
def test_another_number_of_views_than_it_holds_is_refused(folder, num_views):
    assert LabelSet.open(folder, num_views=2).num_views == 2
    with pytest.raises(LabelSetError, match=rf"holds 2 views of each image, {num_views} are need"):
        LabelSet.open(folder, num_views=num_views)


# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_refused_by_name(folder, name):
    path = folder / name
    whole = path.read_bytes()
    for bit in random.Random(7).sample(range(8 * len(whole)), 60):
        flip(path, whole, bit)
        with pytest.raises(LabelSetError, match=name) as caught:
            LabelSet.open(folder, role=name.split("-")[0])
        assert caught.value.exit_code == 3


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0, 1, 5000, -1, None])
def test_a_truncated_missing_or_replaced_file_is_refused_by_name(folder, name, kept):
    path = folder / name
    data = path.read_bytes()
    path.unlink()
    if kept is not None:
        path.write_bytes(data[:kept])
    manifest = LabelSet.open(GOLDEN / "label_set_v1").appended
    role = name.split("-")[0]
    with pytest.raises(LabelSetError, match=name):
        LabelSet.open(folder, role=role, appended=manifest if role == "train" else [])
    if path.exists():
        path.unlink()
    path.mkdir()
    with pytest.raises(LabelSetError, match=name):
        LabelSet.open(folder, role=role, appended=manifest if role == "train" else [])


def test_a_shard_under_an_appended_files_name_is_refused(folder):
    path = folder / "train-more-0123456789abcdef.h5"
    shutil.copy(folder / "train-00000.h5", path)
    with pytest.raises(LabelSetError, match=rf"{path.name} is damaged"):
        LabelSet.open(folder)


def test_appended_rows_of_another_set_are_refused(folder):
    change_plan(folder, img_size=33)
    with pytest.raises(
        LabelSetError, match=r"7a8f5cd9c659ffd0\.h5 holds rows of another label set"
    ):
        LabelSet.open(folder)
    assert len(LabelSet.open(folder, appended=[])) == 3


def test_a_changed_manifest_is_refused(folder):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    for change in ({"plan_sha256": "00" * 32}, {"roles": {"train": {}}}, {"roles": None}):
        path.write_text(canonical_json({**manifest, **change}), "utf-8")
        with pytest.raises(LabelSetError, match=r"manifest\.json"):
            LabelSet.open(folder)
    manifest["roles"]["train"]["shards"][0]["name"] = "../set/train-00000.h5"
    path.write_text(canonical_json(manifest), "utf-8")
    with pytest.raises(LabelSetError, match="lacks its shards"):
        read_manifest(folder)


def test_a_plan_of_another_type_of_label_is_refused(folder):
    change_plan(folder, label_dtype="bfloat16")
    with pytest.raises(LabelSetError, match=r"labels of this set cannot be read: .*bfloat16"):
        LabelSet.open(folder)


def change_plan(folder: Path, **changes: Any) -> dict[str, Any]:
    path = folder / "manifest.json"
    manifest: dict[str, Any] = json.loads(path.read_text("utf-8"))
    manifest["plan"].update(changes)
    manifest["plan_sha256"] = json_sha256(manifest["plan"])
    path.write_text(canonical_json(manifest), "utf-8")
    return manifest


def test_its_folder_belongs_to_its_plan(folder):
    plan = read_manifest(folder)["plan"]
    claim(folder, plan)
    with pytest.raises(LabelSetError, match="format_version is 1 there and 2 here"):
        claim(folder, {**plan, "format_version": 2})


# --- sets that the golden one is not --------------------------------------------------------------


def write_old_shard(path: Path, keys: list[str], **columns: np.ndarray) -> dict[str, Any]:
    """Write a shard as format 1 did; return what its manifest says of it."""
    packed = [key.encode() for key in keys]
    header = {"plan_sha256": "", "role": "train", "number": 0, "skipped": {}, "counts": {}}
    with h5py.File(path, "w") as file:
        file.attrs["header"] = json.dumps(header)
        file["keys"] = np.frombuffer(b"".join(packed), np.uint8)
        file["key_ends"] = np.cumsum([len(key) for key in packed], dtype="<u8")
        for name, column in columns.items():
            file[name] = column
    return {
        "name": path.name,
        "bytes": path.stat().st_size,
        "images": len(keys),
        "sha256": file_sha256(path),
    }


def write_old_set(folder: Path, labels: SoftLabels, dtype: str, keys: list[str]) -> None:
    """Write a set of format 1 with two views of each key, and a shard without images first."""
    folder.mkdir()
    k = labels.indices_NK.shape[1]
    entries = []
    for number, (names, part) in enumerate([([], labels.rows(torch.arange(0))), (keys, labels)]):
        shape = (len(names), 2, k)
        columns = {"probs": part.probs_NK.numpy().reshape(shape).astype(dtype)}
        if not labels.is_dense:
            kind = "<u2" if labels.num_classes <= 65_536 else "<u4"
            columns["indices"] = part.indices_NK.numpy().reshape(shape).astype(kind)
            columns["rest"] = part.rest_N.numpy().reshape(shape[:2]).astype(dtype)
        entries.append(write_old_shard(folder / f"train-{number:05d}.h5", names, **columns))
    plan = {
        "format": "mealv2 label set",
        "format_version": 1,
        "classes": [str(n) for n in range(labels.num_classes)],
        "img_size": 32,
        "topk": k,
        "label_dtype": dtype,
        "roles": {"train": {"num_views": 2}},
    }
    manifest = {
        "plan": plan,
        "plan_sha256": json_sha256(plan),
        "roles": {"train": {"shards": entries, "skipped": {}}},
    }
    (folder / "manifest.json").write_text(canonical_json(manifest), "utf-8")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(
    ("k", "num_classes"), [(3, 50), (1, 2), (4, 70_000), (6, 6), (1, 1), (66_000, 66_000)]
)
def test_every_kind_of_old_set_is_read_to_the_bit(tmp_path, dtype, k, num_classes):
    keys = ["a", "猫"]
    encoding = Encoding(num_classes, dtype, topk=k)
    rows = encoded(encoding, 4)
    write_old_set(tmp_path / "set", rows.labels, dtype, keys)
    opened = LabelSet.open(tmp_path / "set")
    assert opened.encoding == encoding
    assert len(opened) == 2
    assert same(look_up(opened, [(key, view) for key in keys for view in (0, 1)]), rows)
    assert same(look_up(opened, [("猫", 1)]), rows.rows(torch.tensor([3])))
    assert len(opened.soft_labels([], [])) == 0
