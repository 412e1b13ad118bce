"""mealv2 labels import: what FKD stored, as a set that trains exactly from it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import reference
import stored
from cases import mostly_slow
from conftest import Result
from mealv2.data.folder import ImageFolder
from mealv2.data.pixels import cut, decode
from mealv2.data.view_reader import ViewReader
from mealv2.label_set import LabelSet
from mealv2.views import View
from official import CROPS, GOLDEN, KINDS
from pictures import size_of
from pipeline.label_sets import writing

Run = Callable[..., Result]


def _packed(kind: str) -> np.ndarray:
    name = {"ori": "R_probs", "hard": "R_packed_hard_int"}.get(kind, f"R_packed_{kind}")
    return GOLDEN[name]


def _dense(kind: str) -> np.ndarray:
    return GOLDEN["R_probs" if kind == "ori" else f"R_dense_{kind}"]


def _write(path: Path, boxes: np.ndarray, flips: np.ndarray, labels: np.ndarray) -> None:
    """Write a label file as FKD's generator does: arrays, and labels as a tensor."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save([boxes, flips, torch.from_numpy(labels)], path)


def _boxes(seed: int, sizes: tuple[int, int], num_crops: int = CROPS) -> list[View]:
    rng = np.random.default_rng(seed)
    width, height = sizes
    found = []
    for n in range(num_crops):
        h, w = int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1))
        top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
        found.append(View(top, left, h, w, bool(n % 2)))
    return found


def _fractions(views: list[View], sizes: tuple[int, int]) -> np.ndarray:
    width, height = sizes
    rows = [(v.top / height, v.left / width, v.height / height, v.width / width) for v in views]
    return np.array(rows, dtype=np.float32)


@pytest.fixture(scope="session")
def many_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 1,000 classes with an image each, as small as a real image can be."""
    root = tmp_path_factory.mktemp("thousand")
    rng = np.random.default_rng(1)
    for number in range(1000):
        folder = root / "train" / f"n{number:08d}"
        folder.mkdir(parents=True)
        sizes = (int(rng.integers(20, 60)), int(rng.integers(20, 60)))
        pixels = rng.integers(0, 256, (sizes[1], sizes[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"n{number:08d}_{number}.png")
    return root


@pytest.fixture
def fkd_folder(data_dir: Path, tmp_path: Path) -> Path:
    """Label files of the tree's images, kind marginal_smoothing_k2, 6 crops of 3 classes."""
    return _label_tree(data_dir, tmp_path / "soft_labels")


def _label_tree(data_dir: Path, folder: Path, *, seed: int = 0, leave_out: str = "-") -> Path:
    source = ImageFolder(data_dir, "train")
    for position, key in enumerate(source.keys):
        if leave_out in key:
            continue
        rng = np.random.default_rng((seed, position))
        probs = rng.dirichlet([1.0, 1.0, 1.0], CROPS)
        ids, values = reference.top_k(probs, 2)
        packed = np.stack([ids, values], axis=1).astype(np.float32)
        sizes = size_of(source.read(position))
        boxes = _fractions(_boxes(position, sizes), sizes)
        name = Path(key).with_suffix(".tar")
        _write(folder / "imagenet" / "train" / name, boxes, np.arange(CROPS) % 2 == 1, packed)
    return folder


@pytest.fixture
def importing(data_dir: Path, fkd_folder: Path, tmp_path: Path) -> Callable[..., list[object]]:
    """A function: the words that import the tree's labels; flags given after these win."""

    def words(*flags: object, folder: Path = fkd_folder) -> list[object]:
        given = ["--data-dir", data_dir, "--img-size", 32, "--shard-size", 10]
        return ["labels", "import", folder, *given, "--output", tmp_path / "imported", *flags]

    return words


# --- what is stored -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", mostly_slow([np.float32, np.float16]))
def test_labels_of_every_kind_are_what_fkd_recovers(
    done: Run, many_classes: Path, tmp_path: Path, kind: str, dtype: Any
) -> None:
    """With FKD's --use_fp16 boxes, ids and values are float16."""
    packed = _packed(kind)
    is_half = dtype is np.float16
    if is_half:
        packed = packed.astype(np.float16)
    flips = np.zeros(CROPS, dtype=bool)
    boxes = np.tile(np.array([[0.25, 0.5, 0.5, 0.25]], dtype=dtype), (CROPS, 1))
    source = ImageFolder(many_classes, "train")
    for key in source.keys[:3]:
        _write(
            tmp_path / "soft" / "train" / f"{key.removesuffix('.png')}.tar", boxes, flips, packed
        )
    flags = ["--data-dir", many_classes, "--output", tmp_path / "out"]
    if kind == "marginal_renorm_k5":
        flags += ["--label-type", "marginal_renorm"]  # what FKD's training calls it
    result = done("labels", "import", tmp_path / "soft", *flags)
    assert (result.report["label_type"], result.report["images"]) == (kind, 3)
    assert "left out: 997 images without a label file" in result.stderr

    expected = _dense(kind).astype(float)
    if is_half:
        expected = reference.fkd_recovery(packed.astype(float), kind.partition("_k")[0], 1000)
        expected /= expected.sum(axis=1, keepdims=True)  # ori in float16 sums to 1 but for that
    for (_, view), row in stored.dense_of(tmp_path / "out").items():
        np.testing.assert_allclose(row, expected[view], rtol=0, atol=1e-6)
    done("labels", "verify", tmp_path / "out")


