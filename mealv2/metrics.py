"""Accuracy and calibration of a classifier, and how closely a student matches its ensemble."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mealv2.soft_labels import Labels


def num_correct(scores_BC: Tensor, labels_B: Tensor, k: int) -> Tensor:
    """Return how many rows have their label among the ``k`` highest scores, an int64 scalar.

    With fewer than ``k`` classes every row counts.
    """
    k = min(k, scores_BC.shape[1])
    top_BK = scores_BC.topk(k, dim=1).indices
    return (top_BK == labels_B[:, None]).any(dim=1).sum()


NUM_BINS = 15  # of the calibration error, as in the literature


@dataclass(frozen=True)
class Calibration:
    """Images by the confidence of their prediction, in bins of equal width; bin b of B holds
    (b / B, (b + 1) / B].

    ``num_images``, and the means ``confidence`` and ``accuracy`` of each bin as fractions; 0 in a
    bin without images.
    """

    num_images: list[int]
    confidence: list[float]
    accuracy: list[float]

    @classmethod
    def from_sums(cls, sums_3B: Tensor) -> "Calibration":
        """Return the means of what ``calibration_sums`` gives, float64."""
        count_B = sums_3B[0].long()
        confidence_B, accuracy_B = sums_3B[1:] / count_B.clamp(min=1)
        return cls(count_B.tolist(), confidence_B.tolist(), accuracy_B.tolist())

    @property
    def ece(self) -> float:
        """The expected calibration error as a fraction: the mean over images of the absolute
        difference of confidence and accuracy in their bin (Guo et al. 2017, equation 3).
        """
        gaps = (abs(c - a) for c, a in zip(self.confidence, self.accuracy, strict=True))
        weighted = (n * gap for n, gap in zip(self.num_images, gaps, strict=True))
        return sum(weighted) / max(1, sum(self.num_images))


def calibration_sums(confidence_N: Tensor, correct_N: Tensor, num_bins: int = NUM_BINS) -> Tensor:
    """Return images, confidence and correct images summed by bin: float64, shape (3, num_bins).

    ``confidence_N`` is the float64 probability of the predicted class.
    """
    bins_N = ((confidence_N * num_bins).ceil().long() - 1).clamp(0, num_bins - 1)
    rows = (torch.ones_like(confidence_N), confidence_N, correct_N.double())
    return torch.stack([torch.bincount(bins_N, weights=n, minlength=num_bins) for n in rows])


class Evaluation:
    """Metrics of a split, summed batch by batch.

    Accuracies, agreement and ece are percent; cross_entropy and kl are means in nats per image.
    """

    def __init__(self, num_classes: int, *, num_bins: int = NUM_BINS) -> None:
        self._num_classes = num_classes
        self._num_bins = num_bins
        self.load_sums(torch.zeros(6 + 3 * num_bins + 2 * num_classes, dtype=torch.float64))

    def add(self, logits_BC: Tensor, labels_B: Tensor, soft_labels: Labels | None = None) -> None:
        """Add a batch: logits, class ids and, if there are any, the ensemble's soft labels."""
        log_probs_BC = torch.log_softmax(logits_BC.cpu().double(), dim=1)
        labels_B = labels_B.cpu()
        best_B = log_probs_BC.argmax(dim=1)
        self.num_images += len(labels_B)
        self._images_C += torch.bincount(labels_B, minlength=self._num_classes)
        hits_B = labels_B[best_B == labels_B]
        self._correct1_C += torch.bincount(hits_B, minlength=self._num_classes)
        self._correct5 += int(num_correct(log_probs_BC, labels_B, 5))
        self._cross_entropy -= float(log_probs_BC.gather(1, labels_B[:, None]).sum())
        confidence_B = log_probs_BC.gather(1, best_B[:, None])[:, 0].exp()
        self._bins_3B += calibration_sums(confidence_B, best_B == labels_B, self._num_bins)
        if soft_labels is not None:
            probs_BC = soft_labels.to_dense().cpu().double()
            self._num_labelled += len(labels_B)
            self._num_agreeing += int((soft_labels.argmax().cpu() == best_B).sum())
            # KL(q || p) = sum_c q_c (log q_c - log p_c), 0 log 0 = 0
            self._kl += float((torch.xlogy(probs_BC, probs_BC) - probs_BC * log_probs_BC).sum())

    def sums(self) -> Tensor:
        """Return all sums as one float64 tensor; the sums of several parts of a split add up."""
        counts = [self.num_images, self._correct5, self._num_labelled, self._num_agreeing]
        scalars = torch.tensor([*counts, self._cross_entropy, self._kl], dtype=torch.float64)
        by_class = (self._correct1_C.double(), self._images_C.double())
        return torch.cat([scalars, self._bins_3B.flatten(), *by_class])

    def load_sums(self, sums: Tensor) -> None:
        """Replace the sums by those of ``sums()``."""
        counts: list[int] = sums[:4].long().tolist()
        self.num_images, self._correct5, self._num_labelled, self._num_agreeing = counts
        self._cross_entropy, self._kl = float(sums[4]), float(sums[5])
        size = 3 * self._num_bins
        self._bins_3B = sums[6 : 6 + size].clone().view(3, -1)
        self._correct1_C, self._images_C = sums[6 + size :].long().view(2, -1)

    @property
    def top1(self) -> float:
        """Percent of images whose best class is the label."""
        return 100.0 * int(self._correct1_C.sum()) / max(1, self.num_images)

    @property
    def top5(self) -> float:
        """Percent of images with the label among the five best classes."""
        return 100.0 * self._correct5 / max(1, self.num_images)

    @property
    def cross_entropy(self) -> float:
        """Mean cross-entropy to the hard labels, nats."""
        return self._cross_entropy / max(1, self.num_images)

    @property
    def ece(self) -> float:
        """The expected calibration error in percent (``Calibration``)."""
        return 100.0 * self.calibration().ece

    @property
    def agreement(self) -> float | None:
        """Percent of images where student and ensemble have the same best class."""
        return 100.0 * self._num_agreeing / self._num_labelled if self._num_labelled else None

    @property
    def kl(self) -> float | None:
        """Mean KL(ensemble || student), nats."""
        return self._kl / self._num_labelled if self._num_labelled else None

    def calibration(self) -> Calibration:
        """Return confidence and accuracy by bin."""
        return Calibration.from_sums(self._bins_3B)

    def per_class(self) -> list[tuple[int, int]]:
        """Return (images, correct at top-1) of every class."""
        return list(zip(self._images_C.tolist(), self._correct1_C.tolist(), strict=True))

    def summary(self) -> dict[str, float | int]:
        """Return the metrics by name, without agreement and kl if no image has soft labels."""
        names = ("num_images", "top1", "top5", "cross_entropy", "ece", "agreement", "kl")
        metrics = {name: getattr(self, name) for name in names}
        return {name: value for name, value in metrics.items() if value is not None}


class Predictions:
    """Label and predicted class of every image of a split."""

    def __init__(self, num_classes: int) -> None:
        self._num_classes = num_classes
        self._labels: list[Tensor] = []
        self._predicted: list[Tensor] = []

    def add(self, logits_BC: Tensor, labels_B: Tensor) -> None:
        """Add a batch: logits and class ids."""
        log_probs_BC = torch.log_softmax(logits_BC.cpu().double(), dim=1)
        self._labels.append(labels_B.cpu())
        self._predicted.append(log_probs_BC.argmax(dim=1))  # as Evaluation

    def confusion(self) -> list[tuple[int, int, int]]:
        """Return (label, predicted class, number of images) of all pairs with images, in order."""
        codes_N = torch.cat(self._labels) * self._num_classes + torch.cat(self._predicted)
        codes, counts = torch.unique(codes_N, return_counts=True)
        pairs = zip(codes.tolist(), counts.tolist(), strict=True)
        return [(*divmod(code, self._num_classes), count) for code, count in pairs]
