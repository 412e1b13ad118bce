"""Five percent of the hard labels of a real label set are wrong: which of them the list has."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mealv2.label_set import LabelSet
from mealv2.report.label_errors import find_label_errors
from mealv2.report.sample import sample_labels

CLASSES = ("ants", "bees", "cats")
PER_CLASS, NUM_WRONG = 60, 9


@pytest.fixture(scope="module")
def relabelled(
    draw_tree: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, set[str]]:
    """Images of which some lie in the folder of another class; the keys of those."""
    folder = tmp_path_factory.mktemp("planted")
    data = draw_tree(folder / "data", classes=CLASSES, num_train=PER_CLASS, num_val=4, seed=5)
    rng = np.random.default_rng(0)
    wrong = set()
    for number in rng.choice(len(CLASSES) * PER_CLASS, NUM_WRONG, replace=False).tolist():
        class_id, at = divmod(number, PER_CLASS)
        given = CLASSES[(class_id + 1 + number % 2) % len(CLASSES)]
        (path,) = (data / "train" / CLASSES[class_id]).glob(f"{at:02d}.*")
        moved = data / "train" / given / f"from-{CLASSES[class_id]}-{path.name}"
        path.rename(moved)
        wrong.add(f"{given}/{moved.name}")
    return data, wrong


# a teacher of few steps is unsure of all classes; both learned from other images, labelled right
@pytest.mark.slow
@pytest.mark.parametrize(("steps", "least"), [(24, 0.6), (90, 0.85)])
def test_planted_label_errors_are_found(
    steps: int,
    least: float,
    relabelled: tuple[Path, set[str]],
    make_model: Callable[..., Path],
    done: Callable[..., Any],
    tmp_path: Path,
) -> None:
    data, wrong = relabelled
    teacher = make_model("test_resnet", seed=1, steps=steps)
    settings = ["--img-size", 32, "--num-views", 8, "--workers", 0, "--rate", 0.005]
    named = ["--data-dir", data, "--teacher", f"test_resnet={teacher}"]
    done("precompute", *named, *settings, "--output", tmp_path / "labels")
    labels = LabelSet.open(tmp_path / "labels")
    assert len(wrong) / len(labels) == pytest.approx(0.05)
    sample = sample_labels(labels)
    table = find_label_errors(sample).table(sample)
    hits = [row for row in table if row["key"] in wrong]
    precision, recall = len(hits) / len(table), len(hits) / len(wrong)
    print(
        f"teacher of {steps} steps, {len(wrong)} of {len(labels)} labels are wrong: {len(table)} "
        f"suspected, precision {precision:.2f}, recall {recall:.2f}"
    )
    assert precision >= least
    assert recall >= least
    assert all(f"from-{row['suggested']}-" in row["key"] for row in hits)
