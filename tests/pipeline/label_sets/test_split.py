"""mealv2 labels split: parts are sets of their own and together the whole."""

from collections.abc import Callable
from pathlib import Path

import pytest

import stored
from cases import mostly_slow
from conftest import Result
from mealv2.data.folder import ImageFolder
from mealv2.label_set import LabelSet

Run = Callable[..., Result]
Make = Callable[..., Path]


def _parts(folder: Path, number: int) -> list[Path]:
    return [folder / f"part-{n}" for n in range(number)]


@pytest.mark.parametrize("number", mostly_slow([2, 5, 36]))
def test_parts_are_whole_sets_of_disjoint_images_in_order(
    done: Run, make_set: Make, tmp_path: Path, number: int, data_dir: Path
) -> None:
    whole = make_set("--topk", 2)
    report = done("labels", "split", whole, "--parts", number, "--output", tmp_path).report
    assert [part["labels"] for part in report["parts"]] == [
        str(path) for path in _parts(tmp_path, number)
    ]
    keys: list[str] = []
    for part in _parts(tmp_path, number)[:: 1 if number < 36 else 9]:
        found = done("labels", "verify", part, "--data-dir", data_dir)
        assert found.report["data"] == "a part of it"
    rows = {}
    for part in _parts(tmp_path, number):
        labels = LabelSet.open(part)
        keys += labels.keys()
        rows |= stored.rows_of(part)
        assert abs(len(labels) - 36 / number) < 1
        assert stored.rows_of(part, "val") == stored.rows_of(whole, "val")
    assert keys == list(LabelSet.open(whole).keys())
    assert rows == stored.rows_of(whole)


def test_a_student_learns_from_one_part(
    done: Run,
    run_cli: Run,
    make_set: Make,
    distill_flags: list[str],
    tmp_path: Path,
    events: Callable[..., list[dict[str, int]]],
) -> None:
    done("labels", "split", make_set("--topk", 2), "--output", tmp_path)
    words = [*distill_flags, "--labels", tmp_path / "part-1", "--epochs", 1]
    refused = run_cli(*words, "--output", tmp_path / "refused")
    assert refused.code == 3
    assert "--missing teach or --missing skip" in refused.stderr
    result = done(*words, "--missing", "skip", "--output", tmp_path / "run")
    assert "18 images are not in the label set; they are skipped" in result.stderr


def test_skipped_images_go_along(
    done: Run, label: Callable[..., list[object]], own_data: Path, tmp_path: Path
) -> None:
    for name in ("ants/00.jpg", "bees/06.jpg", "cats/11.png"):
        path = own_data / "train" / name
        path.write_bytes(bytes(path.stat().st_size))
    whole = tmp_path / "whole"
    done(*label("--data-dir", own_data, "--on-bad-image", "skip"), "--output", whole)
    done("labels", "split", whole, "--parts", 3, "--output", tmp_path / "parts")
    parts = _parts(tmp_path / "parts", 3)
    skipped = [LabelSet.open(part).skipped for part in parts]
    assert [list(keys) for keys in skipped] == [["ants/00.jpg"], ["bees/06.jpg"], ["cats/11.png"]]
    for part in parts:
        done("labels", "verify", part, "--data-dir", own_data)
    order = [k for part in parts for f in LabelSet.open(part).blocks[0][1] for k in f.all_keys()]
    assert order == list(ImageFolder(own_data, "train").keys)
    done("labels", "merge", *parts, "--output", tmp_path / "joined")
    assert stored.rows_of(tmp_path / "joined") == stored.rows_of(whole)
    mine, theirs = stored.manifest_of(tmp_path / "joined"), stored.manifest_of(whole)
    assert mine["plan"]["roles"] == theirs["plan"]["roles"]
    assert mine["roles"]["train"]["skipped"] == theirs["roles"]["train"]["skipped"]


def test_added_views_go_along(
    done: Run,
    make_set: Make,
    data_dir: Path,
    teach_flags: list[object],
    tmp_path: Path,
    copied: Callable[[Path], Path],
) -> None:
    whole = copied(make_set("--topk", 2))
    words = ["labels", "add-views", whole, "--data-dir", data_dir, "--num-views", 6]
    done(*words, "--batch-size", 16, *teach_flags)
    done("labels", "split", whole, "--output", tmp_path / "parts")
    parts = _parts(tmp_path / "parts", 2)
    assert stored.rows_of(parts[0]) | stored.rows_of(parts[1]) == stored.rows_of(whole)
    assert LabelSet.open(parts[1]).num_views == 6
    done("labels", "verify", parts[1])


def test_a_changed_image_of_a_part_is_found_and_one_of_another_part_is_not(
    done: Run, run_cli: Run, make_set: Make, own_data: Path, tmp_path: Path
) -> None:
    done("labels", "split", make_set("--topk", 2), "--output", tmp_path / "parts")
    (own_data / "train" / "ants" / "00.jpg").write_bytes(b"other")
    first, second = (
        run_cli("labels", "verify", part, "--data-dir", own_data)
        for part in _parts(tmp_path / "parts", 2)
    )
    assert (first.code, second.code) == (3, 0)
    assert "other files" in first.stderr
    assert "train: labels 18 of 36 images" in second.stderr


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        (37, "has only 36 images"),
        (1, "--parts must be at least 2"),
        (0, "--parts must be at least 2"),
    ],
)
def test_a_number_of_parts_that_makes_no_sense_is_refused(
    run_cli: Run, make_set: Make, tmp_path: Path, parts: int, named: str
) -> None:
    out = tmp_path / "parts"
    result = run_cli("labels", "split", make_set("--topk", 2), "--parts", parts, "--output", out)
    assert result.code == 2
    assert named in result.stderr
    assert not out.exists()


def test_the_same_command_again_changes_nothing_and_another_number_is_refused(
    done: Run, run_cli: Run, make_set: Make, tmp_path: Path
) -> None:
    words = ["labels", "split", make_set("--topk", 2), "--output", tmp_path / "parts"]
    first = done(*words).report
    shards = {p: p.stat().st_mtime_ns for p in (tmp_path / "parts").glob("*/*.h5")}
    assert done(*words).report == first
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "parts").glob("*/*.h5")} == shards
    other = run_cli(*words, "--parts", 3)
    assert other.code == 3
    assert "holds another label set" in other.stderr


def test_boxes_that_drifted_are_not_written_anew_as_if_they_had_been_labelled(
    run_cli: Run, make_set: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_set("--topk", 2)
    monkeypatch.setattr("mealv2.label_set.boxes.boxes_of", lambda shard, views: "0" * 64)
    result = run_cli("labels", "split", whole, "--output", tmp_path / "parts")
    assert result.code == 3
    assert "not the labelled ones" in result.stderr
