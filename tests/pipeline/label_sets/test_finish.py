"""mealv2 labels finish: a manifest from whole shards, the one that stage one writes, or none."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import stored
from conftest import Result
from mealv2.storage.atomic import TEMPORARY_PREFIX

Run = Callable[..., Result]
Make = Callable[..., Path]
Copy = Callable[[Path], Path]
Files = Callable[..., dict[str, bytes]]


@pytest.fixture
def labels(make_set: Make, copied: Copy) -> Path:
    """A set without its manifest."""
    folder = copied(make_set("--topk", 2))
    (folder / "manifest.json").unlink()
    return folder


def test_it_writes_the_manifest_of_stage_one_and_says_the_accuracies(
    done: Run, labels: Path, make_set: Make, contents: Files
) -> None:
    result = done("labels", "finish", labels, "--batch-size", 16)
    assert contents(labels) == contents(make_set("--topk", 2))
    assert "teachers on the validation split" in result.stderr
    manifest = stored.manifest_of(labels)
    assert result.report["accuracy"] == manifest["roles"]["val"]["accuracy"]
    assert (result.report["images"], result.report["views"]) == (36, 144)
    done("labels", "verify", labels)
    # again, also without the batch size, nothing changes
    done("labels", "finish", labels)
    assert contents(labels) == contents(make_set("--topk", 2))


def test_a_batch_size_that_nobody_says_is_left_out(done: Run, labels: Path) -> None:
    done("labels", "finish", labels)
    assert "batch_size" not in stored.manifest_of(labels)


def test_images_that_were_skipped_are_listed(
    done: Run, label: Make, own_data: Path, tmp_path: Path, contents: Files
) -> None:
    (own_data / "train" / "bees" / "03.jpg").write_bytes(b"no image")
    flags = [*label("--topk", 2), "--data-dir", own_data, "--on-bad-image", "skip"]
    done(*flags, "--output", tmp_path / "set")
    before = contents(tmp_path / "set")
    (tmp_path / "set" / "manifest.json").unlink()
    done("labels", "finish", tmp_path / "set", "--batch-size", 16)
    assert contents(tmp_path / "set") == before
    skipped = stored.manifest_of(tmp_path / "set")["roles"]["train"]["skipped"]
    assert list(skipped) == ["bees/03.jpg"]


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (lambda path: path.unlink(), "1 missing of 6 shards (train-00002.h5)"),
        (lambda path: path.write_bytes(b""), "1 damaged of 6 shards (train-00002.h5)"),
    ],
)
def test_a_set_that_is_not_whole_gets_no_manifest(
    run_cli: Run,
    labels: Path,
    contents: Files,
    harm: Callable[[Path], object],
    named: str,
) -> None:
    harm(labels / "train-00002.h5")
    before = contents(labels)
    result = run_cli("labels", "finish", labels)
    assert (result.code, result.stdout) == (3, "")
    last = result.stderr.splitlines()[-1]
    assert named in last
    assert "run the same `mealv2 precompute` again, then `mealv2 labels finish" in last
    assert contents(labels) == before


def test_a_set_of_others_is_its_own_commands_to_finish(
    run_cli: Run, done: Run, make_set: Make, tmp_path: Path
) -> None:
    done("labels", "split", make_set("--topk", 2), "--output", tmp_path)
    result = run_cli("labels", "finish", tmp_path / "part-0")
    assert (result.code, len(result.stderr.splitlines())) == (3, 1)
    assert "the same `mealv2 labels split` again" in result.stderr


def test_temporary_files_are_counted_and_stay(done: Run, labels: Path) -> None:
    for number, age_s in enumerate((10, 90_000)):
        path = labels / f"{TEMPORARY_PREFIX}{number}"
        path.write_bytes(b"half")
        os.utime(path, (0, path.stat().st_mtime - age_s))
    result = done("labels", "finish", labels)
    assert "holds 2 temporary files of jobs that were killed or still run" in result.stderr
    assert "1 of them older than a day" in result.stderr
    assert len(list(labels.glob(f"{TEMPORARY_PREFIX}*"))) == 2
