"""Accuracy of a classifier, and how faithful a student is to its ensemble."""

from dataclasses import dataclass, field

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


@dataclass
class Evaluation:
    """Sums over an evaluation, batch by batch; read the figures as properties.

    Accuracies and agreement are percent; cross_entropy and kl are means in nats per image.
    """

    num_classes: int
    num_images: int = 0
    _correct1_C: Tensor = field(init=False)
    _images_C: Tensor = field(init=False)
    _correct5: int = 0
    _cross_entropy: float = 0.0
    _labelled: int = 0
    _agree: int = 0
    _kl: float = 0.0

    def __post_init__(self) -> None:
        self._correct1_C = torch.zeros(self.num_classes, dtype=torch.int64)
        self._images_C = torch.zeros(self.num_classes, dtype=torch.int64)

    def add(self, logits_BC: Tensor, labels_B: Tensor, soft_labels: Labels | None = None) -> None:
        """Count a batch: logits, class ids and, where there are any, the ensemble's soft labels."""
        log_probs_BC = torch.log_softmax(logits_BC.cpu().double(), dim=1)
        labels_B = labels_B.cpu()
        best_B = log_probs_BC.argmax(dim=1)
        self.num_images += len(labels_B)
        self._images_C += torch.bincount(labels_B, minlength=self.num_classes)
        hits_B = labels_B[best_B == labels_B]
        self._correct1_C += torch.bincount(hits_B, minlength=self.num_classes)
        self._correct5 += int(num_correct(log_probs_BC, labels_B, 5))
        self._cross_entropy -= float(log_probs_BC.gather(1, labels_B[:, None]).sum())
        if soft_labels is not None:
            probs_BC = soft_labels.to_dense().cpu().double()
            self._labelled += len(labels_B)
            self._agree += int((soft_labels.argmax().cpu() == best_B).sum())
            # KL(q || p) = sum_c q_c (log q_c - log p_c), 0 log 0 = 0
            self._kl += float((torch.xlogy(probs_BC, probs_BC) - probs_BC * log_probs_BC).sum())

    def sums(self) -> Tensor:
        """Return all sums as one row, float64, for ``take``: rows of parts of a split add up."""
        single = [self.num_images, self._correct5, self._cross_entropy]
        single += [self._labelled, self._agree, self._kl]
        counts = [self._correct1_C.double(), self._images_C.double()]
        return torch.cat([torch.tensor(single, dtype=torch.float64), *counts])

    def take(self, sums: Tensor) -> None:
        """Have these sums from now on."""
        single = sums[:6].tolist()
        self.num_images, self._correct5, self._labelled, self._agree = (
            round(single[i]) for i in (0, 1, 3, 4)
        )
        self._cross_entropy, self._kl = single[2], single[5]
        self._correct1_C, self._images_C = sums[6:].long().view(2, -1)

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
    def agreement(self) -> float | None:
        """Percent of images where student and ensemble have the same best class, or None."""
        return 100.0 * self._agree / self._labelled if self._labelled else None

    @property
    def kl(self) -> float | None:
        """Mean KL(ensemble || student), nats; None without soft labels."""
        return self._kl / self._labelled if self._labelled else None

    def per_class(self) -> list[tuple[int, int]]:
        """Return (images, correct at top-1) of every class."""
        return list(zip(self._images_C.tolist(), self._correct1_C.tolist(), strict=True))

    def summary(self) -> dict[str, float | int]:
        """Return the figures there are, by name."""
        figures = {
            "num_images": self.num_images,
            "top1": self.top1,
            "top5": self.top5,
            "cross_entropy": self.cross_entropy,
            "agreement": self.agreement,
            "kl": self.kl,
        }
        return {name: value for name, value in figures.items() if value is not None}
