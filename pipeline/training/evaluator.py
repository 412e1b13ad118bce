"""Validate a classifier on a split: centre crops, accuracy, faithfulness to stored labels."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from mealv2.batches import split_evenly
from mealv2.data.content_hash import ImageCheck
from mealv2.data.loader import on_device, read_views
from mealv2.data.pixels import Resize
from mealv2.data.requests import CENTRE, Batch, BatchRequest, centre_requests, check_failures
from mealv2.data.source import ImageSource, multi_labels_of
from mealv2.data.view_reader import ViewReader
from mealv2.errors import DataError
from mealv2.metrics import Evaluation, Predictions
from mealv2.multi_label import MultiLabelEvaluation, labels_of
from mealv2.soft_labels import Labels
from pipeline import console
from pipeline.config import EvaluateConfig, TrainConfig
from pipeline.loading.cache import image_cache
from pipeline.runtime.device import Runtime
from pipeline.runtime.distributed import Ranks
from pipeline.runtime.signals import StopFlag, StopRequested
from pipeline.training.features import FeatureTable


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


class Validation(Protocol):
    """Measures a model on the images of a source; all ranks call it together."""

    @property
    def source(self) -> ImageSource:
        """The images."""

    def summary(
        self, model: Any, *, num_classes: int, stop: StopFlag | None = None
    ) -> dict[str, float | int]:
        """Return the metrics of a model by name, the same on all ranks."""


class Evaluator:
    """Evaluates models on one split.

    With ``labels`` also against the ensemble; images without labels are left out. ``check``
    compares the images with the labelled ones. With ``features``, those of the centre crops, no
    image is read: the models are ``FrozenClassifier`` with the backbone that made them.
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
        features: FeatureTable | None = None,
    ) -> None:
        self.source = source
        self.labels = labels
        self._runtime = runtime
        self._policy = config.on_bad_image
        self._requests = [
            [(p, view) for p, view in request if labels is None or source.keys[p] in labels]
            for request in local_centre_requests(source, config.batch_size, runtime.ranks)
        ]
        self._features = features
        # evaluate reads each image once
        cache = image_cache(config, source) if isinstance(config, TrainConfig) else None
        self._loader: Iterable[Batch] = read_views(
            ViewReader(source, img_size=img_size, resize=resize, check=check, cache=cache),
            self._requests,
            workers=config.workers,
            pin_memory=runtime.should_pin_memory,
        )

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
        for positions, logits_BC in self.logits(model, stop):
            truth = torch.tensor([self.source.labels[p] for p in positions])
            metrics.add(logits_BC, truth, self._soft_labels(positions))
            if predictions is not None:
                predictions.add(logits_BC, truth)
        if ranks.is_distributed:
            metrics.load_sums(ranks.all_reduce(metrics.sums()))
        self.require_images(metrics.num_images)
        return metrics

    def summary(
        self, model: nn.Module, *, num_classes: int, stop: StopFlag | None = None
    ) -> dict[str, float | int]:
        """Return the metrics of a model by name; raises as a call."""
        return self(model, num_classes=num_classes, stop=stop).summary()

    def logits(
        self, model: nn.Module, stop: StopFlag | None
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Yield positions of images of this rank, and their logits, float32 on the CPU.

        The model is in eval mode meanwhile. Raises as a call.
        """
        ranks = self._runtime.ranks
        was_training = model.training
        model.eval()
        batches = self._loader
        if self._features is not None:
            batches = self._features.batches(self._requests)
        shown = console.progress(
            batches,
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
            if batch.positions:
                with torch.no_grad():
                    logits_BC = finite_logits(
                        model, batch, self._runtime, advice="lower --lr, or leave out --amp"
                    )
                yield batch.positions, logits_BC
        model.train(was_training)

    def require_images(self, num_images: int) -> None:
        """Raise DataError if no image could be read."""
        if not num_images:
            raise DataError(f"no image of {self.source.name} could be read")

    def _soft_labels(self, positions: list[int]) -> Labels | None:
        if self.labels is None:
            return None
        return self.labels.soft_labels(
            [self.source.keys[p] for p in positions], [0] * len(positions)
        )


class MultiLabelEvaluator(Evaluator):
    """Evaluates models on a split whose images have several classes: mean average precision."""

    def __init__(
        self,
        source: ImageSource,
        runtime: Runtime,
        config: TrainConfig | EvaluateConfig,
        **settings: Any,
    ) -> None:
        super().__init__(source, runtime, config, **settings)
        self._labels_NC = labels_of(source, multi_labels_of(source) or [])

    def summary(
        self, model: nn.Module, *, num_classes: int, stop: StopFlag | None = None
    ) -> dict[str, float | int]:
        """Return the metrics of a model by name; raises as a call of ``Evaluator``."""
        return self.evaluation(model, num_classes=num_classes, stop=stop).summary()

    def evaluation(
        self, model: nn.Module, *, num_classes: int, stop: StopFlag | None = None
    ) -> MultiLabelEvaluation:
        """Return the metrics of a model, the same on all ranks."""
        found, ranks = MultiLabelEvaluation(num_classes), self._runtime.ranks
        for positions, logits_BC in self.logits(model, stop):
            found.add(logits_BC, self._labels_NC[positions])
        if ranks.is_distributed:
            found.load_rows(*(torch.cat(ranks.all_gather(rows)) for rows in found.rows()))
        self.require_images(found.num_images)
        return found
