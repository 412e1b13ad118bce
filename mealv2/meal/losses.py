"""The losses between a block of the student and the same block of a teacher."""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from mealv2.losses import similarity_loss

BlockLoss = Literal["ce", "l1", "l2", "l1_soft", "l2_soft"]
BLOCK_LOSSES: tuple[str, ...] = get_args(BlockLoss)


def block_loss(student_BD: Tensor, teacher_BD: Tensor, loss: BlockLoss = "ce") -> Tensor:
    """Return the loss of a block, a float32 scalar; the teacher's values have no gradient.

    ``ce``: the cross-entropy of the softmaxes, features included; ``l1`` and ``l2``: the mean
    absolute and the mean square difference of all values; ``l1_soft`` and ``l2_soft``: the same of
    the softmaxes (MEAL, its option --loss). Raises ValueError for another name.
    """
    student_BD, teacher_BD = student_BD.float(), teacher_BD.float().detach()
    if loss == "ce":
        # L = -(1/B) sum_i sum_d softmax(b_i)_d log softmax(a_i)_d
        return similarity_loss(student_BD, torch.softmax(teacher_BD, dim=1))
    if loss in ("l1_soft", "l2_soft"):
        student_BD, teacher_BD = (torch.softmax(x, dim=1) for x in (student_BD, teacher_BD))
    if loss in ("l1", "l1_soft"):
        return F.l1_loss(student_BD, teacher_BD)
    if loss in ("l2", "l2_soft"):
        return F.mse_loss(student_BD, teacher_BD)
    raise ValueError(f"a block loss is one of {', '.join(BLOCK_LOSSES)}, got {loss!r}")
