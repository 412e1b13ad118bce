"""mealv2 labels import and export: SRe2L's and LPLD's files, by their own reading and writing."""

import json
import random
import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sre2l
import torch

import stored
from conftest import Result
from mealv2.data.folder import ImageFolder
from mealv2.label_set import LabelSet
from pictures import size_of
from pipeline.label_sets import import_sre2l

Run = Callable[..., Result]
Make = Callable[..., Path]
DENSE = ("--topk", "all", "--label-dtype", "float32")
EPOCHS, SIZE = 3, 8  # 36 images: four batches of 8 and one of 4


@pytest.fixture
def soft(tmp_path: Path) -> Path:
    return tmp_path / "soft_labels"


@pytest.fixture
def imported(tmp_path: Path) -> Path:
    return tmp_path / "imported"


@pytest.fixture
def words(data_dir: Path, soft: Path, imported: Path) -> Callable[..., list[object]]:
    """A function: the words that import the tree's labels; flags given after these win."""

    def make(*flags: object) -> list[object]:
        given = ["--from", "sre2l", "--data-dir", data_dir, "--img-size", 32, "--shard-size", 10]
        return ["labels", "import", soft, *given, "--output", imported, *flags]

    return make


@pytest.fixture
def exporting(data_dir: Path) -> Callable[..., list[object]]:
    def make(folder: Path, out: Path, *flags: object) -> list[object]:
        given = ["--to", "sre2l", "--data-dir", data_dir, "--batch-size", SIZE]
        return ["labels", "export", folder, *given, "--output", out, *flags]

    return make


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    scaled = logits.astype(np.float64) / temperature
    powers = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def views_in(folder: Path, source: ImageFolder) -> dict[tuple[str, int], tuple[Any, bool]]:
    """Return the box in pixels and the flip of every view of a label set."""
    labels = LabelSet.open(folder)
    views, found = labels.views(), {}
    for position, key in enumerate(source.keys):
        width, height = size_of(source.read(position))
        for number in range(labels.num_views):
            view = views.view(key, number, width=width, height=height)
            found[key, number] = ((view.top, view.left, view.height, view.width), view.flip)
    return found


# --- import ---------------------------------------------------------------------------------------


def test_labels_belong_to_the_images_and_views_that_sre2l_labelled(
    done: Run, words: Callable[..., list[object]], data_dir: Path, soft: Path, imported: Path
) -> None:
    theirs = sre2l.relabel(data_dir / "train", soft)
    result = done(*words())
    assert (result.report["images"], result.report["num_views"]) == (36, EPOCHS)
    assert result.report["top1_agreement"] > 60
    assert "warning" not in result.stderr
    dense, views = stored.dense_of(imported), views_in(imported, ImageFolder(data_dir, "train"))
    assert dense.keys() == views.keys() == theirs.keys()
    for address, view in theirs.items():
        np.testing.assert_allclose(dense[address], softmax(view.logits), rtol=1e-5, atol=1e-12)
        assert views[address] == (view.box, view.flip)
        at_20 = softmax(np.log(dense[address]), 20.0)  # SRe2L trains at this temperature
        np.testing.assert_allclose(at_20, softmax(view.logits, 20.0), rtol=1e-6)
    done("labels", "verify", imported, "--data-dir", data_dir)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_logits_of_both_types_are_kept(
    done: Run,
    words: Callable[..., list[object]],
    data_dir: Path,
    soft: Path,
    imported: Path,
    dtype: torch.dtype,
) -> None:
    theirs = sre2l.relabel(data_dir / "train", soft, dtype=dtype)
    done(*words("--store-logits"))
    labels = LabelSet.open(imported)
    for (key, epoch), view in theirs.items():
        logits = labels.rows([key], [epoch]).logits
        assert logits is not None
        np.testing.assert_array_equal(logits.values_NK[0].numpy(), view.logits)


def test_labels_can_be_coded_as_they_are_imported(
    done: Run, words: Callable[..., list[object]], data_dir: Path, soft: Path, imported: Path
) -> None:
    sre2l.relabel(data_dir / "train", soft)
    done(*words("--topk", 2))
    assert str(LabelSet.open(imported).encoding) == "top-2, curve"


