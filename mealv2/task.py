"""What one training step computes: (images, targets) -> loss, output, parts.

The dict follows timm.task's contract by shape: ``loss`` to call backward on, ``output`` the
student's logits; ``parts`` are detached scalars for the log.
"""

import math
from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mealv2.discriminator import Discriminator
from mealv2.losses import discriminator_loss, similarity_loss
from mealv2.soft_labels import SoftLabels, through_top_k

# The smallest float16 above 0: a label cannot say less, so the discriminator is told no more, of
# either side.
MIN_LOG_PROBABILITY = math.log(2.0**-24)


class Result(TypedDict):
    """A step's outcome; ``parts`` by name: the loss terms and what else is worth a log line."""

    loss: Tensor
    output: Tensor
    parts: dict[str, Tensor]


class DistillTask(nn.Module):
    """Similarity loss plus weighted discriminator loss, no hard labels (paper section 5).

    The discriminator sees log-probabilities, the student's through the same top-k, tail and floor
    as the stored labels, so that it cannot win by recognising the compression (docs/adr/0004).
    """

    def __init__(
        self,
        student: nn.Module,
        discriminator: Discriminator | None = None,
        *,
        discriminator_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.student = student
        self.discriminator = discriminator
        self.discriminator_weight = discriminator_weight

    def forward(self, images_BCHW: Tensor, labels: SoftLabels) -> Result:
        logits_BC = self.student(images_BCHW).float()
        probs_BC = labels.dense()
        similarity = similarity_loss(logits_BC, probs_BC)
        parts = {"similarity_loss": similarity.detach()}
        loss = similarity
        if self.discriminator is not None:
            student_BC = through_top_k(logits_BC, labels.indices_NK).clamp_min(MIN_LOG_PROBABILITY)
            teacher_BC = probs_BC.log().clamp_min(MIN_LOG_PROBABILITY)
            # full precision: under autocast the loss's plateaus would blur
            with torch.autocast(logits_BC.device.type, enabled=False):
                adversary, accuracy = discriminator_loss(self.discriminator, student_BC, teacher_BC)
            loss = similarity + self.discriminator_weight * adversary
            parts["discriminator_loss"] = adversary.detach()
            parts["discriminator_accuracy"] = accuracy
        return Result(loss=loss, output=logits_BC, parts=parts)


class HardLabelTask(nn.Module):
    """Cross-entropy on the data set's own labels: pre-training, own teachers, the control."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, images_BCHW: Tensor, labels_B: Tensor) -> Result:
        logits_BC = self.student(images_BCHW).float()
        loss = F.cross_entropy(logits_BC, labels_B)
        return Result(loss=loss, output=logits_BC, parts={"cross_entropy": loss.detach()})
