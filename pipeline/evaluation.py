"""Validate a classifier on a split: centre crops, accuracy, faithfulness to stored labels."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from mealv2.errors import DataError
from mealv2.images import ImageSource
from mealv2.metrics import Evaluation
from mealv2.pixels import Resize
from mealv2.soft_labels import Labels
from pipeline import logs
from pipeline.config import EvaluateConfig, TrainConfig
from pipeline.loaders import (
    CENTRE,
    Request,
    ViewReader,
    centre_requests,
    read_views,
    refuse_failures,
)
from pipeline.prefetch import on_device
from pipeline.ranks import Ranks, pieces
from pipeline.runtime import Runtime, StopFlag, StopRequested


def centre_shares(source: ImageSource, batch_size: int, ranks: Ranks) -> list[Request]:
    """Return requests for the centre crops of all images; of several ranks, for this one's.

    Each takes neighbours, which lie in few files, in as many requests as the others: some may be
    empty.
    """
    positions = ranks.share(range(len(source)), [1] * len(source))
    if not ranks.are_several:
        return centre_requests(positions, batch_size)
    cuts = pieces([1] * len(positions), -(-len(source) // batch_size))
    return [[(p, (CENTRE,)) for p in positions[cut.start : cut.stop]] for cut in cuts]


class LabelTable(Protocol):
    """Labels of validation images by key, such as the val role of a label set."""

    def __contains__(self, key: object) -> bool: ...

    def soft_labels(self, keys: Sequence[str], views: Sequence[int]) -> Labels:
        """Return the labels of images."""


class Evaluator:
    """Evaluates models on one split, again and again.

    With ``labels`` also against the ensemble; images that have none are left out.
    """

    def __init__(
        self,
        source: ImageSource,
        machine: Runtime,
        config: TrainConfig | EvaluateConfig,
        *,
        img_size: int,
        resize: Resize,
        labels: LabelTable | None = None,
    ) -> None:
        self.source = source
        self.labels = labels
        self._machine = machine
        self._policy = config.on_bad_image
        self._requests = [
            [(p, view) for p, view in request if labels is None or source.keys[p] in labels]
            for request in centre_shares(source, config.batch_size, machine.ranks)
        ]
        self._loader = read_views(
            ViewReader(source, img_size=img_size, resize=resize),
            self._requests,
            workers=config.workers,
            pin_memory=machine.pins,
        )

    @torch.no_grad()
    def __call__(
        self, model: nn.Module, *, num_classes: int, stop: StopFlag | None = None
    ) -> Evaluation:
        """Return the figures of a model; raises DataError for a bad image or logits not finite.

        Ranks look at a share each and know the figures of all. Raises StopRequested, on all of
        them, when a ``stop`` is set.
        """
        figures, ranks = Evaluation(num_classes), self._machine.ranks
        was_training = model.training
        model.eval()
        shown = logs.progress(
            self._loader,
            total=sum(map(len, self._requests)),
            what="validating",
            unit="images",
            size=lambda pixels: len(pixels.positions) + len(pixels.failed),
        )
        for pixels in on_device(shown, self._machine.device):
            refuse_failures(self.source, pixels.failed, self._policy)
            if stop is not None:
                _, stopped_by = ranks.agree(0, stop.signal_name)
                if stopped_by is not None:
                    raise StopRequested(stopped_by)
            if not pixels.positions:
                continue
            with self._machine.autocast():
                logits = model(pixels.images_BCHW).float()
            logits = logits.cpu()  # the one wait of a batch
            if not bool(torch.isfinite(logits).all()):
                raise DataError("the model's logits are not finite; lower --lr, or leave out --amp")
            truth = torch.tensor([self.source.labels[p] for p in pixels.positions])
            figures.add(logits, truth, self._soft(pixels.positions))
        model.train(was_training)
        if ranks.are_several:
            figures.take(ranks.total(figures.sums()))
        if not figures.num_images:
            raise DataError(f"no image of {self.source.name} could be read")
        return figures

    def _soft(self, positions: list[int]) -> Labels | None:
        if self.labels is None:
            return None
        return self.labels.soft_labels(
            [self.source.keys[p] for p in positions], [0] * len(positions)
        )
