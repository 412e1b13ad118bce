"""mealv2 labels status: what is whole, from the files alone, and what to run next."""

import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import stored
from conftest import Result
from mealv2.label_set import ShardFile, read_shard, write_shard
from mealv2.storage.atomic import TEMPORARY_PREFIX

Run = Callable[..., Result]
Make = Callable[..., Path]
Copy = Callable[[Path], Path]
Files = Callable[..., dict[str, bytes]]


@pytest.fixture
def labels(make_set: Make, copied: Copy) -> Path:
    """A finished set: 4 shards of train, 2 of val. A copy to damage."""
    return copied(make_set("--topk", 2))


def check(result: Result, code: int = 1) -> dict[str, Any]:
    """Check how it ended; return the report."""
    assert result.code == code, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("mealv2: ")]
    assert lines == (result.stderr.splitlines()[-1:] if code else [])
    return result.report


def row(result: Result, split: str, views: str) -> list[str]:
    """Return the figures of a line of the table: shards, complete, missing, damaged."""
    (line,) = (x for x in result.stderr.splitlines() if x.split()[:2] == [split, views])
    return line.split()[2:6]


def test_a_finished_set_is_whole_and_nothing_is_to_be_run(
    run_cli: Run, labels: Path, contents: Files
) -> None:
    before = contents(labels)
    result = run_cli("labels", "status", labels)
    report = check(result, 0)
    assert (report["finished"], report["next"]) == (True, None)
    assert (report["temporary_files"], report["unlisted_files"]) == ({}, [])
    assert report["bytes"] == sum(len(d) for n, d in before.items() if n.endswith(".h5"))
    train, val = report["blocks"]
    assert (train["role"], train["views"], train["shards"], train["complete"]) == (
        "train",
        [0, 4],
        4,
        4,
    )
    assert (train["images"], val["images"]) == (36, 15)
    assert row(result, "train", "0-3") == ["4", "4", "0", "0"]
    assert row(result, "val", "0-0") == ["2", "2", "0", "0"]
    assert contents(labels) == before


def flip(path: Path, column: str) -> None:
    """Turn a bit in a column of a shard."""
    offset = ShardFile(path).header["columns"][column]["offset"]
    data = bytearray(path.read_bytes())
    data[offset + 1] ^= 0x10
    path.write_bytes(bytes(data))


def test_what_is_missing_or_damaged_is_counted_named_and_listed(
    run_cli: Run, labels: Path, tmp_path: Path, label: Callable[..., list[object]]
) -> None:
    whole = (labels / "train-00000.h5").read_bytes()
    (labels / "train-00000.h5").unlink()
    flip(labels / "train-00001.h5", "labels")
    (labels / "train-00002.h5").write_bytes(whole)
    (labels / "val-00001.h5").unlink()
    (labels / "val-00001.h5").mkdir()
    (labels / "notes.txt").write_text("mine")
    (labels / "train-00009.h5").write_bytes(whole)
    temporary = labels / f"{TEMPORARY_PREFIX}train-00000.h5-host-1-ab"
    temporary.write_bytes(b"half")
    os.utime(temporary, (0, temporary.stat().st_mtime - 7200))
    listed = tmp_path / "list.txt"

    result = run_cli("labels", "status", labels, "--list", listed)
    report = check(result)
    train, val = report["blocks"]
    assert train["missing"] == ["train-00000.h5"]
    assert train["damaged"].keys() == {"train-00001.h5", "train-00002.h5"}
    assert "is damaged: labels of 1 image" in train["damaged"]["train-00001.h5"]
    assert "another label set" in train["damaged"]["train-00002.h5"]
    assert "cannot read" in val["damaged"]["val-00001.h5"]
    assert row(result, "train", "0-3") == ["4", "1", "1", "2"]
    assert row(result, "val", "0-0") == ["2", "1", "0", "1"]
    assert report["unlisted_files"] == ["notes.txt", "train-00009.h5"]
    assert report["temporary_files"][temporary.name]["bytes"] == 4
    assert report["temporary_files"][temporary.name]["age_s"] == pytest.approx(7200, abs=60)
    assert report["finished"] is False
    broken = [f"train-0000{n}.h5" for n in range(3)] + ["val-00001.h5"]
    assert listed.read_text().splitlines() == broken
    assert "1 missing and 3 damaged of 6 shards" in result.stderr.splitlines()[-1]
    for word in ("precompute", "--teacher test_resnet=… ", "--num-views 4 ", f"--output {labels} "):
        assert word in report["next"]
    assert f"--shard-list {listed}" in report["next"]

    (labels / "val-00001.h5").rmdir()
    flags = [*label("--topk", 2), "--output", labels, "--shard-list", listed]
    assert run_cli(*flags).report["shards_made"] == 4
    result = run_cli("labels", "status", labels, "--list", listed)
    assert check(result, 0)["finished"], "the manifest was there all the time, and is of these"
    assert listed.read_text() == ""


