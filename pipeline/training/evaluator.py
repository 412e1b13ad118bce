"""Validate a classifier on a split: centre crops, accuracy, faithfulness to stored labels."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from mealv2.batches import split_evenly
from mealv2.data.content_hash import ImageCheck
from mealv2.data.loader import on_device, read_views
from mealv2.data.pixels import Resize
from mealv2.data.requests import CENTRE, Batch, BatchRequest, centre_requests, check_failures
from mealv2.data.source import ImageSource
from mealv2.data.view_reader import ViewReader
from mealv2.errors import DataError
from mealv2.metrics import Evaluation, Predictions
from mealv2.soft_labels import Labels
from pipeline import console
from pipeline.config import EvaluateConfig, TrainConfig
from pipeline.loading.cache import image_cache
from pipeline.runtime.device import Runtime
from pipeline.runtime.distributed import Ranks
from pipeline.runtime.signals import StopFlag, StopRequested


def local_centre_requests(source: ImageSource, batch_size: int, ranks: Ranks) -> list[BatchRequest]:
    """Return requests for the centre crops of this rank's images: all, where there is one rank.

    Each rank takes neighbours, which lie in few files, in as many requests as the others: some may
    be empty.
    """
    positions = split_evenly([1] * len(source), ranks.size)[ranks.rank]
    if not ranks.is_distributed:
        return centre_requests(positions, batch_size)
    cuts = split_evenly([1] * len(positions), -(-len(source) // batch_size))
    return [[(p, (CENTRE,)) for p in positions[cut.start : cut.stop]] for cut in cuts]


def finite_logits(model: nn.Module, batch: Batch, runtime: Runtime, *, advice: str) -> torch.Tensor:
    """Return a model's logits of a batch, float32 on the CPU; raises DataError, with ``advice``,
    where one is not finite.
    """
    with runtime.autocast():
        logits: torch.Tensor = model(batch.images_BCHW).float()
    logits = logits.cpu()  # the only wait for the device
    if not bool(torch.isfinite(logits).all()):
        raise DataError(f"the model's logits are not finite; {advice}")
    return logits


class LabelTable(Protocol):
    """Labels of validation images by key, such as the val split of a label set."""

    def __contains__(self, key: object) -> bool: ...

    def soft_labels(self, keys: Sequence[str], views: Sequence[int]) -> Labels:
        """Return the labels of images."""


class Evaluator:
    """Evaluates models on one split.

    With ``labels`` also against the ensemble; images without labels are left out. ``check``
    compares the images with the labelled ones.
    """

    def __init__(
        self,
        source: ImageSource,
        runtime: Runtime,
        config: TrainConfig | EvaluateConfig,
        *,
        img_size: int,
        resize: Resize,
        labels: LabelTable | None = None,
        check: ImageCheck | None = None,
    ) -> None:
        self.source = source
        self.labels = labels
        self._runtime = runtime
        self._policy = config.on_bad_image
        self._requests = [
            [(p, view) for p, view in request if labels is None or source.keys[p] in labels]
            for request in local_centre_requests(source, config.batch_size, runtime.ranks)
        ]
        # evaluate reads each image once
        cache = image_cache(config, source) if isinstance(config, TrainConfig) else None
        self._loader = read_views(
            ViewReader(source, img_size=img_size, resize=resize, check=check, cache=cache),
            self._requests,
            workers=config.workers,
            pin_memory=runtime.should_pin_memory,
        )

    @torch.no_grad()
    def __call__(
        self,
        model: nn.Module,
        *,
        num_classes: int,
        stop: StopFlag | None = None,
        predictions: Predictions | None = None,
    ) -> Evaluation:
        """Return the metrics of a model; raises DataError for a bad image or logits not finite.

        Each rank evaluates its own images and returns the metrics of all; ``predictions`` get only
        its own. Raises StopRequested, on all ranks, when a ``stop`` is set.
        """
        metrics, ranks = Evaluation(num_classes), self._runtime.ranks
        was_training = model.training
        model.eval()
        shown = console.progress(
            self._loader,
            total=sum(map(len, self._requests)),
            what="validating",
            unit="images",
            size=lambda batch: len(batch.positions) + len(batch.failed),
        )
        for batch in on_device(shown, self._runtime.device):
            check_failures(self.source, batch.failed, self._policy)
            if stop is not None:
                _, stopped_by = ranks.sync_step(0, stop.signal_name)
                if stopped_by is not None:
                    raise StopRequested(stopped_by)
            if not batch.positions:
                continue
            logits = finite_logits(
                model, batch, self._runtime, advice="lower --lr, or leave out --amp"
            )
            truth = torch.tensor([self.source.labels[p] for p in batch.positions])
            metrics.add(logits, truth, self._soft_labels(batch.positions))
            if predictions is not None:
                predictions.add(logits, truth)
        model.train(was_training)
        if ranks.is_distributed:
            metrics.load_sums(ranks.all_reduce(metrics.sums()))
        if not metrics.num_images:
            raise DataError(f"no image of {self.source.name} could be read")
        return metrics

    def _soft_labels(self, positions: list[int]) -> Labels | None:
        if self.labels is None:
            return None
        return self.labels.soft_labels(
            [self.source.keys[p] for p in positions], [0] * len(positions)
        )
