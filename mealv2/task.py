"""Tasks of a training step: (images, targets) -> loss, output, parts.

The result follows the contract of timm.task: call backward on ``loss``; ``output`` has the
student's logits; ``parts`` are detached scalars for the log, complete after backward.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mealv2.codec import EncodedLabels
from mealv2.losses import compress_log_probs, compress_logits, discriminator_loss, similarity_loss
from mealv2.models.discriminator import Discriminator, num_dead_outputs, redraw_dead_outputs
from mealv2.soft_labels import Labels, tempered
from mealv2.targets import BatchTargets

# The smallest float16 above 0, the smallest probability that a stored label can have. The inputs of
# the discriminator are clamped to it for both sides.
MIN_LOG_PROBABILITY = math.log(2.0**-24)

DiscriminatorInput = Literal["logits", "log-probs", "probs"]

GRADIENT_RATIO = "discriminator_gradient_ratio"

GatherRows = Callable[[Tensor], Tensor]  # concatenates the rows of all ranks


class TaskResult(TypedDict):
    """The result of a step; ``parts`` has the loss terms and other values for the log, by name."""

    loss: Tensor
    output: Tensor
    parts: dict[str, Tensor]


class Mixture(TypedDict):
    """The second targets of mixed images, and the weight of the first targets."""

    partner: BatchTargets
    lam: float


def _identity(rows_BC: Tensor) -> Tensor:
    return rows_BC


class Task(nn.Module):
    """Base class of tasks; a call returns a TaskResult.

    ``compiled_student`` replaces the student in the forward pass, if it is set.
    """

    compiled_student: Callable[[Tensor], Tensor] | None = None

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def logits(self, images_BCHW: Tensor) -> Tensor:
        """Return the student's logits, float32."""
        student = self.student if self.compiled_student is None else self.compiled_student
        logits_BC: Tensor = student(images_BCHW)
        return logits_BC.float()

    def prepare(
        self,
        images_BCHW: Tensor | None,
        targets: BatchTargets | None,
        *,
        gather_rows: GatherRows = _identity,
    ) -> str | None:
        """Check the first batch before the first step; return a warning, if any.

        A rank without rows passes None for the batch.
        """
        return None


class DistillTask(Task):
    """Similarity loss plus weighted discriminator loss, no hard labels (paper section 5).

    ``discriminator_input`` selects the inputs of the discriminator. ``logits``: the student's and
    the teachers' mean logits (official train.py); if a label set stores the latter, both have the
    same compression. ``log-probs``: the student's go through the same choice of classes, tail and
    floor as the stored labels, so that the discriminator cannot detect the compression
    (docs/adr/0004). ``probs``: softmax against the recovered label (official FKD_train.py). None:
    logits if the targets have the teachers', else log-probs.

    Off in the paper: in the similarity loss, ``label_temperature`` T replaces labels by q^(1/T),
    renormalised, and ``student_temperature`` T divides the student's logits (official FKD
    train_FKD.py, ``--temp``); ``hard_label_weight`` w replaces that loss by (1 - w) similarity + w
    cross-entropy to the class ids.
    """

    def __init__(
        self,
        student: nn.Module,
        discriminator: Discriminator | None = None,
        *,
        discriminator_weight: float = 1.0,
        discriminator_input: DiscriminatorInput | None = None,
        label_temperature: float = 1.0,
        student_temperature: float = 1.0,
        hard_label_weight: float = 0.0,
    ) -> None:
        super().__init__(student)
        self.discriminator = discriminator
        self.discriminator_weight = discriminator_weight
        self.discriminator_input = discriminator_input
        self.label_temperature = label_temperature
        self.student_temperature = student_temperature
        self.hard_label_weight = hard_label_weight

    def forward(
        self, images_BCHW: Tensor, targets: BatchTargets, mixture: Mixture | None = None
    ) -> TaskResult:
        """Return the loss of a batch; ``mixture`` adds a second target, with its weight."""
        logits_BC = self.logits(images_BCHW)
        # two views of the logits: backward measures the gradient of each loss term on its own
        for_labels_BC = logits_BC.view_as(logits_BC)
        for_discriminator_BC = logits_BC.view_as(logits_BC)
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
            record_gradient_ratio(parts, [for_labels_BC], [for_discriminator_BC])
        return TaskResult(loss=loss, output=logits_BC, parts=parts)

    @torch.no_grad()
    def prepare(
        self,
        images_BCHW: Tensor | None,
        targets: BatchTargets | None,
        *,
        gather_rows: GatherRows = _identity,
    ) -> str | None:
        """Redraw a discriminator that has dead outputs on this batch; return a warning, if any.

        The official variant keeps them, as the official code does. The student does not change.
        """
        discriminator = self.discriminator
        if discriminator is None:
            return None
        own_BC = next(discriminator.parameters()).new_zeros(0, discriminator.num_classes)
        # Full precision, as in the step. Autocast would also cache weights cast without gradient
        # for the step that follows.
        with torch.autocast(own_BC.device.type, enabled=False):
            if images_BCHW is not None and targets is not None:
                was_training = self.student.training
                self.student.eval()
                logits_BC = self.student(images_BCHW).float()
                self.student.train(was_training)
                own_BC = torch.cat(self._discriminator_inputs(logits_BC, targets))
            return revive(discriminator, gather_rows(own_BC))

    def _loss_terms(
        self, for_labels_BC: Tensor, for_discriminator_BC: Tensor, targets: BatchTargets
    ) -> dict[str, Tensor]:
        """Return the loss terms for some targets, and the discriminator's accuracy."""
        soft_labels = _soft_labels(targets)
        labels: Tensor | EncodedLabels
        if isinstance(soft_labels, EncodedLabels) and self.label_temperature == 1.0:
            labels = soft_labels  # not expanded to B x C
        else:
            labels = tempered(soft_labels.to_dense(), self.label_temperature)
        scaled_BC = for_labels_BC
        if self.student_temperature != 1.0:
            scaled_BC = for_labels_BC / self.student_temperature
        terms = {"similarity_loss": similarity_loss(scaled_BC, labels)}
        if self.hard_label_weight:
            assert targets.classes_B is not None, "a hard-label weight needs class ids"
            terms["hard_label_loss"] = F.cross_entropy(for_labels_BC, targets.classes_B)
        if self.discriminator is not None:
            # full precision: autocast would blur the plateaus of the loss
            with torch.autocast(for_labels_BC.device.type, enabled=False):
                rows = self._discriminator_inputs(for_discriminator_BC, targets)
                adversary, accuracy = discriminator_loss(self.discriminator, *rows)
            terms |= {"discriminator_loss": adversary, "discriminator_accuracy": accuracy}
        return terms

    def _discriminator_inputs(
        self, logits_BC: Tensor, targets: BatchTargets
    ) -> tuple[Tensor, Tensor]:
        """Return the discriminator's inputs, B x C each: the student's and the teachers'."""
        kind = self.discriminator_input
        soft_labels = _soft_labels(targets)
        if kind == "probs":
            return torch.softmax(logits_BC, dim=1), soft_labels.to_dense()
        if kind != "log-probs" and targets.mean_logits_BC is not None:
            return logits_BC, targets.mean_logits_BC
        kept = soft_labels.kept()
        if kind != "log-probs" and targets.kept_logits is not None:
            teacher_BC = targets.kept_logits.to_dense(kept, soft_labels.num_classes)
            return compress_logits(logits_BC, kept), teacher_BC
        assert kind != "logits", "the targets have no logits"
        return (
            compress_log_probs(logits_BC, kept).clamp_min(MIN_LOG_PROBABILITY),
            soft_labels.to_dense().log().clamp_min(MIN_LOG_PROBABILITY),
        )


