"""Multi-label classification: labels 1, 0 and -1, their loss, targets and metrics."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mealv2.average_precision import (
    ABSENT,
    IGNORED,
    PRESENT,
    average_precision,
    average_precision_11_points,
)
from mealv2.data.source import ImageSource
from mealv2.errors import ConfigError
from mealv2.models.ensemble import ONE_SIZE, BySize
from mealv2.targets import BatchTargets, HardLabels
from mealv2.task import HardLabelTask


def multi_label_loss(logits_BC: Tensor, labels_BC: Tensor) -> Tensor:
    """Return the sigmoid cross-entropy, a float32 scalar: the sum over labels, divided by B x C.

    ``labels_BC`` are 1 (present), -1 (absent) or 0, which adds nothing to the sum. The divisor does
    not depend on the labels, so that the gradients of parts of a batch add up to that of the whole.
    """
    known_BC = labels_BC != IGNORED
    present_BC = (labels_BC == PRESENT).float()
    losses_BC = F.binary_cross_entropy_with_logits(logits_BC.float(), present_BC, reduction="none")
    return (losses_BC * known_BC).mean()


class MultiLabelTask(HardLabelTask):
    """Sigmoid cross-entropy to the labels of the data set (paper section 7, VOC2007)."""

    def _loss(self, logits_BC: Tensor, targets: BatchTargets) -> Tensor:
        assert targets.multi_labels_BC is not None, "this task needs multi-labels"
        return multi_label_loss(logits_BC, targets.multi_labels_BC)


class MultiLabels(HardLabels):
    """The labels of a multi-label data set, N x C of 1, 0 and -1, for any view."""

    def __init__(self, labels_NC: Tensor, *, num_views: int | None = None, seed: int = 0) -> None:
        super().__init__((), num_views=num_views, seed=seed)
        self._labels_NC = labels_NC

    def batch(
        self,
        positions: Sequence[int],
        views: Sequence[int],
        images_BCHW: Tensor,
        by_size: BySize = ONE_SIZE,
        *,
        step: int = 1,
    ) -> BatchTargets:
        return BatchTargets(multi_labels_BC=self._labels_NC[list(positions)])


class MultiLabelEvaluation:
    """Mean average precision of a split, from the scores of all its images.

    ``map`` is the mean of ``average_precision`` over the classes that have a positive image,
    ``map_11point`` that of VOC2007's; both are percent. ``cross_entropy`` is the mean over the
    labels that are not ignored, in nats.
    """

    def __init__(self, num_classes: int) -> None:
        self._scores_BC = [torch.empty(0, num_classes)]
        self._labels_BC = [torch.empty(0, num_classes, dtype=torch.int8)]

    def add(self, logits_BC: Tensor, labels_BC: Tensor) -> None:
        """Add a batch: logits, and labels of 1 (present), 0 (ignored) and -1 (absent)."""
        self._scores_BC.append(logits_BC.float().cpu())
        self._labels_BC.append(labels_BC.to(torch.int8).cpu())

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return the scores, float32 N x C, and labels, int8 N x C, of all images so far."""
        return torch.cat(self._scores_BC), torch.cat(self._labels_BC)

    def load_rows(self, scores_NC: Tensor, labels_NC: Tensor) -> None:
        """Replace the rows, by those of several parts of a split."""
        self._scores_BC, self._labels_BC = [scores_NC], [labels_NC]

    @property
    def num_images(self) -> int:
        """The number of images."""
        return sum(map(len, self._scores_BC))

    def per_class(self) -> list[dict[str, float | int | None]]:
        """Return for each class: images with it, those ignored, both average precisions (0 to 1).

        They are None for a class without a positive image.
        """
        scores_NC, labels_NC = self.rows()
        found: list[dict[str, float | int | None]] = []
        for scores_N, labels_N in zip(scores_NC.T, labels_NC.T, strict=True):
            found.append(
                {
                    "present": int((labels_N == PRESENT).sum()),
                    "ignored": int((labels_N == IGNORED).sum()),
                    "ap": average_precision(scores_N, labels_N),
                    "ap_11point": average_precision_11_points(scores_N, labels_N),
                }
            )
        return found

    def summary(self) -> dict[str, float | int]:
        """Return the metrics by name."""
        scores_NC, labels_NC = self.rows()
        loss = multi_label_loss(scores_NC.double(), labels_NC) * labels_NC.numel()
        num_known = max(1, int((labels_NC != IGNORED).sum()))
        classes = self.per_class()
        return {
            "num_images": self.num_images,
            "map": _mean_percent([row["ap"] for row in classes]),
            "map_11point": _mean_percent([row["ap_11point"] for row in classes]),
            "cross_entropy": float(loss) / num_known,
        }


def _mean_percent(values: Sequence[float | int | None]) -> float:
    known = [value for value in values if value is not None]
    return 100.0 * sum(known) / max(1, len(known))


def labels_of(source: ImageSource, labels: Sequence[Sequence[int]]) -> Tensor:
    """Return the multi-labels of a source as int8 N x C; raises ConfigError for other labels."""
    found = torch.tensor(labels, dtype=torch.int64)
    if found.shape != (len(source), len(source.classes)):
        raise ConfigError(
            f"{source.name} has multi_labels of {tuple(found.shape)}, not of {len(source)} images "
            f"and {len(source.classes)} classes"
        )
    if not bool(found.abs().le(PRESENT).all()):
        raise ConfigError(
            f"{source.name} has multi_labels other than {PRESENT}, {IGNORED} and {ABSENT}"
        )
    return found.to(torch.int8)