def test_whole_shards_without_a_manifest_of_them_are_to_be_finished(
    run_cli: Run, done: Run, labels: Path, make_set: Make
) -> None:
    manifest, path = labels / "manifest.json", labels / "train-00001.h5"
    manifest.unlink()
    report = check(run_cli("labels", "status", labels))
    assert report["next"] == f"`mealv2 labels finish {labels}`"
    # one that was made anew since, on another machine: as whole, of other bytes
    shutil.copy(make_set("--topk", 2) / "manifest.json", manifest)
    write_shard(path, replace(read_shard(path), counts={"other": [1]}), replace=True)
    report = check(run_cli("labels", "status", labels))
    assert [block["complete"] for block in report["blocks"]] == [4, 2]
    assert report["next"] == f"`mealv2 labels finish {labels}`"
    assert (
        "replaced since the previous manifest: 1 shard (" in done("labels", "finish", labels).stderr
    )
    check(run_cli("labels", "status", labels), 0)


def test_views_that_were_begun_are_a_block_of_their_own(
    run_cli: Run,
    done: Run,
    labels: Path,
    data_dir: Path,
    teach_flags: list[object],
    tmp_path: Path,
) -> None:
    words = ["labels", "add-views", labels, "--data-dir", data_dir, "--num-views", 6, *teach_flags]
    done(*words, "--job-index", 0, "--num-jobs", 2)
    (labels / "train-00000-views-9-10.h5").write_text("follows nothing")
    listed = tmp_path / "list.txt"
    result = run_cli("labels", "status", labels, "--list", listed)
    report = check(result)
    assert row(result, "train", "0-3") == ["4", "4", "0", "0"]
    assert row(result, "train", "4-5") == ["4", "2", "2", "0"]
    assert report["finished"], "what was there before is a whole set"
    assert "is finished but for views 4 to 5: 2 missing of 10 shards; next: " in result.stderr
    assert "add-views" in report["next"]
    assert "--num-views 6" in report["next"]
    assert listed.read_text().split() == [f"train-0000{n}-views-4-5.h5" for n in (1, 3)]
    assert report["unlisted_files"] == ["train-00000-views-9-10.h5"]

    done(*words, "--shard-list", listed)
    report = check(run_cli("labels", "status", labels))
    assert report["next"] == f"`mealv2 labels finish {labels}`"
    done("labels", "finish", labels)
    assert check(run_cli("labels", "status", labels), 0)["finished"]
    assert len(stored.manifest_of(labels)["roles"]["train"]["blocks"]) == 2


def test_a_set_made_of_others_is_known_by_its_manifest(
    run_cli: Run, done: Run, make_set: Make, tmp_path: Path
) -> None:
    done("labels", "split", make_set("--topk", 2), "--output", tmp_path)
    part = tmp_path / "part-0"
    assert check(run_cli("labels", "status", part), 0)["finished"]
    name = next(path.name for path in sorted(part.glob("train-*.h5")))
    (part / name).unlink()
    report = check(run_cli("labels", "status", part))
    assert report["blocks"][0]["missing"] == [name]
    assert "labels split" in report["next"]
    (part / "manifest.json").unlink()
    result = run_cli("labels", "status", part)
    assert (result.code, len(result.stderr.splitlines())) == (3, 1)
    assert "its plan does not list its shards; run the same `mealv2 labels split`" in result.stderr


@pytest.mark.parametrize("kind", ["nowhere", "empty"])
def test_what_is_no_set_is_refused(run_cli: Run, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "set"
    if kind == "empty":
        folder.mkdir()
    result = run_cli("labels", "status", folder)
    assert (result.code, len(result.stderr.splitlines())) == (3, 1)


def test_beside_running_jobs_it_says_what_is_there_and_never_fails(
    run_cli: Run, labels: Path
) -> None:
    """Files come and go while it looks: published by link, damaged ones replaced."""
    path, stop = labels / "train-00001.h5", threading.Event()
    data = path.read_bytes()
    aside, other = labels / f"{TEMPORARY_PREFIX}a", labels / f"{TEMPORARY_PREFIX}b"

    def work() -> None:
        while not stop.is_set():
            other.write_bytes(data)
            path.rename(aside)
            os.link(other, path)
            other.unlink()
            aside.unlink()

    job = threading.Thread(target=work)
    job.start()
    try:
        for _ in range(30):
            result = run_cli("labels", "status", labels)
            broken = [*result.report["blocks"][0]["missing"]]
            assert broken in ([], ["train-00001.h5"])
            assert result.report["blocks"][0]["damaged"] == {}
            assert result.code == len(broken)
    finally:
        stop.set()
        job.join()


@pytest.mark.parametrize("name", ["nowhere/list.txt", "folder"])
def test_a_list_that_cannot_be_written_is_refused_before_anything_is_read(
    run_cli: Run, tmp_path: Path, name: str
) -> None:
    (tmp_path / "folder").mkdir()
    result = run_cli("labels", "status", tmp_path / "no-labels", "--list", tmp_path / name)
    assert result.code == 2
    why = "is a folder; give" if name == "folder" else f": there is no folder {tmp_path}/nowhere"
    assert result.stderr.startswith(f"mealv2: --list {tmp_path / name}")
    assert why in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("place", ["s3:/bucket/labels", "s3://"])
def test_half_a_url_is_a_line(run_cli: Run, place: str) -> None:
    result = run_cli("labels", "status", place)
    assert result.code == 2
    assert result.stderr.startswith("mealv2: the URL ")
    assert len(result.stderr.splitlines()) == 1
