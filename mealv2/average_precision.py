"""Mean average precision of a multi-label classifier: the area form and VOC2007's 11 points."""

import torch
from torch import Tensor

# The label of a class in an image; as in the lists of VOC's ImageSets/Main.
PRESENT, IGNORED, ABSENT = 1, 0, -1

_RECALLS = torch.arange(11, dtype=torch.float64) / 10


def precision_recall(scores_N: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return precision and recall, float64, at each different score, from the highest down.

    ``labels_N`` are 1 for a present class and -1 for an absent one; images with 0 are left out, as
    in VOC, where 0 marks a class whose every object is difficult. Images of equal scores are found
    together, so the order of the images has no effect. Both are empty without a positive image.
    """
    known_N = labels_N != IGNORED
    scores_N, labels_N = scores_N[known_N].double(), labels_N[known_N]
    order_N = scores_N.argsort(descending=True, stable=True)
    scores_N, hits_N = scores_N[order_N], (labels_N[order_N] == PRESENT).double()
    num_positive = hits_N.sum()
    if not int(num_positive):
        return scores_N.new_empty(0), scores_N.new_empty(0)
    is_last_N = torch.ones_like(scores_N, dtype=torch.bool)
    is_last_N[:-1] = scores_N[1:] != scores_N[:-1]
    found_N = hits_N.cumsum(0)[is_last_N]
    ranks_N = torch.arange(1, len(scores_N) + 1, dtype=torch.float64)[is_last_N]
    return found_N / ranks_N, found_N / num_positive


def average_precision(scores_N: Tensor, labels_N: Tensor) -> float | None:
    """Return the area under precision and recall; None without a positive image.

    AP = sum_n (R_n - R_(n-1)) P_n over the different scores, without interpolation, as
    scikit-learn's average_precision_score. Arguments as in ``precision_recall``.
    """
    precision_T, recall_T = precision_recall(scores_N, labels_N)
    if not len(recall_T):
        return None
    steps_T = recall_T.diff(prepend=recall_T.new_zeros(1))
    return float((steps_T * precision_T).sum())


def average_precision_11_points(scores_N: Tensor, labels_N: Tensor) -> float | None:
    """Return VOC2007's average precision; None without a positive image.

    AP = 1/11 sum over t = 0, 0.1, ..., 1 of the highest precision at a recall of at least t, 0
    where there is none (Everingham et al. 2010, section 4.2). Arguments as in ``precision_recall``.
    """
    precision_T, recall_T = precision_recall(scores_N, labels_N)
    if not len(recall_T):
        return None
    # a recall of 3 / 10 counts as 0.3, which rounding could prevent
    reached_11T = recall_T >= _RECALLS[:, None] - 1e-12
    return float((precision_T * reached_11T).max(dim=1).values.mean())