def test_labels_of_more_images_than_memory_holds_are_the_same(
    done: Run,
    words: Callable[..., list[object]],
    data_dir: Path,
    soft: Path,
    imported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sre2l.relabel(data_dir / "train", soft)
    done(*words("--output", tmp_path / "at-once"))
    monkeypatch.setattr(import_sre2l, "_MAX_BYTES", 1)
    done(*words())
    assert stored.rows_of(imported) == stored.rows_of(tmp_path / "at-once")


def test_pruned_labels_are_read_by_lplds_list_and_repeated(
    done: Run, words: Callable[..., list[object]], data_dir: Path, soft: Path, imported: Path
) -> None:
    """LPLD: without the incomplete batch of each epoch, and less than all epochs."""
    theirs = sre2l.relabel(data_dir / "train", soft, epochs=6, kept=0.6)  # 14 of 24 batches
    assert len(theirs) == 14 * SIZE
    assert len(list(soft.glob("epoch_3/*.tar"))) == 2
    result = done(*words())
    dense, views = stored.dense_of(imported), views_in(imported, ImageFolder(data_dir, "train"))
    by_image: dict[str, list[sre2l.View]] = {}
    for (key, _), view in sorted(theirs.items(), key=lambda item: item[0][1]):
        by_image.setdefault(key, []).append(view)
    num_views = max(map(len, by_image.values()))
    assert result.report["num_views"] == num_views == 4
    assert {len(views) for views in by_image.values()} == {2, 3, 4}
    assert result.report["images"] == len(by_image)
    num_repeated = 4 * len(by_image) - len(theirs)
    assert f"repeated: {num_repeated} labels of images in fewer epochs" in result.stderr
    for (key, number), row in dense.items():
        view = by_image[key][number % len(by_image[key])]
        np.testing.assert_allclose(row, softmax(view.logits), rtol=1e-5, atol=1e-12)
        assert views[key, number] == (view.box, view.flip)


def test_images_are_numbered_as_in_torchvision(
    done: Run, words: Callable[..., list[object]], soft: Path, imported: Path, own_data: Path
) -> None:
    """Tiny-ImageNet has folders in its class folders; torchvision lists these after the images."""
    ants = own_data / "train" / "ants"
    (ants / "0-folder").mkdir()
    for path in sorted(ants.glob("*.*"))[:6:5]:
        path.rename(ants / "0-folder" / path.name)
    theirs = sre2l.relabel(own_data / "train", soft)
    done(*words("--data-dir", own_data))
    for address, row in stored.dense_of(imported).items():
        expected = softmax(theirs[address].logits)
        np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-12)


# --- what does not fit ----------------------------------------------------------------------------

SWAP = torch.tensor([1, 0, 2, 3, 4, 5, 6, 7])
CUTMIX = [SWAP, 0.75, [np.int64(0), np.int64(3), np.int64(16), np.int64(19)]]
NO_BOX = [SWAP, 0.999, [np.int64(5), np.int64(3), np.int64(5), np.int64(3)]]


@pytest.mark.parametrize(
    ("mixed", "named"),
    [
        (CUTMIX, "its images were mixed by CutMix (lambda 0.75)"),
        ([SWAP, 0.25, None], "its images were mixed by MixUp (lambda 0.25)"),
        ([None, 0.25, None], "it has a mixing weight or box, but no partners"),
        ([SWAP[1:], 0.25, None], "its mix index is not an order of its images"),
        ([SWAP, 1.25, None], "its mixing weight is 1.25"),
        ([SWAP, 0.25, [1, 2, 3]], "its CutMix box is not four numbers"),
    ],
)
def test_labels_of_mixed_images_are_refused_before_anything_is_written(
    run_cli: Run,
    words: Callable[..., list[object]],
    data_dir: Path,
    soft: Path,
    imported: Path,
    mixed: list[Any],
    named: str,
) -> None:
    sre2l.relabel(data_dir / "train", soft, mixed=mixed)
    result = run_cli(*words())
    assert result.code == 3
    assert f"label file {soft}/epoch_0/batch_0.tar: {named}" in result.stderr
    assert not imported.exists()


@pytest.mark.parametrize("mixed", [NO_BOX, [SWAP, 1.0, None], [torch.arange(8), 0.5, None]])
def test_mixing_that_changes_no_pixel_is_none(
    done: Run,
    words: Callable[..., list[object]],
    own_data: Path,
    soft: Path,
    imported: Path,
    mixed: list[Any],
) -> None:
    for path in sorted((own_data / "train" / "ants").iterdir())[:4]:
        path.unlink()  # 32 images: four batches
    theirs = sre2l.relabel(own_data / "train", soft, mixed=mixed)
    done(*words("--data-dir", own_data))
    assert stored.dense_of(imported).keys() == theirs.keys()


