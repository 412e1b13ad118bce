"""mealv2 labels export: others read what a set holds, with their own readers."""

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
import webdataset

import reference
import stored
from conftest import ROOT, Result
from label_sets import forms_of
from mealv2 import fkd
from mealv2.data.folder import ImageFolder
from mealv2.data.open import open_source
from mealv2.data.source import fingerprint
from mealv2.label_set import Encoding, LabelSet, block_of_member
from mealv2.storage import atomic
from pictures import size_of

Run = Callable[..., Result]
Make = Callable[..., Path]
DENSE = ("--topk", "all", "--label-dtype", "float32")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "exported"


# --- FKD ----------------------------------------------------------------------------------------

FKD_KINDS = [
    "ori",
    "hard",
    "smoothing",
    "marginal_smoothing_k1",
    "marginal_smoothing_k2",
    "marginal_renorm_k2",
    "marginal_smoothing_k3",
]


def _as_fkd_reads(path: Path, order: list[int], kind: str) -> list[tuple[Any, bool, np.ndarray]]:
    """Read crops of a label file as FKD's training does, unmodified: plain torch.load."""
    boxes, flips, labels = torch.load(path)
    found = []
    for i in order:
        label = labels[i]
        label = label.detach() if kind == "ori" else label
        found.append((boxes[i], bool(flips[i]), np.asarray(label)))
    return found


@pytest.mark.parametrize("kind", FKD_KINDS)
def test_fkds_own_reading_gives_our_labels_and_boxes(
    done: Run, make_set: Make, data_dir: Path, out: Path, kind: str
) -> None:
    folder = make_set(*DENSE)
    words = ["labels", "export", folder, "--to", "fkd", "--label-type", kind, "--output", out]
    assert done(*words).report["files"] == 36
    labels, dense = LabelSet.open(folder), stored.dense_of(folder)
    source = ImageFolder(data_dir, "train")
    order = [3, 0, 2, 1]
    for position, key in enumerate(source.keys):
        width, height = size_of(source.read(position))
        path = (out / "train" / key).with_suffix(".tar")
        for view, (box, flip, packed) in zip(order, _as_fkd_reads(path, order, kind), strict=True):
            p = dense[key, view].astype(float)
            k = {"ori": 3, "hard": 1, "smoothing": 1}.get(kind) or int(kind[-1])
            ids, values = reference.top_k(p[None], k)
            by_kind = kind.partition("_k")[0]
            if kind == "marginal_smoothing_k3":
                found = np.zeros(3)
                found[packed[0].astype(int)] = packed[1]
                expected = p
            else:
                found = reference.fkd_recovery(packed[None], by_kind, 3)[0]
                stored_as = {"ori": p, "hard": ids[0, 0]}.get(kind, np.stack([ids[0], values[0]]))
                expected = reference.fkd_recovery(np.asarray(stored_as)[None], by_kind, 3)[0]
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
            if kind in ("ori", "marginal_smoothing_k2", "marginal_smoothing_k3"):
                np.testing.assert_allclose(found, p, rtol=0, atol=1e-6)  # nothing is lost
            # FKD: box times image size, PIL rounds the corners
            view_of = labels.views().view(key, view, width=width, height=height)
            top, left, h, w = (float(x) for x in box)
            corners = (left * width, top * height, (left + w) * width, (top + h) * height)
            assert [round(c) for c in corners] == [
                view_of.left,
                view_of.top,
                view_of.left + view_of.width,
                view_of.top + view_of.height,
            ]
            assert flip == view_of.flip


