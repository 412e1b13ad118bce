"""--extra-data: unlabelled pictures are labelled by the teachers, and the student learns them."""

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Result
from mealv2.data.extra import UnlabelledFolder, WithExtra, open_unlabelled
from mealv2.data.folder import ImageFolder
from mealv2.data.open import open_source
from mealv2.errors import ConfigError
from mealv2.label_set import LabelSet, ShardFile, read_plan
from mealv2.label_set.shard import NO_CLASS
from pictures import flip
from pipeline.loading.sources import summary
from tars import tar_tree, write_tar

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def pool(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Flat and nested pictures without classes, with names that labelled ones have too."""
    folder = tmp_path_factory.mktemp("extra") / "pool"
    for name in ("ants/00.jpg", "ants/01.jpg", "bees/02.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(data_dir / "val" / name, folder / name)
    shutil.copy(data_dir / "val" / "cats" / "03.jpg", folder / "flat.jpg")
    (folder / "notes.txt").write_text("x")
    return folder


@pytest.fixture(scope="module")
def labels(
    done: Run, precompute_flags: list[str], pool: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A label set of the tree and the pool. Not to be changed."""
    out = tmp_path_factory.mktemp("labels") / "set"
    result = done(*precompute_flags, "--extra-data", pool, "--output", out)
    assert result.report["images"] == 40
    assert result.report["accuracy"]["num_images"] == 15  # of labelled validation images
    return out


def _column(run: Path, name: str) -> list[str]:
    with (run / "summary.csv").open() as file:
        return [row[name] for row in csv.DictReader(file)]


KEYS = {f"extra/pool/{name}" for name in ("ants/00.jpg", "ants/01.jpg", "bees/02.png", "flat.jpg")}


def test_labels_of_the_pool_join_those_of_the_tree(
    labels: Path, labels_dir: Path, pool: Path
) -> None:
    both, alone = LabelSet.open(labels), LabelSet.open(labels_dir)
    assert set(both.keys()) == set(alone.keys()) | KEYS
    key = "ants/00.jpg"
    assert both.soft_labels([key], [1]).to_dense().equal(alone.soft_labels([key], [1]).to_dense())
    roles = read_plan(labels)["roles"]
    assert roles["train"]["extra"] == [{"name": "pool", "num_images": 4}]
    assert "extra" not in roles["val"]
    assert list(ShardFile(labels / "train-00003.h5").images.classes_N) == [2] * 6 + [NO_CLASS] * 4


def test_the_summary_says_that_they_are_unlabelled(pool: Path) -> None:
    source = UnlabelledFolder(pool, classes=["a"])
    assert summary(source) == f"data {pool}: 4 images, unlabelled; left out 1 file: 1 .txt"


def test_a_student_learns_from_both_and_validates_on_labelled_pictures(
    done: Run, distill_flags: list[str], labels: Path, pool: Path, run: Path
) -> None:
    words = [*distill_flags, "--labels", labels, "--extra-data", pool]
    report = done(*words, "--output", run).report
    assert report["num_images"] == 15
    assert _column(run, "train_labels_stored") == ["40", "40"]
    assert done(*words, "--output", run).report["steps"] == report["steps"]  # continues: finished


@pytest.mark.slow
def test_resuming_gives_the_same_weights(
    done: Run,
    distill_flags: list[str],
    labels: Path,
    pool: Path,
    tmp_path: Path,
    weights: Callable[[Path], dict[str, bytes]],
) -> None:
    words = [*distill_flags, "--labels", labels, "--extra-data", pool, "--decay-milestones", "1"]
    done(*words, "--epochs", 3, "--output", tmp_path / "whole")
    done(*words, "--epochs", 2, "--output", tmp_path / "part")
    moved = shutil.copytree(pool, tmp_path / "moved" / "pool")
    done("distill", "--resume", tmp_path / "part", "--epochs", 3, "--extra-data", moved)
    assert weights(tmp_path / "whole") == weights(tmp_path / "part")


def test_another_picture_of_the_pool_is_found(
    done: Run, run_cli: Run, distill_flags: list[str], labels: Path, pool: Path, tmp_path: Path
) -> None:
    changed = shutil.copytree(pool, tmp_path / "pool")
    flip(changed / "ants" / "00.jpg")
    words = ["labels", "verify", labels, "--data-dir", distill_flags[2], "--extra-data"]
    assert done(*words, pool).report["images_compared"] == 55
    result = run_cli(*words, changed)
    assert result.code == 3
    assert "extra/pool/ants/00.jpg" in result.stderr
    train = [*distill_flags, "--labels", labels, "--output", tmp_path / "run"]
    result = run_cli(*train, "--extra-data", changed)
    assert result.code == 3
    assert f"{changed}/ants/00.jpg" in result.stderr


def test_views_are_added_for_the_pool_too(
    done: Run,
    run_cli: Run,
    labels: Path,
    pool: Path,
    data_dir: Path,
    teacher_flags: list[str],
    tmp_path: Path,
) -> None:
    own = shutil.copytree(labels, tmp_path / "labels")
    words = ["labels", "add-views", own, "--data-dir", data_dir, "--num-views", 5, *teacher_flags]
    result = run_cli(*words, "--workers", 0)
    assert result.code == 2
    assert "(pool); give each with --extra-data" in result.stderr
    done(*words, "--workers", 0, "--extra-data", pool)
    assert LabelSet.open(own).soft_labels(["extra/pool/flat.jpg"], [4]) is not None
    done("labels", "split", own, "--parts", 2, "--output", tmp_path / "parts")
    parts = sorted((tmp_path / "parts").iterdir())
    done("labels", "merge", *parts, "--output", tmp_path / "joined")
    joined = read_plan(tmp_path / "joined")["roles"]["train"]
    assert joined["data_sha256"] == read_plan(own)["roles"]["train"]["data_sha256"]


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ([], 2, "give each with --extra-data"),
        (["--extra-data", "{pool}", "--hard-label-weight", "0.1"], 2, "needs class ids"),
        (["--extra-data", "{pool}", "--extra-data", "{pool}"], 2, "of 1 folder of unlabelled"),
        (["--extra-data", "{none}"], 2, "no file or folder"),
    ],
)
def test_what_does_not_fit_the_label_set_is_one_line(
    run_cli: Run,
    distill_flags: list[str],
    labels: Path,
    pool: Path,
    run: Path,
    flags: list[str],
    code: int,
    message: str,
) -> None:
    flags = [flag.format(pool=pool, none=run) for flag in flags]
    result = run_cli(*distill_flags, "--labels", labels, *flags, "--output", run)
    assert (result.code, result.stderr.count("\n")) == (code, 1), result.stderr
    assert message in result.stderr


