"""What a step computes: (images, targets) -> loss, output, parts.

The dict follows timm.task's contract by shape: ``loss`` to call backward on, ``output`` the
student's logits; ``parts`` are detached scalars for the log, complete after backward.
"""

import math
from collections.abc import Callable
from typing import Literal, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mealv2.losses import discriminator_loss, similarity_loss
from mealv2.models.discriminator import Discriminator, num_dead_outputs, redraw_dead_outputs
from mealv2.soft_labels import EncodedLabels, Labels, compress_log_probs, compress_logits, tempered
from mealv2.targets import BatchTargets

# The smallest float16 above 0: a stored label has no smaller probability, so the discriminator
# sees none of either side.
MIN_LOG_PROBABILITY = math.log(2.0**-24)

DiscriminatorInput = Literal["logits", "log-probs", "probs"]

GRADIENT_RATIO = "discriminator_gradient_ratio"


class TaskResult(TypedDict):
    """A step's outcome; ``parts`` by name: the loss terms and what else is worth a log line."""

    loss: Tensor
    output: Tensor
    parts: dict[str, Tensor]


class Mixture(TypedDict):
    """The second targets of mixed images, and the weight of the first."""

    partner: BatchTargets
    lam: float


# The rows of a whole batch, from those of each rank.
GatherRows = Callable[[Tensor], Tensor]


def _identity(rows_BC: Tensor) -> Tensor:
    return rows_BC


class Task(nn.Module):
    """What the training loop asks of a task: a call returns a TaskResult.

    ``compiled_student`` is what to call in the student's place, such as a compiled form of it.
    """

    student: nn.Module
    compiled_student: Callable[[Tensor], Tensor] | None = None

    def logits(self, images_BCHW: Tensor) -> Tensor:
        """Return the student's logits, float32."""
        call = self.student if self.compiled_student is None else self.compiled_student
        logits_BC: Tensor = call(images_BCHW)
        return logits_BC.float()

    def prepare(
        self,
        images_BCHW: Tensor | None,
        targets: BatchTargets | None,
        *,
        gather_rows: GatherRows = _identity,
    ) -> str | None:
        """Look at the first batch before the first step; return a warning if there is one.

        ``gather_rows`` gathers the rows of all ranks; this rank may have none (None).
        """
        return None