def test_views_are_the_stored_boxes_to_the_pixel(
    done: Run, importing: Callable[..., list[object]], data_dir: Path, tmp_path: Path
) -> None:
    done(*importing())
    labels, source = LabelSet.open(tmp_path / "imported"), ImageFolder(data_dir, "train")
    reader = ViewReader(source, img_size=32, views=labels.views(), resize="pil")
    for position in range(0, len(source), 5):
        image = decode(source.read(position))
        expected = _boxes(position, image.shape[1::-1])
        pixels = reader.read([(position, tuple(range(CROPS)))])
        assert pixels.boxes_B5.tolist() == [list(view.box()) for view in expected]
        for row, view in enumerate(expected):
            found = pixels.images_BCHW[row].permute(1, 2, 0).numpy()
            np.testing.assert_array_equal(found, cut(image, view, 32, resize="pil"))


def test_a_student_learns_from_imported_labels_on_their_boxes(
    done: Run,
    importing: Callable[..., list[object]],
    distill_flags: list[str],
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done(*importing())
    seen: set[tuple[int, ...]] = set()
    real = ViewReader.cut

    def watched(self: ViewReader, picture: Any, position: int, index: int) -> Any:
        row, box = real(self, picture, position, index)
        if any(box):
            seen.add((position, *box))
        return row, box

    monkeypatch.setattr(ViewReader, "cut", watched)
    words = [*distill_flags, "--labels", tmp_path / "imported", "--epochs", CROPS]
    done(*words, "--output", tmp_path / "run")
    source = ImageFolder(data_dir, "train")
    expected = {
        (p, *view.box()) for p in range(len(source)) for view in _boxes(p, size_of(source.read(p)))
    }
    assert seen == expected


def test_labels_of_two_teachers_on_the_same_crops_are_averaged(
    done: Run, run_cli: Run, importing: Callable[..., list[object]], data_dir: Path, tmp_path: Path
) -> None:
    """FKD's --reference_path labels the same crops again; averaging them is left to its users."""
    folders = []
    for seed, name in enumerate(("one", "two")):
        folder = _label_tree(data_dir, tmp_path / f"soft-{name}", seed=seed)
        folders.append(tmp_path / name)
        done(*importing("--teacher-name", name, "--output", folders[-1], folder=folder))
    dense = ["--topk", "all", "--label-dtype", "float32"]
    report = done("labels", "merge", *folders, *dense, "--output", tmp_path / "both").report
    assert (report["merged"], report["teachers"]) == ("averaged", 2)
    one, two = (stored.dense_of(folder) for folder in folders)
    for place, row in stored.dense_of(tmp_path / "both").items():
        mean = (one[place].astype(float) + two[place]) / 2
        np.testing.assert_allclose(row, mean, rtol=0, atol=1e-6)


def test_labels_on_other_crops_are_not_averaged(
    done: Run,
    run_cli: Run,
    importing: Callable[..., list[object]],
    fkd_folder: Path,
    tmp_path: Path,
) -> None:
    done(*importing("--teacher-name", "one", "--output", tmp_path / "one"))
    path = fkd_folder / "imagenet" / "train" / "ants" / "00.tar"
    boxes, flips, labels = torch.load(path, weights_only=False)
    _write(path, boxes * np.float32(0.5), flips, labels.numpy())
    done(*importing("--teacher-name", "two", "--output", tmp_path / "two"))
    words = ["labels", "merge", tmp_path / "one", tmp_path / "two", "--output", tmp_path / "both"]
    result = run_cli(*words)
    assert result.code == 3
    assert "other images or views" in result.stderr


def test_imported_sets_are_no_ones_to_add_to_or_compare(
    done: Run,
    run_cli: Run,
    importing: Callable[..., list[object]],
    data_dir: Path,
    tmp_path: Path,
    teach_flags: list[object],
    distill_flags: list[str],
) -> None:
    done(*importing())
    folder = tmp_path / "imported"
    done("labels", "verify", folder, "--data-dir", data_dir)
    flags = ["--data-dir", data_dir, *teach_flags]
    for words in (
        ["labels", "add-views", folder, "--num-views", 9, *flags],
        ["labels", "verify", folder, "--relabel", 5, *flags],
        [*distill_flags, "--labels", folder, "--missing", "teach", "--output", tmp_path / "run"],
    ):
        result = run_cli(*words)
        assert result.code == 3
        assert "was imported and the weights of its teachers are unknown" in result.stderr


# --- what does not fit ----------------------------------------------------------------------------


def test_images_without_labels_and_labels_without_images_are_counted(
    done: Run,
    run_cli: Run,
    importing: Callable[..., list[object]],
    fkd_folder: Path,
    data_dir: Path,
    tmp_path: Path,
    distill_flags: list[str],
) -> None:
    train = fkd_folder / "imagenet" / "train"
    (train / "ants" / "00.tar").rename(train / "ants" / "gone.tar")
    (train / "bees" / "01.tar").unlink()
    result = done(*importing())
    assert "left out: 2 images without a label file" in result.stderr
    assert "left out: 1 label file without an image" in result.stderr
    assert result.report["images"] == 34
    verified = run_cli("labels", "verify", tmp_path / "imported", "--data-dir", data_dir)
    assert verified.code == 3
    assert "images without labels: 2 (ants/00.jpg, bees/01.jpg)" in verified.stderr
    words = [*distill_flags, "--labels", tmp_path / "imported", "--epochs", 1]
    done(*words, "--missing", "skip", "--output", tmp_path / "run")


def test_labels_of_none_of_the_images_are_refused(
    run_cli: Run, importing: Callable[..., list[object]], fkd_folder: Path
) -> None:
    for path in (fkd_folder / "imagenet" / "train").glob("*/*.tar"):
        path.rename(path.with_name(f"other-{path.name}"))
    result = run_cli(*importing())
    assert result.code == 3
    assert "36 of 36 images have no label file (first: ants/00.jpg" in result.stderr
    assert "other-00" in result.stderr


def test_other_numbers_of_crops_are_refused(
    run_cli: Run, importing: Callable[..., list[object]], fkd_folder: Path
) -> None:
    path = fkd_folder / "imagenet" / "train" / "cats" / "03.tar"
    boxes, flips, labels = torch.load(path, weights_only=False)
    _write(path, boxes[:4], flips[:4], labels.numpy()[:4])
    result = run_cli(*importing())
    assert result.code == 3
    assert f"label file {path} has 4 labelled crops, the first file has 6" in result.stderr


@pytest.mark.parametrize("name", ["ants/00.tar", "cats/03.tar"])
def test_a_damaged_label_file_is_named_and_the_import_goes_on_when_it_is_mended(
    done: Run,
    run_cli: Run,
    importing: Callable[..., list[object]],
    fkd_folder: Path,
    tmp_path: Path,
    name: str,
) -> None:
    path = fkd_folder / "imagenet" / "train" / name
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    result = run_cli(*importing())
    assert result.code == 3
    assert str(path) in result.stderr
    path.write_bytes(data)
    done(*importing())
    done(*importing("--output", tmp_path / "at-once"))
    assert stored.rows_of(tmp_path / "imported") == stored.rows_of(tmp_path / "at-once")


def test_a_stopped_import_goes_on(
    done: Run,
    run_cli: Run,
    importing: Callable[..., list[object]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    contents: Callable[..., dict[str, bytes]],
) -> None:
    real = writing.label_set.write_shard

    def stopping(path: Path, *args: Any, **kwargs: Any) -> bool:
        if "00002" in path.name:
            raise KeyboardInterrupt
        return real(path, *args, **kwargs)

    monkeypatch.setattr(writing.label_set, "write_shard", stopping)
    assert run_cli(*importing()).code == 4
    monkeypatch.undo()
    before = stored.files_of(tmp_path / "imported")
    assert sorted(before) == ["plan.json", "train-00000.h5", "train-00001.h5"]
    done(*importing())
    after = stored.files_of(tmp_path / "imported")
    assert {name: after[name] for name in before} == before
    done(*importing("--output", tmp_path / "at-once"))
    assert contents(tmp_path / "imported") == contents(tmp_path / "at-once")


@pytest.mark.parametrize(
    ("flags", "code", "named"),
    [
        (["--label-type", "marginal_smoothing_k4"], 3, "does not match marginal_smoothing_k4"),
        (["--label-type", "smoth"], 2, "--label-type smoth is not one of FKD's"),
        (["--train-split", "val"], 3, "36 label files have no image"),
        (["--train-split", "trian"], 2, "no folder"),
        (["--from", "relabel"], 2, "relabel"),
        (["--img-size", 0], 2, "--img-size must be at least 1"),
    ],
)
def test_flags_that_do_not_fit_are_named(
    run_cli: Run,
    importing: Callable[..., list[object]],
    flags: list[object],
    code: int,
    named: str,
    tmp_path: Path,
) -> None:
    result = run_cli(*importing(*flags))
    assert result.code == code
    assert named in result.stderr
    assert not (tmp_path / "imported").exists()


def test_a_folder_without_label_files_is_said_so(
    run_cli: Run, importing: Callable[..., list[object]], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    result = run_cli(*importing(folder=tmp_path / "empty"))
    assert result.code == 3
    assert f"no label files in {tmp_path / 'empty'}; expected" in result.stderr
    assert "CLASS/STEM.tar" in result.stderr
    missing = run_cli(*importing(folder=tmp_path / "nowhere"))
    assert missing.code == 2
    assert f"FOLDER: no file or folder at {tmp_path / 'nowhere'}" in missing.stderr
