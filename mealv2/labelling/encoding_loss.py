"""What the encoding of a label set loses."""

import torch
from torch import Tensor

_MIN_PROB = torch.finfo(torch.float32).tiny  # instead of one that float16 rounded to 0


def kl_sum(probs_NC: Tensor, recovered_NC: Tensor) -> float:
    """Return the sum over rows of KL(p || recovered), nats, in float64."""
    # sum_c p_c (log p_c - log q_c), 0 log 0 = 0
    probs_NC, recovered_NC = probs_NC.double(), recovered_NC.double().clamp_min(_MIN_PROB)
    return float((torch.xlogy(probs_NC, probs_NC) - torch.xlogy(probs_NC, recovered_NC)).sum())