def test_an_export_to_fkd_comes_back_equal(
    done: Run, make_set: Make, data_dir: Path, out: Path, tmp_path: Path
) -> None:
    folder = make_set(*DENSE)
    flags = ["--to", "fkd", "--label-type", "marginal_smoothing_k2", "--output", out]
    done("labels", "export", folder, *flags)
    words = ["labels", "import", out, "--data-dir", data_dir, "--img-size", 32]
    done(*words, "--output", tmp_path / "back")
    back, dense = stored.dense_of(tmp_path / "back"), stored.dense_of(folder)
    assert back.keys() == dense.keys()
    for place, row in dense.items():
        np.testing.assert_allclose(back[place], row, rtol=0, atol=1e-6)
    ours, theirs = LabelSet.open(folder).views(), LabelSet.open(tmp_path / "back").views()
    source = ImageFolder(data_dir, "train")
    for position, key in enumerate(source.keys):
        width, height = size_of(source.read(position))
        for view in range(4):
            sizes = {"width": width, "height": height}
            assert ours.view(key, view, **sizes) == theirs.view(key, view, **sizes)
    again = ["--to", "fkd", "--label-type", "marginal_smoothing_k2", "--output", tmp_path / "again"]
    done("labels", "export", tmp_path / "back", *again)
    for path in out.glob("train/*/*.tar"):
        one, two = (torch.load(p) for p in (path, tmp_path / "again" / path.relative_to(out)))
        torch.testing.assert_close(one[0], two[0], rtol=0, atol=1 / 65535)
        torch.testing.assert_close(one[2], two[2], rtol=0, atol=1e-6)
        assert torch.equal(one[1], two[1])


@pytest.mark.parametrize(("layout", "num_parts"), [("fkd", 3), ("mealv2", 4)])
def test_each_training_finds_its_files_and_import_reads_both(
    done: Run,
    make_set: Make,
    data_dir: Path,
    out: Path,
    tmp_path: Path,
    layout: str,
    num_parts: int,
) -> None:
    flags = ["--to", "fkd", "--label-type", "hard", "--layout", layout, "--output", out]
    flags += ["--data-dir", data_dir] if layout == "mealv2" else []
    done("labels", "export", make_set(*DENSE), *flags)
    for image in data_dir.glob("train/*/*"):
        # official code: the last 3 (FKD) or 4 (MEAL V2) parts of the image's path
        stem = image.with_name(image.name.split(".")[0] + ".tar")
        assert out.joinpath(*stem.parts[-num_parts:]).is_file()
    words = ["labels", "import", out, "--data-dir", data_dir, "--img-size", 32]
    report = done(*words, "--output", tmp_path / "back").report
    assert (report["images"], report["num_views"]) == (36, 4)


@pytest.mark.parametrize("name", ["marginal_renorm", "marginal_smoothing"])
def test_fkds_names_without_k_mean_five_classes(name: str) -> None:
    assert fkd.with_k(name) == f"{name}_k5"
    assert fkd.num_kept(fkd.with_k(name), 1000) == 5
    assert fkd.with_k("marginal_renorm_k10") == "marginal_renorm_k10"
    assert fkd.with_k("ori") == "ori"


def test_added_views_are_exported_too(
    done: Run,
    make_set: Make,
    copied: Callable[[Path], Path],
    data_dir: Path,
    teach_flags: list[object],
    out: Path,
) -> None:
    folder = copied(make_set(*DENSE))
    words = ["labels", "add-views", folder, "--data-dir", data_dir, "--num-views", 6]
    done(*words, *teach_flags)
    done("labels", "export", folder, "--to", "fkd", "--label-type", "ori", "--output", out)
    boxes, _, labels = torch.load(out / "train" / "bees" / "03.tar")
    assert (len(boxes), len(labels)) == (6, 6)
    np.testing.assert_allclose(labels[5], stored.dense_of(folder)["bees/03.jpg", 5], atol=1e-6)


