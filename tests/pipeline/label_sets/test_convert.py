"""mealv2 labels convert: another encoding is what precompute would have kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stored
from conftest import Result
from mealv2.label_set import LabelSet, ShardFile

Run = Callable[..., Result]
Make = Callable[..., Path]
DENSE = ("--topk", "all", "--label-dtype", "float32")
GOLDEN = Path(__file__).parents[2] / "golden" / "label_set_v1"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "converted"


@pytest.mark.parametrize(
    "flags",
    [("--rate", 0.001), ("--rate", 0.05), ("--topk", 1), ("--topk", "all"), ("--topk", 2)],
)
def test_a_dense_set_converted_is_what_precompute_makes_at_once(
    done: Run, make_set: Make, out: Path, flags: tuple[object, ...]
) -> None:
    report = done("labels", "convert", make_set(*DENSE), *flags, "--output", out).report
    for split in ("train", "val"):
        assert stored.rows_of(out, split) == stored.rows_of(make_set(*flags), split)
    mine, theirs = stored.manifest_of(out), stored.manifest_of(make_set(*flags))
    assert mine["plan"]["labels"] == theirs["plan"]["labels"]
    assert mine["roles"]["val"]["accuracy"] == theirs["roles"]["val"]["accuracy"]
    assert report["images"] == 36
    done("labels", "verify", out)


@pytest.mark.parametrize("flags", [("--rate", 0.05), ("--topk", 2, "--store-logits"), DENSE])
def test_without_an_encoding_the_set_keeps_its_own(
    done: Run, make_set: Make, out: Path, flags: tuple[object, ...]
) -> None:
    folder = make_set(*flags)
    done("labels", "convert", folder, "--output", out)
    assert stored.rows_of(out) == stored.rows_of(folder)
    assert LabelSet.open(out).encoding == LabelSet.open(folder).encoding


@pytest.mark.parametrize(
    ("stored_logits", "flags", "kept"),
    [
        (True, ["--topk", 2], False),
        (True, ["--topk", 2, "--store-logits"], True),
        (True, [], True),
        (True, ["--store-logits"], True),
        (False, [], False),
    ],
)
def test_logits_are_kept_where_they_are_asked_for_or_nothing_is(
    done: Run, make_set: Make, out: Path, stored_logits: bool, flags: list[Any], kept: bool
) -> None:
    folder = make_set(*DENSE, *(["--store-logits"] if stored_logits else []))
    done("labels", "convert", folder, *flags, "--output", out)
    labels = LabelSet.open(out)
    assert labels.encoding.logits is kept
    if kept and flags == ["--topk", 2, "--store-logits"]:
        assert stored.rows_of(out) == stored.rows_of(make_set(*flags))


def test_logits_that_are_not_there_cannot_be_kept(run_cli: Run, make_set: Make, out: Path) -> None:
    result = run_cli("labels", "convert", make_set(*DENSE), "--store-logits", "--output", out)
    assert result.code == 2
    assert "--store-logits: not every label set has logits" in result.stderr


def test_a_set_is_not_converted_onto_itself(run_cli: Run, make_set: Make) -> None:
    folder = make_set(*DENSE)
    before = stored.files_of(folder)
    for out in (folder, folder / ".." / folder.name):
        result = run_cli("labels", "convert", folder, "--rate", 0.1, "--output", out)
        assert result.code == 2
        assert "is the label set itself" in result.stderr
    inside = run_cli("labels", "convert", folder, "--rate", 0.1, "--output", folder / "smaller")
    assert (inside.code, "lies in the label set itself" in inside.stderr) == (2, True)
    assert stored.files_of(folder) == before


def test_appended_rows_and_added_views_are_converted_too(
    done: Run, appended_set: Path, data_dir: Path, teach_flags: list[object], out: Path
) -> None:
    words = ["labels", "add-views", appended_set, "--data-dir", data_dir, "--num-views", 6]
    done(*words, "--batch-size", 16, *teach_flags)
    done("labels", "convert", appended_set, "--topk", 1, "--output", out)
    old, new = LabelSet.open(appended_set), LabelSet.open(out)
    assert (new.num_appended, new.num_views) == (3, 6)
    assert stored.rows_of(out).keys() == stored.rows_of(appended_set).keys()
    keys = [next(iter(old.keys())), "cats/new.png"]
    np.testing.assert_array_equal(
        old.lookup(keys, [9, 0]).indices_NK[:, 0], new.lookup(keys, [9, 0]).indices_NK[:, 0]
    )
    done("labels", "verify", out)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--topk", 4], "--topk 4: the data has only 3 classes"),
        (["--topk", "most"], "--topk must be"),
        (["--rate", 0], "--rate must be greater than 0"),
        (["--rate", 0.1, "--topk", 2], "give --rate or --topk, not both"),
        (["--label-dtype", "float16"], "--label-dtype has no effect"),
    ],
)
def test_encodings_that_do_not_exist_are_named(
    run_cli: Run, make_set: Make, out: Path, flags: list[object], named: str
) -> None:
    result = run_cli("labels", "convert", make_set(*DENSE), *flags, "--output", out)
    assert result.code == 2
    assert named in result.stderr
    assert not out.exists()


def test_a_damaged_set_is_not_converted(
    run_cli: Run, make_set: Make, copied: Callable[[Path], Path], out: Path
) -> None:
    folder = copied(make_set("--topk", 2))
    path = folder / "train-00001.h5"
    data = bytearray(path.read_bytes())
    (at,) = (f._columns["labels"][0] for _, fs in LabelSet.open(folder).blocks for f in fs[1:2])
    data[at] ^= 1
    path.write_bytes(bytes(data))
    result = run_cli("labels", "convert", folder, "--topk", 1, "--output", out)
    assert result.code == 3
    assert "CRC-32" in result.stderr
    assert not (out / "manifest.json").exists()


def losses_of(folder: Path, split: str) -> list[dict[str, Any]]:
    """The loss of the encoding in the header of each shard."""
    paths = sorted(folder.glob(f"{split}-*.h5"))
    return [ShardFile(path).header["encoding_loss"] for path in paths]


def test_the_loss_of_an_encoding_is_that_of_precompute(
    done: Run, make_set: Make, out: Path
) -> None:
    done("labels", "convert", make_set(*DENSE), "--rate", 0.05, "--output", out)
    for split in ("train", "val"):
        found = losses_of(out, split)
        assert found == losses_of(make_set("--rate", 0.05), split)
        assert all(loss["kl"] > 0 for loss in found)
    report = done("labels", "info", out).report["roles"]["train"]["encoding_loss"]
    exact, coded = stored.dense_of(make_set(*DENSE)), stored.dense_of(out)
    each = [float((p * np.log(p / coded[address])).sum()) for address, p in exact.items()]
    assert report["num_views"] == len(each) == 144  # fewer images than are measured
    assert report["kl"] == pytest.approx(np.mean(each), rel=0.01)


def test_the_loss_of_labels_that_had_lost_something_is_not_known(
    done: Run, make_set: Make, out: Path
) -> None:
    done("labels", "convert", make_set("--rate", 0.05), "--topk", 1, "--output", out)
    assert "encoding_loss" not in ShardFile(out / "train-00000.h5").header
    result = done("labels", "info", out)
    assert "encoding_loss" not in result.report["roles"]["train"]
    assert "KL of the labels" not in result.stderr


def test_a_set_that_keeps_its_encoding_keeps_its_loss(done: Run, make_set: Make, out: Path) -> None:
    done("labels", "convert", make_set("--rate", 0.05), "--output", out)
    assert losses_of(out, "train") == losses_of(make_set("--rate", 0.05), "train")
