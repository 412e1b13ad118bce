"""Every stage on tar shards: labels, runs and figures as on the folder they were made of."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import IMG_SIZE, Result
from mealv2.data.folder import ImageFolder
from mealv2.data.loader import read_views
from mealv2.data.open import open_source
from mealv2.data.pixels import cut, decode
from mealv2.data.tar_index import index_shard
from mealv2.data.view_reader import ViewReader
from mealv2.label_set import LabelSet, read_manifest
from mealv2.views import DrawnViews, view_of
from tars import tar_tree

Run = Callable[..., Result]
Contents = Callable[..., dict[str, bytes]]

LAYOUTS: dict[str, dict[str, Any]] = {
    "beside": {"by_webdataset": True},
    "inside": {"beside": False, "per_shard": 7},
}


def on(data_dir: Path | str, flags: list[str]) -> list[object]:
    """Return flags with another --data-dir, without --shard-size, which tar shards say."""
    pairs = zip(flags[1::2], flags[2::2], strict=True)
    kept = [part for pair in pairs if pair[0] != "--shard-size" for part in pair]
    return [flags[0], *kept, "--data-dir", data_dir]


@pytest.fixture(scope="module")
def twin(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree as tar files whose samples say the keys of the tree. Not to be changed."""
    return tar_tree(data_dir, tmp_path_factory.mktemp("tars") / "twin", keys=True)


def probabilities(labels: Path, split: str) -> dict[tuple[str, int], np.ndarray]:
    """Return every label of a set, dense."""
    stored = LabelSet.open(labels, split=split)
    images = list(stored.keys())
    names = [(key, view) for key in images for view in range(stored.num_views)]
    keys, views = zip(*names, strict=True)
    dense = stored.soft_labels(keys, views).to_dense().numpy()
    return dict(zip(names, dense, strict=True))


