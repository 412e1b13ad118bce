"""FKD's label types (fast knowledge distillation, also in the MEAL V2 code): one array a view."""

import numpy as np
import torch
from torch import Tensor

from mealv2.errors import LabelSetError
from mealv2.soft_labels import SoftLabels

LABEL_TYPES = ("ori", "hard", "smoothing", "marginal_smoothing_kK", "marginal_renorm_kK")

_WITH_REST = ("smoothing", "marginal_smoothing")
_MASS_SLACK = 0.01  # a sum of float16 probabilities can exceed 1


def kind_of(packed: np.ndarray, num_classes: int, label_type: str | None = None) -> str:
    """Return the type of N packed arrays by their shape, with K: ``marginal_smoothing_k5``.

    ``label_type``, with or without K, decides between types of the same shape: marginal_smoothing
    (the default) and marginal_renorm; ori and smoothing of two classes. Raises LabelSetError for a
    shape of no type, or of several types when ``label_type`` is None.
    """
    shape = packed.shape
    if label_type is not None:
        _split(label_type)
    fitting = []
    if packed.dtype.kind in "iuf" and packed.ndim == 1:
        fitting = ["hard"]
    elif packed.dtype.kind == "f" and packed.ndim == 2:
        fitting = ["ori"] if shape[1] == num_classes else []
        fitting += ["smoothing"] if shape[1] == 2 else []
    elif packed.dtype.kind == "f" and packed.ndim == 3 and shape[1] == 2:
        fitting = [f"marginal_smoothing_k{shape[2]}", f"marginal_renorm_k{shape[2]}"]
    named = [kind for kind in fitting if label_type in (kind, kind.partition("_k")[0])]
    if named:
        return named[0]
    what = f"labels are {packed.dtype} of shape {shape}"
    if label_type is not None or not fitting:
        kind = label_type or "any FKD type"
        raise LabelSetError(f"{what}, which does not match {kind} (classes: {num_classes})")
    if fitting == ["ori", "smoothing"]:
        raise LabelSetError(f"{what}: ori or smoothing of two classes; name the label type")
    return fitting[0]


def labels_of(packed: np.ndarray, label_type: str, num_classes: int) -> SoftLabels:
    """Return the distributions of N packed arrays of an FKD type.

    ``packed`` per view: ``ori`` C probabilities; ``hard`` a class id; ``smoothing`` (id,
    probability), the rest spread evenly; ``marginal_smoothing_kK`` (2, K) ids over probabilities,
    the rest spread evenly; ``marginal_renorm_kK`` the same data, normalised, with 0 elsewhere
    (recover_soft_label of the FKD code; K may be omitted from the name). Raises LabelSetError for
    another type or shape, an unknown or repeated id, float16 ids of more than 2,049 classes (which
    float16 cannot count), and values that are not probabilities.
    """
    kind, given_k = _split(label_type)
    try:
        ids_NK, probs_NK = _columns(packed, kind, num_classes)
        if given_k and ids_NK.shape[1] != given_k:
            raise ValueError(f"{ids_NK.shape[1]} classes a label")
    except ValueError:
        raise LabelSetError(
            f"FKD labels of type {label_type} cannot have the shape {packed.shape}"
        ) from None
    if kind != "ori":
        _check_ids(ids_NK, num_classes, packed.dtype)
    _check_probs(probs_NK)
    ids_NK = ids_NK.astype(np.int64)
    mass_N = probs_NK.sum(axis=1)
    rest_N = np.maximum(0.0, 1.0 - mass_N) if kind in _WITH_REST else np.zeros(len(mass_N))
    if ids_NK.shape[1] == num_classes:
        probs_NC = np.take_along_axis(probs_NK, ids_NK.argsort(axis=1), axis=1)
        return SoftLabels.from_dense(torch.from_numpy(probs_NC.astype(np.float32)))
    return SoftLabels(
        torch.from_numpy(ids_NK),
        torch.from_numpy(probs_NK.astype(np.float32)),
        torch.from_numpy(rest_N.astype(np.float32)),
        num_classes,
    )


