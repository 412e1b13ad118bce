"""benchmarks/mean_logits.py: the formula, and a set that a student can be distilled from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import mean_logits
from mealv2.label_set import LabelSet
from pipeline.label_sets import writing


def test_mean_of_logits_from_probabilities() -> None:
    logits_TNC = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)).double() * 9
    found_NC = mean_logits.mean_of_logits(torch.softmax(logits_TNC, dim=-1).float())
    expected_NC = torch.softmax(logits_TNC.mean(0), dim=1).float()
    torch.testing.assert_close(found_NC, expected_NC, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_a_set_of_the_mean_of_logits(
    done: Callable[..., Any],
    data_dir: Path,
    teacher_dirs: dict[str, Path],
    tmp_path: Path,
) -> None:
    flags = ["--data-dir", data_dir, "--img-size", 32, "--num-views", 2, "--workers", 0]
    flags += ["--topk", "all", "--label-dtype", "float32"]
    for name, folder in teacher_dirs.items():
        done("precompute", *flags, "--teacher", f"{name}={folder}", "--output", tmp_path / name)
    sets = tuple(tmp_path / name for name in teacher_dirs)
    mean_logits.run(mean_logits.MeanLogitsConfig(sets, tmp_path / "mean"))
    probs = []
    for folder in (*sets, tmp_path / "mean"):
        labels = LabelSet.open(folder)
        (file,) = [file for _, files in labels.blocks for file in files]
        probs.append(writing.all_rows(file, labels.encoding).labels.to_dense().double())
    one, two, found = probs
    expected = (one * two).sqrt()
    expected /= expected.sum(1, keepdim=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(found, (one + two) / 2, atol=1e-3)
    done("labels", "verify", tmp_path / "mean")
    student = ["--model", "test_resnet", "--no-pretrained", "--epochs", 1, "--batch-size", 12]
    run = ["--data-dir", data_dir, "--labels", tmp_path / "mean", "--workers", 0]
    done("distill", *run, *student, "--output", tmp_path / "run")
