"""What the modules of the MEAL V2 and FKD repositories computed, and FKD's kinds of labels."""

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

with np.load(Path(__file__).parent / "golden" / "official_mealv2.npz") as arrays:
    GOLDEN: dict[str, np.ndarray] = dict(arrays)
