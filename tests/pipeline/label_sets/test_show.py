"""`mealv2 labels show`: text, JSON and a drawing of one image's views, on a real label set."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import cli
from mealv2.label_set import LabelSet
from pipeline.label_sets import show

Run = Callable[..., Any]
ROOT = Path(cli.__file__).resolve().parent


def test_the_text_names_classes_boxes_and_what_contradicts(
    done: Run, labels_dir: Path, data_dir: Path
) -> None:
    key = "ants/00.jpg"
    said = done("labels", "show", labels_dir, key).stdout
    labels = LabelSet.open(labels_dir)
    assert said.startswith(f"{key}, ")
    dense_VC = labels.soft_labels([key] * 4, range(4)).to_dense().numpy()
    hard = labels.classes.index("ants")
    contradicting = int((dense_VC.argmax(axis=1) != hard).sum())
    mean = 100 * dense_VC[:, hard].mean()
    assert f"hard label ants: mean probability {mean:.1f} %" in said
    assert f"{contradicting} of 4 views contradict it" in said
    assert said.count("contradicts the hard label") == contradicting
    with Image.open(data_dir / "train" / key) as image:
        width, height = image.size
    for view in range(4):
        box = labels.views().view(key, view, width=width, height=height)
        assert f"view {view}, box {box.width} x {box.height} at x {box.left}, y {box.top}" in said
    assert "ants (hard label)" in said
    assert "█" in said


def test_the_report_has_the_numbers_of_the_set(done: Run, labels_dir: Path) -> None:
    shown = done("labels", "show", labels_dir, "bees/01.jpg", "--json", "--topk", 1).report
    assert (shown["key"], shown["hard_class"]) == ("bees/01.jpg", "bees")
    labels = LabelSet.open(labels_dir)
    for view in shown["views"]:
        dense_C = labels.soft_labels(["bees/01.jpg"], [view["view"]]).to_dense()[0].numpy()
        (best,) = view["top"]
        assert best["class"] == labels.classes[int(dense_C.argmax())]
        assert best["prob"] == pytest.approx(float(dense_C.max()))
    few = done("labels", "show", labels_dir, "bees/01.jpg", "--json", "--max-views", 2).report
    assert len(few["views"]) == 2


def test_pictures_draws_the_image_and_its_views(
    done: Run, run_cli: Run, labels_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    for name in ("views.png", "views.svg", "views.pdf"):
        path = tmp_path / name
        flags = ["--data-dir", data_dir, "--pictures", path]
        report = done("labels", "show", labels_dir, "cats/02.png", *flags, "--json").report
        assert report["pictures"] == str(path)
    with Image.open(tmp_path / "views.png") as image:
        assert image.size[0] > 800
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 100
    assert b"view 3" in (tmp_path / "views.svg").read_bytes()
    val = ["--split", "val", "--data-dir", data_dir, "--pictures", tmp_path / "val.png"]
    done("labels", "show", labels_dir, "cats/02.png", *val)
    assert (tmp_path / "val.png").stat().st_size > 1000


def test_what_is_wrong_is_one_line(run_cli: Run, labels_dir: Path, tmp_path: Path) -> None:
    wrong = run_cli("labels", "show", labels_dir, "ants/no\nsuch.jpg")
    assert wrong.code == 3
    assert "no such.jpg" not in wrong.stderr
    assert "not an image of this set" in wrong.stderr
    wrong = run_cli("labels", "show", labels_dir, "ants/00.jpg", "--pictures", tmp_path / "x.png")
    assert wrong.code == 2
    assert "--pictures needs --data-dir" in wrong.stderr
    wrong = run_cli("labels", "show", labels_dir, "ants/00.jpg", "--pictures", "x.bmp")
    assert wrong.code == 2
    wrong = run_cli("labels", "show", tmp_path, "ants/00.jpg")
    assert "no label set" in wrong.stderr


def test_sets_of_single_teachers_are_shown_as_their_mean(
    done: Run, precompute_flags: list[str], tmp_path: Path
) -> None:
    done(*precompute_flags, "--store", "per-teacher", "--output", tmp_path / "apart")
    shown = done("labels", "show", tmp_path / "apart", "ants/00.jpg", "--json").report
    sets = [LabelSet.open(tmp_path / "apart" / f"teacher-{n}") for n in range(2)]
    mean_C = np.mean(
        [s.soft_labels(["ants/00.jpg"], [0]).to_dense()[0].numpy() for s in sets], axis=0
    )
    best = shown["views"][0]["top"][0]
    assert best["prob"] == pytest.approx(float(mean_C.max()), rel=1e-5)


def test_bars_have_eighths_of_a_character() -> None:
    assert show._bar(1.0) == "█" * show._BAR
    assert show._bar(0.0).strip() == ""
    assert show._bar(0.5 + 1 / (8 * show._BAR)) == "█" * 12 + "▏" + " " * 11


def test_the_guide_runs_on_a_small_set(
    done: Run, labels_dir: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/how-to/look-at-labels.md."""
    text = (ROOT / "docs" / "how-to" / "look-at-labels.md").read_text("utf-8")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "labels").symlink_to(labels_dir)
    (tmp_path / "imagenet").symlink_to(data_dir)
    commands = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    assert len(commands) == 2
    for command in commands:
        words = shlex.split(command.replace("n01440764/n01440764_10026.JPEG", "ants/00.jpg"))
        done(*words[1:])
    assert (tmp_path / "views.png").exists()
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(code, "look-at-labels.md", "exec"), {})
