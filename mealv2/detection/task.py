"""Detection as a task of the one training loop: objects as targets, RetinaNet's losses."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mealv2.data.coco import CocoSource
from mealv2.detection.views import WholeView, WholeViews
from mealv2.models.detector import Detector
from mealv2.models.ensemble import ONE_SIZE, BySize
from mealv2.objects import ImageObjects
from mealv2.targets import BatchTargets, Targets
from mealv2.task import Mixture, Task, TaskResult


class ObjectTargets(Targets):
    """The objects of the images of a source, on the view of each epoch: epoch e uses view e."""

    def __init__(self, source: CocoSource, views: WholeViews) -> None:
        self._source = source
        self._views = views

    def view(self, key: str, epoch: int) -> int:
        return epoch

    def batch(
        self,
        positions: Sequence[int],
        views: Sequence[int],
        images_BCHW: Tensor,
        by_size: BySize = ONE_SIZE,
        *,
        step: int = 1,
    ) -> BatchTargets:
        pairs = zip(positions, views, strict=True)
        return BatchTargets(objects=tuple(self._objects(*pair) for pair in pairs))

    def _objects(self, position: int, index: int) -> ImageObjects:
        image = self._source.images[position]
        key, width, height = self._source.keys[position], image.width, image.height
        view = self._views.view(key, index, width=width, height=height)
        found = torch.tensor(image.objects, dtype=torch.float64).reshape(-1, 5)
        boxes_N4 = on_view(found[:, :4], view, width=width, height=height).float()
        return ImageObjects((view.height, view.width), boxes_N4, found[:, 4].long())


def on_view(boxes_N4: Tensor, view: WholeView, *, width: int, height: int) -> Tensor:
    """Return boxes, left, top, right, bottom, of an image of ``width`` x ``height`` on a view."""
    x, y = view.width / width, view.height / height
    boxes_N4 = boxes_N4 * torch.tensor([x, y, x, y], dtype=boxes_N4.dtype)
    if view.is_flipped:
        left_N, top_N, right_N, bottom_N = boxes_N4.unbind(1)
        boxes_N4 = torch.stack((view.width - right_N, top_N, view.width - left_N, bottom_N), 1)
    return boxes_N4


class DetectionTask(Task):
    """RetinaNet's losses, by torchvision: focal loss plus L1 loss of the boxes.

    Each is a sum over the anchors of an image, divided by its anchors with an object (or 1), and
    the mean over the images. So micro-batches add up to the gradient of the whole batch.
    """

    student: Detector

    def __init__(self, student: Detector) -> None:
        super().__init__(student)

    def forward(
        self, images_BCHW: Tensor, targets: BatchTargets, mixture: Mixture | None = None
    ) -> TaskResult:
        """Return the loss of a batch; ``output`` is the loss too: the logits stay inside."""
        sizes = [found.size for found in targets.objects]
        objects = [{"boxes": f.boxes_N4, "labels": f.classes_N} for f in targets.objects]
        losses = self.student(images_BCHW, sizes, objects)
        classes, boxes = losses["classification"], losses["bbox_regression"]
        loss = classes + boxes
        parts = {"classification_loss": classes.detach(), "box_loss": boxes.detach()}
        return TaskResult(loss=loss, output=loss, parts=parts)