def test_a_label_set_without_the_pool_names_the_ways_out(
    done: Run,
    run_cli: Run,
    distill_flags: list[str],
    teacher_flags: list[str],
    pool: Path,
    tmp_path: Path,
) -> None:
    words = [*distill_flags, "--extra-data", pool, "--output", tmp_path / "run"]
    result = run_cli(*words)
    assert result.code == 2
    assert "has no labels of --extra-data; precompute with --extra-data" in result.stderr
    done(*words, "--missing", "teach", *teacher_flags, "--epochs", 1)


def test_online_teachers_label_the_pool(
    done: Run,
    distill_flags: list[str],
    teacher_flags: list[str],
    pool: Path,
    run: Path,
) -> None:
    at = distill_flags.index("--labels")
    words = [*distill_flags[:at], *distill_flags[at + 2 :], "--online", *teacher_flags]
    done(*words, "--extra-data", pool, "--img-size", 32, "--epochs", 1, "--output", run)
    assert _column(run, "train_labels_online") == ["40"]


def test_tar_shards_and_a_pool_make_label_shards_of_each(
    data_dir: Path, pool: Path, tmp_path: Path
) -> None:
    tars = tar_tree(data_dir, tmp_path / "tars")
    source = open_source(tars, "train")
    joined = WithExtra(source, [UnlabelledFolder(pool, classes=source.classes)])
    assert joined.shard_starts == [0, 10, 20, 30, 36]
    assert joined.read(36) == (pool / "ants" / "00.jpg").read_bytes()
    assert joined.labels[35:] == [2, -1, -1, -1, -1]


