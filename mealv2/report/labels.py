"""Statistics of a label set: certainty, entropy, bytes, by class; teachers against each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mealv2.data.source import UNLABELLED
from mealv2.errors import LabelSetError
from mealv2.label_set import LabelSet
from mealv2.report.sample import LabelSample, sample_labels

MAX_AVERAGED = 2000  # classes: an average soft label of each takes 32 MB


@dataclass(frozen=True)
class LabelStatistics:
    """What a sample of a label set shows; means over its views unless stated otherwise.

    ``top1``, ``mass`` (by the number of likeliest classes), ``hard_prob`` are probabilities,
    ``entropy`` and ``disagreement`` nats, ``bytes`` stored bytes per view. ``num_labelled`` counts
    views of images with a hard label, ``num_contradicting`` those whose likeliest class is another;
    ``images_contradicting`` counts images by how many of their views do: none, some, all.
    ``classes`` is a row per class, ``mean_label_CC`` the average soft label of each hard class, NaN
    for a class without images; None above MAX_AVERAGED classes.
    """

    num_views: int
    top1: float
    entropy: float
    disagreement: float
    bytes: float
    mass: dict[int, float]
    hard_prob: float | None
    num_labelled: int
    num_contradicting: int
    images_contradicting: dict[str, int]
    classes: list[dict[str, Any]]
    mean_label_CC: np.ndarray | None

    def summary(self) -> dict[str, Any]:
        """Return the figures as JSON values, without those by class."""
        contradicting = None
        if self.num_labelled:
            contradicting = 100 * self.num_contradicting / self.num_labelled
        return {
            "views": self.num_views,
            "top1_probability": self.top1,
            "entropy": self.entropy,
            "disagreement_of_views": self.disagreement,
            "bytes_per_view": self.bytes,
            "mass": {str(k): value for k, value in self.mass.items()},
            "hard_label_probability": self.hard_prob,
            "views_with_hard_label": self.num_labelled,
            "views_contradicting": self.num_contradicting,
            "views_contradicting_percent": contradicting,
            "images_contradicting": self.images_contradicting,
        }


def label_statistics(sample: LabelSample) -> LabelStatistics:
    """Return the statistics of a sample; sums in float64."""
    has_NV = sample.has_NV
    is_labelled_N = sample.hard_N != UNLABELLED
    num_labelled = int(has_NV[is_labelled_N].sum())
    contradicting_N = sample.contradicts().sum(axis=1)[is_labelled_N]
    views_N = has_NV.sum(axis=1)[is_labelled_N]
    none, every = contradicting_N == 0, contradicting_N == views_N
    masses = np.nanmean(sample.mass_NVK, axis=(0, 1)).tolist()
    return LabelStatistics(
        num_views=int(has_NV.sum()),
        top1=float(np.nanmean(sample.top1_NV)),
        entropy=float(np.nanmean(sample.entropy_NV)),
        disagreement=float(sample.disagreement().mean()),
        bytes=float(sample.bytes_N.mean()),
        mass=dict(zip(sample.mass_k, masses, strict=True)),
        hard_prob=float(np.nanmean(sample.hard_prob_NV)) if num_labelled else None,
        num_labelled=num_labelled,
        num_contradicting=int(contradicting_N.sum()),
        images_contradicting={
            "none": int(none.sum()),
            "some": int((~none & ~every).sum()),
            "all": int((every & ~none).sum()),
        },
        classes=_class_rows(sample),
        mean_label_CC=mean_labels(sample),
    )


def _class_rows(sample: LabelSample) -> list[dict[str, Any]]:
    """Return the statistics of every class, by the hard label of the images."""
    num_classes = len(sample.classes)
    is_labelled_N = sample.hard_N != UNLABELLED
    hard_N = sample.hard_N[is_labelled_N]
    views_N = sample.has_NV[is_labelled_N].sum(axis=1)

    def sums(values_N: np.ndarray) -> np.ndarray:
        return np.bincount(hard_N, weights=values_N, minlength=num_classes)

    def of_views(values_NV: np.ndarray) -> np.ndarray:
        return sums(np.nansum(values_NV[is_labelled_N], axis=1))

    images_C, views_C = np.bincount(hard_N, minlength=num_classes), sums(views_N)
    means = {
        "top1_probability": of_views(sample.top1_NV) / np.maximum(1, views_C),
        "hard_label_probability": of_views(sample.hard_prob_NV) / np.maximum(1, views_C),
        "entropy": of_views(sample.entropy_NV) / np.maximum(1, views_C),
        "contradicting_percent": 100 * of_views(sample.contradicts()) / np.maximum(1, views_C),
        "bytes_per_view": sums(sample.bytes_N[is_labelled_N]) / np.maximum(1, images_C),
    }
    return [
        {
            "class_id": c,
            "class": name,
            "images": int(images_C[c]),
            **{what: float(of_C[c]) if images_C[c] else None for what, of_C in means.items()},
        }
        for c, name in enumerate(sample.classes)
    ]


def mean_labels(sample: LabelSample) -> np.ndarray | None:
    """Return the average soft label of the images of each hard class, float64 C x C.

    Row c is the mean over the images of class c (paper figure 2, part 3), NaN if there is none.
    None above MAX_AVERAGED classes.
    """
    num_classes = len(sample.classes)
    if num_classes > MAX_AVERAGED:
        return None
    is_labelled_N = sample.hard_N != UNLABELLED
    hard_N, means_NC = sample.hard_N[is_labelled_N], sample.mean_NC[is_labelled_N]
    sums_CC = np.zeros((num_classes, num_classes))
    np.add.at(sums_CC, hard_N, means_NC.astype(np.float64))
    images_C = np.bincount(hard_N, minlength=num_classes)
    mean_CC: np.ndarray = sums_CC / np.where(images_C, images_C, np.nan)[:, None]
    return mean_CC


@dataclass(frozen=True)
class TeacherComparison:
    """Teachers against each other on the same views, T x T.

    ``agreement_TT`` percent of views with the same likeliest class, ``kl_TT`` the mean KL(row ||
    column) in nats, ``accuracy_T`` percent of views whose likeliest class is the hard label (NaN
    without hard labels). ``num_views`` were compared.
    """

    names: list[str]
    agreement_TT: np.ndarray
    kl_TT: np.ndarray
    accuracy_T: np.ndarray
    num_views: int
    size_text: str


def compare_teachers(
    sets: Sequence[LabelSet], *, max_views: int = 20_000, seed: int = 0
) -> TeacherComparison:
    """Compare label sets of single teachers (mealv2.teacher_sets) on a sample of their views.

    Raises LabelSetError for sets of other classes, images or views.
    """
    first, batch = sets[0], 256
    sample = sample_labels(first, max_views=max_views, seed=seed)
    for other in sets[1:]:
        if other.classes != first.classes or other.num_views != first.num_views:
            raise LabelSetError(f"{other.folder} labels other classes or views than {first.folder}")
    addresses = [
        (key, int(view), int(hard))
        for row, (key, hard) in enumerate(zip(sample.keys, sample.hard_N, strict=True))
        for view in sample.views_V[sample.has_NV[row]]
    ]
    num_teachers = len(sets)
    equal_TT, kl_TT = np.zeros((2, num_teachers, num_teachers))
    correct_T, num_labelled = np.zeros(num_teachers), 0
    for start in range(0, len(addresses), batch):
        keys, views, hard = zip(*addresses[start : start + batch], strict=True)
        found = [labels.soft_labels(keys, views).to_dense().double() for labels in sets]
        best_TB = np.stack([dense.argmax(dim=1).numpy() for dense in found])
        equal_TT += (best_TB[:, None] == best_TB[None]).sum(axis=2)
        is_labelled_B = np.array(hard) != UNLABELLED
        num_labelled += int(is_labelled_B.sum())
        correct_T += ((best_TB == np.array(hard)) & is_labelled_B).sum(axis=1)
        logs = [dense.clamp_min(1e-12).log() for dense in found]  # stored float16 can be 0
        for a in range(num_teachers):
            for b in range(num_teachers):
                kl_TT[a, b] += float((found[a] * (logs[a] - logs[b])).sum())
    num_views = len(addresses)
    return TeacherComparison(
        [_teacher_name(labels) for labels in sets],
        100 * equal_TT / num_views,
        kl_TT / num_views,
        100 * correct_T / num_labelled if num_labelled else np.full(num_teachers, np.nan),
        num_views,
        sample.size_text,
    )


def _teacher_name(labels: LabelSet) -> str:
    teachers = labels.manifest["plan"].get("teachers", [])
    return ", ".join(str(teacher["model"]) for teacher in teachers) or labels.folder.name