def test_labels_with_cutout_are_refused(
    run_cli: Run, words: Callable[..., list[object]], data_dir: Path, soft: Path
) -> None:
    """LPLD's labels of ImageNet-21K have a box and a colour instead of the flip."""
    sre2l.relabel(data_dir / "train", soft)
    path = soft / "epoch_0" / "batch_0.tar"
    content = torch.load(path)
    content[1] = torch.rand(SIZE, 7)
    torch.save(content, path)
    result = run_cli(*words())
    assert result.code == 3
    assert "have Cutout (LPLD's labels of ImageNet-21K)" in result.stderr


@pytest.mark.parametrize("removed", [1, 5])
def test_other_images_than_those_labelled_are_refused(
    run_cli: Run,
    words: Callable[..., list[object]],
    own_data: Path,
    soft: Path,
    imported: Path,
    removed: int,
) -> None:
    sre2l.relabel(own_data / "train", soft)
    for path in sorted((own_data / "train" / "ants").iterdir())[:removed]:
        path.unlink()
    result = run_cli(*words("--data-dir", own_data))
    assert result.code == 3
    assert f"the {36 - removed} images of {own_data}/train" in result.stderr
    assert not imported.exists()


def test_labels_of_other_images_cause_a_warning(
    done: Run, words: Callable[..., list[object]], data_dir: Path, soft: Path
) -> None:
    sre2l.relabel(data_dir / "train", soft)
    orders = sre2l.batches_of(36, SIZE)
    shifted = {epoch: [(n + 12) % 36 for n in chain(*next(orders))] for epoch in range(EPOCHS)}
    (soft / "sampler_indices_epoch.json").write_text(json.dumps(shifted))
    result = done(*words())
    warning = "% of 16 labels name the class of their image, as by chance: is"
    assert warning in result.stderr
    assert result.report["top1_agreement"] < 40


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda soft: (soft / "epoch_1").rename(soft / "epoch_7"), "has epoch_7 but no epoch_1"),
        (lambda soft: (soft / "epoch_1/batch_2.tar").unlink(), "has batch_4.tar but no batch_2."),
        (
            lambda soft: (soft / "epoch_1/batch_4.tar").unlink(),
            "has 4 batch files of 8 images, but",
        ),
        (lambda soft: shutil.rmtree(soft / "epoch_0"), "has epoch_2 but no epoch_0"),
        (lambda soft: [shutil.rmtree(p) for p in soft.iterdir()], "no label files in"),
        (lambda soft: [p.unlink() for p in soft.glob("epoch_1/*")], "epoch_1/batch_0.tar"),
    ],
)
def test_missing_files_are_named(
    run_cli: Run,
    words: Callable[..., list[object]],
    data_dir: Path,
    soft: Path,
    imported: Path,
    spoil: Callable[[Path], object],
    named: str,
) -> None:
    sre2l.relabel(data_dir / "train", soft)
    spoil(soft)
    result = run_cli(*words())
    assert result.code == 3
    assert named in result.stderr
    assert not imported.exists()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "cannot read"),
        ("[]", "cannot read"),
        ('{"0": [0]}', "no epoch '1'"),
        ('{"0": [0], "1": [36], "2": [1]}', "image numbers outside 0 to 35"),
        ('{"0": [0], "1": [true], "2": [1]}', "not a list of image numbers"),
        ('{"0": [0], "1": [3, 3], "2": [1]}', "an image twice"),
        ('{"0": [0], "1": [3], "2": [1]}', "has 5 batch files of 8 images, but the 1 images"),
    ],
)
def test_a_list_of_images_that_is_none_is_refused(
    run_cli: Run,
    words: Callable[..., list[object]],
    data_dir: Path,
    soft: Path,
    text: str,
    named: str,
) -> None:
    sre2l.relabel(data_dir / "train", soft)
    (soft / "sampler_indices_epoch.json").write_text(text)
    result = run_cli(*words())
    assert result.code == 3
    assert named in result.stderr


def test_a_damaged_file_is_named_and_the_import_continues_when_it_is_replaced(
    done: Run,
    run_cli: Run,
    words: Callable[..., list[object]],
    data_dir: Path,
    soft: Path,
    imported: Path,
    tmp_path: Path,
) -> None:
    sre2l.relabel(data_dir / "train", soft)
    path = soft / "epoch_2" / "batch_3.tar"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    result = run_cli(*words())
    assert result.code == 3
    assert str(path) in result.stderr
    path.write_bytes(data)
    done(*words())
    done(*words("--output", tmp_path / "at-once"))
    assert stored.rows_of(imported) == stored.rows_of(tmp_path / "at-once")


