"""Who resizes views: what a label set says of it, and that stage two does the same."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import stored
from conftest import Result
from mealv2.data import pixels
from mealv2.data.folder import ImageFolder
from mealv2.data.pixels import probe_sha256
from mealv2.data.view_reader import ViewReader
from mealv2.views import DrawnViews, view_of

Run = Callable[..., Result]
OTHER = "0" * 64


@pytest.fixture
def resizes(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Who resized, in all that runs."""
    seen: set[str] = set()
    real = pixels.resized

    def watched(pixels_HWC: Any, height: int, width: int, resize: Any) -> Any:
        seen.add(resize)
        return real(pixels_HWC, height, width, resize)

    monkeypatch.setattr(pixels, "resized", watched)
    return seen


@pytest.fixture(scope="module")
def pil_dir(
    done: Run, precompute_flags: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A label set of Pillow's pixels. Not to be changed."""
    out = tmp_path_factory.mktemp("pil") / "set"
    done(*precompute_flags, "--exact-pil", "--output", out)
    return out


def test_plan_says_who_resized_and_what_the_probe_came_to(pil_dir: Path, labels_dir: Path) -> None:
    for folder, name, resize in ((pil_dir, "PIL", "pil"), (labels_dir, "torch", "torch")):
        plan = stored.manifest_of(folder)["plan"]
        assert plan["interpolation"] == f"bilinear, antialias ({name})"
        assert plan["probe_sha256"] == probe_sha256(resize)


def test_exact_pil_cuts_pillows_very_pixels(data_dir: Path) -> None:
    source = ImageFolder(data_dir, "train")
    reader = ViewReader(source, img_size=32, views=DrawnViews(7), resize="pil")
    found = reader.read([(position, (0, 1)) for position in range(len(source))])
    for row, (position, index) in enumerate(zip(found.positions, found.views, strict=True)):
        key = source.keys[position]
        with Image.open(data_dir / "train" / key) as opened:
            image = opened.convert("RGB")
        box = view_of(key, index, seed=7, width=image.width, height=image.height)
        corners = (box.left, box.top, box.left + box.width, box.top + box.height)
        small = image.crop(corners).resize((32, 32), Image.Resampling.BILINEAR)
        expected = np.asarray(
            small.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if box.flip else small
        )
        assert np.array_equal(found.images_BCHW[row].permute(1, 2, 0).numpy(), expected)


def test_stage_two_resizes_as_stage_one_did(
    done: Run,
    distill_flags: list[str],
    pil_dir: Path,
    labels_dir: Path,
    tmp_path: Path,
    resizes: set[str],
) -> None:
    for folder, resize in ((pil_dir, "pil"), (labels_dir, "torch")):
        resizes.clear()
        result = done(*distill_flags, "--labels", folder, "--output", tmp_path / resize)
        assert resizes == {resize}
        assert "was labelled on views" not in result.stderr


@pytest.mark.parametrize(
    ("flag", "resize", "made_by"),
    [("--exact-pil", "pil", "torch"), ("--no-exact-pil", "torch", "pillow")],
)
def test_another_resize_than_the_labels_is_said_and_used(
    done: Run,
    distill_flags: list[str],
    pil_dir: Path,
    labels_dir: Path,
    tmp_path: Path,
    resizes: set[str],
    flag: str,
    resize: str,
    made_by: str,
) -> None:
    folder = labels_dir if made_by == "torch" else pil_dir
    result = done(*distill_flags, "--labels", folder, flag, "--output", tmp_path / "run")
    assert resizes == {resize}
    assert (
        f"the views of {folder} were resized by {made_by}; the pixels of this run differ"
        in result.stderr
    )


@pytest.fixture
def other_set(labels_dir: Path, tmp_path: Path) -> Path:
    """A label set that a machine with other pixels made."""
    folder = Path(shutil.copytree(labels_dir, tmp_path / "other"))
    stored.signed_again(folder, lambda plan, splits: plan.update(probe_sha256=OTHER))
    return folder


def test_other_pixels_than_the_labels_are_said_before_training(
    done: Run, distill_flags: list[str], other_set: Path, tmp_path: Path
) -> None:
    result = done(*distill_flags, "--labels", other_set, "--output", tmp_path / "run")
    said = result.stderr.splitlines()
    (line,) = (
        number for number, text in enumerate(said) if "gives slightly different pixels" in text
    )
    assert said[line].startswith(f"the views of {other_set} were resized by torch ")
    assert line < next(number for number, text in enumerate(said) if "run folder" in text)


def test_a_machine_with_other_pixels_adds_nothing_to_a_set(
    run_cli: Run, precompute_flags: list[str], other_set: Path, contents: Callable[..., Any]
) -> None:
    before = contents(other_set)
    result = run_cli(*precompute_flags, "--output", other_set)
    assert result.code == 3
    assert "probe_sha256 is 0000" in result.stderr
    assert "another version of torch or Pillow" in result.stderr
    assert contents(other_set) == before


@pytest.mark.parametrize("command", ["finetune", "evaluate", "predict", "online"])
@pytest.mark.parametrize("flag", [(), ("--exact-pil",)])
def test_commands_without_labels_resize_as_they_are_told(
    done: Run,
    data_dir: Path,
    student_dir: Path,
    teacher_flags: list[str],
    tmp_path: Path,
    resizes: set[str],
    command: str,
    flag: tuple[str, ...],
) -> None:
    data: list[object] = ["--data-dir", data_dir]
    small: list[object] = ["--img-size", 32, "--workers", 0]
    start: list[object] = ["--model", "test_resnet", "--initial-checkpoint", student_dir]
    train: list[object] = [*start, "--epochs", 1, "--batch-size", 12, "--output", tmp_path / "run"]
    words: dict[str, list[object]] = {
        "finetune": ["finetune", *data, *small, *train],
        "evaluate": ["evaluate", *data, *small, "--checkpoint", student_dir],
        "predict": ["predict", data_dir / "val", *small, "--checkpoint", student_dir],
        "online": ["distill", *data, *small, *train, "--online", *teacher_flags],
    }
    done(*words[command], *flag)
    assert resizes == {"pil" if flag else "torch"}
