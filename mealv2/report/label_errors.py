"""Suspected label errors: images whose hard label the ensemble's mean soft label contradicts."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from mealv2.data.source import UNLABELLED
from mealv2.report.sample import LabelSample

_ROUNDING = 1e-6  # of a probability against a threshold


@dataclass(frozen=True)
class LabelErrors:
    """The images of a sample whose hard label is suspected, most suspicious first.

    ``rows`` are their rows in the sample, ``suggested`` the class that the ensemble suggests for
    each, ``given_prob`` and ``suggested_prob`` the mean probability of both classes. The threshold
    of each class is in ``thresholds_C``, the number of images with a hard label ``num_labelled``.
    """

    rows: np.ndarray
    suggested: np.ndarray
    given_prob: np.ndarray
    suggested_prob: np.ndarray
    thresholds_C: np.ndarray
    num_labelled: int

    def __len__(self) -> int:
        return len(self.rows)

    def table(self, sample: LabelSample) -> list[dict[str, Any]]:
        """Return a row per image: its key, both classes by name and their probabilities."""
        columns = (self.rows, self.suggested, self.given_prob, self.suggested_prob)
        return [
            {
                "key": sample.keys[row],
                "given": sample.classes[int(sample.hard_N[row])],
                "suggested": sample.classes[suggested],
                "given_probability": given_prob,
                "suggested_probability": suggested_prob,
            }
            for row, suggested, given_prob, suggested_prob in zip(
                *(column.tolist() for column in columns), strict=True
            )
        ]


def find_label_errors(sample: LabelSample) -> LabelErrors:
    """Find images of a sample whose hard label is probably wrong, by confident learning.

    The probabilities of an image are the ensemble's mean over its views. An image counts as class j
    if j is the likeliest among the classes whose probability reaches their threshold; the
    threshold of a class is its mean probability over the images labelled with it. An image that
    counts as another class than its label is suspected, unless its label is its likeliest class.
    The lowest probability of the given label comes first. (Northcutt, Jiang and Chuang 2021,
    "Confident Learning", equations 1 and 2, and its ranking by self-confidence.) The teachers must
    not have fitted the wrong labels: ones trained on the same images hide some.
    """
    labelled = np.flatnonzero(sample.hard_N != UNLABELLED)
    probs_NC = sample.mean_NC[labelled].astype(np.float64)
    hard_N = sample.hard_N[labelled]
    rows_N = np.arange(len(labelled))
    given_N = probs_NC[rows_N, hard_N]
    thresholds_C = class_thresholds(given_N, hard_N, len(sample.classes))
    is_confident_NC = probs_NC >= thresholds_C - _ROUNDING
    candidates_NC = np.where(is_confident_NC, probs_NC, -1.0)
    counted_N = candidates_NC.argmax(axis=1)
    is_suspected_N = is_confident_NC.any(axis=1) & (counted_N != hard_N)
    is_suspected_N &= given_N < probs_NC.max(axis=1)
    found = np.flatnonzero(is_suspected_N)
    found = found[np.argsort(given_N[found], kind="stable")]
    return LabelErrors(
        labelled[found],
        counted_N[found],
        given_N[found],
        probs_NC[found, counted_N[found]],
        thresholds_C,
        len(labelled),
    )


def class_thresholds(given_N: np.ndarray, hard_N: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the mean probability of each class over the images labelled with it, C.

    Infinite for a class without images: no image counts as it.
    """
    images_C = np.bincount(hard_N, minlength=num_classes)
    sums_C = np.bincount(hard_N, weights=given_N, minlength=num_classes)
    thresholds_C: np.ndarray = np.where(images_C > 0, sums_C / np.maximum(1, images_C), np.inf)
    return thresholds_C