def pack(labels: SoftLabels, label_type: str) -> Tensor:
    """Return N packed arrays of an FKD type, the inverse of labels_of: float32, hard int64.

    The name of a marginal type must have K. The K likeliest classes are kept, ties in the order of
    ``labels``. Raises LabelSetError for an unknown type, a marginal type without K, and labels of
    fewer than K classes.
    """
    kind, given_k = _split(label_type)
    if kind == "ori":
        return labels.to_dense()
    num_kept = labels.indices_NK.shape[1]
    k = given_k or 1
    if k > num_kept or (kind.startswith("marginal") and not given_k):
        raise LabelSetError(
            f"labels of {num_kept} kept classes cannot be stored as {label_type}; "
            f"give a K from 1 to {num_kept}"
        )
    order_NK = labels.probs_NK.argsort(dim=1, descending=True, stable=True)[:, :k]
    ids_NK, probs_NK = labels.indices_NK.gather(1, order_NK), labels.probs_NK.gather(1, order_NK)
    if kind == "hard":
        return ids_NK[:, 0]
    packed_N2K = torch.stack([ids_NK.float(), probs_NK], dim=1)
    return packed_N2K[:, :, 0] if kind == "smoothing" else packed_N2K


def num_kept(label_type: str, num_classes: int) -> int:
    """Return the number of classes that a type keeps; raises LabelSetError as ``pack``."""
    kind, given_k = _split(label_type)
    if kind == "ori":
        return num_classes
    if kind.startswith("marginal") and not 1 <= (given_k or 0) <= num_classes:
        raise LabelSetError(f"{label_type} must name a K from 1 to {num_classes}, as in {kind}_k5")
    return given_k or 1


def with_k(label_type: str) -> str:
    """Return a type's full name: FKD's marginal_renorm without K means 5 classes, as in its code.

    Other names stay as they are.
    """
    return (
        f"{label_type}_k5"
        if label_type in ("marginal_smoothing", "marginal_renorm")
        else label_type
    )


def is_label_type(name: str) -> bool:
    """Return whether a name is an FKD type, with or without K."""
    try:
        _split(name)
    except LabelSetError:
        return False
    return True


def _split(label_type: str) -> tuple[str, int | None]:
    """Return the kind and the K of a type's name, K None if the name has none."""
    kind, _, given_k = label_type.partition("_k")
    marginal = kind in ("marginal_smoothing", "marginal_renorm")
    if not (marginal or label_type in LABEL_TYPES) or not (given_k.isdecimal() or not given_k):
        raise LabelSetError(
            f"unknown FKD label type {label_type!r}; known: {', '.join(LABEL_TYPES)}"
        )
    return kind, int(given_k) if given_k else None


def _columns(packed: np.ndarray, kind: str, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return class ids and probabilities, float64 N x K each; raises ValueError."""
    if kind == "ori":
        num_labels, width = packed.shape
        if width != num_classes:
            raise ValueError(f"{num_labels} labels of {width} classes")
        ids_NK = np.broadcast_to(np.arange(float(num_classes)), packed.shape)
        return ids_NK, packed.astype(np.float64)
    if kind == "hard":
        (num_labels,) = packed.shape
        ids_NK = packed.reshape(num_labels, 1).astype(np.float64)
        return ids_NK, np.ones(ids_NK.shape)
    if kind == "smoothing":
        packed = packed[..., None]
    num_labels, two, _ = packed.shape
    if two != 2:
        raise ValueError(f"{num_labels} labels of {two} rows")
    return packed[:, 0].astype(np.float64), packed[:, 1].astype(np.float64)


def _check_ids(ids_NK: np.ndarray, num_classes: int, dtype: np.dtype[np.generic]) -> None:
    if dtype == np.float16 and num_classes > 2049:  # float16 has every integer up to 2048
        raise LabelSetError(f"FKD labels in float16 cannot tell {num_classes} classes apart")
    integral = ids_NK == np.floor(ids_NK)  # false for NaN
    if not integral.all():
        raise LabelSetError(f"FKD labels name class {ids_NK[~integral][0]}, not an integer")
    outside = (ids_NK < 0) | (ids_NK >= num_classes)
    if outside.any():
        raise LabelSetError(f"FKD labels name class {ids_NK[outside][0]:.0f} of {num_classes}")
    ordered_NK = np.sort(ids_NK, axis=1)
    if (ordered_NK[:, 1:] == ordered_NK[:, :-1]).any():
        raise LabelSetError("FKD labels name a class twice")


def _check_probs(probs_NK: np.ndarray) -> None:
    mass_N = probs_NK.sum(axis=1)
    if not ((probs_NK >= 0).all() and ((mass_N > 0) & (mass_N <= 1 + _MASS_SLACK)).all()):
        raise LabelSetError("FKD labels hold values that are not probabilities")
