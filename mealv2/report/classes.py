"""Class by class: accuracy before and after, confused pairs, similar classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

NUM_PAIRS = 12
MIN_IMAGES = 5  # of a class among the biggest gains and losses

Confusion = list[tuple[int, int, int]]  # label, predicted class, images


@dataclass(frozen=True)
class ClassResults:
    """How a model does on each class of a split: ``images_C``, ``correct_C`` at top-1, and the
    number of images by label and predicted class.
    """

    images_C: np.ndarray
    correct_C: np.ndarray
    confusion: Confusion

    @classmethod
    def from_pairs(
        cls, hard_N: np.ndarray, predicted_N: np.ndarray, num_classes: int
    ) -> "ClassResults":
        """Return the results of N images by their class ids."""
        codes = hard_N.astype(np.int64) * num_classes + predicted_N
        pairs, counts = np.unique(codes, return_counts=True)
        confusion = [
            (*divmod(int(pair), num_classes), int(number))
            for pair, number in zip(pairs, counts, strict=True)
        ]
        return cls.from_confusion(confusion, num_classes)

    @classmethod
    def from_confusion(cls, confusion: Confusion, num_classes: int) -> "ClassResults":
        """Return the results that a confusion implies."""
        images_C, correct_C = np.zeros((2, num_classes), dtype=np.int64)
        for label, predicted, number in confusion:
            images_C[label] += number
            correct_C[label] += number * (label == predicted)
        return cls(images_C, correct_C, confusion)

    @property
    def top1(self) -> float:
        """Percent of images whose predicted class is the label."""
        return 100.0 * int(self.correct_C.sum()) / max(1, int(self.images_C.sum()))

    def top1_of(self, class_id: int) -> float | None:
        """Return the accuracy of a class in percent, None without images."""
        images = int(self.images_C[class_id])
        return 100.0 * int(self.correct_C[class_id]) / images if images else None


def class_changes(
    classes: Sequence[str], before: ClassResults, after: ClassResults
) -> list[dict[str, Any]]:
    """Return a row per class with images: accuracy before and after in percent, and the gain.

    The biggest gain comes first.
    """
    rows = []
    for class_id, name in enumerate(classes):
        first, last = before.top1_of(class_id), after.top1_of(class_id)
        if first is None or last is None:
            continue
        rows.append(
            {
                "class_id": class_id,
                "class": name,
                "images": int(after.images_C[class_id]),
                "before": first,
                "after": last,
                "gain": last - first,
            }
        )
    return sorted(rows, key=lambda row: -float(row["gain"]))


def extremes(
    rows: list[dict[str, Any]], number: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the biggest gains and the biggest losses among ``class_changes``.

    Of classes with few images only if there are no others.
    """
    large = [row for row in rows if row["images"] >= MIN_IMAGES] or rows
    gains = [row for row in large if row["gain"] > 0][:number]
    losses = [row for row in reversed(large) if row["gain"] < 0][:number]
    return gains, losses


def confused_pairs(
    classes: Sequence[str], before: ClassResults, after: ClassResults, *, number: int = NUM_PAIRS
) -> list[dict[str, Any]]:
    """Return the pairs of classes that are most often taken for each other, both ways together.

    In images before and after, and their change; the most confused before come first.
    """
    counts = [_errors_by_pair(results) for results in (before, after)]
    pairs = sorted(
        set(counts[0]) | set(counts[1]), key=lambda pair: (-counts[0].get(pair, 0), pair)
    )
    images_C = before.images_C
    return [
        {
            "class": classes[a],
            "other": classes[b],
            "images": int(images_C[a] + images_C[b]),
            "before": counts[0].get((a, b), 0),
            "after": counts[1].get((a, b), 0),
            "change": counts[1].get((a, b), 0) - counts[0].get((a, b), 0),
        }
        for a, b in pairs[:number]
    ]


def _errors_by_pair(results: ClassResults) -> dict[tuple[int, int], int]:
    """Return how many images of two classes are taken for the other one."""
    counts: dict[tuple[int, int], int] = {}
    for label, predicted, number in results.confusion:
        if label != predicted:
            pair = min(label, predicted), max(label, predicted)
            counts[pair] = counts.get(pair, 0) + number
    return counts


# --- similarity ---------------------------------------------------------------------------------


def class_similarity(mean_label_CC: np.ndarray) -> np.ndarray:
    """Return how similar the ensemble finds each two classes, C x C in [0, 1], 0 on the diagonal.

    The mean of the mass that the average soft label of each puts on the other (paper section 4.1:
    soft labels say how alike two classes look). A class without images has its other half only.
    """
    with np.errstate(invalid="ignore"):
        mass_CC = np.stack([mean_label_CC, mean_label_CC.T])
        is_known = ~np.isnan(mass_CC)
        similarity_CC: np.ndarray = np.where(is_known, mass_CC, 0).sum(axis=0)
        similarity_CC = similarity_CC / np.maximum(1, is_known.sum(axis=0))
    np.fill_diagonal(similarity_CC, 0.0)
    return similarity_CC


def similar_pairs(similarity_CC: np.ndarray, number: int) -> list[tuple[int, int, float]]:
    """Return the most similar pairs of classes and their similarity, highest first."""
    rows, columns = np.triu_indices(len(similarity_CC), k=1)
    values = similarity_CC[rows, columns]
    order = np.argsort(-values, kind="stable")[:number]
    return [(int(rows[i]), int(columns[i]), float(values[i])) for i in order]


def similar_classes(similarity_CC: np.ndarray, number: int) -> list[int]:
    """Return classes in groups that are taken for each other: those of the most similar pairs.

    Each class comes after the one that it is most similar to, so that groups are neighbours.
    """
    num_classes = len(similarity_CC)
    if num_classes <= number:
        return list(range(num_classes))
    groups: list[list[int]] = []
    for a, b, _ in similar_pairs(similarity_CC, num_classes):
        found = [group for group in groups if a in group or b in group]
        members = sum(map(len, groups))
        new = [c for c in (a, b) if not any(c in group for group in groups)]
        if members + len(new) > number:
            break
        if found:
            found[0].extend(new)
        else:
            groups.append(new)
    return [c for group in groups for c in group]


def gains_by_similarity(
    rows: list[dict[str, Any]], similarity_CC: np.ndarray
) -> list[dict[str, Any]]:
    """Return the mean gain of the most and the least similar third of the classes (paper table 1).

    The similarity of a class is that to its most similar other class.
    """
    ids = [row["class_id"] for row in rows]
    nearest = {c: float(similarity_CC[c].max()) for c in ids}
    ordered = sorted(rows, key=lambda row: -nearest[row["class_id"]])
    third = max(1, len(ordered) // 3)
    groups = {"most similar": ordered[:third], "least similar": ordered[-third:]}
    return [
        {
            "classes": f"{name} third: {len(group)} classes",
            "similarity": float(np.mean([nearest[row["class_id"]] for row in group])),
            "before": float(np.mean([row["before"] for row in group])),
            "after": float(np.mean([row["after"] for row in group])),
            "gain": float(np.mean([row["gain"] for row in group])),
        }
        for name, group in groups.items()
    ]