class DistillTask(Task):
    """Similarity loss plus weighted discriminator loss, no hard labels (paper section 5).

    What the discriminator is shown, ``discriminator_input``: ``logits``, the student's and the
    teachers' mean logits (official train.py), through the same loss where a label set kept them;
    ``log-probs``, the student's through the same choice of classes, tail and floor as the stored
    labels, so that it cannot win by recognising the compression (docs/adr/0004); ``probs``, softmax
    against the recovered label (official FKD_train.py). None: logits where the targets have the
    teachers', else log-probs.

    Off in the paper: ``label_temperature`` T takes labels to q^(1/T), renormalised, in the
    similarity loss; ``hard_label_weight`` w makes that (1 - w) similarity + w cross-entropy to the
    class ids.
    """

    def __init__(
        self,
        student: nn.Module,
        discriminator: Discriminator | None = None,
        *,
        discriminator_weight: float = 1.0,
        discriminator_input: DiscriminatorInput | None = None,
        label_temperature: float = 1.0,
        hard_label_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.student = student
        self.discriminator = discriminator
        self.discriminator_weight = discriminator_weight
        self.discriminator_input = discriminator_input
        self.label_temperature = label_temperature
        self.hard_label_weight = hard_label_weight

    def forward(
        self, images_BCHW: Tensor, targets: BatchTargets, mixture: Mixture | None = None
    ) -> TaskResult:
        """Return the loss of a batch; with ``mixture`` that of two targets, weighted by area."""
        logits_BC = self.logits(images_BCHW)
        # two views of the logits, so that each side's gradient can be measured on its way back
        for_labels_BC, for_discriminator_BC = (
            logits_BC.view_as(logits_BC),
            logits_BC.view_as(logits_BC),
        )
        terms = self._loss_terms(for_labels_BC, for_discriminator_BC, targets)
        if mixture is not None:
            # L = l L(q) + (1 - l) L(q of the partner)   (official FKD_train.py)
            lam = mixture["lam"]
            others = self._loss_terms(for_labels_BC, for_discriminator_BC, mixture["partner"])
            terms = {name: lam * term + (1.0 - lam) * others[name] for name, term in terms.items()}
        loss = (1.0 - self.hard_label_weight) * terms["similarity_loss"]
        if self.hard_label_weight:
            loss = loss + self.hard_label_weight * terms["hard_label_loss"]
        parts = {name: term.detach() for name, term in terms.items()}
        if self.discriminator is not None:
            loss = loss + self.discriminator_weight * terms["discriminator_loss"]
            _record_gradient_ratio(parts, for_labels_BC, for_discriminator_BC)
        return TaskResult(loss=loss, output=logits_BC, parts=parts)

    @torch.no_grad()
    def prepare(
        self,
        images_BCHW: Tensor | None,
        targets: BatchTargets | None,
        *,
        gather_rows: GatherRows = _identity,
    ) -> str | None:
        """Redraw a discriminator with outputs that are dead on this batch; return what was done.

        The official variant keeps them, as the code does. The student is only looked at.
        """
        if self.discriminator is None:
            return None
        own_BC = next(self.discriminator.parameters()).new_zeros(0, self.discriminator.num_classes)
        # full precision, as in the step; and autocast may keep weights that it casts without
        # gradient for the step that follows
        with torch.autocast(own_BC.device.type, enabled=False):
            if images_BCHW is not None and targets is not None:
                own_BC = self._eval_discriminator_inputs(images_BCHW, targets)
            return _redraw_or_report(self.discriminator, gather_rows(own_BC))

    def _eval_discriminator_inputs(self, images_BCHW: Tensor, targets: BatchTargets) -> Tensor:
        """Return what the discriminator would be shown of a batch, 2B x C."""
        was_training = self.student.training
        self.student.eval()
        logits_BC = self.student(images_BCHW).float()
        self.student.train(was_training)
        return torch.cat(self._discriminator_inputs(logits_BC, targets))

    def _loss_terms(
        self, for_labels_BC: Tensor, for_discriminator_BC: Tensor, targets: BatchTargets
    ) -> dict[str, Tensor]:
        """Return the terms of the loss for some targets, and the discriminator's accuracy."""
        soft_labels = _soft_labels(targets)
        labels: Tensor | EncodedLabels
        if isinstance(soft_labels, EncodedLabels) and self.label_temperature == 1.0:
            labels = soft_labels  # never expanded
        else:
            labels = tempered(soft_labels.to_dense(), self.label_temperature)
        terms = {"similarity_loss": similarity_loss(for_labels_BC, labels)}
        if self.hard_label_weight:
            assert targets.classes_B is not None, "a hard-label weight needs class ids"
            terms["hard_label_loss"] = F.cross_entropy(for_labels_BC, targets.classes_B)
        if self.discriminator is not None:
            # full precision: under autocast the loss's plateaus would blur
            with torch.autocast(for_labels_BC.device.type, enabled=False):
                rows = self._discriminator_inputs(for_discriminator_BC, targets)
                adversary, accuracy = discriminator_loss(self.discriminator, *rows)
            terms |= {"discriminator_loss": adversary, "discriminator_accuracy": accuracy}
        return terms

    def _discriminator_inputs(
        self, logits_BC: Tensor, targets: BatchTargets
    ) -> tuple[Tensor, Tensor]:
        """Return what the discriminator is shown, B x C each: the student's and the teachers'."""
        shown = self.discriminator_input
        soft_labels = _soft_labels(targets)
        if shown == "probs":
            return torch.softmax(logits_BC, dim=1), soft_labels.to_dense()
        if shown != "log-probs" and targets.mean_logits_BC is not None:
            return logits_BC, targets.mean_logits_BC
        kept = soft_labels.kept()
        if shown != "log-probs" and targets.kept_logits is not None:
            teacher_BC = targets.kept_logits.to_dense(kept, soft_labels.num_classes)
            return compress_logits(logits_BC, kept), teacher_BC
        assert shown != "logits", "the targets have no logits to show"
        return (
            compress_log_probs(logits_BC, kept).clamp_min(MIN_LOG_PROBABILITY),
            soft_labels.to_dense().log().clamp_min(MIN_LOG_PROBABILITY),
        )


class HardLabelTask(Task):
    """Cross-entropy on the data set's own labels: pre-training, own teachers, the control."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, images_BCHW: Tensor, targets: BatchTargets) -> TaskResult:
        assert targets.classes_B is not None, "this task needs class ids"
        logits_BC = self.logits(images_BCHW)
        loss = F.cross_entropy(logits_BC, targets.classes_B)
        return TaskResult(loss=loss, output=logits_BC, parts={"cross_entropy": loss.detach()})


def _redraw_or_report(discriminator: Discriminator, rows_BC: Tensor) -> str | None:
    dead = num_dead_outputs(discriminator, rows_BC)
    if not dead:
        return None
    what = f"{dead} of the discriminator's outputs react to nothing (dead at initialisation)"
    if discriminator.variant == "official":
        return f"{what}; kept, as the official code does"
    return f"{what}; redrawn {redraw_dead_outputs(discriminator, rows_BC)} times"


def _soft_labels(targets: BatchTargets) -> Labels:
    assert targets.soft_labels is not None, "distillation needs soft labels"
    return targets.soft_labels


def _record_gradient_ratio(
    parts: dict[str, Tensor], for_labels_BC: Tensor, for_discriminator_BC: Tensor
) -> None:
    """Add to ``parts``, during backward: |gradient from the discriminator| / |from the labels|.

    Of the loss terms as they are weighted in the loss, on the student's logits; stays on the
    device.
    """
    norms: dict[str, Tensor] = {}

    def record(side: str, grad_BC: Tensor) -> None:
        norms[side] = grad_BC.norm()
        if len(norms) == 2:
            parts[GRADIENT_RATIO] = norms["discriminator"] / norms["labels"].clamp_min(1e-30)

    if for_labels_BC.requires_grad:
        for_labels_BC.register_hook(  # type: ignore[no-untyped-call]
            lambda grad: record("labels", grad)
        )
        for_discriminator_BC.register_hook(  # type: ignore[no-untyped-call]
            lambda grad: record("discriminator", grad)
        )