def test_other_numbers_of_classes_are_refused(
    run_cli: Run, words: Callable[..., list[object]], data_dir: Path, soft: Path
) -> None:
    sre2l.relabel(data_dir / "train", soft, classes=10)
    result = run_cli(*words())
    assert result.code == 3
    assert "has labels of 10 classes" in result.stderr
    assert "--class-map" in result.stderr


@pytest.mark.parametrize(
    ("flags", "code", "named"),
    [
        (["--label-type", "ori"], 2, "--label-type has no effect with --from sre2l"),
        (["--from", "fkd", "--rate", 0.1], 2, "--rate has no effect without --from sre2l"),
        (["--from", "fkd", "--store-logits"], 2, "--store-logits has no effect without"),
        (["--topk", 2, "--rate", 0.1], 2, "give --rate or --topk, not both"),
        (["--topk", 4], 2, "the data has only 3 classes"),
    ],
)
def test_flags_that_do_not_fit_are_named(
    run_cli: Run,
    words: Callable[..., list[object]],
    data_dir: Path,
    soft: Path,
    imported: Path,
    flags: list[object],
    code: int,
    named: str,
) -> None:
    sre2l.relabel(data_dir / "train", soft, epochs=1)
    result = run_cli(*words(*flags))
    assert result.code == code
    assert named in result.stderr
    assert not imported.exists()


