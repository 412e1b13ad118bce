"""mealv2 labels merge: joined rows are the parts' to the bit, means the whole ensemble's."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stored
from conftest import Result
from mealv2.label_set import LabelSet, ShardFile
from pipeline.label_sets import writing

Run = Callable[..., Result]
Make = Callable[..., Path]
Copy = Callable[[Path], Path]
DENSE = ("--topk", "all", "--label-dtype", "float32")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "merged"


@pytest.fixture(scope="session")
def halves(
    done: Run, make_set: Make, data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """Sets of the same teachers: one of ants and half of the bees, one of all the others."""
    out = tmp_path_factory.mktemp("halves")
    done("labels", "split", make_set("--topk", 2), "--output", out)
    return [out / "part-0", out / "part-1"]


# --- joined ---------------------------------------------------------------------------------------


def test_joined_rows_are_those_of_the_parts_to_the_bit(
    done: Run, halves: list[Path], out: Path
) -> None:
    report = done("labels", "merge", *reversed(halves), "--output", out).report
    assert (report["merged"], report["sets"], report["images"]) == ("joined", 2, 36)
    assert stored.rows_of(out) == stored.rows_of(halves[0]) | stored.rows_of(halves[1])
    assert stored.rows_of(out, "val") == stored.rows_of(halves[0], "val")
    done("labels", "verify", out)


def test_parts_joined_are_the_set_that_was_split(
    done: Run, make_set: Make, halves: list[Path], out: Path
) -> None:
    done("labels", "merge", *halves, "--output", out)
    whole, joined = stored.manifest_of(make_set("--topk", 2)), stored.manifest_of(out)
    assert stored.rows_of(out) == stored.rows_of(make_set("--topk", 2))
    assert joined["plan"]["roles"] == whole["plan"]["roles"]  # data_sha256 is in there
    for name in ("num_images", "skipped"):
        assert joined["roles"]["train"][name] == whole["roles"]["train"][name]
    assert joined["roles"]["val"]["accuracy"] == whole["roles"]["val"]["accuracy"]
    assert joined["plan_sha256"] != whole["plan_sha256"]
    assert joined["plan"]["derived"]["from"] == [
        stored.manifest_of(part)["plan_sha256"] for part in halves
    ]


def test_images_that_two_sets_have_are_refused_by_name(
    run_cli: Run, make_set: Make, halves: list[Path], out: Path
) -> None:
    result = run_cli("labels", "merge", halves[1], make_set("--topk", 2), "--output", out)
    assert result.code == 3
    shared = next(iter(LabelSet.open(halves[1]).keys()))
    assert f"both have train labels of {shared!r}" in result.stderr
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--topk", 1), "different encodings (top-1"),
        (("--topk", 2, "--view-seed", 8), "different train view seed (8 and 7)"),
        (("--topk", 2, "--num-views", 3), "different train views in the files (0 to 2 and 0 to 3)"),
        (("--topk", 2, "--img-size", 24), "different img_size (24 and 32)"),
        (("--topk", 2, "--val-split", "none"), "different splits (train and train, val)"),
        (("--topk", 2, "--amp"), "different precision (bfloat16 and float32)"),
    ],
)
def test_sets_that_cannot_be_joined_are_refused_with_what_differs(
    run_cli: Run,
    make_set: Make,
    halves: list[Path],
    out: Path,
    flags: Sequence[object],
    named: str,
) -> None:
    result = run_cli("labels", "merge", halves[0], make_set(*flags), "--output", out)
    assert result.code == 3
    assert named in result.stderr
    assert str(halves[0]) in result.stderr
    assert not out.exists()


def test_sets_of_other_classes_are_refused(
    done: Run,
    run_cli: Run,
    draw_tree: Callable[..., Path],
    make_model: Callable[..., Path],
    halves: list[Path],
    tmp_path: Path,
    out: Path,
) -> None:
    data = draw_tree(tmp_path / "pets", classes=("ants", "dogs"), num_train=2, num_val=1)
    teacher = make_model("test_resnet", classes=("ants", "dogs"))
    words = ["precompute", "--data-dir", data, "--teacher", f"test_resnet={teacher}"]
    done(
        *words,
        "--img-size",
        32,
        "--num-views",
        4,
        "--workers",
        0,
        "--output",
        tmp_path / "pets-set",
    )
    result = run_cli("labels", "merge", halves[0], tmp_path / "pets-set", "--output", out)
    assert result.code == 3
    assert "different classes (2 of them and 3 of them)" in result.stderr


def test_joining_keeps_the_encoding_and_says_who_changes_it(
    run_cli: Run, halves: list[Path], out: Path
) -> None:
    result = run_cli("labels", "merge", *halves, "--topk", 1, "--output", out)
    assert result.code == 2
    assert "`mealv2 labels convert`" in result.stderr


def test_appended_rows_are_joined_too(
    done: Run, appended_set: Path, tmp_path: Path, out: Path
) -> None:
    done("labels", "split", appended_set, "--parts", 3, "--output", tmp_path / "parts")
    parts = [tmp_path / "parts" / f"part-{n}" for n in range(3)]
    assert [LabelSet.open(part).num_appended for part in parts] == [1, 0, 2]
    done("labels", "merge", *parts, "--output", out)
    assert LabelSet.open(out).num_appended == 3
    assert stored.rows_of(out) == stored.rows_of(appended_set)
    assert (next(iter(LabelSet.open(out).keys())), 9) in stored.rows_of(out)


def test_validation_labels_of_different_images_are_joined(
    done: Run,
    run_cli: Run,
    label: Callable[..., list[object]],
    draw_tree: Callable[..., Path],
    tmp_path: Path,
    out: Path,
) -> None:
    folders = []
    for number in range(2):
        data = draw_tree(tmp_path / f"data-{number}", num_train=2, num_val=2, seed=number)
        for path in data.glob("*/*/*"):
            path.rename(path.with_name(f"{number}-{path.name}"))
        folders.append(tmp_path / f"set-{number}")
        done(*label("--data-dir", data), "--output", folders[-1])
    done("labels", "merge", *folders, "--output", out)
    rows = [stored.rows_of(folder, "val") for folder in folders]
    assert stored.rows_of(out, "val") == rows[0] | rows[1]
    accuracy, *parts = (
        stored.manifest_of(folder)["roles"]["val"]["accuracy"] for folder in [out, *folders]
    )
    assert accuracy["num_images"] == 12
    mean = (parts[0]["ensemble"]["top1"] + parts[1]["ensemble"]["top1"]) / 2
    assert accuracy["ensemble"]["top1"] == pytest.approx(mean, abs=1e-3)


def test_a_killed_join_goes_on_and_ends_in_the_same_bytes(
    done: Run,
    run_cli: Run,
    halves: list[Path],
    tmp_path: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    contents: Callable[..., dict[str, bytes]],
) -> None:
    done("labels", "merge", *halves, "--output", tmp_path / "at-once")
    real, calls = writing.label_set.write_shard, 0

    def stopping(*args: Any, **kwargs: Any) -> bool:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(writing.label_set, "write_shard", stopping)
    stopped = run_cli("labels", "merge", *halves, "--output", out)
    assert stopped.code == 4
    assert "run the same command again" in stopped.stderr
    monkeypatch.undo()
    assert len(list(out.glob("*.h5"))) == 2
    half_way = run_cli("labels", "verify", out)
    assert half_way.code == 3
    assert "not finished; run the same `mealv2 labels merge` again" in half_way.stderr
    before = stored.files_of(out)

    done("labels", "merge", *halves, "--output", out)
    after = stored.files_of(out)
    assert {name: after[name] for name in before} == before
    assert contents(out) == contents(tmp_path / "at-once")


def test_a_damaged_shard_of_a_joined_set_is_made_again_and_added_views_stay(
    done: Run,
    run_cli: Run,
    halves: list[Path],
    out: Path,
    data_dir: Path,
    teach_flags: list[object],
    flipped_bit: Callable[..., None],
) -> None:
    done("labels", "merge", *halves, "--output", out)
    words = ["labels", "add-views", out, "--data-dir", data_dir, "--num-views", 6]
    done(*words, "--batch-size", 16, *teach_flags)
    whole = stored.rows_of(out)
    flipped_bit(out / "train-00000.h5")
    assert "`mealv2 labels merge`" in run_cli("labels", "verify", out).stderr.splitlines()[-1]
    done("labels", "merge", *halves, "--output", out)
    assert stored.rows_of(out) == whole
    assert {view for _, view in whole} == set(range(6))
    done("labels", "verify", out)


# --- averaged -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags", [(), ("--rate", 0.05), ("--topk", 2), ("--topk", 2, "--label-dtype", "float16"), DENSE]
)
def test_the_average_of_dense_sets_is_what_both_teachers_say_at_once(
    done: Run, make_set: Make, dense_sets: list[Path], out: Path, flags: Sequence[object]
) -> None:
    report = done("labels", "merge", *dense_sets, *flags, "--output", out).report
    assert (report["merged"], report["teachers"]) == ("averaged", 2)
    at_once = make_set(*flags)
    assert stored.rows_of(out) == stored.rows_of(at_once)
    assert stored.rows_of(out, "val") == stored.rows_of(at_once, "val")
    mine, theirs = stored.manifest_of(out), stored.manifest_of(at_once)
    assert mine["roles"]["val"]["accuracy"] == theirs["roles"]["val"]["accuracy"]
    assert mine["plan"]["teachers"] == theirs["plan"]["teachers"]
    assert mine["plan"]["labels"] == theirs["plan"]["labels"]
    for name in ("train-00000.h5", "val-00000.h5"):
        lost, at_once_lost = (ShardFile(s / name).shard().loss for s in (out, at_once))
        assert lost is not None
        assert lost == pytest.approx(at_once_lost, rel=0.01)  # the last digit may differ
    done("labels", "verify", out)


def test_every_teacher_weighs_the_same_whatever_set_it_is_in(
    done: Run,
    make_set: Make,
    dense_sets: list[Path],
    make_model: Callable[..., Path],
    label: Callable[..., list[object]],
    tmp_path: Path,
    out: Path,
) -> None:
    other = f"test_resnet={make_model('test_resnet', seed=3, steps=2)}"
    words = label(*DENSE)
    words[words.index("--teacher") + 1] = other
    done(*words, "--output", tmp_path / "third")
    done("labels", "merge", make_set(*DENSE), tmp_path / "third", *DENSE, "--output", out)
    sets = [stored.dense_of(folder) for folder in [*dense_sets, tmp_path / "third"]]
    for place, row in stored.dense_of(out).items():
        expected = np.mean([dense[place].astype(float) for dense in sets], axis=0)
        np.testing.assert_allclose(row, expected, rtol=0, atol=2e-7)
    accuracy = stored.manifest_of(out)["roles"]["val"]["accuracy"]
    alone = [
        stored.manifest_of(folder)["roles"]["val"]["accuracy"]["teachers"][0]
        for folder in [*dense_sets, tmp_path / "third"]
    ]
    assert accuracy["teachers"] == alone


def test_mean_logits_are_averaged_where_all_sets_have_them(
    done: Run, run_cli: Run, make_set: Make, teacher_dirs: dict[str, Path], out: Path
) -> None:
    flags = (*DENSE, "--store-logits")
    sets = [make_set(*flags, teachers=[name]) for name in teacher_dirs]
    done("labels", "merge", *sets, *flags, "--output", out)
    found, expected = (LabelSet.open(folder) for folder in (out, make_set(*flags)))
    addresses = stored.addresses_of(found)
    keys, views = [key for key, _ in addresses], [view for _, view in addresses]
    mine, theirs = (labels.rows(keys, views).logits for labels in (found, expected))
    assert mine is not None
    assert theirs is not None
    assert theirs.values_NK.float().std() > 0.3
    np.testing.assert_allclose(mine.values_NK, theirs.values_NK, rtol=2e-3, atol=2e-3)

    refused = run_cli(
        "labels",
        "merge",
        sets[0],
        make_set(*DENSE, teachers=["test_efficientnet"]),
        *flags,
        "--output",
        out.with_name("other"),
    )
    assert refused.code == 2
    assert "--store-logits" in refused.stderr


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--shard-size", 9), "--shard-size"),
        (("--num-views", 3), "--num-views"),
        (("--view-seed", 8), "different train view seed (8 and 7)"),
    ],
)
def test_sets_that_are_not_aligned_are_refused_with_what_to_do(
    run_cli: Run, make_set: Make, dense_sets: list[Path], out: Path, flags: Any, named: str
) -> None:
    other = make_set(*DENSE, *flags, teachers=["test_efficientnet"])
    result = run_cli("labels", "merge", dense_sets[0], other, "--output", out)
    assert result.code == 3
    assert named in result.stderr
    assert not out.exists()


def test_sets_that_share_a_teacher_are_refused(
    run_cli: Run, make_set: Make, dense_sets: list[Path], out: Path
) -> None:
    result = run_cli("labels", "merge", dense_sets[0], make_set(*DENSE), "--output", out)
    assert result.code == 2
    assert "share a teacher" in result.stderr


def test_sets_that_lost_something_are_averaged_with_a_note(
    done: Run, make_set: Make, dense_sets: list[Path], out: Path
) -> None:
    assert (
        "not all sets are dense" not in done("labels", "merge", *dense_sets, "--output", out).stderr
    )
    lossy = make_set("--topk", 1, teachers=["test_efficientnet"])
    result = done("labels", "merge", dense_sets[0], lossy, "--output", out.with_name("lossy"))
    assert "not all sets are dense" in result.stderr
    assert "--topk all" in result.stderr
    for merged, is_known in ((out, True), (out.with_name("lossy"), False)):
        assert (ShardFile(merged / "train-00000.h5").shard().loss is not None) == is_known


@pytest.mark.slow
def test_one_shard_at_a_time_is_read(
    done: Run, dense_sets: list[Path], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    real = writing.Encoding.encode

    def watched(self: Any, probs_NC: Any, *rest: Any, num_views: int) -> Any:
        sizes.append(len(probs_NC))
        assert len(probs_NC) % num_views == 0, "images are encoded as wholes"
        return real(self, probs_NC, *rest, num_views=num_views)

    monkeypatch.setattr(writing, "SLICE", 7)
    monkeypatch.setattr(writing.Encoding, "encode", watched)
    done("labels", "merge", *dense_sets, *DENSE, "--output", out)
    assert max(sizes) == 7
    assert sum(sizes) == 36 * 4 + 15


def test_one_set_alone_or_none_is_wrong_usage(
    run_cli: Run, dense_sets: list[Path], out: Path
) -> None:
    for sets, named in (([dense_sets[0]], "two label sets or more"), ([], "SETS is required")):
        result = run_cli("labels", "merge", *sets, "--output", out)
        assert result.code == 2
        assert named in result.stderr


def test_the_out_folder_is_none_of_the_sets(run_cli: Run, dense_sets: list[Path]) -> None:
    before = stored.files_of(dense_sets[1])
    result = run_cli("labels", "merge", *dense_sets, "--output", dense_sets[1])
    assert result.code == 2
    assert "is the label set itself" in result.stderr
    assert stored.files_of(dense_sets[1]) == before


def test_imports_of_unknown_teachers_are_not_merged_by_guess(
    run_cli: Run, done: Run, dense_sets: list[Path], data_dir: Path, out: Path, tmp_path: Path
) -> None:
    files = tmp_path / "fkd"
    done("labels", "export", dense_sets[0], "--to", "fkd", "--label-type", "ori", "--output", files)
    for name in ("one", "other"):
        flags = ["--data-dir", data_dir, "--img-size", 32, "--output", tmp_path / name]
        done("labels", "import", files, *flags)
    result = run_cli("labels", "merge", tmp_path / "one", tmp_path / "other", "--output", out)
    assert result.code == 2
    assert "--teacher-name" in result.stderr
