"""pipeline.precompute: the right labels, the same ones every time, whole or not there."""

import collections
import json
import shutil
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as v2

from cases import mostly_slow
from conftest import FORMS, Result, Spawned
from label_sets import same
from mealv2.data.content_hash import content_hash, hash_text
from mealv2.data.folder import ImageFolder
from mealv2.label_set import LabelSet, Rows, ShardFile, read_manifest, read_shard
from mealv2.losses import compress_logits
from mealv2.soft_labels import Labels, SoftLabels, encode, top_k
from mealv2.views import view_of

Run = Callable[..., Result]
Files = Callable[..., dict[str, bytes]]

# What timm says of the two teachers, written down once more.
NORMALISATION = {
    "test_resnet": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "test_efficientnet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "labels"


def lookup_all(labels: LabelSet) -> np.ndarray:
    """Return every label of a set as dense rows: (images, views, classes)."""
    keys = list(labels.keys())
    dense = np.zeros((len(keys), labels.num_views, labels.num_classes))
    for view in range(labels.num_views):
        found = labels.lookup(keys, [view] * len(keys))
        np.put_along_axis(dense[:, view], found.indices_NK, found.probs_NK.astype(float), axis=1)
    return dense


# --- the labels are right -----------------------------------------------------------------------


def _image(path: Path) -> torch.Tensor:
    with Image.open(path) as opened:
        return v2.pil_to_tensor(opened.convert("RGB"))


def _train_view(path: Path, key: str, view: int) -> np.ndarray:
    """Cut a view with torchvision alone."""
    image = _image(path)
    height, width = image.shape[1:]
    box = view_of(key, view, seed=7, width=width, height=height)
    place = box.top, box.left, box.height, box.width
    small = v2.resized_crop(image, *place, [32, 32], antialias=True)
    return (v2.hflip(small) if box.flip else small).permute(1, 2, 0).numpy()


def _val_view(path: Path) -> np.ndarray:
    """Resize the shorter side to 36 = int(32 * 256 / 224), cut the middle 32 x 32."""
    resized = v2.resize(_image(path), [36], antialias=True)
    return v2.center_crop(resized, [32]).permute(1, 2, 0).numpy()


def _logits(teacher_dirs: dict[str, Path], pixels_NHWC: np.ndarray) -> np.ndarray:
    """Ask each teacher by hand; return logits teachers x N x classes, float64."""
    annotations = []
    for name, folder in teacher_dirs.items():
        model = timm.create_model(name, num_classes=3).eval()
        model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
        mean, std = (np.array(values, dtype=np.float32) for values in NORMALISATION[name])
        images = torch.from_numpy((pixels_NHWC.astype(np.float32) / 255 - mean) / std)
        with torch.no_grad():
            annotations.append(model(images.permute(0, 3, 1, 2)).double().numpy())
    return np.array(annotations)


def _answers(teacher_dirs: dict[str, Path], pixels_NHWC: np.ndarray) -> np.ndarray:
    """Ask each teacher by hand; return probabilities teachers x N x classes, float64."""
    logits = _logits(teacher_dirs, pixels_NHWC)
    odds = np.exp(logits - logits.max(axis=2, keepdims=True))
    return odds / odds.sum(axis=2, keepdims=True)


def _all_train_views(data_dir: Path, keys: list[str], num_views: int) -> np.ndarray:
    folder = data_dir / "train"
    return np.stack([_train_view(folder / k, k, v) for k in keys for v in range(num_views)])


def test_dense_labels_are_the_mean_of_the_teachers_softmax(
    done: Run, precompute_flags: list[str], teacher_dirs: dict[str, Path], data_dir: Path, out: Path
) -> None:
    done(*precompute_flags, "--topk", "all", "--label-dtype", "float32", "--output", out)
    labels = LabelSet.open(out)
    keys = list(labels.keys())
    by_hand = _answers(teacher_dirs, _all_train_views(data_dir, keys, 4)).mean(axis=0)
    assert by_hand.std(axis=0).min() > 0.05, "labels this alike would agree by chance"
    np.testing.assert_allclose(lookup_all(labels), by_hand.reshape(36, 4, 3), rtol=0, atol=1e-6)


def test_top_k_labels_are_the_largest_answers_in_order(
    labels_dir: Path, teacher_dirs: dict[str, Path], data_dir: Path
) -> None:
    labels = LabelSet.open(labels_dir)
    keys = list(labels.keys())
    by_hand = _answers(teacher_dirs, _all_train_views(data_dir, keys, 4)).mean(axis=0)
    found = labels.lookup([k for k in keys for _ in range(4)], list(range(4)) * len(keys))
    largest_first = -np.sort(-by_hand, axis=1)
    np.testing.assert_allclose(found.probs_NK, largest_first[:, :2], rtol=0, atol=1e-3)
    at_indices = np.take_along_axis(by_hand, found.indices_NK, axis=1)
    np.testing.assert_allclose(found.probs_NK, at_indices, rtol=0, atol=1e-3)


def test_accuracies_in_the_manifest_are_those_of_an_independent_evaluation(
    labels_dir: Path, teacher_dirs: dict[str, Path], data_dir: Path
) -> None:
    accuracy = LabelSet.open(labels_dir).manifest["roles"]["val"]["accuracy"]
    paths = sorted((data_dir / "val").glob("*/*"))
    truth = np.array([sorted({p.parent.name for p in paths}).index(p.parent.name) for p in paths])
    annotations = _answers(teacher_dirs, np.stack([_val_view(path) for path in paths]))
    expected = [
        round(100 * float((probs.argmax(axis=1) == truth).mean()), 4)
        for probs in (*annotations, annotations.mean(axis=0))
    ]
    assert [t["top1"] for t in accuracy["teachers"]] == expected[:-1]
    assert accuracy["ensemble"]["top1"] == expected[-1]
    assert [t["top5"] for t in accuracy["teachers"]] == [100.0, 100.0]
    assert accuracy["num_images"] == 15
    assert len(set(expected)) > 1, "teachers this alike would agree by chance"


def test_val_labels_are_of_the_centre_crop(
    labels_dir: Path, teacher_dirs: dict[str, Path], data_dir: Path
) -> None:
    labels = LabelSet.open(labels_dir, split="val")
    keys = list(labels.keys())
    pixels = np.stack([_val_view(data_dir / "val" / key) for key in keys])
    by_hand = -np.sort(-_answers(teacher_dirs, pixels).mean(axis=0), axis=1)[:, :2]
    np.testing.assert_allclose(labels.lookup(keys, [0] * 15).probs_NK, by_hand, rtol=0, atol=1e-3)


# --- every way to keep labels -------------------------------------------------------------------


def _places(labels: LabelSet) -> tuple[list[str], list[int]]:
    """Return key and view of every row."""
    keys = list(labels.keys())
    num_views = labels.num_views
    return [k for k in keys for _ in range(num_views)], list(range(num_views)) * len(keys)


def _kept_by_hand(form: str, probs_NC: torch.Tensor, num_views: int) -> Labels:
    if form == "rate":
        return encode(probs_NC, rate=0.02, num_views=num_views)
    if form == "curve":
        return encode(probs_NC, topk=2)
    dtype = torch.float32 if form.endswith("float32") else torch.float16
    return top_k(probs_NC, 3 if form.startswith("all") else 2).rounded(dtype)


def _pixels(data_dir: Path, split: str, keys: list[str], views: list[int]) -> np.ndarray:
    folder = data_dir / split
    if split == "val":
        return np.stack([_val_view(folder / key) for key in keys])
    return np.stack([_train_view(folder / k, k, v) for k, v in zip(keys, views, strict=True)])


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("form", mostly_slow(FORMS, fast=2))
def test_rows_are_what_each_form_makes_of_the_teachers_answers(
    labels_of: Callable[..., Path],
    teacher_dirs: dict[str, Path],
    data_dir: Path,
    form: str,
    logits: bool,
    split: str,
) -> None:
    """The answers of a set of exact values are those asked for by hand; the forms start there."""
    exact = LabelSet.open(labels_of("all float32"), split=split)
    keys, views = _places(exact)
    of_teachers = _logits(teacher_dirs, _pixels(data_dir, split, keys, views))
    annotations = exact.soft_labels(keys, views)
    assert isinstance(annotations, SoftLabels)
    by_hand = torch.softmax(torch.from_numpy(of_teachers), dim=2).mean(dim=0)
    np.testing.assert_allclose(annotations.probs_NK, by_hand, rtol=0, atol=1e-6)

    labels = LabelSet.open(labels_of(form, logits=logits), split=split)
    rows = labels.rows(keys, views)
    expected = _kept_by_hand(form, annotations.probs_NK, labels.num_views)
    assert same(Rows(rows.labels), Rows(expected))
    assert (rows.logits is not None) == logits
    if form == "rate" and split == "train":
        assert len(set(rows.labels.kept().is_kept_NK.sum(dim=1).tolist())) > 1, "or it varies not"
    if rows.logits is not None:
        kept = rows.labels.kept()
        expected = compress_logits(torch.from_numpy(of_teachers.mean(axis=0)), kept)
        atol = 0.2 if form == "rate" else 1e-3  # a line
        np.testing.assert_allclose(rows.logits.to_dense(kept, 3), expected, rtol=1e-3, atol=atol)


def _size(path: Path) -> list[int]:
    with Image.open(path) as image:
        return list(image.size)


@pytest.mark.parametrize("split", ["train", "val"])
def test_set_knows_the_size_the_bytes_and_the_class_of_its_images(
    labels_dir: Path, data_dir: Path, split: str
) -> None:
    found = 0
    for path in sorted(labels_dir.glob(f"{split}-*.h5")):
        file = ShardFile(path)
        images = file.images
        assert images is not None
        keys = file.keys()
        paths = [data_dir / split / key for key in keys]
        found += len(paths)
        assert images.sizes_N2.tolist() == [_size(p) for p in paths]
        assert images.file_bytes_N.tolist() == [p.stat().st_size for p in paths]
        classes = ["ants", "bees", "cats"]
        assert images.classes_N.tolist() == [classes.index(p.parent.name) for p in paths]
    assert found == {"train": 36, "val": 15}[split]


def _boxes_sha256(file: ShardFile) -> str:
    """Hash the boxes that the recipe gives images of the stored sizes."""
    images = file.images
    assert images is not None
    digest = sha256()
    for key, (width, height) in zip(file.keys(), images.sizes_N2.tolist(), strict=True):
        for index in range(file.first_view, file.first_view + file.num_views):
            box = view_of(key, index, seed=7, width=width, height=height)
            numbers = (box.top, box.left, box.height, box.width, box.flip)
            digest.update(struct.pack("<5I", *numbers))
    return digest.hexdigest()


def test_shard_has_the_hash_of_the_boxes_that_were_cut(labels_dir: Path) -> None:
    files = [ShardFile(path) for path in sorted(labels_dir.glob("train-*.h5"))]
    assert [file.header["boxes_sha256"] for file in files] == [_boxes_sha256(f) for f in files]
    for path in labels_dir.glob("val-*.h5"):
        assert ShardFile(path).header["boxes_sha256"] is None


# --- the same labels, however they are made -----------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_shards_are_byte_equal_for_any_number_of_workers(
    done: Run,
    precompute_flags: list[str],
    labels_dir: Path,
    out: Path,
    contents: Files,
    workers: int,
) -> None:
    done(*precompute_flags, "--workers", workers, "--output", out)
    assert contents(out) == contents(labels_dir)


