"""The mean logits in a block: a line in the labels' log-probabilities, or values of kept classes.

docs/reference/label-set-format.md describes the bytes of both.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mealv2.codec import Kept, to_device
from mealv2.soft_labels import KeptLogits

SLOPE_UNIT = 64  # steps of a slope of 1
_LINE = np.dtype([("slope", "u1"), ("offset", "<f2"), ("rest", "<f2")])
LINE_SIZE = _LINE.itemsize  # bytes a view
_WEIGHT = 0.75  # the power of a probability that weighs its logit: KL at temperatures of 1 to 2
_PRIOR = 0.01  # nats^2: a slope of 1 where log-probabilities do not tell
_LIMIT = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class FittedLogits:
    """The ensemble's mean logits of N labels, as a line in their recovered log-probabilities.

    A class that the label keeps has ``slopes / 64 * ln p + offsets``; ``rest_N`` is the mean of all
    others, 0 where it keeps all classes. ``slopes_N`` are uint8, the others float16, as stored.
    """

    slopes_N: Tensor
    offsets_N: Tensor
    rest_N: Tensor

    def to(self, device: torch.device) -> "FittedLogits":
        """Return the logits on a device."""
        return FittedLogits(*(to_device(part, device) for part in self._parts()))

    def rows(self, order_N: Tensor) -> "FittedLogits":
        """Return rows by index, in that order."""
        order_N = to_device(order_N, self.rest_N.device)
        return FittedLogits(*(part[order_N] for part in self._parts()))

    @staticmethod
    def concat(parts: "Sequence[FittedLogits]") -> "FittedLogits":
        """Concatenate logits."""
        columns = zip(*(part._parts() for part in parts), strict=True)
        return FittedLogits(*(torch.cat(column) for column in columns))

    def of_kept(self, kept: Kept) -> KeptLogits:
        """Return the logits of the kept classes of the labels, float32."""
        slopes_N1 = self.slopes_N[:, None].float() / SLOPE_UNIT
        values_NK = slopes_N1 * _logs(kept) + self.offsets_N[:, None].float()
        return KeptLogits(values_NK.masked_fill(~kept.is_kept_NK, 0.0), self.rest_N.float())

    def to_dense(self, kept: Kept, num_classes: int) -> Tensor:
        """Return the logits of all classes, float32 N x C; ``kept`` is that of their labels."""
        return self.of_kept(kept).to_dense(kept, num_classes)

    def to_bytes(self) -> bytes:
        """Return the line of each view; the logits are on the CPU."""
        lines_N = np.empty(len(self.rest_N), _LINE)
        for name, part in zip(_LINE.names or (), self._parts(), strict=True):
            lines_N[name] = part.numpy()
        return lines_N.tobytes()

    @staticmethod
    def from_bytes(data: np.ndarray) -> "FittedLogits":
        """Return the logits that ``to_bytes`` wrote, of uint8."""
        lines_N = data.view(_LINE)
        return FittedLogits(*(torch.from_numpy(lines_N[name].copy()) for name in _LINE.names or ()))

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.slopes_N, self.offsets_N, self.rest_N


Logits = KeptLogits | FittedLogits


def concat_logits(parts: Sequence[Logits]) -> Logits:
    """Concatenate logits of one form."""
    kept = [part for part in parts if isinstance(part, KeptLogits)]
    fitted = [part for part in parts if isinstance(part, FittedLogits)]
    if kept and fitted:
        raise ValueError("cannot join KeptLogits and FittedLogits")
    return KeptLogits.concat(kept) if kept else FittedLogits.concat(fitted)


def are_finite(logits: Logits) -> bool:
    """Return whether all values are finite."""
    values = logits.values_NK if isinstance(logits, KeptLogits) else logits.offsets_N
    return bool(torch.isfinite(values).all() & torch.isfinite(logits.rest_N).all())


def fit_logits(logits_NC: Tensor, probs_NC: Tensor, kept: Kept) -> FittedLogits:
    """Fit mean logits to labels: ``kept`` are the recovered ones, ``probs_NC`` the distributions.

    Weighted least squares over the kept classes. A masked class, whose logit is infinite, counts
    neither there nor in the mean of the others. Its recovered logit is on the line if it is kept;
    else it is that mean or, where all others are masked, on the line at the tail.
    """
    is_finite_NC = torch.isfinite(logits_NC)
    logits_NC = logits_NC.double().masked_fill(~is_finite_NC, 0.0).clamp(-_LIMIT, _LIMIT)
    has_weight_NK = kept.is_kept_NK & is_finite_NC.gather(1, kept.indices_NK)
    weights_NK = probs_NC.gather(1, kept.indices_NK).double() ** _WEIGHT * has_weight_NK
    weights_NK = weights_NK / weights_NK.sum(1, keepdim=True).clamp_min(1e-30)
    # min_{a,b} sum_k w_k (z_k - a - b ln p_k)^2 + prior (b - 1)^2
    logs_NK, values_NK = _logs(kept).double(), logits_NC.gather(1, kept.indices_NK)
    mean_log_N1 = (weights_NK * logs_NK).sum(1, keepdim=True)
    mean_value_N1 = (weights_NK * values_NK).sum(1, keepdim=True)
    from_mean_NK = logs_NK - mean_log_N1
    covariance_N = (weights_NK * from_mean_NK * (values_NK - mean_value_N1)).sum(1)
    variance_N = (weights_NK * from_mean_NK**2).sum(1)
    slopes_N = (covariance_N + _PRIOR) / (variance_N + _PRIOR)
    slopes_N = (SLOPE_UNIT * slopes_N).round().clamp(0, 255)
    offsets_N = mean_value_N1[:, 0] - slopes_N / SLOPE_UNIT * mean_log_N1[:, 0]

    is_other_NC = ~kept.mask(logits_NC.shape[1])
    num_finite_N = (is_other_NC & is_finite_NC).sum(1)
    rest_N = (logits_NC * is_other_NC).sum(1) / num_finite_N.clamp_min(1)
    of_tail_N = slopes_N / SLOPE_UNIT * kept.tail_N.double().clamp_min(1e-30).log() + offsets_N
    rest_N = torch.where((num_finite_N == 0) & is_other_NC.any(1), of_tail_N, rest_N)
    return FittedLogits(slopes_N.to(torch.uint8), _half(offsets_N), _half(rest_N))


def _logs(kept: Kept) -> Tensor:
    """Return the log-probabilities of kept classes, 0 in the padding."""
    return torch.where(kept.is_kept_NK, kept.probs_NK, 1.0).log()


def _half(values_N: Tensor) -> Tensor:
    return values_N.clamp(-_LIMIT, _LIMIT).to(torch.float16)


# --- values of the classes kept -------------------------------------------------------------------


def value_bytes(logits: KeptLogits, is_stored_NK1: np.ndarray, is_rest_NK1: np.ndarray) -> bytes:
    """Return float16 values: of the slots that are stored, where one may be the rest's."""
    padded_NK1: np.ndarray = np.zeros(is_stored_NK1.shape, "<f2")
    padded_NK1[:, :-1] = logits.values_NK.numpy()[:, : padded_NK1.shape[1] - 1]
    padded_NK1[is_rest_NK1] = logits.rest_N.numpy()[is_rest_NK1.any(axis=1)]
    stored: bytes = padded_NK1[is_stored_NK1].tobytes()
    return stored


def of_values(values: np.ndarray, is_stored_NK1: np.ndarray, is_rest_NK1: np.ndarray) -> KeptLogits:
    """Return the logits that ``value_bytes`` wrote."""
    padded_NK1 = np.zeros(is_stored_NK1.shape, "<f2")
    padded_NK1[is_stored_NK1] = values
    rest_N = np.zeros(len(padded_NK1), "<f2")
    rest_N[is_rest_NK1.any(axis=1)] = padded_NK1[is_rest_NK1]
    padded_NK1[is_rest_NK1] = 0
    values_NK = torch.from_numpy(np.ascontiguousarray(padded_NK1[:, :-1]))
    return KeptLogits(values_NK, torch.from_numpy(rest_N))


def no_values() -> KeptLogits:
    """Return the logits of no rows."""
    return KeptLogits(torch.zeros((0, 0), dtype=torch.float16), torch.zeros(0, dtype=torch.float16))