class HardLabelTask(Task):
    """Cross-entropy to the class ids of the data set: pre-training, own teachers, baselines.

    ``smoothing`` e replaces a class id y by (1 - e) onehot(y) + e / C, as in timm. A mixture weighs
    the loss of both class ids: timm's soft target l y + (1 - l) y', because the loss is linear.
    """

    def __init__(self, student: nn.Module, *, smoothing: float = 0.0) -> None:
        super().__init__(student)
        self.smoothing = smoothing

    def forward(
        self, images_BCHW: Tensor, targets: BatchTargets, mixture: Mixture | None = None
    ) -> TaskResult:
        logits_BC = self.logits(images_BCHW)
        loss = self._loss(logits_BC, targets)
        if mixture is not None:
            lam = mixture["lam"]
            loss = lam * loss + (1.0 - lam) * self._loss(logits_BC, mixture["partner"])
        return TaskResult(loss=loss, output=logits_BC, parts={"cross_entropy": loss.detach()})

    def _loss(self, logits_BC: Tensor, targets: BatchTargets) -> Tensor:
        assert targets.classes_B is not None, "this task needs class ids"
        return F.cross_entropy(logits_BC, targets.classes_B, label_smoothing=self.smoothing)


def _soft_labels(targets: BatchTargets) -> Labels:
    assert targets.soft_labels is not None, "distillation needs soft labels"
    return targets.soft_labels


def revive(discriminator: Discriminator, rows_BC: Tensor) -> str | None:
    """Redraw a discriminator that has dead outputs on these rows; return a warning, if any.

    The official variant keeps them, as the official code does.
    """
    if not (dead := num_dead_outputs(discriminator, rows_BC)):
        return None
    message = f"{dead} of the discriminator's outputs get no gradient (dead at initialisation)"
    if discriminator.variant == "official":
        return f"{message}; kept, as the official code does"
    return f"{message}; redrawn {redraw_dead_outputs(discriminator, rows_BC)} times"


def record_gradient_ratio(
    parts: dict[str, Tensor], for_labels: Sequence[Tensor], for_discriminator: Sequence[Tensor]
) -> None:
    """Add |gradient of the discriminator term| / |gradient of the label terms| during backward.

    Both are gradients of the weighted terms on the student's outputs, of which each term has a view
    of its own; the ratio stays on the device.
    """
    if not all(output.requires_grad for output in for_labels):
        return
    norms: dict[str, list[Tensor]] = {"labels": [], "discriminator": []}

    def record(term: str, grad_BC: Tensor) -> None:
        norms[term].append(grad_BC.norm())
        if all(len(found) == len(for_labels) for found in norms.values()):
            adversary, labels = (_total(norms[name]) for name in ("discriminator", "labels"))
            parts[GRADIENT_RATIO] = adversary / labels.clamp_min(1e-30)

    for term, outputs in (("labels", for_labels), ("discriminator", for_discriminator)):
        for output in outputs:
            output.register_hook(partial(record, term))  # type: ignore[no-untyped-call]


def _total(norms: Sequence[Tensor]) -> Tensor:
    """Return the norm of all the values of which some have these norms."""
    return norms[0] if len(norms) == 1 else torch.stack(list(norms)).norm()