def assert_same_labels(labels: Path, others: Path) -> None:
    """Insist that two sets say the same of the same views, in whatever shards.

    The rows of a batch are others, so that the last bit of a float16 may be another too.
    """
    for split in ("train", "val"):
        ours, theirs = probabilities(labels, split), probabilities(others, split)
        assert ours.keys() == theirs.keys()
        for name, row in ours.items():
            np.testing.assert_allclose(row, theirs[name], atol=1e-3)
        plans = [read_manifest(folder)["plan"]["roles"][split] for folder in (labels, others)]
        assert plans[0]["data_sha256"] == plans[1]["data_sha256"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_labels_of_tar_shards_are_those_of_the_folder_in_a_shard_for_each_tar_file(
    done: Run,
    precompute_flags: list[str],
    labels_dir: Path,
    data_dir: Path,
    tmp_path: Path,
    layout: str,
) -> None:
    tree = tar_tree(data_dir, tmp_path / "tars", keys=True, **LAYOUTS[layout])
    labels = tmp_path / "labels"
    done(*on(tree, precompute_flags), "--output", labels, "--workers", 2)
    assert_same_labels(labels, labels_dir)
    plan = read_manifest(labels)["plan"]
    assert "shard_size" not in plan
    for split in ("train", "val"):
        tars = sorted(tree.glob(f"{split}*/*.tar" if layout == "inside" else f"{split}-*.tar"))
        _, files = LabelSet.open(labels, split=split).blocks[0]
        in_tars = [index_shard(tar).keys for tar in tars]
        assert [file.keys() for file in files] == in_tars
        assert plan["roles"][split]["shard_sizes"] == list(map(len, in_tars))


def test_shard_size_is_refused_where_tar_files_say_it(
    run_cli: Run, precompute_flags: list[str], twin: Path, tmp_path: Path
) -> None:
    words = [*on(twin, precompute_flags), "--output", tmp_path / "labels", "--shard-size", 10]
    result = run_cli(*words)
    assert result.code == 2
    assert "--shard-size has no effect on tar shards" in result.stderr
    assert not (tmp_path / "labels").exists()


def test_shard_size_is_of_the_split_that_is_no_tar_files(
    done: Run, precompute_flags: list[str], data_dir: Path, twin: Path, tmp_path: Path
) -> None:
    tree = tmp_path / "mixed"
    shutil.copytree(twin, tree, ignore=shutil.ignore_patterns("val-*"))
    shutil.copytree(data_dir / "val", tree / "val")
    words = [*on(tree, precompute_flags), "--output", tmp_path / "labels", "--shard-size", 4]
    done(*words)
    blocks = [LabelSet.open(tmp_path / "labels", split=r).blocks[0][1] for r in ("train", "val")]
    assert [[file.num_images for file in files] for files in blocks] == [
        [10, 10, 10, 6],
        [4, 4, 4, 3],
    ]


def test_info_knows_how_many_shards_an_unfinished_set_of_tar_files_is_to_have(
    done: Run, precompute_flags: list[str], twin: Path, tmp_path: Path
) -> None:
    labels = tmp_path / "labels"
    done(*on(twin, precompute_flags), "--output", labels)
    (labels / "manifest.json").unlink()
    (labels / "train-00001.h5").unlink()
    splits = done("labels", "info", labels).report["roles"]
    assert (splits["train"]["shards"], splits["train"]["of"]) == (3, 4)
    assert (splits["val"]["shards"], splits["val"]["of"]) == (2, 2)


def test_sets_made_of_sets_of_tar_files_do_not_say_their_shards(
    done: Run, precompute_flags: list[str], twin: Path, tmp_path: Path
) -> None:
    labels, parts = tmp_path / "labels", tmp_path / "parts"
    done(*on(twin, precompute_flags), "--output", labels)
    done("labels", "split", labels, "--parts", 2, "--output", parts)
    done("labels", "merge", parts / "part-0", parts / "part-1", "--output", tmp_path / "joined")
    assert_same_labels(tmp_path / "joined", labels)
    for folder in (parts / "part-0", tmp_path / "joined"):
        assert "shard_sizes" not in (folder / "plan.json").read_text()


def test_a_pattern_gives_both_splits(
    done: Run, precompute_flags: list[str], labels_dir: Path, twin: Path, tmp_path: Path
) -> None:
    pattern = f"{twin}/{{train-{{000000..000003}},val-*}}.tar"
    done(*on(pattern, precompute_flags), "--output", tmp_path / "labels")
    assert_same_labels(tmp_path / "labels", labels_dir)


def test_views_of_plain_samples_are_drawn_from_their_webdataset_keys(
    data_dir: Path, tmp_path: Path
) -> None:
    source = open_source(tar_tree(data_dir, tmp_path / "tars"), "train")
    folder = ImageFolder(data_dir, "train")
    assert source.keys == [key.rpartition(".")[0] for key in folder.keys]
    reader = ViewReader(source, img_size=IMG_SIZE, views=DrawnViews(7))
    (pixels,) = read_views(reader, [[(3, (0, 5)), (20, (1,))]], workers=1)
    for row, (position, index) in enumerate([(3, 0), (3, 5), (20, 1)]):
        image = decode(folder.read(position))
        width, height = image.shape[1::-1]
        view = view_of(source.keys[position], index, seed=7, width=width, height=height)
        expected = cut(image, view, IMG_SIZE)
        np.testing.assert_array_equal(pixels.images_BCHW[row].permute(1, 2, 0), expected)


def test_one_set_of_plain_tar_shards_goes_through_all_stages(
    done: Run,
    run_cli: Run,
    precompute_flags: list[str],
    distill_flags: list[str],
    data_dir: Path,
    tmp_path: Path,
) -> None:
    tree = tar_tree(data_dir, tmp_path / "tars")
    labels, run = tmp_path / "labels", tmp_path / "run"
    done(*on(tree, precompute_flags), "--output", labels)
    assert done("labels", "verify", labels, "--data-dir", tree, "--workers", 0).report["data"]
    assert read_manifest(labels)["plan"]["classes"] == ["ants", "bees", "cats"]
    assert next(iter(LabelSet.open(labels).keys())) == "ants/00"
    done(*on(tree, distill_flags), "--labels", labels, "--epochs", 1, "--output", run)
    done("evaluate", "--data-dir", tree, "--checkpoint", run, "--workers", 0)

    (tree / "val-000001.tar").write_bytes(b"")
    result = run_cli("labels", "verify", labels, "--data-dir", tree, "--workers", 0)
    assert result.code == 1
    assert "val-000001.tar" in result.stderr


def test_training_and_figures_are_the_same_from_tar_shards(
    done: Run,
    distill_flags: list[str],
    finetune_flags: list[str],
    student_dir: Path,
    data_dir: Path,
    twin: Path,
    tmp_path: Path,
    weights: Callable[[Path], dict[str, bytes]],
) -> None:
    start = ["--initial-checkpoint", student_dir]
    one_epoch = ["--epochs", 1, "--seed", 3]
    for flags in (distill_flags, [f for f in finetune_flags if f != "--no-pretrained"]):
        runs = tmp_path / f"{flags[0]}-folder", tmp_path / f"{flags[0]}-tars"
        for run, data in zip(runs, (data_dir, twin), strict=True):
            done(*on(data, flags), *start, *one_epoch, "--output", run)
        assert weights(runs[0]) == weights(runs[1])
    reports = [
        done(
            "evaluate", "--data-dir", data, "--checkpoint", runs[0], "--workers", 0, "--json"
        ).report
        for data in (data_dir, twin)
    ]
    assert {**reports[0], "data": ""} == {**reports[1], "data": ""}


def test_an_image_that_its_shard_no_longer_holds_is_skipped_by_name(
    done: Run, run_cli: Run, student_dir: Path, twin: Path, tmp_path: Path
) -> None:
    tree = tmp_path / "tars"
    shutil.copytree(twin, tree)
    path = tree / "val-000000.tar"
    data = path.read_bytes()
    place = data.index(b"ants/02.png") + 600  # within the image
    path.write_bytes(data[:place] + bytes(300) + data[place + 300 :])
    words = ["evaluate", "--data-dir", tree, "--checkpoint", student_dir, "--workers", 0]
    result = run_cli(*words)
    assert result.code == 1
    assert "ants/02.png" in result.stderr
    done(*words, "--on-bad-image", "skip")


def test_validation_shards_without_class_names_say_what_to_do(
    run_cli: Run, precompute_flags: list[str], twin: Path, tmp_path: Path
) -> None:
    tree = tmp_path / "tars"
    shutil.copytree(twin, tree)
    (tree / "classes.txt").unlink()
    for number in (2, 3):  # the third class
        (tree / f"train-00000{number}.tar").unlink()
    result = run_cli(*on(tree, precompute_flags), "--output", tmp_path / "labels")
    assert result.code == 2
    assert "different classes from the training data: 2; " in result.stderr
    assert "name the classes in classes.txt" in result.stderr


# --- exported sets ------------------------------------------------------------------------------


def test_an_exported_set_is_data_that_its_labels_fit(
    done: Run, labels_dir: Path, data_dir: Path, twin: Path, tmp_path: Path, contents: Contents
) -> None:
    for name, data in (("from-folder", data_dir), ("from-tars", twin)):
        words = ["labels", "export", labels_dir, "--to", "webdataset", "--data-dir", data]
        done(*words, "--output", tmp_path / name)
    exported = contents(tmp_path / "from-folder")
    assert contents(tmp_path / "from-tars") == exported
    done("labels", "export", labels_dir, "--to", "webdataset", "--split", "val",
         "--data-dir", data_dir, "--output", tmp_path / "val")  # fmt: skip
    for path in (tmp_path / "val").glob("*.tar"):
        shutil.copy(path, tmp_path / "from-tars")
    report = done(
        "labels", "verify", labels_dir, "--data-dir", tmp_path / "from-tars", "--workers", 0
    ).report
    assert report["data"] == "the same"


def test_labels_of_plain_tar_shards_are_exported_with_their_images(
    done: Run, precompute_flags: list[str], data_dir: Path, tmp_path: Path
) -> None:
    tree = tar_tree(data_dir, tmp_path / "tars")
    labels, out = tmp_path / "labels", tmp_path / "out"
    done(*on(tree, precompute_flags), "--val-split", "none", "--output", labels)
    done("labels", "export", labels, "--to", "webdataset", "--data-dir", tree, "--output", out)
    before, after = (open_source(place, "train") for place in (tree, out))
    assert after.keys == before.keys
    assert after.classes == before.classes
    assert [after.read(p) for p in range(36)] == [before.read(p) for p in range(36)]