def test_curves_and_logits_are_byte_equal_for_any_number_of_workers(
    done: Run,
    plain_precompute_flags: list[str],
    labels_of: Callable[..., Path],
    out: Path,
    contents: Files,
) -> None:
    flags = [*FORMS["rate"], "--store-logits", "--workers", 2]
    done(*plain_precompute_flags, *flags, "--output", out)
    assert contents(out) == contents(labels_of("rate", logits=True))


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3, 10_000])
def test_batch_size_changes_probabilities_by_less_than_a_thousandth(
    done: Run, precompute_flags: list[str], labels_dir: Path, out: Path, batch_size: int
) -> None:
    done(*precompute_flags, "--batch-size", batch_size, "--output", out)
    made, first = LabelSet.open(out), LabelSet.open(labels_dir)
    assert list(made.keys()) == list(first.keys())
    np.testing.assert_allclose(lookup_all(made), lookup_all(first), rtol=0, atol=1e-3)


def test_view_seed_changes_the_train_labels_and_not_the_val_labels(
    done: Run, precompute_flags: list[str], labels_dir: Path, out: Path
) -> None:
    done(*precompute_flags, "--view-seed", 8, "--output", out)
    train = [lookup_all(LabelSet.open(path)) for path in (out, labels_dir)]
    val = [lookup_all(LabelSet.open(path, split="val")) for path in (out, labels_dir)]
    assert not np.array_equal(*train)
    np.testing.assert_array_equal(*val)


