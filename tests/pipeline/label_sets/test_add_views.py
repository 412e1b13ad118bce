"""mealv2 labels add-views: more views as if they had been there from the start."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stored
from conftest import Result, Spawned
from mealv2 import label_set
from mealv2.errors import LabelSetError
from mealv2.label_set import LabelSet
from mealv2.labelling import shards

Run = Callable[..., Result]
Make = Callable[..., Path]
Copy = Callable[[Path], Path]
Add = Callable[..., list[object]]


@pytest.fixture
def add(data_dir: Path, teach_flags: list[object]) -> Add:
    """A function: the words that take a set to 7 views; flags given after these win."""

    def words(folder: Path, *flags: object) -> list[object]:
        given = ["--data-dir", data_dir, "--num-views", 7, "--batch-size", 16, *teach_flags]
        return ["labels", "add-views", folder, *given, *flags]

    return words


@pytest.mark.parametrize("flags", [("--topk", 2), ("--rate", 0.05, "--store-logits")])
def test_added_views_are_those_of_a_set_that_had_them_from_the_start(
    done: Run, make_set: Make, copied: Copy, add: Add, flags: tuple[object, ...]
) -> None:
    folder = copied(make_set(*flags))
    before = stored.files_of(folder)
    report = done(*add(folder)).report
    assert (report["views"], report["added"], report["shards_made"]) == (7, [4, 7], 4)
    whole = make_set(*flags, "--num-views", 7)
    ours, theirs = stored.rows_of(folder), stored.rows_of(whole)
    # its views were asked about in other batches, which moves the last bits of an answer
    assert ours.keys() == theirs.keys()
    assert np.mean([ours[place] == theirs[place] for place in ours]) > 0.9
    ours, theirs = stored.dense_of(folder), stored.dense_of(whole)
    assert max(np.abs(ours[place] - theirs[place]).max() for place in ours) < 0.01
    after = stored.files_of(folder)
    assert {n: after[n] for n in before if n != "manifest.json"} == {
        n: before[n] for n in before if n != "manifest.json"
    }
    assert after.keys() - before.keys() == {f"train-{n:05d}-views-4-6.h5" for n in range(4)}
    done("labels", "verify", folder)


def test_views_are_added_twice(done: Run, make_set: Make, copied: Copy, add: Add) -> None:
    folder = copied(make_set("--topk", 2))
    done(*add(folder, "--num-views", 6))
    done(*add(folder))
    assert stored.rows_of(folder) == stored.rows_of(make_set("--topk", 2, "--num-views", 7))
    blocks = stored.manifest_of(folder)["roles"]["train"]["blocks"]
    assert [block["views"] for block in blocks] == [[0, 4], [4, 6], [6, 7]]


def test_the_manifest_comes_last_and_a_stopped_command_goes_on(
    done: Run,
    run_cli: Run,
    make_set: Make,
    copied: Copy,
    add: Add,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = copied(make_set("--topk", 2))
    rows, before = stored.rows_of(folder), stored.files_of(folder)
    real = label_set.write_shard

    def stopping(path: Path, *args: Any, **kwargs: Any) -> bool:
        if "00002" in path.name:
            raise KeyboardInterrupt
        return real(path, *args, **kwargs)

    monkeypatch.setattr(shards.label_set, "write_shard", stopping)
    assert run_cli(*add(folder)).code == 4
    monkeypatch.undo()
    half_way = stored.files_of(folder)
    assert {name: half_way[name] for name in before} == before
    assert half_way.keys() - before.keys() == {f"train-{n:05d}-views-4-6.h5" for n in range(2)}
    assert stored.rows_of(folder) == rows
    done("labels", "verify", folder)

    assert done(*add(folder)).report["shards_made"] == 2
    assert stored.rows_of(folder) == stored.rows_of(make_set("--topk", 2, "--num-views", 7))
    after = stored.files_of(folder)
    assert {n: after[n] for n in half_way if n != "manifest.json"} == {
        n: half_way[n] for n in half_way if n != "manifest.json"
    }


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 4), (signal.SIGKILL, -9)])
def test_a_signal_leaves_a_whole_set_and_the_same_command_finishes(
    done: Run,
    make_set: Make,
    copied: Copy,
    add: Add,
    spawn: Callable[..., Spawned],
    number: signal.Signals,
    code: int,
) -> None:
    folder = copied(make_set("--topk", 2))
    words = add(folder, "--num-views", 40, "--batch-size", 4)
    process = spawn(*words)
    process.until(lambda: list(folder.glob("train-*-views-*.h5")))
    process.signal(number)
    assert process.result().code == code
    assert LabelSet.open(folder).num_views == 4
    done("labels", "verify", folder)
    for path in folder.glob(".tmp-*"):
        path.unlink()
    there = {path.name for path in folder.glob("train-*-views-*.h5")}
    assert 0 < len(there) < 4
    assert done(*words).report["shards_made"] == 4 - len(there)
    assert LabelSet.open(folder).num_views == 40


@pytest.mark.parametrize("total", [3, 1])
def test_a_total_below_what_is_there_is_wrong_usage(
    run_cli: Run, make_set: Make, add: Add, total: int
) -> None:
    folder = make_set("--topk", 2)
    before = stored.files_of(folder)
    result = run_cli(*add(folder, "--num-views", total))
    assert result.code == 2
    assert f"--num-views {total}: {folder} has 4 already" in result.stderr
    assert stored.files_of(folder) == before


def test_distilling_uses_all_views(
    done: Run,
    make_set: Make,
    copied: Copy,
    add: Add,
    distill_flags: list[str],
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = copied(make_set("--topk", 2))
    done(*add(folder))
    asked: set[int] = set()
    real = LabelSet.rows

    def watched(self: LabelSet, keys: Any, views: Any) -> Any:
        asked.update(views if self.split == "train" else [])
        return real(self, keys, views)

    monkeypatch.setattr(LabelSet, "rows", watched)
    done(*distill_flags, "--labels", folder, "--epochs", 7, "--output", run)
    assert asked == set(range(7))


# --- images and teachers ------------------------------------------------------------------------


def _spoil(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def test_an_image_unreadable_meanwhile_stops_or_is_left_out(
    done: Run,
    run_cli: Run,
    make_set: Make,
    copied: Copy,
    add: Add,
    own_data: Path,
    distill_flags: list[str],
    run: Path,
) -> None:
    folder = copied(make_set("--topk", 2))
    _spoil(own_data / "train" / "ants" / "01.jpg")
    refused = run_cli(*add(folder, "--data-dir", own_data))
    assert refused.code == 3
    assert "ants/01.jpg: it is not the picture that was labelled" in refused.stderr
    assert LabelSet.open(folder).num_views == 4

    result = done(*add(folder, "--data-dir", own_data, "--on-bad-image", "skip"))
    assert result.report["skipped"] == 1
    assert "1 image could not be read: only their first views have labels" in result.stderr
    labels = LabelSet.open(folder)
    assert labels.holds("ants/01.jpg", 3)
    assert not labels.holds("ants/01.jpg", 4)
    assert labels.holds("ants/00.jpg", 4)
    whole = stored.rows_of(make_set("--topk", 2, "--num-views", 7))
    expected = {(k, v): row for (k, v), row in whole.items() if k != "ants/01.jpg" or v < 4}
    assert stored.rows_of(folder) == expected
    done("labels", "verify", folder)
    with pytest.raises(
        label_set.reader.LabelSetError, match="could not be read when the other views"
    ):
        labels.rows(["ants/01.jpg"], [5])
    words = [*distill_flags, "--labels", folder, "--epochs", 7, "--missing", "skip"]
    done(*words, "--output", run)


def test_images_skipped_from_the_start_stay_skipped(
    done: Run, label: Callable[..., list[object]], add: Add, own_data: Path, tmp_path: Path
) -> None:
    _spoil(own_data / "train" / "bees" / "04.jpg")
    flags = ("--data-dir", own_data, "--on-bad-image", "skip")
    done(*label("--topk", 2, *flags), "--output", tmp_path / "four")
    done(*label("--topk", 2, "--num-views", 7, *flags), "--output", tmp_path / "seven")
    assert done(*add(tmp_path / "four", *flags)).report["skipped"] == 0
    assert stored.rows_of(tmp_path / "four") == stored.rows_of(tmp_path / "seven")


def test_other_data_other_weights_and_another_precision_are_refused(
    run_cli: Run,
    make_set: Make,
    add: Add,
    own_data: Path,
    make_model: Callable[..., Path],
) -> None:
    folder = make_set("--topk", 2)
    (own_data / "train" / "ants" / "00.jpg").unlink()
    gone = run_cli(*add(folder, "--data-dir", own_data))
    assert (gone.code, "ants/00.jpg" in gone.stderr) == (3, True)
    other = f"test_resnet={make_model('test_resnet', seed=5)}"
    weights = run_cli(*add(folder, "--teacher", other))  # a third one
    assert (weights.code, "other weights" in weights.stderr) == (3, True)
    precision = run_cli(*add(folder, "--amp"))
    assert precision.code == 2
    assert "--amp" in precision.stderr


def test_a_part_of_a_set_gets_more_views_from_the_whole_data(
    done: Run, make_set: Make, add: Add, tmp_path: Path
) -> None:
    done("labels", "split", make_set("--topk", 2), "--output", tmp_path)
    done(*add(tmp_path / "part-1"))
    whole = stored.rows_of(make_set("--topk", 2, "--num-views", 7))
    part = stored.rows_of(tmp_path / "part-1")
    assert len(part) == 18 * 7
    assert part.items() <= whole.items()


def test_a_damaged_added_shard_is_made_again_by_add_views(
    done: Run,
    run_cli: Run,
    make_set: Make,
    copied: Copy,
    add: Add,
) -> None:
    folder = copied(make_set("--topk", 2))
    done(*add(folder))
    whole = stored.rows_of(folder)
    (folder / "train-00001-views-4-6.h5").unlink()
    with pytest.raises(LabelSetError, match="run the same `mealv2 labels add-views` again to"):
        LabelSet.open(folder)
    line = run_cli("labels", "verify", folder).stderr.splitlines()[-1]
    assert "1 of 11 files damaged" in line
    assert "run the same `mealv2 labels add-views` again: only these files" in line
    assert "precompute" not in line
    assert done(*add(folder)).report["shards_made"] == 1
    assert stored.rows_of(folder) == whole


def test_a_folder_that_cannot_be_written_is_named_before_teachers_are_loaded(
    run_cli: Run, make_set: Make, add: Add, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_set("--topk", 2)
    monkeypatch.setattr("os.access", lambda path, mode: path != folder)
    monkeypatch.setattr("pipeline.label_sets.add_views.make_annotator", None)
    result = run_cli(*add(folder))
    assert result.code == 2
    assert f"cannot add to {folder}: no permission; give a copy of the set" in result.stderr
