"""docs/reference/reference_reader.py reads every set in 80 lines, without this library."""

import functools
import importlib.util
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from cases import mostly_slow
from conftest import FORMS, IMG_SIZE, ROOT, Result
from label_sets import make_set
from mealv2.codec.residual_codes import RUN_LENGTHS, VALUE_LENGTHS
from mealv2.label_set import Encoding, LabelSet, ShardFile
from mealv2.models import create_classifier, save_classifier

PATH = ROOT / "docs" / "reference" / "reference_reader.py"
CLASSES = tuple(f"c{number:03d}" for number in range(300))
# Of 300 classes: ids of 9 bits, curves with many anchors, counts of two bytes.
LARGE = {
    "rate": ["--rate", "0.00001"],
    "curve": ["--topk", "24"],
    "counts of two bytes": ["--topk", "260"],
    "curve over all": ["--topk", "300"],
    "float16": ["--topk", "20", "--label-dtype", "float16"],
    "float32": ["--topk", "255", "--label-dtype", "float32"],
    "all": ["--topk", "all"],
}

LabelSetReader = Callable[..., Iterator[tuple[tuple[str, int], np.ndarray]]]


@pytest.fixture(scope="module")
def read() -> LabelSetReader:
    """The reader's function, from the file."""
    spec = importlib.util.spec_from_file_location("reference_reader", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.label_set


@pytest.fixture(scope="module")
def seeded_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 300 classes that is sure of some answers and not of others."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        model = create_classifier("test_resnet", num_classes=len(CLASSES), img_size=IMG_SIZE)
        model.backbone.get_classifier().weight.mul_(100.0)
    folder = tmp_path_factory.mktemp("teacher") / "test_resnet"
    save_classifier(folder, model, classes=CLASSES, img_size=IMG_SIZE)
    return folder


@pytest.fixture(scope="module")
def large(
    done: Callable[..., Result],
    draw_tree: Callable[..., Path],
    seeded_teacher: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Path]:
    """A function: a set of one image of each of 300 classes, in one of LARGE."""
    folder = tmp_path_factory.mktemp("large")
    draw_tree(folder / "data", classes=CLASSES, num_train=1, num_val=0)

    @functools.cache
    def make(form: str, *, logits: bool = False) -> Path:
        out = folder / f"{form}-{logits}"
        flags = [*LARGE[form], *(["--store-logits"] if logits else [])]
        data = ["--data-dir", folder / "data", "--val-split", "none", "--shard-size", 128]
        how = ["--teacher", f"test_resnet={seeded_teacher}", "--img-size", IMG_SIZE, "--workers", 0]
        done("precompute", *data, *how, "--num-views", 3, *flags, "--output", out)
        return out

    return make


def _agrees(read: LabelSetReader, folder: Path, split: str = "train") -> np.ndarray:
    """Compare every row of a set with LabelSet's; return how many each view's label keeps."""
    labels = LabelSet.open(folder, split=split)
    found = dict(read(folder, split))
    assert found.keys() == {(k, v) for k in labels.keys() for v in range(labels.num_views)}  # noqa: SIM118
    rows = labels.soft_labels([key for key, _ in found], [view for _, view in found])
    np.testing.assert_allclose(list(found.values()), rows.to_dense(), rtol=0, atol=1e-6)
    return rows.kept().is_kept_NK.sum(dim=1).numpy()


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_reader_agrees_on_three_classes(
    read: LabelSetReader, labels_of: Callable[..., Path], form: str, logits: bool, split: str
) -> None:
    _agrees(read, labels_of(form, logits=logits), split)


@pytest.mark.parametrize("num_classes", [2, 50, 1000])
@pytest.mark.parametrize("num_views", [1, 2, 16])
def test_reader_agrees_on_views_that_share_a_model(
    read: LabelSetReader, tmp_path: Path, num_views: int, num_classes: int
) -> None:
    keys = [f"{n}.jpg" for n in range(7)]
    make_set(tmp_path / "set", Encoding(num_classes, rate=1e-3), keys, num_views)
    _agrees(read, tmp_path / "set")
    labels = LabelSet.open(tmp_path / "set").soft_labels(keys, [0] * len(keys))
    first = {int(labels.data_P[at]) for at in labels.at_B}
    if (num_views, num_classes) == (16, 1000):
        assert max(first) > 1, "components"


@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("form", mostly_slow(LARGE, fast=2))
def test_reader_agrees_on_many_classes(
    read: LabelSetReader, large: Callable[..., Path], form: str, logits: bool
) -> None:
    num_kept = _agrees(read, large(form, logits=logits))
    if form == "rate":
        assert len(set(num_kept.tolist())) > 10, "or few lengths of a curve were seen"


def test_reader_agrees_on_added_views(
    read: LabelSetReader,
    labels_of: Callable[..., Path],
    add_views: Callable[..., object],
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(labels_of("rate"), tmp_path / "set"))
    add_views(folder, (4, 5, 6))
    _agrees(read, folder)
    assert len(dict(read(folder))) == 36 * 7


def test_reader_leaves_out_views_of_an_unfinished_block(
    read: LabelSetReader,
    labels_of: Callable[..., Path],
    add_views: Callable[..., object],
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(labels_of("rate"), tmp_path / "set"))
    manifest = (folder / "manifest.json").read_bytes()
    add_views(folder, (4, 5, 6))
    (folder / "manifest.json").write_bytes(manifest)  # as a job that was killed leaves it
    (folder / "train-00003-views-4-6.h5").unlink()
    assert {view for _, view in dict(read(folder))} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "column", ["labels", "keys", "key_ends", "key_hashes", "label_ends", "crc32", "image_sizes"]
)
def test_reader_refuses_a_flipped_bit_in_a_column(
    read: LabelSetReader,
    labels_of: Callable[..., Path],
    tmp_path: Path,
    flipped_bit: Callable[..., None],
    column: str,
) -> None:
    folder = Path(shutil.copytree(labels_of("rate"), tmp_path / "set"))
    file = ShardFile(folder / "train-00001.h5")
    flipped_bit(file.path, file.header["columns"][column]["offset"] + 1)
    with pytest.raises(AssertionError):
        dict(read(folder))


