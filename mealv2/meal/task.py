"""The task of MEAL: block losses weighted by gamma, a discriminator of each block by eta."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mealv2.label_set import Rows
from mealv2.losses import discriminator_loss
from mealv2.meal.blocks import BlockLayers
from mealv2.meal.losses import BlockLoss, block_loss
from mealv2.meal.stored import stored_logits, stored_loss
from mealv2.models.discriminator import Discriminator, Variant
from mealv2.targets import BatchTargets
from mealv2.task import GatherRows, Mixture, Task, TaskResult, record_gradient_ratio, revive

# Of one teacher: its blocks in the order of the layers, or its stored row, which has logits alone.
OfTeacher = Sequence[Tensor] | Rows

REDUCTION = 2  # MEAL: each layer of a discriminator is half as wide as the one before


def block_discriminators(widths: Sequence[int], variant: Variant = "official") -> nn.ModuleList:
    """Return a discriminator of each compared block, D -> D/2 -> D/4 -> 2.

    ``official`` is that of MEAL's code, with a ReLU after all three layers. The other variants are
    those of ``Discriminator`` with these widths. Raises ValueError for a width below 2.
    """
    return nn.ModuleList(
        Discriminator(d, variant, reduction=REDUCTION, two_outputs=True) for d in widths
    )


class MealTask(Task):
    """Block losses and block discriminators against the teachers of a batch, no hard labels.

    ``gammas`` and ``etas`` weigh the losses and the discriminators' losses of the compared blocks,
    in the order of ``layers``. With the blocks of several teachers the loss is the mean over them.
    """

    def __init__(
        self,
        student: nn.Module,
        layers: BlockLayers,
        discriminators: nn.ModuleList | None = None,
        *,
        loss: BlockLoss = "ce",
        gammas: Sequence[float] = (1.0,),
        etas: Sequence[float] = (1.0,),
    ) -> None:
        super().__init__(student)
        num = len(layers.positions)
        for name, values in (("gammas", gammas), ("etas", etas)):
            if len(values) != num:
                raise ValueError(f"{name} has {len(values)} values for {num} blocks")
        self.layers = layers
        self.discriminators = discriminators
        self.loss: BlockLoss = loss
        self.gammas = tuple(gammas)
        self.etas = tuple(etas)

    def forward(
        self, images_BCHW: Tensor, targets: BatchTargets, mixture: Mixture | None = None
    ) -> TaskResult:
        """Return the loss of a batch; ``mixture`` adds a second target, with its weight."""
        # L = sum_l gamma_l loss(a_l, b_l) + sum_l eta_l BCE(D_l([a_l; b_l]))
        network: Any = self.student if self.compiled_student is None else self.compiled_student
        blocks, logits_BC = self.layers.outputs(network, images_BCHW)
        # two views of each block: backward measures the gradient of each loss term on its own
        for_labels = [block_BD.view_as(block_BD) for block_BD in blocks]
        for_discriminator = [block_BD.view_as(block_BD) for block_BD in blocks]
        terms = self._loss_terms(for_labels, for_discriminator, targets)
        if mixture is not None:
            lam = mixture["lam"]
            others = self._loss_terms(for_labels, for_discriminator, mixture["partner"])
            terms = {name: lam * term + (1.0 - lam) * others[name] for name, term in terms.items()}
        loss = terms["similarity_loss"]
        parts = {name: term.detach() for name, term in terms.items()}
        if self.discriminators is not None:
            loss = loss + terms["discriminator_loss"]
            record_gradient_ratio(parts, for_labels, for_discriminator)
        return TaskResult(loss=loss, output=logits_BC, parts=parts)

    def _loss_terms(
        self,
        for_labels: Sequence[Tensor],
        for_discriminator: Sequence[Tensor],
        targets: BatchTargets,
    ) -> dict[str, Tensor]:
        """Return the weighted sums, the loss of each of several blocks, and the accuracy of the
        discriminators.
        """
        of_teachers = self._of_teachers(targets)
        of_block = [
            _mean([self._block_loss(a_BD, found, number) for found in of_teachers])
            for number, a_BD in enumerate(for_labels)
        ]
        terms = {"similarity_loss": _weighted(self.gammas, of_block)}
        if len(of_block) > 1:
            terms |= {f"block_{number}_loss": loss for number, loss in enumerate(of_block)}
        if self.discriminators is None:
            return terms
        losses, accuracies = [], []
        # full precision: autocast would blur the plateaus of the loss
        with torch.autocast(for_labels[0].device.type, enabled=False):
            for number, discriminator in enumerate(self.discriminators):
                a_BD = for_discriminator[number]
                found = [
                    discriminator_loss(discriminator, *_inputs(a_BD, teacher, number))  # type: ignore[arg-type]
                    for teacher in of_teachers
                ]
                losses.append(_mean([loss for loss, _ in found]))
                accuracies += [accuracy for _, accuracy in found]
        return terms | {
            "discriminator_loss": _weighted(self.etas, losses),
            "discriminator_accuracy": _mean(accuracies),
        }

    @torch.no_grad()
    def prepare(
        self,
        images_BCHW: Tensor | None,
        targets: BatchTargets | None,
        *,
        gather_rows: GatherRows = lambda rows_BD: rows_BD,
    ) -> str | None:
        """Redraw discriminators that have dead outputs on this batch; return a warning, if any."""
        if self.discriminators is None:
            return None
        first = next(self.discriminators.parameters())
        rows = [first.new_zeros(0, d.num_classes) for d in self._each()]
        with torch.autocast(first.device.type, enabled=False):
            if images_BCHW is not None and targets is not None:
                was_training = self.student.training
                self.student.eval()
                blocks, _ = self.layers.outputs(self.student, images_BCHW)
                self.student.train(was_training)
                of_teachers = self._of_teachers(targets)
                for number, a_BD in enumerate(blocks):
                    pairs = [_inputs(a_BD, teacher, number) for teacher in of_teachers]
                    rows[number] = torch.cat([pairs[0][0], *(b_BD for _, b_BD in pairs)])
            warnings = [
                (position, revive(discriminator, gather_rows(rows_BD)))
                for position, discriminator, rows_BD in zip(
                    self.layers.positions, self._each(), rows, strict=True
                )
            ]
        return "; ".join(f"--out-layer {at}: {text}" for at, text in warnings if text) or None

    def _of_teachers(self, targets: BatchTargets) -> Sequence[OfTeacher]:
        if targets.stored:
            assert self.layers.only_logits, "stored labels have no features"
            return targets.stored
        assert targets.blocks, "MEAL needs the blocks of a teacher"
        return targets.blocks

    def _block_loss(self, student_BD: Tensor, teacher: OfTeacher, number: int) -> Tensor:
        if isinstance(teacher, Rows):
            return stored_loss(student_BD, teacher, self.loss)
        return block_loss(student_BD, teacher[number], self.loss)

    def _each(self) -> list[Discriminator]:
        found = list(self.discriminators or ())
        assert all(isinstance(each, Discriminator) for each in found)
        return found  # type: ignore[return-value]


def _inputs(student_BD: Tensor, teacher: OfTeacher, number: int) -> tuple[Tensor, Tensor]:
    """Return the inputs of the discriminator of a block: the student's and a teacher's."""
    if isinstance(teacher, Rows):
        return stored_logits(student_BD, teacher)
    return student_BD, teacher[number]


def _mean(values: Sequence[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(list(values)).mean()


def _weighted(weights: Sequence[float], losses: Sequence[Tensor]) -> Tensor:
    return torch.stack([w * loss for w, loss in zip(weights, losses, strict=True)]).sum()
