"""Teachers of different input sizes label the same views, each at its own size."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mealv2
from conftest import IMG_SIZE, Result
from mealv2.data import view_reader
from mealv2.data.folder import ImageFolder
from mealv2.data.pixels import centre_crop, cut, decode
from mealv2.data.requests import CENTRE
from mealv2.data.view_reader import ViewReader
from mealv2.label_set import LabelSet, read_plan
from mealv2.models import create_classifier
from mealv2.models.ensemble import BySize
from mealv2.views import DrawnViews
from pipeline.labelling.batch_size import find_batch_size

Run = Callable[..., Result]
LARGE = 48
SEED = 7


@pytest.fixture(scope="module")
def specs(teacher_dirs: dict[str, Path], make_model: Callable[..., Path]) -> list[str]:
    """A teacher of 32 pixels, a convolutional network of 48, and a transformer of 48."""
    return [
        f"test_resnet={teacher_dirs['test_resnet']}",
        f"test_efficientnet={make_model('test_efficientnet', seed=3, img_size=LARGE)}",
        f"test_vit={make_model('test_vit', seed=4, img_size=LARGE)}",
    ]


@pytest.fixture(scope="module")
def flags(data_dir: Path, specs: list[str]) -> list[object]:
    settings: dict[str, object] = {
        "--data-dir": data_dir,
        "--img-size": IMG_SIZE,
        "--num-views": 2,
        "--view-seed": SEED,
        "--shard-size": 20,
        "--batch-size": 16,
        "--workers": 0,
        "--topk": "all",
        "--label-dtype": "float32",
    }
    given = [part for spec in specs for part in ("--teacher", spec)]
    return [*(part for pair in settings.items() for part in pair), *given]


@pytest.fixture(scope="module")
def labels(done: Run, flags: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sizes") / "labels"
    result = done("precompute", *flags, "--output", out)
    assert "teacher test_vit sees views of 48 pixels, which it was trained at" in result.stderr
    return out


def _mean_of_each_alone(specs: list[str], image_HWC: np.ndarray, view: Any) -> torch.Tensor:
    """Return the mean of the softmax of each teacher, run on pixels that are cut for it alone."""
    probs = []
    for spec, size in zip(specs, (IMG_SIZE, LARGE, LARGE), strict=True):
        name, _, path = spec.partition("=")
        teacher = create_classifier(name, num_classes=3, checkpoint=Path(path), img_size=size)
        pixels = centre_crop(image_HWC, size) if view is None else cut(image_HWC, view, size)
        pixels_1CHW = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None]
        with torch.no_grad():
            probs.append(torch.softmax(teacher.eval()(pixels_1CHW).double(), dim=-1)[0])
    return torch.stack(probs).mean(dim=0)


def test_a_label_is_the_mean_of_each_teacher_alone_at_its_own_size(
    labels: Path, specs: list[str], data_dir: Path
) -> None:
    plan = read_plan(labels)
    assert [teacher.get("img_size") for teacher in plan["teachers"]] == [None, LARGE, LARGE]
    assert plan["img_size"] == IMG_SIZE
    for split, views in (("train", (0, 1)), ("val", (0,))):
        source, label_set = ImageFolder(data_dir, split), LabelSet.open(labels, split=split)
        for position in (0, 7):
            key, image_HWC = source.keys[position], decode(source.read(position))
            height, width, _ = image_HWC.shape
            for index in views:
                view = None
                if split == "train":
                    view = DrawnViews(SEED).view(key, index, width=width, height=height)
                found_C = label_set.soft_labels([key], [index]).to_dense()[0].double()
                expected_C = _mean_of_each_alone(specs, image_HWC, view)
                torch.testing.assert_close(found_C, expected_C, rtol=0, atol=2e-6)


def test_the_description_of_a_label_set_names_the_sizes(labels: Path, done: Run) -> None:
    result = done("labels", "info", labels)
    assert result.report["teacher_img_sizes"] == [IMG_SIZE, LARGE, LARGE]
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("teachers")]
    assert "test_resnet at" not in line
    assert line.endswith("test_efficientnet at 48 pixels, test_vit at 48 pixels")


def test_an_image_is_decoded_once_and_a_lost_shard_comes_back_with_its_bytes(
    done: Run,
    flags: list[object],
    labels: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    again = tmp_path / "labels"
    shutil.copytree(labels, again)
    lost = sorted(again.glob("train-*"))[0]
    before = lost.read_bytes()
    lost.unlink()
    decoded: list[int] = []
    decode_for = view_reader.decode_for

    def counting(data: bytes, views_of: Any) -> Any:
        decoded.append(len(data))
        return decode_for(data, views_of)

    monkeypatch.setattr(view_reader, "decode_for", counting)
    done("precompute", *flags, "--output", again, "--check-images", "never")
    assert lost.read_bytes() == before
    assert len(decoded) == 20  # images of a shard; each has 2 views in 2 sizes


def test_a_reader_of_two_sizes_gives_the_pixels_of_a_reader_of_each(data_dir: Path) -> None:
    source, views = ImageFolder(data_dir, "train"), DrawnViews(SEED)
    request = [(3, (0, 4)), (9, (CENTRE,)), (5, (2,))]
    both = ViewReader(source, img_size=32, views=views, other_sizes=(48, 20)).read(request)
    assert list(both.other_sizes) == [48, 20]
    for size, images_BCHW in ((32, both.images_BCHW), *both.other_sizes.items()):
        alone = ViewReader(source, img_size=size, views=views).read(request)
        assert torch.equal(images_BCHW, alone.images_BCHW)
        assert np.array_equal(both.boxes_B5, alone.boxes_B5)


def test_one_size_for_all_is_a_flag_and_names_no_size_in_the_plan(
    done: Run, run_cli: Run, flags: list[object], labels: Path, data_dir: Path, tmp_path: Path
) -> None:
    settings, (small, large, _) = flags[:18], flags[19::2]
    common = [*settings, "--teacher", small, "--teacher", large, "--val-split", "none"]
    done("precompute", *common, "--teacher-img-size", IMG_SIZE, "--output", tmp_path / "32")
    assert all("img_size" not in teacher for teacher in read_plan(tmp_path / "32")["teachers"])
    again = ["--data-dir", data_dir, "--teacher", small, "--teacher", large, "--relabel", 20]
    # the size of a teacher is that of the set, not that of its checkpoint
    report = done("labels", "verify", tmp_path / "32", *again, "--workers", 0).report
    assert report["relabelled"]["kl"] < 1e-6

    other = run_cli("precompute", *flags, "--teacher-img-size", 64, "--output", labels)
    assert other.code == 3
    assert "teachers[0].img_size is None in the set and 64 in this run" in other.stderr


def test_relabelling_gives_the_labels_of_the_set(
    done: Run, run_cli: Run, labels: Path, specs: list[str], data_dir: Path, tmp_path: Path
) -> None:
    given = [part for spec in reversed(specs) for part in ("--teacher", spec)]
    verify = ["labels", "verify", labels, "--data-dir", data_dir, "--relabel", 30, "--workers", 0]
    found = done(*verify, *given).report["relabelled"]
    assert (found["views"], found["top1_agreement"]) == (30, 100.0)
    assert found["kl"] < 1e-7  # sums in another order

    shutil.copytree(labels, tmp_path / "labels")
    wrong = run_cli(*verify[:2], tmp_path / "labels", *verify[3:], *given[:4])
    assert wrong.code == 3
    assert "give the teachers of its manifest" in wrong.stderr


def test_views_added_later_and_labels_of_missing_views_are_equal(
    done: Run,
    labels: Path,
    specs: list[str],
    data_dir: Path,
    student_dir: Path,
    tmp_path: Path,
) -> None:
    given = [part for spec in specs for part in ("--teacher", spec)]
    more = ["--data-dir", data_dir, *given, "--batch-size", 8, "--workers", 0]
    for name in ("added", "appended"):
        shutil.copytree(labels, tmp_path / name)
    done("labels", "add-views", tmp_path / "added", "--num-views", 3, *more)
    run = ["--labels", tmp_path / "appended", "--missing", "teach", "--write-back"]
    model = ["--model", "test_resnet", "--initial-checkpoint", student_dir, "--epochs", 3]
    mixed = ["--cutmix", 1.0, "--output", tmp_path / "run"]
    done("distill", *run, *more, *model, *mixed)
    added, appended = (LabelSet.open(tmp_path / name) for name in ("added", "appended"))
    keys = list(added.keys())
    found, expected = (s.soft_labels(keys, [2] * len(keys)).to_dense() for s in (appended, added))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_online_teachers_see_mixed_images_of_their_size(
    done: Run, specs: list[str], data_dir: Path, student_dir: Path, tmp_path: Path
) -> None:
    given = [part for spec in specs[:2] for part in ("--teacher", spec)]
    flags = ["--data-dir", data_dir, *given, "--online", "--img-size", IMG_SIZE, "--batch-size", 8]
    flags += ["--workers", 0, "--model", "test_resnet", "--initial-checkpoint", student_dir]
    mixed = ["--cutmix", 1.0, "--cutmix-target", "teachers", "--val-split", "none"]
    for name, more in (("own", []), ("same", ["--teacher-img-size", IMG_SIZE])):
        run = ["--epochs", 1, "--output", tmp_path / name]
        result = done("distill", *flags, *mixed, *more, *run)
        assert ("sees views of 48 pixels" in result.stderr) == (name == "own")
        assert ("labels views of 32" in result.stderr) == (name == "same")


def test_the_batch_size_is_measured_with_images_of_all_sizes() -> None:
    seen: set[tuple[int, ...]] = set()

    def forward(images_BCHW: torch.Tensor, by_size: BySize) -> None:
        seen.add((images_BCHW.shape[-1], *(by_size[size].shape[-1] for size in (12, 10))))

    cpu = torch.device("cpu")
    find_batch_size(forward, img_size=8, other_sizes=(10, 12), device=cpu, max_size=8)
    assert seen == {(8, 12, 10)}


def test_annotate_labels_at_the_size_of_a_checkpoint(
    labels: Path, specs: list[str], data_dir: Path, tmp_path: Path
) -> None:
    found = mealv2.annotate(
        data_dir,
        specs,
        tmp_path / "labels",
        num_views=2,
        view_seed=SEED,
        img_size=IMG_SIZE,
        topk="all",
        label_dtype="float32",
        shard_size=20,
        batch_size=16,
        workers=0,
    )
    for path in labels.glob("*.h5"):
        assert (found.folder / path.name).read_bytes() == path.read_bytes()
    assert read_plan(found.folder) == read_plan(labels)