@pytest.mark.parametrize("offset", [0, 9, 17, 30, 50, 80, 103])
def test_reader_refuses_a_flipped_bit_in_the_head(
    read: LabelSetReader,
    labels_of: Callable[..., Path],
    tmp_path: Path,
    flipped_bit: Callable[..., None],
    offset: int,
) -> None:
    folder = Path(shutil.copytree(labels_of("all"), tmp_path / "set"))
    flipped_bit(folder / "train-00000.h5", offset)
    with pytest.raises(AssertionError):
        dict(read(folder))


def test_reader_refuses_a_damaged_header_and_a_file_cut_short(
    read: LabelSetReader,
    labels_of: Callable[..., Path],
    tmp_path: Path,
    flipped_bit: Callable[..., None],
) -> None:
    folder = Path(shutil.copytree(labels_of("all"), tmp_path / "set"))
    path = folder / "train-00000.h5"
    whole = path.read_bytes()
    flipped_bit(path, whole.index(b'"plan_sha256"') + 20)
    with pytest.raises(AssertionError):
        dict(read(folder))
    path.write_bytes(whole[:-1])
    with pytest.raises(AssertionError):
        dict(read(folder))
    path.write_bytes(whole)
    assert len(dict(read(folder))) == 144


def test_lengths_of_codes_beside_the_reader_are_those_of_the_library() -> None:
    assert PATH.with_name("code_lengths.txt").read_text("utf-8").split() == [
        *RUN_LENGTHS,
        *VALUE_LENGTHS,
    ]


def test_reader_is_short_and_stands_in_the_document() -> None:
    code = PATH.read_text(encoding="utf-8")
    assert sum(map(bool, code.splitlines())) <= 80
    assert "mealv2." not in code
    assert f"```py\n{code}```" in (ROOT / "docs" / "reference" / "label-set-format.md").read_text(
        "utf-8"
    )