def test_tar_files_without_class_ids_are_unlabelled_pictures(
    done: Run, precompute_flags: list[str], distill_flags: list[str], pool: Path, tmp_path: Path
) -> None:
    folder, names = tmp_path / "pool", ("ants/00.jpg", "bees/02.png")
    write_tar(folder / "some.tar", [(name, (pool / name).read_bytes()) for name in names])
    extra = ["--extra-data", folder]
    result = done(*precompute_flags, *extra, "--output", tmp_path / "labels")
    assert any("pool: 2 images, unlabelled" in line for line in result.data_lines)
    assert {"extra/pool/ants/00", "extra/pool/bees/02"} <= set(
        LabelSet.open(tmp_path / "labels").keys()
    )
    words = [*distill_flags, "--labels", tmp_path / "labels", *extra, "--epochs", 1]
    done(*words, "--output", tmp_path / "run")
    assert _column(tmp_path / "run", "train_labels_stored") == ["38"]


def test_a_folder_of_tar_files_has_no_class_ids_and_no_pictures(pool: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pool"
    write_tar(folder / "some.tar", [("1.jpg", b"x"), ("1.cls", b"0")])
    with pytest.raises(ConfigError, match="tar files with class ids; give them as --data-dir"):
        open_unlabelled(folder, classes=["ants"])
    shutil.copy(pool / "flat.jpg", folder)
    with pytest.raises(ConfigError, match=r"tar files and pictures \(flat\.jpg\)"):
        open_unlabelled(folder, classes=["ants"])


def test_a_name_that_is_not_utf8_is_an_error(pool: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"b\xff.jpg")
    try:
        shutil.copy(pool / "flat.jpg", tmp_path / name)
    except OSError:
        pytest.skip("the file system allows UTF-8 only")
    with pytest.raises(ConfigError, match="is not valid UTF-8; rename it"):
        UnlabelledFolder(tmp_path, classes=["ants"])


def test_folders_that_contain_one_another_or_share_a_name_are_refused(
    own_data: Path, pool: Path, tmp_path: Path
) -> None:
    source = ImageFolder(own_data, "train")
    for folder in (own_data, own_data / "train" / "ants"):
        with pytest.raises(ConfigError, match="contain one another"):
            WithExtra(source, [UnlabelledFolder(folder, classes=[])])
    val = ImageFolder(own_data, "val")
    for folder in (own_data / "val", own_data / "val" / "ants"):
        extra = [UnlabelledFolder(folder, classes=[])]
        with pytest.raises(ConfigError, match="labelled images of val in"):
            WithExtra(source, extra, val=val)
    table = own_data / "list.csv"
    table.write_text("path,class\ntrain/ants/00.jpg,ants\n")
    of_table = open_source(table, "train")
    extra = [UnlabelledFolder(own_data / "train" / "ants", classes=[])]
    with pytest.raises(ConfigError, match="contain one another"):
        WithExtra(of_table, extra)
    other = shutil.copytree(pool, tmp_path / "other" / "pool")
    with pytest.raises(ConfigError, match="same name"):
        WithExtra(source, [UnlabelledFolder(f, classes=[]) for f in (pool, other)])
    taken = own_data / "train" / "extra" / "pool"
    shutil.copytree(pool, taken)
    with pytest.raises(ConfigError, match="class folder extra"):
        WithExtra(ImageFolder(own_data, "train"), [UnlabelledFolder(pool, classes=[])])


def test_the_settings_keep_the_folders(
    done: Run, distill_flags: list[str], labels: Path, pool: Path, run: Path
) -> None:
    done(*distill_flags, "--labels", labels, "--extra-data", pool, "--epochs", 1, "--output", run)
    assert json.loads((run / "config.json").read_text())["extra_data"] == [str(pool)]
