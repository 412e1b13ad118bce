"""benchmarks/present_classes.py: probabilities of the classes that the data has."""

import json
from pathlib import Path

import numpy as np
import torch

from benchmarks.present_classes import PresentClassesConfig, of_present, run
from benchmarks.rate_tables import labels_of_training


def test_other_classes_get_nothing_and_the_sum_is_one_again() -> None:
    probs_NC = np.random.default_rng(0).dirichlet(np.full(6, 0.3), 5)
    present_C = np.array([True, False, True, True, False, False])
    found = of_present(torch.from_numpy(probs_NC), torch.from_numpy(present_C)).numpy()
    expected = np.where(present_C, probs_NC, 0.0)
    expected /= expected.sum(1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_set_has_the_classes_of_the_folder(labels_dir: Path, tmp_path: Path) -> None:
    names = json.loads((labels_dir / "plan.json").read_text())["classes"]
    for name in names[:2]:
        (tmp_path / "train" / name).mkdir(parents=True)
    class_map = tmp_path / "classes.txt"
    class_map.write_text("".join(f"{name}\n" for name in names))
    output = tmp_path / "present"
    report = run(PresentClassesConfig(labels_dir, tmp_path / "train", class_map, output))
    assert report["views"] > 0
    before_NC, after_NC = (labels_of_training(each).to_dense() for each in (labels_dir, output))
    assert before_NC[:, 2].max() > 0.01
    torch.testing.assert_close(after_NC[:, 2], torch.zeros(len(after_NC)), atol=0.002, rtol=0.0)
    ratio_N = before_NC[:, 0] / before_NC[:, :2].sum(1)
    torch.testing.assert_close(after_NC[:, 0], ratio_N, atol=0.004, rtol=0.0)