def test_added_views_of_a_curve_are_in_the_order_of_the_views(
    done: Run,
    make_set: Make,
    copied: Callable[[Path], Path],
    data_dir: Path,
    teach_flags: list[object],
    out: Path,
) -> None:
    folder = copied(make_set("--rate", 0.05, "--store-logits"))
    for num_views in (5, 7):
        words = ["labels", "add-views", folder, "--data-dir", data_dir, "--num-views", num_views]
        done(*words, *teach_flags)
    done("labels", "export", folder, "--output", out)
    table = pyarrow.parquet.read_table(out).to_pylist()
    labels = LabelSet.open(folder)
    keys = list(labels.keys())
    assert [(row["key"], row["view"]) for row in table] == [(k, v) for k in keys for v in range(7)]
    rows = labels.rows([row["key"] for row in table], [row["view"] for row in table])
    assert rows.logits is not None
    kept = rows.labels.kept()
    np.testing.assert_array_equal([r["prob_of_each_other"] for r in table], kept.tail_N)
    np.testing.assert_array_equal([r["mean_logit_of_others"] for r in table], rows.logits.rest_N)
    for row, is_kept, probs in zip(table, kept.is_kept_NK, kept.probs_NK, strict=True):
        np.testing.assert_array_equal(row["probs"], probs[is_kept])


