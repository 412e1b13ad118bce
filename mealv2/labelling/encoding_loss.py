"""What the encoding of a label set loses."""

import math

import torch
from torch import Tensor

from mealv2.label_set import EncodingLoss
from mealv2.soft_labels import Labels

_MIN_PROB = torch.finfo(torch.float32).tiny  # instead of one that float16 rounded to 0
_SAMPLE_VIEWS = 64  # of a shard, rounded to whole images


def kl_of_rows(probs_NC: Tensor, recovered_NC: Tensor) -> Tensor:
    """Return KL(p || recovered) of each row, nats, float64 N."""
    # sum_c p_c (log p_c - log q_c), 0 log 0 = 0
    probs_NC, recovered_NC = probs_NC.double(), recovered_NC.double().clamp_min(_MIN_PROB)
    return (torch.xlogy(probs_NC, probs_NC) - torch.xlogy(probs_NC, recovered_NC)).sum(1)


def kl_sum(probs_NC: Tensor, recovered_NC: Tensor) -> float:
    """Return the sum over rows of KL(p || recovered), nats."""
    return math.fsum(kl_of_rows(probs_NC, recovered_NC).tolist())


def sample_size(num_views: int) -> int:
    """Return how many labels of a shard are measured: all ``num_views`` of its first images."""
    return max(1, _SAMPLE_VIEWS // num_views) * num_views


def encoding_loss(probs_NC: Tensor, labels: Labels) -> EncodingLoss | None:
    """Return what the first labels of a shard lose; None of no labels.

    ``probs_NC`` are the exact probabilities of the rows to measure, ``labels`` all rows. They are
    decoded in one call, so the result does not depend on batches; rounded to three digits, so that
    neither does it on the last bits.
    """
    num_rows = len(probs_NC)
    if not num_rows:
        return None
    recovered_NC = labels.rows(torch.arange(num_rows)).to_dense()
    mean = kl_sum(probs_NC.to(recovered_NC.device), recovered_NC) / num_rows
    return EncodingLoss(float(f"{max(0.0, round(mean, 6)):.3g}"), num_rows)
