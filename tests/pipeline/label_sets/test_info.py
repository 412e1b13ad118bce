"""mealv2 labels info: what a set is, finished or not, without reading its labels."""

from collections.abc import Callable
from pathlib import Path

import pytest

import stored
from conftest import Result
from mealv2.label_set import LabelSet, ShardFile

Run = Callable[..., Result]
Make = Callable[..., Path]
Copy = Callable[[Path], Path]


def test_it_says_views_teachers_encoding_bytes_and_accuracy(done: Run, make_set: Make) -> None:
    folder = make_set("--topk", 2, "--label-dtype", "float16")
    result = done("labels", "info", folder)
    report, manifest = result.report, stored.manifest_of(folder)
    assert (report["finished"], report["classes"], report["img_size"]) == (True, 3, 32)
    assert report["teachers"] == ["test_resnet", "test_efficientnet"]
    assert report["encoding"] == manifest["plan"]["labels"]
    assert report["plan_sha256"] == manifest["plan_sha256"]
    train, val = report["roles"]["train"], report["roles"]["val"]
    assert (train["images"], train["views"], train["shards"]) == (36, 4, 4)
    assert train["bytes"] == sum(p.stat().st_size for p in folder.glob("train-*.h5"))
    # two ids of 2 bits, two probabilities and the mass of all others
    assert train["label_bytes"] == 144 * (1 + 3 * 2)
    assert train["bytes_per_view"] == train["label_bytes"] / 144
    assert val["accuracy"] == manifest["roles"]["val"]["accuracy"]
    for said in (
        "top-2, float16",
        "test_resnet, test_efficientnet",
        "36 images x 4 views, 4 shards",
        "random-resized-crop, seed 7",
        f"KL of the labels {train['encoding_loss']['kl']:.3g} nats, measured on 144 views",
        f"ensemble top-1 {val['accuracy']['ensemble']['top1']:.2f}",
    ):
        assert said in result.stderr


def test_skipped_appended_and_added_are_counted(
    done: Run, appended_set: Path, data_dir: Path, teach_flags: list[object]
) -> None:
    words = ["labels", "add-views", appended_set, "--data-dir", data_dir, "--num-views", 6]
    done(*words, *teach_flags)
    train = done("labels", "info", appended_set).report["roles"]["train"]
    assert (train["views"], train["shards"], train["appended_rows"]) == (6, 8, 3)


def test_a_derived_set_says_how_it_was_made(done: Run, make_set: Make, tmp_path: Path) -> None:
    done("labels", "split", make_set("--topk", 2), "--output", tmp_path)
    result = done("labels", "info", tmp_path / "part-1")
    assert "`mealv2 labels split`: part 1 of 2" in result.stderr
    derived = result.report["derived"]
    assert derived["from"] == [stored.manifest_of(make_set("--topk", 2))["plan_sha256"]]


def test_an_unfinished_set_says_what_is_there_and_what_to_run(
    done: Run, make_set: Make, copied: Copy
) -> None:
    folder = copied(make_set("--topk", 2))
    (folder / "manifest.json").unlink()
    (folder / "train-00002.h5").unlink()
    result = done("labels", "info", folder)
    assert result.report["finished"] is False
    assert result.report["roles"] == {
        "train": {"images": 36, "shards": 3, "of": 4},
        "val": {"images": 15, "shards": 2, "of": 2},
    }
    assert "36 images, 3 of 4 shards" in result.stderr
    assert "not finished: run the same `mealv2 precompute` again" in result.stderr


def test_an_unfinished_set_of_another_command_names_that(
    done: Run, make_set: Make, tmp_path: Path
) -> None:
    done("labels", "convert", make_set("--topk", 2), "--topk", 1, "--output", tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    result = done("labels", "info", tmp_path / "out")
    assert "run the same `mealv2 labels convert` again" in result.stderr
    assert result.report["roles"]["train"]["shards"] == 4


def test_no_labels_are_read(done: Run, make_set: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a shard was opened")

    folder = make_set("--topk", 2)
    monkeypatch.setattr(ShardFile, "__init__", refuse)
    monkeypatch.setattr(LabelSet, "open", refuse)
    done("labels", "info", folder)


@pytest.mark.parametrize("spoil", ["missing", "cut", "head"])
def test_a_shard_that_is_not_whole_is_named(
    run_cli: Run, make_set: Make, copied: Copy, flipped_bit: Callable[..., None], spoil: str
) -> None:
    folder = copied(make_set("--topk", 2))
    path = folder / "train-00001.h5"
    if spoil == "missing":
        path.unlink()
    elif spoil == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        flipped_bit(path, 30)
    result = run_cli("labels", "info", folder)
    assert result.code == 3
    assert "train-00001.h5" in result.stderr
    assert "`mealv2 labels verify` lists all damage, and what to do" in result.stderr


def test_a_folder_that_is_no_label_set_is_said_so(run_cli: Run, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        result = run_cli("labels", "info", folder)
        assert result.code == 3
        assert "no label set in" in result.stderr
