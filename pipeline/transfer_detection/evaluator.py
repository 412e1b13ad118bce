"""Validate a detector on a split: COCO's average precisions, over all ranks."""

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mealv2.data.coco import CocoSource
from mealv2.data.loader import on_device
from mealv2.data.requests import CENTRE, Batch, check_failures
from mealv2.detection.coco_metrics import Detection, average_precisions
from mealv2.detection.reader import WholeImageReader
from mealv2.detection.views import WholeViews
from mealv2.errors import DataError
from mealv2.models.detector import Detector
from pipeline import console
from pipeline.config import TransferDetectionConfig
from pipeline.runtime.device import Runtime
from pipeline.runtime.signals import StopFlag, StopRequested
from pipeline.training.evaluator import local_centre_requests


class DetectionEvaluator:
    """Evaluates detectors on one split, whole images resized as in training but not flipped."""

    def __init__(
        self,
        source: CocoSource,
        views: WholeViews,
        config: TransferDetectionConfig,
        runtime: Runtime,
    ) -> None:
        self.source = source
        self._views = views
        self._runtime = runtime
        self._policy = config.on_bad_image
        self._requests = local_centre_requests(source, config.batch_size, runtime.ranks)
        self._reader = WholeImageReader(
            source, views, workers=config.workers, pin_memory=runtime.should_pin_memory
        )

    def summary(
        self, model: Any, *, num_classes: int, stop: StopFlag | None = None
    ) -> dict[str, float | int]:
        """Return the metrics of a detector by name, the same on all ranks.

        Raises DataError for a bad image, boxes or scores that are not finite, and StopRequested on
        all ranks when a ``stop`` is set.
        """
        found, image_ids = self._detect(model, stop)
        ranks = self._runtime.ranks
        if ranks.is_distributed:
            parts = [json.loads(t) for t in ranks.all_gather_text(json.dumps([found, image_ids]))]
            found = [tuple(row) for rows, _ in parts for row in rows]
            image_ids = [image_id for _, ids in parts for image_id in ids]
        if not image_ids:
            raise DataError(f"no image of {self.source.name} could be read")
        measured = average_precisions(self.source.annotations, found, image_ids)
        return {"num_images": len(image_ids), **measured}

    def _detect(self, model: Detector, stop: StopFlag | None) -> tuple[list[Detection], list[int]]:
        """Return the detections on this rank's images, and the ids of those that were read."""
        found: list[Detection] = []
        image_ids: list[int] = []
        was_training = model.training
        model.eval()
        shown = console.progress(
            self._reader.batches(self._requests),
            total=sum(map(len, self._requests)),
            what="validating",
            unit="images",
            size=lambda batch: len(batch.positions) + len(batch.failed),
        )
        for batch in on_device(shown, self._runtime.device):
            check_failures(self.source, batch.failed, self._policy)
            if stop is not None:
                _, stopped_by = self._runtime.ranks.sync_step(0, stop.signal_name)
                if stopped_by is not None:
                    raise StopRequested(stopped_by)
            if batch.positions:
                found += self._detections(model, batch)
                image_ids += [self.source.images[p].image_id for p in batch.positions]
        model.train(was_training)
        return found, image_ids

    @torch.no_grad()
    def _detections(self, model: Detector, batch: Batch) -> Iterator[Detection]:
        """Return the detections of a batch, boxes in pixels of the original images."""
        sizes = [self._resized(position) for position in batch.positions]
        with self._runtime.autocast():
            outputs = model(batch.images_BCHW, sizes)
        rows: list[Detection] = []
        for position, (height, width), output in zip(batch.positions, sizes, outputs, strict=True):
            image = self.source.images[position]
            scale = torch.tensor([image.width / width, image.height / height] * 2)
            boxes_N4 = output["boxes"].float().cpu() * scale
            scores_N = output["scores"].float().cpu()
            self._require_finite(boxes_N4, scores_N)
            columns = (boxes_N4.tolist(), output["labels"].tolist(), scores_N.tolist())
            for (left, top, right, bottom), class_id, score in zip(*columns, strict=True):
                category = self.source.category_ids[class_id]
                box = (left, top, right - left, bottom - top)
                rows.append((image.image_id, category, *box, score))
        return iter(rows)

    def _resized(self, position: int) -> tuple[int, int]:
        """Return height and width of an image as the detector gets it."""
        image, key = self.source.images[position], self.source.keys[position]
        view = self._views.view(key, CENTRE, width=image.width, height=image.height)
        return view.height, view.width

    def _require_finite(self, *tensors: Tensor) -> None:
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
            raise DataError(
                f"the detections on {self.source.name} are not finite; lower --lr, or leave out "
                "--amp"
            )
