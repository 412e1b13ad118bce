"""FKD's label types (fast knowledge distillation; the stored labels of the MEAL V2 code).

Each view's label is one small array; these functions tell what distribution it stands for.
"""

import numpy as np
import torch

from mealv2.errors import LabelSetError
from mealv2.soft_labels import SoftLabels

LABEL_TYPES = ("ori", "hard", "smoothing", "marginal_smoothing_kK", "marginal_renorm_kK")


def labels_of(packed: np.ndarray, label_type: str, num_classes: int) -> SoftLabels:
    """Return the labels that N packed arrays of an FKD type stand for.

    ``packed`` per view: ``ori`` C probabilities; ``hard`` a class id; ``smoothing`` (id,
    probability), the rest spread evenly; ``marginal_smoothing_kK`` (2, K) ids over probabilities,
    the rest spread evenly; ``marginal_renorm_kK`` the same data, divided by its sum and nothing
    elsewhere (recover_soft_label of the FKD code; its number K may be left out of the name). Raises
    LabelSetError for another type, another shape, or an id that is no class.
    """
    kind, _, given_k = label_type.partition("_k")
    if kind not in ("ori", "hard", "smoothing", "marginal_smoothing", "marginal_renorm"):
        raise LabelSetError(
            f"unknown FKD label type {label_type!r}; known: {', '.join(LABEL_TYPES)}"
        )
    try:
        ids_NK, probs_NK = _columns(packed, kind, num_classes)
        if given_k and ids_NK.shape[1] != int(given_k):
            raise ValueError(f"{ids_NK.shape[1]} classes a label")
    except ValueError:
        raise LabelSetError(
            f"FKD labels of type {label_type} cannot have the shape {packed.shape}"
        ) from None
    if ids_NK.size and not 0 <= ids_NK.min() <= ids_NK.max() < num_classes:
        raise LabelSetError(f"FKD labels name class {ids_NK.max()} of {num_classes}")
    has_rest = kind in ("smoothing", "marginal_smoothing")
    rest_N = np.maximum(0.0, 1.0 - probs_NK.sum(axis=1)) if has_rest else np.zeros(len(probs_NK))
    return SoftLabels(
        torch.from_numpy(ids_NK),
        torch.from_numpy(probs_NK.astype(np.float32)),
        torch.from_numpy(rest_N.astype(np.float32)),
        num_classes,
    )


def _columns(packed: np.ndarray, kind: str, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return class ids int64 N x K and probabilities float64 N x K; raises ValueError."""
    if kind == "ori":
        num_labels, width = packed.shape
        if width != num_classes:
            raise ValueError(f"{num_labels} labels of {width} classes")
        ids_NK = np.broadcast_to(np.arange(num_classes), packed.shape).copy()
        return ids_NK, packed.astype(np.float64)
    if kind == "hard":
        (num_labels,) = packed.shape
        ids_NK = packed.reshape(num_labels, 1).astype(np.int64)
        return ids_NK, np.ones(ids_NK.shape)
    if kind == "smoothing":
        packed = packed[..., None]
    num_labels, two, _ = packed.shape
    if two != 2:
        raise ValueError(f"{num_labels} labels of {two} rows")
    return packed[:, 0].astype(np.int64), packed[:, 1].astype(np.float64)
