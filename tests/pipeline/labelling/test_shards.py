"""mealv2.labelling.shards: views added to a finished set are files of their own."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Result
from mealv2.label_set import (
    LabelSet,
    Shard,
    ShardFile,
    boxes_sha256,
    read_manifest,
    read_shard,
    write_shard,
)
from mealv2.labelling import shards
from mealv2.labelling.plan import LabelSplit
from mealv2.views import view_of

Run = Callable[..., Result]
Files = Callable[..., dict[str, bytes]]
AddViews = Callable[..., dict[str, Any]]

ADDED = [f"train-{number:05d}-views-4-5.h5" for number in range(4)]


@pytest.fixture
def own_labels(labels_dir: Path, tmp_path: Path) -> Path:
    """A copy of the label set that views may be added to."""
    return Path(shutil.copytree(labels_dir, tmp_path / "own-labels"))


@pytest.fixture
def grown(own_labels: Path, add_views: AddViews) -> Path:
    """The set with views 4 and 5 in a block of their own."""
    add_views(own_labels, (4, 5))
    return own_labels


def test_added_views_are_a_block_beside_files_that_stay_as_they_are(
    grown: Path, labels_dir: Path, contents: Files
) -> None:
    before, after = contents(labels_dir), contents(grown)
    assert sorted(after.keys() - before.keys()) == ADDED
    assert {name for name in before if after[name] != before[name]} == {"manifest.json"}

    blocks = read_manifest(grown)["roles"]["train"]["blocks"]
    assert [block["views"] for block in blocks] == [[0, 4], [4, 6]]
    assert blocks[0] == read_manifest(labels_dir)["roles"]["train"]["blocks"][0]
    assert [shard["name"] for shard in blocks[1]["shards"]] == ADDED
    for shard in blocks[1]["shards"]:
        data = after[shard["name"]]
        assert shard["bytes"] == len(data)
        assert shard["sha256"] == sha256(data).hexdigest()
        assert shard["head_sha256"] == sha256(data[:512]).hexdigest()


def test_added_labels_are_those_of_a_set_that_had_the_views_from_the_start(
    done: Run, precompute_flags: list[str], grown: Path, labels_dir: Path, tmp_path: Path
) -> None:
    done(*precompute_flags, "--num-views", 6, "--output", tmp_path / "at-once")
    at_once, labels, first = map(LabelSet.open, (tmp_path / "at-once", grown, labels_dir))
    assert (labels.num_views, first.num_views) == (6, 4)
    keys = list(labels.keys())
    for view in range(6):
        found, expected = (s.lookup(keys, [view] * 36).probs_NK for s in (labels, at_once))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
    mixed = labels.lookup(keys[:6], [5, 0, 4, 1, 3, 2]).probs_NK
    places = zip(keys[:6], (5, 0, 4, 1, 3, 2), strict=True)
    single = [labels.lookup([key], [view]).probs_NK[0] for key, view in places]
    np.testing.assert_array_equal(mixed, single)


def test_shard_of_added_views_has_their_boxes(grown: Path) -> None:
    for name in ADDED:
        file = ShardFile(grown / name)
        assert (file.first_view, file.num_views) == (4, 2)
        images = file.images
        assert images is not None
        boxes = [
            view_of(key, index, seed=7, width=width, height=height).box()
            for key, (width, height) in zip(file.keys(), images.sizes_N2.tolist(), strict=True)
            for index in (4, 5)
        ]
        assert file.header["boxes_sha256"] == boxes_sha256(np.array(boxes))


@pytest.mark.parametrize("manifest", ["there", "lost"])
def test_precompute_run_again_keeps_added_views_in_the_manifest(
    done: Run, precompute_flags: list[str], grown: Path, contents: Files, manifest: str
) -> None:
    before = contents(grown)
    if manifest == "lost":
        (grown / "manifest.json").unlink()
    assert done(*precompute_flags, "--output", grown).report["shards_made"] == 0
    assert contents(grown) == before


def test_added_views_that_are_not_complete_are_not_listed_until_they_are(
    done: Run,
    precompute_flags: list[str],
    grown: Path,
    labels_dir: Path,
    add_views: AddViews,
    contents: Files,
    flipped_bit: Callable[..., None],
) -> None:
    before = contents(grown)
    damaged = grown / ADDED[2]
    flipped_bit(damaged, ShardFile(damaged).header["columns"]["labels"]["offset"])
    result = done(*precompute_flags, "--output", grown)
    assert result.report["shards_made"] == 0
    assert "not listed: views 4 to 5; those from 4 on are not complete" in result.stderr
    assert contents(grown, "manifest.json") == contents(labels_dir, "manifest.json")
    assert LabelSet.open(grown).num_views == 4

    add_views(grown, (4, 5))
    assert contents(grown) == before


def test_views_that_do_not_follow_the_others_are_not_listed(
    own_labels: Path, add_views: AddViews, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = add_views(own_labels, (6, 7))
    assert [block["views"] for block in manifest["roles"]["train"]["blocks"]] == [[0, 4]]
    assert "not listed: views 6 to 7; those from 4 on are not complete" in capsys.readouterr().err
    manifest = add_views(own_labels, (4, 5))
    assert "not listed" not in capsys.readouterr().err
    views = [block["views"] for block in manifest["roles"]["train"]["blocks"]]
    assert views == [[0, 4], [4, 6], [6, 8]]
    assert LabelSet.open(own_labels).num_views == 8


def test_a_complete_shard_that_another_job_made_meanwhile_stays(
    done: Run,
    precompute_flags: list[str],
    labels_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "shared"
    own = shards.make_shard
    others = replace(read_shard(labels_dir / "train-00001.h5"), counts={"of another job": [1]})

    def late(split: LabelSplit, number: int, *arguments: Any) -> Shard:
        if (split.name, number) == ("train", 1):
            assert write_shard(out / split.planned[number].name, others)
        return own(split, number, *arguments)

    monkeypatch.setattr(shards, "make_shard", late)
    done(*precompute_flags, "--output", out)
    assert read_shard(out / "train-00001.h5").counts == {"of another job": [1]}
    LabelSet.open(out)
