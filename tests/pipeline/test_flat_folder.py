"""Pictures without classes, in a folder or in tar files: the teachers' classes label them."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import mealv2
from conftest import CLASSES, Result
from mealv2.data.folder import is_flat
from mealv2.label_set import LabelSet, read_plan
from mealv2.models import read_metadata
from tars import tar_of

Run = Callable[..., Result]
NO_VAL = ["--val-split", "none"]


@pytest.fixture(scope="module", params=["folder", "tars"])
def flat(
    request: pytest.FixtureRequest, data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Twelve pictures of all classes in one folder, or in two tar files. Not to be changed."""
    folder = tmp_path_factory.mktemp("flat") / "pictures"
    folder.mkdir()
    paths = sorted((data_dir / "train").glob("*/0[0-3].*"))
    if request.param == "tars":
        files = [(f"{path.parent.name}-{path.name}", path.read_bytes()) for path in paths]
        for number in range(2):
            tar = tar_of([*files[6 * number :][:6], (f"notes{number}.txt", b"x")])
            (folder / f"train-{number:03d}.tar").write_bytes(tar)
        return folder
    for path in paths:
        shutil.copy(path, folder / f"{path.parent.name}-{path.name}")
    (folder / "notes.txt").write_text("x")
    return folder


@pytest.fixture(scope="module")
def stage_one(precompute_flags: list[str]) -> list[str]:
    """Return the flags of stage one without --shard-size, which tar files do not take."""
    at = precompute_flags.index("--shard-size")
    return [*precompute_flags[:at], *precompute_flags[at + 2 :]]


@pytest.fixture(scope="module")
def flat_labels(
    done: Run, stage_one: list[str], flat: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A label set of the folder. Not to be changed."""
    out = tmp_path_factory.mktemp("labels") / "set"
    result = done(*stage_one, "--data-dir", flat, *NO_VAL, "--output", out)
    expected = r"pictures.*: 12 images, unlabelled; left out (1 file: 1|2 files: 2) \.txt"
    assert re.search(expected, result.data_lines[0])
    assert "the classes are the teachers' (ants, bees, cats)" in result.stderr
    return out


def test_labels_have_the_teachers_classes_and_no_validation(flat_labels: Path) -> None:
    plan = read_plan(flat_labels)
    assert plan["classes"] == list(CLASSES)
    assert set(plan["roles"]) == {"train"}
    labels = LabelSet.open(flat_labels)
    assert {"ants-00.jpg", "ants-00"} & set(labels.keys())
    assert len(list(labels.keys())) == 12


def test_a_student_is_distilled_resumed_and_evaluated_on_labelled_pictures(
    done: Run, distill_flags: list[str], flat: Path, flat_labels: Path, data_dir: Path, run: Path
) -> None:
    words = [*distill_flags, "--data-dir", flat, "--labels", flat_labels, *NO_VAL]
    done(*words, "--output", run)
    assert read_metadata(run / "student")["classes"] == list(CLASSES)
    done("distill", "--resume", run, "--epochs", 3)
    evaluated = ["--data-dir", data_dir, "--checkpoint", run, "--workers", 0, "--json"]
    assert done("evaluate", *evaluated).report["num_images"] == 15
    assert len(mealv2.SoftLabelDataset(flat_labels, flat)) == 12


def test_online_teachers_and_label_set_commands_take_the_folder(
    done: Run,
    distill_flags: list[str],
    teacher_flags: list[str],
    flat: Path,
    flat_labels: Path,
    tmp_path: Path,
) -> None:
    at = distill_flags.index("--labels")
    words = [*distill_flags[:at], *distill_flags[at + 2 :], "--data-dir", flat, "--online"]
    words += [*teacher_flags, *NO_VAL, "--img-size", 32, "--epochs", 1]
    done(*words, "--output", tmp_path / "run")
    own = shutil.copytree(flat_labels, tmp_path / "labels")
    data = ["--data-dir", flat, "--workers", 0]
    done("labels", "add-views", own, *data, "--num-views", 5, *teacher_flags)
    assert done("labels", "verify", own, *data).report["images_compared"] == 12


def test_tar_files_of_images_and_labels_need_classes(
    run_cli: Run, flat: Path, flat_labels: Path, tmp_path: Path
) -> None:
    words = ["--to", "webdataset", "--data-dir", flat, "--output", tmp_path / "out"]
    result = run_cli("labels", "export", flat_labels, *words)
    assert result.code == 2
    assert "has labels of unlabelled pictures, and a sample of a tar file needs a class" in (
        result.stderr
    )


def test_what_needs_classes_is_one_line(
    run_cli: Run,
    stage_one: list[str],
    distill_flags: list[str],
    teacher_flags: list[str],
    make_model: Callable[..., Path],
    flat: Path,
    flat_labels: Path,
    tmp_path: Path,
) -> None:
    data = ["--data-dir", flat, "--output", tmp_path / "out"]
    two = make_model("test_resnet", seed=3, classes=("ants", "bees"))
    class_map = tmp_path / "classes.txt"
    class_map.write_text("ants\nbees\n")
    no_teacher = stage_one[: -len(teacher_flags)]
    cases = [
        (stage_one, "--val-split none"),
        ([*stage_one, *NO_VAL, "--class-map", class_map], "--class-map has no effect"),
        ([*no_teacher, "--teacher", "test_vit", *NO_VAL], "--teacher test_vit has no class names"),
        ([*stage_one, "--teacher", f"test_vit={two}", *NO_VAL], "different classes"),
        (
            [*distill_flags, "--labels", flat_labels, "--hard-label-weight", 0.5, *NO_VAL],
            "--hard-label-weight needs class ids",
        ),
    ]
    for words, message in cases:
        result = run_cli(*words, *data)
        assert result.code == 2, result.stderr
        assert message in result.stderr.splitlines()[-1]


def test_nothing_of_it_can_be_held_out(
    run_cli: Run, stage_one: list[str], flat: Path, tmp_path: Path
) -> None:
    words = [*stage_one, "--data-dir", flat, "--output", tmp_path / "labels"]
    result = run_cli(*words, "--val-fraction", 0.2)
    assert result.code in (1, 2)
    reasons = r"add --val-split none|sample ants-00 of .*-000\.tar has no class"
    assert re.search(reasons, result.stderr.splitlines()[-1])


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["a.jpg", "notes.txt", ".hidden/b.jpg"], True),
        (["a.jpg", "cats/b.jpg"], False),
        (["notes.txt"], False),
        (["a.jpg", "train-000.tar"], False),
    ],
)
def test_a_flat_folder_has_pictures_and_no_folders(
    tmp_path: Path, names: list[str], found: bool
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert is_flat(tmp_path) is found
