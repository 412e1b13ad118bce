"""What the modules of the MEAL, MEAL V2 and FKD repositories computed; FKD's kinds of labels."""

from pathlib import Path

import numpy as np

CROPS = 6  # rows of the arrays of labels
KINDS = [
    "ori",
    "hard",
    "smoothing",
    "marginal_smoothing_k5",
    "marginal_smoothing_k10",
    "marginal_renorm_k5",
]

_FOLDER = Path(__file__).parent / "golden"
with np.load(_FOLDER / "official_mealv2.npz") as arrays:
    GOLDEN: dict[str, np.ndarray] = dict(arrays)
with np.load(_FOLDER / "official_meal_v1.npz") as arrays:
    GOLDEN_V1: dict[str, np.ndarray] = dict(arrays)