# --- WebDataset -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*train-0|unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset's files
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    "flags",
    [("--topk", 2), ("--rate", 0.05, "--store-logits"), DENSE, (*DENSE, "--store-logits")],
)
def test_webdataset_reads_images_classes_and_the_rows(
    done: Run, make_set: Make, data_dir: Path, out: Path, flags: tuple[object, ...], split: str
) -> None:
    folder = make_set(*flags)
    words = ["labels", "export", folder, "--to", "webdataset", "--data-dir", data_dir]
    report = done(*words, "--split", split, "--output", out).report
    source = ImageFolder(data_dir, split)
    assert (report["images"], report["files"]) == (len(source), len(list(out.glob("*.tar"))))
    exported = json.loads((out / "_plan.json").read_text())
    encoding = Encoding.of_plan(exported["label_set"])
    num_views = exported["num_views"]

    urls = sorted(str(path) for path in out.glob("*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(samples) == len(source)
    found: dict[tuple[str, int], bytes] = {}
    for position, sample in enumerate(samples):
        key = sample["key"].decode()
        assert key == source.keys[position]
        assert sample["__key__"] == key.rpartition(".")[0]
        assert sample[key.rpartition(".")[2]] == source.read(position)
        assert int(sample["cls"]) == source.labels[position]
        block = np.frombuffer(block_of_member(key, sample["mealv2"]), np.uint8)
        rows = encoding.all_rows_of(block, np.array([len(block)]), num_views)
        for view, row in enumerate(forms_of(rows)):
            found[key, view] = row
    assert found == stored.rows_of(folder, split)


def test_tar_shards_are_the_same_bytes_every_time(
    done: Run,
    make_set: Make,
    data_dir: Path,
    tmp_path: Path,
    contents: Callable[..., dict[str, bytes]],
) -> None:
    words = ["labels", "export", make_set("--topk", 2), "--to", "webdataset"]
    for name in ("one", "two"):
        done(*words, "--data-dir", data_dir, "--output", tmp_path / name)
        os.utime(data_dir / "train" / "ants" / "00.jpg")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    with tarfile.open(tmp_path / "one" / "train-000000.tar") as tar:
        names = tar.getnames()
    assert names[:4] == ["ants/00.cls", "ants/00.jpg", "ants/00.key", "ants/00.mealv2"]


def test_images_of_one_name_differ_in_tar_shards_and_are_refused_in_fkds_files(
    done: Run,
    run_cli: Run,
    label: Callable[..., list[object]],
    own_data: Path,
    out: Path,
    tmp_path: Path,
) -> None:
    folder = own_data / "train" / "cats"
    (folder / "11.png").rename(folder / "10.b.png")
    done(*label("--data-dir", own_data), "--output", tmp_path / "set")
    words = ["labels", "export", tmp_path / "set"]
    result = run_cli(*words, "--to", "fkd", "--label-type", "ori", "--output", out)
    assert result.code == 3
    assert "cats/10.b.png" in result.stderr
    assert "cats/10.jpg" in result.stderr
    assert not out.exists()
    done(*words, "--to", "webdataset", "--data-dir", own_data, "--output", out)
    tree, tars = ImageFolder(own_data, "train"), open_source(out, "train")
    assert fingerprint(tars) == fingerprint(tree)
    assert [tars.read(p) for p in range(36)] == [tree.read(p) for p in range(36)]


def test_other_images_are_not_put_beside_the_labels(
    run_cli: Run, make_set: Make, own_data: Path, out: Path
) -> None:
    (own_data / "train" / "ants" / "00.jpg").write_bytes(b"other")
    words = ["labels", "export", make_set("--topk", 2), "--to", "webdataset"]
    result = run_cli(*words, "--data-dir", own_data, "--output", out)
    assert result.code == 3
    assert not out.exists()


# --- Parquet --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [("--topk", 2), ("--rate", 0.05, "--store-logits"), DENSE, (*DENSE, "--store-logits")],
)
def test_tables_hold_the_labels_and_where_they_were_cut(
    done: Run, make_set: Make, data_dir: Path, out: Path, flags: tuple[object, ...]
) -> None:
    folder = make_set(*flags)
    assert done("labels", "export", folder, "--output", out).report["to"] == "parquet"
    rows = pyarrow.parquet.read_table(out).to_pylist()
    assert len(rows) == 36 * 4
    dense, labels = stored.dense_of(folder), LabelSet.open(folder)
    source = ImageFolder(data_dir, "train")
    sizes = {key: size_of(source.read(p)) for p, key in enumerate(source.keys)}
    truth = dict(zip(source.keys, source.labels, strict=True))
    for row in rows:
        key, view = row["key"], row["view"]
        p = np.full(3, row["prob_of_each_other"])
        p[row["classes"]] = row["probs"]
        assert sum(p) == pytest.approx(1.0, abs=1e-5)
        np.testing.assert_allclose(p, dense.pop((key, view)), rtol=0, atol=1e-6)
        assert row["true_class"] == truth[key]
        width, height = sizes[key]
        box = labels.views().view(key, view, width=width, height=height)
        found = [row[f"box_{name}"] for name in ("top", "left", "height", "width")]
        scaled = np.array(found) * [height, width, height, width]
        np.testing.assert_allclose(scaled, [box.top, box.left, box.height, box.width], atol=1e-9)
        assert row["flip"] is box.flip
        assert ("mean_logits" in row) == ("--store-logits" in flags)
        if "mean_logits" in row:
            stored_logits = labels.rows([key], [view])
            assert stored_logits.logits is not None
            all_logits = stored_logits.logits.to_dense(stored_logits.labels.kept(), 3)[0]
            assert row["mean_logits"] == all_logits[row["classes"]].tolist()
    assert not dense


def test_the_validation_labels_are_a_table_too(done: Run, make_set: Make, out: Path) -> None:
    done("labels", "export", make_set("--topk", 2), "--split", "val", "--output", out)
    table = pyarrow.parquet.read_table(out / "val-00000.parquet")
    assert table.num_rows == 10
    assert "box_top" not in table.column_names


@pytest.mark.slow
def test_without_pyarrow_it_says_what_to_install(make_set: Make, out: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        f"sys.argv = ['mealv2', 'labels', 'export', {str(make_set('--topk', 2))!r}, "
        f"'--output', {str(out)!r}]\n"
        "import cli; cli.main()"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2
    assert "--to parquet needs pyarrow: pip install 'mealv2[parquet]'" in run.stderr
    assert not out.exists()


# --- all of them ----------------------------------------------------------------------------------

ALL = {
    "parquet": [],
    "fkd": ["--to", "fkd", "--label-type", "ori"],
    "webdataset": ["--to", "webdataset"],
}


@pytest.fixture
def exporting(make_set: Make, data_dir: Path, out: Path) -> Callable[..., list[object]]:
    """A function: the words of an export of a kind; flags given after these win."""

    def words(to: str, *flags: object) -> list[object]:
        data = ["--data-dir", data_dir] if to == "webdataset" else []
        return ["labels", "export", make_set(*DENSE), *ALL[to], *data, "--output", out, *flags]

    return words


@pytest.mark.parametrize("to", ALL)
def test_a_stopped_export_goes_on_and_ends_in_the_same_bytes(
    done: Run,
    run_cli: Run,
    exporting: Callable[..., list[object]],
    out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    contents: Callable[..., dict[str, bytes]],
    to: str,
) -> None:
    done(*exporting(to, "--output", tmp_path / "at-once"))
    real, calls = atomic._sync_folder, 0

    def stopping(folder: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        real(folder)

    monkeypatch.setattr(atomic, "_sync_folder", stopping)
    assert run_cli(*exporting(to)).code == 4
    monkeypatch.undo()
    half_way = contents(out)
    assert len(half_way) == 4
    assert not (out / "_export.json").exists()
    assert half_way.items() <= contents(tmp_path / "at-once").items()
    done(*exporting(to))
    assert contents(out) == contents(tmp_path / "at-once")


@pytest.mark.parametrize("to", ALL)
def test_a_finished_export_is_left_as_it_is(
    done: Run, exporting: Callable[..., list[object]], out: Path, to: str
) -> None:
    first = done(*exporting(to)).report
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.suffix != ".json"}
    assert done(*exporting(to)).report == first
    assert json.loads((out / "_export.json").read_text())["files"] == first["files"]
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.suffix != ".json"}
    assert after == before


def test_a_folder_of_something_else_is_refused(
    done: Run, run_cli: Run, exporting: Callable[..., list[object]], make_set: Make, out: Path
) -> None:
    done(*exporting("parquet"))
    other = run_cli("labels", "export", make_set("--topk", 2), "--output", out)
    assert (other.code, "has another export" in other.stderr) == (2, True)
    onto_itself = run_cli(*exporting("parquet", "--output", make_set(*DENSE)))
    assert (onto_itself.code, "is the label set itself" in onto_itself.stderr) == (2, True)
    foreign_files = out.with_name("strange")
    foreign_files.mkdir()
    (foreign_files / "notes.txt").touch()
    full = run_cli(*exporting("parquet", "--output", foreign_files))
    assert (full.code, "is not empty (notes.txt, …)" in full.stderr) == (2, True)


def test_appended_rows_are_left_out_with_a_note(done: Run, appended_set: Path, out: Path) -> None:
    result = done("labels", "export", appended_set, "--output", out)
    assert "left out: 3 appended labels" in result.stderr
    assert result.report["views"] == 36 * 4


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--to", "fkd"], "--label-type marginal_smoothing_k5"),  # of 3 classes
        (["--to", "fkd", "--label-type", "marginal_renorm"], "marginal_renorm_k5 must name a K"),
        (["--to", "fkd", "--layout", "mealv2"], "--data-dir is required"),
        (["--layout", "mealv2", "--data-dir", "/tmp"], "--layout has no effect without --to fkd"),
        (["--to", "fkd", "--label-type", "soft"], "unknown FKD label type 'soft'"),
        (["--to", "fkd", "--label-type", "ori", "--split", "val"], "--split train"),
        (["--to", "webdataset"], "--data-dir"),
        (["--data-dir", "/nowhere"], "--data-dir is required with --to webdataset"),
        (["--label-type", "ori"], "--label-type has no effect without --to fkd"),
        (["--to", "csv"], "parquet"),
        (["--split", "test"], "train"),
    ],
)
def test_flags_that_do_not_fit_are_named(
    run_cli: Run, make_set: Make, out: Path, flags: list[object], named: str
) -> None:
    result = run_cli("labels", "export", make_set("--topk", 2), *flags, "--output", out)
    assert result.code == 2
    assert named in result.stderr
    assert not out.exists()