def test_each_image_is_read_once_for_all_its_views(
    done: Run,
    precompute_flags: list[str],
    data_dir: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads: collections.Counter[str] = collections.Counter()
    read = ImageFolder.read

    def counting(self: ImageFolder, position: int) -> bytes:
        reads[f"{self.split}/{self.keys[position]}"] += 1
        return read(self, position)

    monkeypatch.setattr(ImageFolder, "read", counting)
    # fewer than the 4 views of an image; without --crop, the size of one is looked at before
    done(*precompute_flags, "--crop", "rrc", "--batch-size", 3, "--output", out)
    images = {path.relative_to(data_dir).as_posix() for path in data_dir.glob("*/*/*")}
    assert reads == dict.fromkeys(images, 1)


def test_val_split_none_labels_the_train_split_alone(
    done: Run, precompute_flags: list[str], labels_dir: Path, out: Path, contents: Files
) -> None:
    result = done(*precompute_flags, "--val-split", "none", "--output", out)
    labels = LabelSet.open(out)
    assert list(labels.manifest["roles"]) == ["train"]
    assert "accuracy" not in result.report
    np.testing.assert_array_equal(lookup_all(labels), lookup_all(LabelSet.open(labels_dir)))
    assert not list(out.glob("val*"))


def test_default_is_a_curve_over_as_many_classes_as_each_view_needs(
    done: Run, plain_precompute_flags: list[str], out: Path
) -> None:
    done(*plain_precompute_flags, "--output", out)
    assert LabelSet.open(out).manifest["plan"]["labels"] == {
        "form": "curve",
        "rate": 0.001,
        "logits": False,
        "tail": "even over the classes not kept",
    }


# --- what the set says of itself ----------------------------------------------------------------


def test_manifest_says_what_the_set_is(labels_dir: Path, teacher_dirs: dict[str, Path]) -> None:
    manifest = json.loads((labels_dir / "manifest.json").read_text())
    plan = manifest["plan"]
    assert plan["classes"] == ["ants", "bees", "cats"]
    assert [t["model"] for t in plan["teachers"]] == list(teacher_dirs)
    assert all(len(t["weights_sha256"]) == 64 for t in plan["teachers"])
    assert [tuple(t["mean"]) for t in plan["teachers"]] == [m for m, _ in NORMALISATION.values()]
    assert (plan["img_size"], plan["format_version"]) == (32, 2)
    kept = plan["labels"]
    assert (kept["form"], kept["topk"], kept["logits"]) == ("float16", 2, False)
    assert "bilinear" in plan["interpolation"]
    assert "antialias" in plan["interpolation"]
    train = plan["roles"]["train"]
    assert (train["split"], train["num_images"], train["num_views"]) == ("train", 36, 4)
    assert len(train["data_sha256"]) == 64
    assert train["views"]["seed"] == 7
    assert train["views"]["scale"] == [0.08, 1.0]
    assert {"torch", "torchvision", "timm", "pillow", "numpy", "h5py"} < manifest["versions"].keys()
    blocks = {name: split["blocks"] for name, split in manifest["roles"].items()}
    assert {name: [block["views"] for block in listed] for name, listed in blocks.items()} == {
        "train": [[0, 4]],
        "val": [[0, 1]],
    }
    shards = [shard for listed in blocks.values() for block in listed for shard in block["shards"]]
    assert shards == [
        {
            "name": path.name,
            "bytes": path.stat().st_size,
            "images": len(read_shard(path).keys),
            "sha256": sha256(path.read_bytes()).hexdigest(),
            "head_sha256": sha256(path.read_bytes()[:512]).hexdigest(),
        }
        for split in ("train", "val")
        for path in sorted(labels_dir.glob(f"{split}-*.h5"))
    ]
    text = (labels_dir / "manifest.json").read_text()
    own = manifest["manifest_sha256"]
    assert text.count(own) == 1
    assert sha256(text.replace(own, "0" * 64).encode()).hexdigest() == own


def test_report_counts_what_was_made(
    done: Run, precompute_flags: list[str], out: Path, contents: Files
) -> None:
    report = done(*precompute_flags, "--output", out).report
    assert (report["images"], report["views"], report["skipped"]) == (36, 144, 0)
    assert report["shards_made"] == 6  # 36 and 15 images, ten in a shard
    assert report["bytes"] == sum(map(len, contents(out, "*.h5").values()))


# --- stopped and run again ----------------------------------------------------------------------


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Return inode and time of change of every shard."""
    found = {path.name: path.stat() for path in folder.glob("*.h5")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}


def _whole_shards(folder: Path) -> set[str]:
    """Return the names of the shards that are there; a torn one raises."""
    names = {path.name for path in folder.glob("*.h5")}
    for name in names:
        assert len(read_shard(folder / name).keys) > 0
    return names


LONG = ["--num-views", "240", "--shard-size", "2"]  # 8 shards of val, 18 of train


@pytest.fixture(scope="module")
def uninterrupted(
    done: Run, precompute_flags: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "labels"
    done(*precompute_flags, *LONG, "--output", out)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_stopped_half_way_and_run_again_the_shards_are_byte_equal(
    spawn: Callable[..., Spawned],
    done: Run,
    precompute_flags: list[str],
    out: Path,
    uninterrupted: Path,
    contents: Files,
    number: signal.Signals,
) -> None:
    run = spawn(*precompute_flags, *LONG, "--workers", 1, "--output", out)
    run.until(lambda: any(name.startswith("train") for name in _whole_shards(out)))
    run.signal(number)
    stopped = run.result()

    there = _whole_shards(out)
    assert not (out / "manifest.json").exists(), "it was stopped too late to show anything"
    assert {f"val-{n:05d}.h5" for n in range(8)} < there
    if number is signal.SIGINT:
        assert stopped.code == 4
        assert "Traceback" not in stopped.stderr
        assert stopped.stderr.splitlines()[-1].startswith("mealv2: stopped; ")
        assert not list(out.glob(".tmp-*"))

    before = _stamps(out)
    again = done(*precompute_flags, *LONG, "--output", out)
    assert contents(out, "*.h5") == contents(uninterrupted, "*.h5")
    assert contents(out, "*.json") == contents(uninterrupted, "*.json")
    assert again.report["shards_made"] == 8 + 18 - len(there)
    assert {name: _stamps(out)[name] for name in there} == before


@pytest.mark.parametrize("harm", ["removed", "damaged", "altered"])
def test_plan_of_a_finished_set_is_written_anew_from_what_the_manifest_repeats(
    done: Run, precompute_flags: list[str], labels_dir: Path, out: Path, contents: Files, harm: str
) -> None:
    shutil.copytree(labels_dir, out)
    before, plan = contents(out), out / "plan.json"
    if harm == "removed":
        plan.unlink()
    else:
        text = plan.read_text()
        plan.write_text(text[:100] if harm == "damaged" else text.replace('"topk": 2', '"topk": 3'))
        assert plan.read_text() != text
    report = done(*precompute_flags, "--output", out).report
    assert report["shards_made"] == 0
    assert contents(out) == before


def test_finished_set_is_left_as_it_is(
    done: Run, precompute_flags: list[str], labels_dir: Path, out: Path, contents: Files
) -> None:
    shutil.copytree(labels_dir, out)
    before, stamps = contents(out), _stamps(out)
    assert done(*precompute_flags, "--output", out).report["shards_made"] == 0
    assert contents(out) == before
    assert _stamps(out) == stamps


def _flip_in(column: str) -> Callable[..., None]:
    def damage(path: Path, flip: Callable[..., None], folder: Path) -> None:
        flip(path, ShardFile(path).header["columns"][column]["offset"] + 5)

    damage.__name__ = f"flip_in_{column}"
    return damage


def _flip_in_head(path: Path, flip: Callable[..., None], folder: Path) -> None:
    flip(path, 20)


def _truncate(path: Path, flip: Callable[..., None], folder: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def _empty(path: Path, flip: Callable[..., None], folder: Path) -> None:
    path.write_bytes(b"")


def _remove(path: Path, flip: Callable[..., None], folder: Path) -> None:
    path.unlink()


def _take_another(path: Path, flip: Callable[..., None], folder: Path) -> None:
    shutil.copy(folder / "train-00000.h5", path)


@pytest.mark.parametrize(
    "damage",
    [
        *map(_flip_in, ("labels", "keys", "crc32", "image_sizes")),
        _flip_in_head,
        _truncate,
        _empty,
        _remove,
        _take_another,
    ],
)
def test_damaged_shard_is_noticed_and_it_alone_made_anew(
    done: Run,
    precompute_flags: list[str],
    labels_dir: Path,
    out: Path,
    contents: Files,
    flipped_bit: Callable[..., None],
    damage: Callable[..., None],
) -> None:
    shutil.copytree(labels_dir, out)
    damage(out / "train-00002.h5", flipped_bit, out)
    stamps = _stamps(out)
    result = done(*precompute_flags, "--output", out)
    assert result.report["shards_made"] == 1
    if damage is not _remove:
        assert "train-00002.h5" in result.stderr
        assert "making it again" in result.stderr
    assert contents(out) == contents(labels_dir)
    stamps.pop("train-00002.h5", None)
    assert {name: _stamps(out)[name] for name in stamps} == stamps


# --- a second run with something else -----------------------------------------------------------


def _refused_untouched(
    run_cli: Run, contents: Files, folder: Path, flags: list[object], named: str
) -> None:
    before, stamps = contents(folder), _stamps(folder)
    result = run_cli(*flags, "--output", folder)
    assert result.code == 3
    assert result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"mealv2: {folder} holds another label set: ")
    assert named in last
    assert contents(folder) == before
    assert _stamps(folder) == stamps


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--topk", "3"], "labels.topk is 2 in the set and 3 in this run"),
        (["--topk", "all"], "labels.topk is 2 in the set and 3 in this run"),
        (["--store-logits"], "labels.logits is False in the set and True in this run"),
        (["--view-seed", 8], "roles.train.views.seed is 7 in the set and 8 in this run"),
        (["--num-views", 5], "roles.train.num_views is 4 in the set and 5 in this run"),
        (["--img-size", 40], "img_size is 32 in the set and 40 in this run"),
        (["--label-dtype", "float32"], "labels.form is float16 in the set and float32 in this run"),
        (["--shard-size", 11], "shard_size is 10 in the set and 11 in this run"),
        (["--amp"], "precision is float32 in the set and bfloat16 in this run"),
        (["--val-split", "none"], "roles.val"),
    ],
)
def test_other_settings_are_refused_by_name(
    run_cli: Run,
    precompute_flags: list[str],
    labels_dir: Path,
    contents: Files,
    flags: list[object],
    named: str,
) -> None:
    _refused_untouched(run_cli, contents, labels_dir, [*precompute_flags, *flags], named)


@pytest.mark.parametrize("how", ["one more", "one fewer", "other weights"])
def test_other_teachers_are_refused_by_name(
    run_cli: Run,
    precompute_flags: list[str],
    teacher_flags: list[str],
    labels_dir: Path,
    contents: Files,
    make_model: Callable[..., Path],
    how: str,
) -> None:
    other = ["--teacher", f"test_efficientnet={make_model('test_efficientnet', seed=6)}"]
    flags, named = {
        "one more": ([*precompute_flags, *other], "teachers"),
        "one fewer": (precompute_flags[:-2], "teachers"),
        "other weights": ([*precompute_flags[:-2], *other], "teachers[1].weights_sha256"),
    }[how]
    assert precompute_flags[-len(teacher_flags) :] == teacher_flags
    _refused_untouched(run_cli, contents, labels_dir, flags, named)


@pytest.mark.parametrize("how", ["grown", "renamed", "removed"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_other_data_are_refused_by_name(
    run_cli: Run,
    precompute_flags: list[str],
    labels_dir: Path,
    own_data: Path,
    contents: Files,
    how: str,
    split: str,
) -> None:
    path = own_data / split / "bees" / "03.jpg"
    if how == "grown":
        path.write_bytes(path.read_bytes() + b"\0")
    elif how == "renamed":
        path.rename(path.with_name("another.jpg"))
    else:
        path.unlink()
    flags = [*precompute_flags, "--data-dir", own_data]
    _refused_untouched(run_cli, contents, labels_dir, flags, f"roles.{split}.data_sha256")


def test_folder_that_holds_something_else_is_refused_untouched(
    run_cli: Run, precompute_flags: list[str], out: Path, contents: Files
) -> None:
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    result = run_cli(*precompute_flags, "--output", out)
    assert result.code == 2
    assert "thesis.txt" in result.stderr
    assert contents(out) == {"thesis.txt": b"years of work"}


@pytest.mark.parametrize("flags", [[], ["--topk", 1], ["--rate", 0.1]])
def test_curve_over_one_class_is_refused_naming_the_way_out(
    run_cli: Run,
    done: Run,
    plain_precompute_flags: list[str],
    data_dir: Path,
    make_model: Callable[..., Path],
    tmp_path: Path,
    flags: list[object],
) -> None:
    for split in ("train", "val"):
        shutil.copytree(data_dir / split / "ants", tmp_path / "data" / split / "ants")
    teacher = f"test_resnet={make_model('test_resnet', classes=('ants',))}"
    command = [*plain_precompute_flags[:-4], "--data-dir", tmp_path / "data", "--teacher", teacher]
    result = run_cli(*command, *flags, "--output", tmp_path / "labels")
    assert (result.code, len(result.stderr.splitlines())) == (2, 1)
    assert "--topk all" in result.stderr
    assert not (tmp_path / "labels").exists()
    done(*command, "--topk", "all", "--output", tmp_path / "labels")
    assert len(LabelSet.open(tmp_path / "labels")) == 12


@pytest.mark.parametrize("topk", ["4", "1000"])
def test_topk_above_the_class_count_is_refused_and_nothing_written(
    run_cli: Run, precompute_flags: list[str], out: Path, topk: str
) -> None:
    result = run_cli(*precompute_flags, "--topk", topk, "--output", out)
    assert result.code == 2
    assert f"--topk {topk}" in result.stderr
    assert "3 classes" in result.stderr
    assert not out.exists()


# --- images that cannot be read -----------------------------------------------------------------

BAD = {
    "train/ants/01.jpg": lambda data: data[: len(data) // 2],
    "train/bees/04.jpg": lambda data: b"",
    "train/cats/07.jpg": lambda data: b"this is no image\n",
    "val/ants/00.jpg": lambda data: b"",
}


@pytest.fixture
def bad_data(own_data: Path) -> Path:
    for name, spoil in BAD.items():
        path = own_data / name
        path.write_bytes(spoil(path.read_bytes()))
    return own_data


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("workers", [0, 1])
def test_bad_image_stops_stage_one_and_is_named(
    run_cli: Run, precompute_flags: list[str], own_data: Path, out: Path, name: str, workers: int
) -> None:
    path = own_data / name
    path.write_bytes(BAD[name](path.read_bytes()))
    flags = ["--data-dir", own_data, "--workers", workers, "--output", out]
    result = run_cli(*precompute_flags, *flags)
    assert result.code == 1
    assert str(path) in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("shard_size", [10, 1])
def test_skipped_images_stand_in_the_manifest_with_the_reason(
    done: Run, precompute_flags: list[str], bad_data: Path, out: Path, shard_size: int
) -> None:
    flags = ["--data-dir", bad_data, "--on-bad-image", "skip", "--shard-size", shard_size]
    report = done(*precompute_flags, *flags, "--output", out).report
    assert (report["skipped"], report["images"], report["views"]) == (4, 33, 132)
    splits = LabelSet.open(out).manifest["roles"]
    named = {f"{split}/{key}" for split in splits for key in splits[split]["skipped"]}
    assert named == BAD.keys()
    assert "truncated" in splits["train"]["skipped"]["ants/01.jpg"]
    assert "empty" in splits["train"]["skipped"]["bees/04.jpg"]
    assert "not an image" in splits["train"]["skipped"]["cats/07.jpg"]
    assert (splits["train"]["num_images"], splits["val"]["num_images"]) == (33, 14)


def test_shard_keeps_place_reason_bytes_and_class_of_its_skipped_images(
    done: Run, precompute_flags: list[str], bad_data: Path, out: Path
) -> None:
    done(*precompute_flags, "--data-dir", bad_data, "--on-bad-image", "skip", "--output", out)
    found = {
        (path.name, key): missing
        for path in sorted(out.glob("*.h5"))
        for key, missing in ShardFile(path).header["skipped"].items()
    }
    addresses = {  # ten images in a shard, 12 and 5 of a class
        "train/ants/01.jpg": ("train-00000.h5", 1, 0),
        "train/bees/04.jpg": ("train-00001.h5", 6, 1),
        "train/cats/07.jpg": ("train-00003.h5", 1, 2),
        "val/ants/00.jpg": ("val-00000.h5", 0, 0),
    }
    reasons = read_manifest(out)["roles"]
    assert found == {
        (shard, name.partition("/")[2]): {
            "position": position,
            "reason": reasons[name.partition("/")[0]]["skipped"][name.partition("/")[2]],
            "bytes": (bad_data / name).stat().st_size,
            "class": class_id,
            "content_hash": hash_text(content_hash((bad_data / name).read_bytes())),
        }
        for name, (shard, position, class_id) in addresses.items()
    }
    for path in out.glob("train-*.h5"):
        file = ShardFile(path)
        assert file.header["boxes_sha256"] == _boxes_sha256(file)


def test_skipped_images_change_no_other_label(
    done: Run, precompute_flags: list[str], bad_data: Path, labels_dir: Path, out: Path
) -> None:
    done(*precompute_flags, "--data-dir", bad_data, "--on-bad-image", "skip", "--output", out)
    labels, whole = LabelSet.open(out), LabelSet.open(labels_dir)
    keys = list(labels.keys())
    assert set(whole.keys()) - set(keys) == {k.split("/", 1)[1] for k in BAD if k[:5] == "train"}
    found, expected = (s.lookup(keys, [2] * len(keys)).probs_NK for s in (labels, whole))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


def test_stage_two_leaves_out_what_stage_one_skipped(
    done: Run,
    precompute_flags: list[str],
    distill_flags: list[str],
    bad_data: Path,
    out: Path,
    tmp_path: Path,
) -> None:
    flags = ["--data-dir", bad_data, "--on-bad-image", "skip"]
    done(*precompute_flags, *flags, "--output", out)
    run = ["--labels", out, "--output", tmp_path / "run", "--epochs", 1, "--batch-size", 11]
    report = done(*distill_flags, *flags, *run).report
    assert (report["steps"], report["num_images"]) == (3, 14)  # 33 and 14 of 36 and 15


def test_advice_to_skip_can_be_followed_in_the_same_folder(
    run_cli: Run, done: Run, precompute_flags: list[str], bad_data: Path, out: Path
) -> None:
    flags = [*precompute_flags, "--data-dir", bad_data, "--output", out]
    first = run_cli(*flags)
    assert "--on-bad-image skip" in first.stderr
    there = _whole_shards(out)
    report = done(*flags, "--on-bad-image", "skip").report
    assert report["shards_made"] == 6 - len(there)


# --- before the work: --dry-run -----------------------------------------------------------------


@pytest.fixture
def short_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.timing.SAMPLE_SECONDS", 0.2)


@pytest.mark.usefixtures("short_sample")
def test_dry_run_writes_nothing_and_says_rows_bytes_and_seconds(
    done: Run,
    precompute_flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = done(*precompute_flags, "--dry-run", "--output", tmp_path / "labels")
    assert list(tmp_path.iterdir()) == []
    told = result.report
    assert told["dry_run"] is True
    assert (told["views"], told["val_views"]) == (36 * 4, 15)
    assert told["seconds"] == pytest.approx(159 / told["views_per_second"], abs=0.1)
    assert "159 views (15 of validation), " in result.stderr
    assert told["limit"] in ("reading images", "the networks")
    assert f"limit: {told['limit']}" in result.stderr
    assert told["peak_bytes"] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("short_sample")
@pytest.mark.parametrize(
    "flags",
    [
        ["--shard-size", 2048],
        ["--shard-size", 2048, "--topk", "all", "--label-dtype", "float32"],
        ["--shard-size", 2048, "--num-views", 150],
        ["--shard-size", 2048, "--num-views", 600, "--store-logits"],
        ["--shard-size", 3],
        ["--shard-size", 1],
    ],
)
@pytest.mark.parametrize("form", ["rate", "float16"])
def test_dry_run_foretells_the_bytes(
    done: Run,
    plain_precompute_flags: list[str],
    tmp_path: Path,
    contents: Files,
    form: str,
    flags: list[object],
) -> None:
    out = tmp_path / "labels"
    kept = [] if "--topk" in flags else FORMS[form]
    told = done(*plain_precompute_flags, *kept, *flags, "--dry-run", "--output", out).report
    done(*plain_precompute_flags, *kept, *flags, "--batch-size", 512, "--output", out)
    real = sum(map(len, contents(out, "*.h5").values()))
    assert told["bytes"] == pytest.approx(real, rel=0.2, abs=10_000)


@pytest.mark.usefixtures("short_sample")
def test_dry_run_foretells_what_the_encoding_loses(
    done: Run, plain_precompute_flags: list[str], tmp_path: Path
) -> None:
    flags = [*plain_precompute_flags, "--batch-size", 512]
    told = done(*flags, *FORMS["rate"], "--dry-run", "--output", tmp_path / "no").report
    dense = {}
    for form in ("rate", "all float32"):
        done(*flags, *FORMS[form], "--output", tmp_path / form)
        labels = LabelSet.open(tmp_path / form)
        rows = [(key, view) for key in labels.keys() for view in range(labels.num_views)]  # noqa: SIM118
        dense[form] = labels.soft_labels(*map(list, zip(*rows, strict=True))).to_dense().numpy()
    exact, recovered = dense["all float32"].astype(np.float64), dense["rate"].astype(np.float64)
    kl = (exact * np.log(exact / recovered)).sum(1).mean()
    assert kl > 1e-4
    assert told["kl_of_encoding"] == pytest.approx(kl, rel=1e-3)


@pytest.mark.parametrize("rate", [0.004, 5.0])
@pytest.mark.usefixtures("short_sample")
def test_dry_run_warns_of_labels_that_lose_more_than_was_measured(
    done: Run,
    plain_precompute_flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rate: float,
) -> None:
    monkeypatch.setattr("pipeline.precompute._MEASURED_KL", 0.005)  # three classes lose little
    told = done(*plain_precompute_flags, "--rate", rate, "--dry-run", "--output", tmp_path / "no")
    is_much = told.report["kl_of_encoding"] > 0.005
    assert is_much == (rate > 1)
    assert ("with a smaller --rate" in told.stderr) == is_much


# --- disk full: a real, small file system -------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 kB; needs the right to mount one."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(place)]
    try:
        made = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command here")
    if made.returncode:
        pytest.skip(f"may not mount a small file system: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def _grow(place: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=10m", str(place)], check=True)


def test_full_disk_is_one_line_and_what_is_there_is_whole_and_counts(
    run_cli: Run,
    done: Run,
    precompute_flags: list[str],
    small_disk: Path,
    labels_dir: Path,
    contents: Files,
) -> None:
    out = small_disk / "labels"
    flags = [*precompute_flags, "--num-views", 40, "--output", out]
    result = run_cli(*flags)
    assert result.code == 1
    assert "No space left on device" in result.stderr.splitlines()[-1]
    assert result.stderr.splitlines()[-1].startswith("mealv2: ")
    assert "Traceback" not in result.stderr
    there = _whole_shards(out)
    assert 0 < len(there) < 6
    assert not list(out.glob(".tmp-*"))

    _grow(small_disk)
    assert done(*flags).report["shards_made"] == 6 - len(there)


def test_full_disk_in_training_is_one_line_and_the_run_goes_on_from_its_checkpoint(
    run_cli: Run, done: Run, distill_flags: list[str], small_disk: Path
) -> None:
    run = small_disk / "run"
    result = run_cli(*distill_flags, "--output", run)
    assert result.code == 1
    assert "No space left on device" in result.stderr.splitlines()[-1]
    assert not list(run.glob("**/.tmp-*"))
    _grow(small_disk)
    assert done(*distill_flags[:1], "--resume", run).report["epochs"] == 2