def test_no_damage_makes_a_wrong_label(
    done: Run,
    run_cli: Run,
    words: Callable[..., list[object]],
    data_dir: Path,
    soft: Path,
    imported: Path,
    tmp_path: Path,
) -> None:
    """Through the command: a flipped bit is an error with the file's name, or changes nothing."""
    sre2l.relabel(
        data_dir / "train", soft, epochs=1, mixed=[torch.arange(8), 0.5, None][:0] or None
    )
    done(*words("--output", tmp_path / "sound"))
    expected = stored.rows_of(tmp_path / "sound")
    path, rng = soft / "epoch_0" / "batch_1.tar", random.Random(0)
    data = path.read_bytes()
    for _ in range(12):
        spoilt = bytearray(data)
        spoilt[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(spoilt)
        result = run_cli(*words())
        if result.code == 0:
            assert stored.rows_of(imported) == expected
        else:
            assert result.code == 3
            assert str(path) in result.stderr
        shutil.rmtree(imported, ignore_errors=True)


# --- export ---------------------------------------------------------------------------------------


def test_sre2ls_own_loader_reads_our_labels_and_boxes(
    done: Run,
    make_set: Make,
    exporting: Callable[..., list[object]],
    data_dir: Path,
    tmp_path: Path,
) -> None:
    folder, out = make_set(*DENSE), tmp_path / "out"
    report = done(*exporting(folder, out)).report
    assert report["files"] == 4 * 5 + 1
    found = sre2l.load(f"{out}/labels/", data_dir / "train", batch_size=SIZE, epochs=4)
    dense, views = stored.dense_of(folder), views_in(folder, ImageFolder(data_dir, "train"))
    assert found.keys() == dense.keys()
    for address, view in found.items():
        assert view.logits.dtype == np.float16
        np.testing.assert_allclose(softmax(view.logits), dense[address], rtol=6e-3)
        assert (view.box, view.flip) == views[address]
    listed = json.loads((out / "labels" / "sampler_indices_epoch.json").read_text())
    orders = sre2l.batches_of(36, SIZE)
    assert listed == {str(epoch): [*chain(*next(orders))] for epoch in range(4)}


@pytest.mark.parametrize("flags", [("--topk", 2), ("--rate", 0.01), (*DENSE, "--store-logits")])
def test_labels_of_every_encoding_are_exported(
    done: Run,
    make_set: Make,
    exporting: Callable[..., list[object]],
    data_dir: Path,
    tmp_path: Path,
    flags: tuple[object, ...],
) -> None:
    """Mean logits of several teachers are not exported: their softmax is not the label."""
    folder = make_set(*flags)
    done(*exporting(folder, tmp_path / "out"))
    found = sre2l.load(f"{tmp_path}/out/labels/", data_dir / "train", batch_size=SIZE, epochs=4)
    for address, row in stored.dense_of(folder).items():
        np.testing.assert_allclose(softmax(found[address].logits), row, rtol=6e-3)


def test_an_import_with_logits_is_exported_to_equal_tensors(
    done: Run,
    words: Callable[..., list[object]],
    exporting: Callable[..., list[object]],
    data_dir: Path,
    soft: Path,
    imported: Path,
    tmp_path: Path,
) -> None:
    theirs = sre2l.relabel(data_dir / "train", soft)
    done(*words("--store-logits"))
    done(*exporting(imported, tmp_path / "out"))
    paths = sorted(soft.glob("*/*.tar"))
    assert len(paths) == 15
    for path in paths:
        one = torch.load(path)
        two = torch.load(tmp_path / "out" / "labels" / path.relative_to(soft))
        torch.testing.assert_close(two[0], one[0], rtol=0, atol=1 / 65535)
        assert torch.equal(two[1], one[1])
        assert torch.equal(two[5], one[5])
    again = sre2l.load(f"{tmp_path}/out/labels/", data_dir / "train", batch_size=SIZE, epochs=3)
    assert {a: (v.box, v.flip) for a, v in again.items()} == {
        a: (v.box, v.flip) for a, v in theirs.items()
    }


def test_an_export_comes_back_equal_and_is_exported_to_equal_bytes(
    done: Run,
    make_set: Make,
    exporting: Callable[..., list[object]],
    words: Callable[..., list[object]],
    data_dir: Path,
    imported: Path,
    tmp_path: Path,
    contents: Callable[..., dict[str, bytes]],
) -> None:
    folder, source = make_set("--topk", 2), ImageFolder(data_dir, "train")
    done(*exporting(folder, tmp_path / "one"))
    flags = ["--from", "sre2l", "--data-dir", data_dir, "--img-size", 32, "--store-logits"]
    done("labels", "import", tmp_path / "one" / "labels", *flags, "--output", imported)
    assert views_in(imported, source) == views_in(folder, source)
    back = stored.dense_of(imported)
    for address, row in stored.dense_of(folder).items():
        np.testing.assert_allclose(back[address], row, rtol=6e-3)
    done(*exporting(imported, tmp_path / "two"))
    done("labels", "import", tmp_path / "two", *flags, "--output", tmp_path / "again")
    assert stored.rows_of(tmp_path / "again") == stored.rows_of(imported)
    for path in (tmp_path / "one" / "labels").glob("*/*.tar"):
        one, two = (
            torch.load(path),
            torch.load(tmp_path / "two" / path.relative_to(tmp_path / "one")),
        )
        assert torch.equal(one[5], two[5])
    done(*exporting(tmp_path / "again", tmp_path / "three"))
    assert contents(tmp_path / "two" / "labels") == contents(tmp_path / "three" / "labels")


def test_a_stopped_export_continues(
    done: Run,
    make_set: Make,
    exporting: Callable[..., list[object]],
    tmp_path: Path,
    contents: Callable[..., dict[str, bytes]],
) -> None:
    folder = make_set("--topk", 2)
    done(*exporting(folder, tmp_path / "one"))
    done(*exporting(folder, tmp_path / "two"))
    (tmp_path / "one" / "labels" / "epoch_2" / "batch_1.tar").unlink()
    shutil.rmtree(tmp_path / "one" / "labels" / "epoch_3")
    (tmp_path / "one" / "labels" / "sampler_indices_epoch.json").unlink()
    done(*exporting(folder, tmp_path / "one"))
    assert contents(tmp_path / "one" / "labels") == contents(tmp_path / "two" / "labels")


@pytest.mark.parametrize(
    ("flags", "code", "named"),
    [
        (["--batch-size", 37], 2, "--batch-size 37 exceeds the 36 images; give"),
        (["--split", "val"], 2, "--to sre2l exports views with boxes: use --split train"),
        (["--layout", "mealv2"], 2, "--layout has no effect without --to fkd"),
        (["--to", "webdataset"], 2, "--batch-size has no effect without --to sre2l"),
    ],
)
def test_flags_of_the_export_that_do_not_fit_are_named(
    run_cli: Run,
    make_set: Make,
    exporting: Callable[..., list[object]],
    tmp_path: Path,
    flags: list[object],
    code: int,
    named: str,
) -> None:
    result = run_cli(*exporting(make_set("--topk", 2), tmp_path / "out", *flags))
    assert result.code == code
    assert named in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_export_needs_labels_of_every_image_of_the_folder(
    run_cli: Run,
    done: Run,
    make_set: Make,
    exporting: Callable[..., list[object]],
    own_data: Path,
    tmp_path: Path,
) -> None:
    folder = make_set("--topk", 2)
    (own_data / "train" / "ants" / "new.jpg").write_bytes(
        (own_data / "train" / "ants" / "00.jpg").read_bytes()
    )
    result = run_cli(*exporting(folder, tmp_path / "out", "--data-dir", own_data))
    assert result.code == 3
    assert "images without labels: 1 (ants/new.jpg)" in result.stderr
