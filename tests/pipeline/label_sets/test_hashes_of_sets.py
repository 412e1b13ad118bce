"""Content hashes of sets made from sets, by jobs or by appending, and what tells of them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from conftest import Result
from mealv2.label_set import Appender, LabelSet, ShardFile
from pictures import flip
from stored import manifest_of, signed_again, without_hashes

Run = Callable[..., Result]
Make = Callable[..., Path]
Words = Callable[..., list[object]]
Copy = Callable[[Path], Path]
KEY = "bees/03.jpg"


def hashes_of(folder: Path, split: str = "train") -> dict[str, int]:
    """Return the content hash of each image, of every block of views."""
    found: dict[str, int] = {}
    for _, files in LabelSet.open(folder, split=split).blocks:
        for file in files:
            for key, value in file.content_hashes().items():
                assert found.setdefault(key, value) == value
    return found


def content_of(folder: Path) -> list[object]:
    return [split.get("content") for split in manifest_of(folder)["roles"].values()]


@pytest.fixture(scope="session")
def labels(make_set: Make) -> Path:
    """A label set of the tree; not to be changed."""
    return make_set("--topk", 2)


# --- sets made from sets --------------------------------------------------------------------------


def test_converted_split_and_joined_sets_keep_the_hashes(
    done: Run, labels: Path, tmp_path: Path
) -> None:
    assert len(hashes_of(labels)) == 36
    done("labels", "convert", labels, "--topk", 1, "--output", tmp_path / "converted")
    assert hashes_of(tmp_path / "converted") == hashes_of(labels)
    assert content_of(tmp_path / "converted") == content_of(labels)
    done("labels", "split", labels, "--parts", 2, "--output", tmp_path / "parts")
    parts = [tmp_path / "parts" / f"part-{number}" for number in range(2)]
    assert hashes_of(parts[0]) | hashes_of(parts[1]) == hashes_of(labels)
    without_hashes(parts[1])
    done("labels", "merge", *parts, "--output", tmp_path / "joined")
    assert hashes_of(tmp_path / "joined") == hashes_of(parts[0])  # those that are known


def test_averaged_sets_keep_the_hashes_that_any_of_them_has(
    done: Run, dense_sets: list[Path], copied: Copy, tmp_path: Path
) -> None:
    first = copied(dense_sets[0])
    without_hashes(first)
    result = done("labels", "merge", first, dense_sets[1], "--output", tmp_path / "mean")
    assert hashes_of(tmp_path / "mean") == hashes_of(dense_sets[1])
    assert "not all sets have content hashes" in result.stderr


@pytest.mark.parametrize("split", ["train", "val"])
def test_sets_of_other_pictures_of_the_same_names_and_sizes_are_not_averaged(
    split: str,
    done: Run,
    run_cli: Run,
    label: Words,
    dense_sets: list[Path],
    own_data: Path,
    teacher_dirs: dict[str, Path],
    tmp_path: Path,
) -> None:
    key = "ants/01.jpg"
    flip(own_data / split / key, at=-1)  # behind the picture's end: it decodes as before
    flags = ["--topk", "all", "--label-dtype", "float32", "--data-dir", own_data]
    teacher = list(teacher_dirs)[1]
    done(*label(*flags, teachers=[teacher]), "--output", tmp_path / "other")
    words = ["labels", "merge", dense_sets[0], tmp_path / "other"]
    result = run_cli(*words, "--output", tmp_path / "mean")
    assert result.code == 3
    assert f"different pictures {key} of {split}" in result.stderr
    assert not (tmp_path / "mean").exists()


def test_an_export_puts_no_other_picture_beside_a_label(
    run_cli: Run, labels: Path, own_data: Path, tmp_path: Path
) -> None:
    flip(own_data / "train" / KEY, at=-1)
    words = ["labels", "export", labels, "--to", "webdataset", "--data-dir", own_data]
    result = run_cli(*words, "--output", tmp_path / "shards")
    assert result.code == 3
    assert f"{KEY}: it is not the picture that was labelled" in result.stderr


# --- what tells of them ---------------------------------------------------------------------------


def test_info_status_and_verify_say_which_images_have_no_hash(
    done: Run, labels: Path, data_dir: Path, tmp_path: Path, distill_flags: list[str]
) -> None:
    some, none = (Path(shutil.copytree(labels, tmp_path / name)) for name in ("some", "none"))
    without_hashes(some, "train-00001.h5")
    without_hashes(none)
    said = {
        labels: ("content hashes of all images", 36),
        some: ("content hashes of 26 of 36 images", 26),
        none: ("no content hashes", 0),
    }
    for folder, (text, number) in said.items():
        if folder == some:  # as `labels merge` writes it
            (folder / "manifest.json").unlink()
            done("labels", "finish", folder)
        info = done("labels", "info", folder)
        assert text in info.stderr
        assert info.report["roles"]["train"]["content_hashes"] == number
        status = done("labels", "status", folder)
        assert status.report["blocks"][0]["content_hashes"] == number
        assert ("without a content hash" in status.stderr) == (number < 36)
    result = done("labels", "verify", some, "--data-dir", data_dir)
    assert result.report["data_compared"] == "content, of some"
    assert (result.report["images_compared"], result.report["images_not_compared"]) == (41, 10)
    assert "only names and sizes of 10 without a content hash" in result.stderr
    result = done(*distill_flags, "--labels", some, "--epochs", 1, "--output", tmp_path / "run")
    assert "no content hashes of 10 images" in result.stderr


def test_verify_compares_the_manifest_with_the_hashes_in_the_shards(
    run_cli: Run, labels: Path, copied: Copy
) -> None:
    folder = copied(labels)
    signed_again(folder, lambda plan, splits: splits["val"]["content"].update(sha256="0" * 64))
    result = run_cli("labels", "verify", folder)
    assert result.code == 3
    assert "manifest.json: has another hash of the images of val" in result.stderr


# --- jobs, added views, appended rows -------------------------------------------------------------


def test_a_job_compares_the_images_of_its_own_complete_shards_only(
    run_cli: Run, done: Run, label: Words, own_data: Path, tmp_path: Path
) -> None:
    words = [*label("--data-dir", own_data), "--output", tmp_path / "set"]
    jobs = [[*words, "--job-index", index, "--num-jobs", 2] for index in range(2)]
    for job in jobs:
        done(*job)
    names = sorted(path.name for path in (tmp_path / "set").glob("*.h5"))  # train first
    train = [name for name in names if name.startswith("train")]
    keys = {name: ShardFile(tmp_path / "set" / name).keys() for name in train}
    flip(own_data / "train" / keys["train-00000.h5"][0], at=-1)
    num_val = len(names) - len(train)
    own, other = (num_val % 2, 1 - num_val % 2)  # jobs that make train-00000 and train-00001
    (tmp_path / "set" / "train-00002.h5").unlink()
    (tmp_path / "set" / "train-00003.h5").unlink()
    result = done(*jobs[other])
    assert result.report["shards_made"] == 1
    num_compared = len(keys["train-00001.h5"])
    assert f"train: {num_compared} images, " in result.stderr
    result = run_cli(*jobs[own])
    assert result.code == 3
    assert keys["train-00000.h5"][0] in result.stderr
    assert not (tmp_path / "set" / "train-00002.h5").exists()
    assert done(*jobs[own], "--check-images", "never").report["shards_made"] == 1


def test_verify_finds_added_views_of_another_picture(
    run_cli: Run, done: Run, labels: Path, own_data: Path, copied: Copy, teach_flags: list[object]
) -> None:
    folder = copied(labels)
    flip(own_data / "train" / KEY, at=-1)
    words = ["labels", "add-views", folder, "--data-dir", own_data, "--num-views", 6]
    done(*words, *teach_flags, "--check-images", "never")
    result = run_cli("labels", "verify", folder)
    assert result.code == 3
    assert f"has labels of another picture for 1 image: {KEY}" in result.stderr


def test_appended_rows_keep_the_hash_of_an_image_that_no_shard_has(
    run_cli: Run,
    done: Run,
    labels: Path,
    own_data: Path,
    copied: Copy,
    distill_flags: list[str],
    teacher_flags: list[str],
    tmp_path: Path,
) -> None:
    folder, new = copied(labels), own_data / "train" / "bees" / "new.jpg"
    shutil.copy(own_data / "train" / KEY, new)
    words = [*distill_flags, "--labels", folder, "--data-dir", own_data, "--missing", "teach"]
    words += [*teacher_flags, "--write-back", "--epochs", 1, "--output"]
    result = run_cli(*words, tmp_path / "never", "--check-images", "never")
    assert result.code == 2
    assert "could append labels of other pictures" in result.stderr
    done(*words, tmp_path / "run")
    (file,) = LabelSet.open(folder).appended_files
    assert file.content_hashes() == {"bees/new.jpg": hashes_of(folder)[KEY]}
    for command in (["convert", folder], ["split", folder, "--parts", 2]):
        out = tmp_path / str(command[0])
        done("labels", *command, "--output", out)
        out = out / "part-1" if command[0] == "split" else out
        (copy,) = LabelSet.open(out).appended_files
        assert copy.content_hashes() == file.content_hashes()
    flip(new, at=-1)
    result = run_cli(*words, tmp_path / "again")
    assert result.code == 3
    assert "bees/new.jpg: it is not the picture that was labelled" in result.stderr


def test_verify_finds_appended_rows_of_another_picture(
    run_cli: Run, labels: Path, copied: Copy
) -> None:
    folder = copied(labels)
    opened = LabelSet.open(folder)
    rows = opened.rows([KEY], [0])
    for value in (hashes_of(folder)[KEY], 5):
        assert run_cli("labels", "verify", folder).code == 0
        appender = Appender(LabelSet.open(folder), hash_of=lambda _, value=value: value)
        appender.add([KEY], [9], rows)
        path = appender.flush()
    assert path is not None
    assert np.array_equal(ShardFile(path).column("content_hashes"), [5])
    result = run_cli("labels", "verify", folder)
    assert result.code == 3
    assert f"{path.name}: has labels of another picture for 1 image: {KEY}" in result.stderr
