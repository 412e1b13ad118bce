"""mealv2.report.measured: teachers and ensemble by their labels of the validation images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reference
from mealv2.label_set import LabelSet, class_of
from mealv2.report.averaged import open_labels
from mealv2.report.measured import measure_teachers, with_measured
from mealv2.report.teachers import label_source

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def apart(done: Cli, precompute_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The label sets of two teachers, with labels of the validation images."""
    folder = tmp_path_factory.mktemp("apart") / "sets"
    done(*precompute_flags, "--num-views", 1, "--store", "per-teacher", "--output", folder)
    return folder


def dense_of(folder: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return keys, class ids and float64 distributions of the validation images."""
    labels = LabelSet.open(folder, split="val")
    keys = list(labels.keys())
    hard = [class_of(c) for _, files in labels.blocks for f in files for c in f.images.classes_N]
    dense_NC = labels.soft_labels(keys, [0] * len(keys)).to_dense().numpy().astype(np.float64)
    return keys, np.array(hard), dense_NC / dense_NC.sum(axis=1, keepdims=True)


def test_figures_of_teachers_and_ensemble_agree_with_numpy(apart: Path) -> None:
    keys, hard_N, first_NC = dense_of(apart / "teacher-0")
    others, _, second_NC = dense_of(apart / "teacher-1")
    assert keys == others
    probs_TNC = np.stack([first_NC, second_NC])
    mean_NC = probs_TNC.mean(axis=0)
    ensemble, teachers = measure_teachers(open_labels(apart, split="val"))
    assert ensemble is not None
    assert ensemble["num_images"] == len(hard_N) == 15
    assert ensemble["top1"] == pytest.approx(100 * (mean_NC.argmax(1) == hard_N).mean())
    error, _ = reference.calibration_error(mean_NC, hard_N)
    assert ensemble["ece"] == pytest.approx(100 * error, abs=1e-4)
    for found, probs_NC in zip(teachers, probs_TNC, strict=True):
        error, _ = reference.calibration_error(probs_NC, hard_N)
        assert found["ece"] == pytest.approx(100 * error, abs=1e-4)
        equal_N = probs_NC.argmax(1) == mean_NC.argmax(1)
        assert found["agreement"] == pytest.approx(100 * equal_N.mean())
        kl = (mean_NC * np.log(mean_NC / np.maximum(probs_NC, 1e-12))).sum(1).mean()
        assert found["kl"] == pytest.approx(kl, rel=1e-4)


def test_what_the_manifest_knows_stays_and_the_rest_is_added(apart: Path, labels_dir: Path) -> None:
    known, before = label_source(apart), label_source(labels_dir)
    found, after = with_measured(known, apart), with_measured(before, labels_dir)
    assert known is not None
    assert found is not None
    assert known.ensemble is None
    assert found.ensemble is not None
    assert set(found.ensemble.metrics) == {"top1", "top5", "ece"}
    for teacher, old in zip(found.teachers, known.teachers, strict=True):
        assert set(teacher.metrics) == {"top1", "top5", "ece", "agreement", "kl"}
        assert old.metrics.items() <= teacher.metrics.items()
    assert before is not None
    assert after is not None
    assert before.ensemble is not None
    assert after.ensemble is not None
    assert after.teachers == before.teachers, "a set of the ensemble knows nothing of one teacher"
    assert set(after.ensemble.metrics) - set(before.ensemble.metrics) == {"ece"}


def test_a_set_without_validation_labels_changes_nothing(tmp_path: Path) -> None:
    from label_sets import ENCODINGS, make_set

    make_set(tmp_path / "set", ENCODINGS["float16"])
    known = label_source(tmp_path / "set")
    assert with_measured(known, tmp_path / "set") is known
    assert with_measured(None, None) is None
