"""The ensemble: several teachers, and the mean of their softmax outputs."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

BySize = Mapping[int, Tensor]  # images B x 3 x S x S by S
ONE_SIZE: BySize = MappingProxyType({})


class EnsembleOutput(NamedTuple):
    """The ensemble's output for B views, float32; each row of ``probs_BC`` sums to 1."""

    probs_BC: Tensor
    mean_logits_BC: Tensor


def combine(logits_TBC: Tensor) -> EnsembleOutput:
    """Average T teachers: the mean of their softmax outputs and the mean of their logits, float32.

    Source: paper eq. 1; official models/ensemble (the mean of probabilities, not of logits).
    """
    logits_TBC = logits_TBC.float()
    # q = (1/T) sum_t softmax(z_t);  m = (1/T) sum_t z_t
    return EnsembleOutput(torch.softmax(logits_TBC, dim=-1).mean(dim=0), logits_TBC.mean(dim=0))


class TeacherEnsemble(nn.Module):
    """Frozen teachers that label a batch of views.

    ``teachers`` map images (B x 3 x H x W, uint8 or float in [0, 1]) to logits of the same classes,
    as ``mealv2.models.Classifier`` does with its own mean and std. They stay in eval mode and have
    no gradient. ``calls`` are the callables that run, one a teacher: the modules themselves or
    compiled forms of them. ``img_sizes`` are the sizes at which teachers see a view, None for the
    size of the batch. Raises ValueError without teachers.
    """

    def __init__(
        self, teachers: Sequence[nn.Module], img_sizes: Sequence[int | None] | None = None
    ) -> None:
        super().__init__()
        if not teachers:
            raise ValueError("an ensemble needs at least one teacher")
        self.teachers = nn.ModuleList(teachers)
        self.calls: list[Callable[[Tensor], Tensor]] = list(teachers)
        self.img_sizes = [None] * len(teachers) if img_sizes is None else list(img_sizes)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "TeacherEnsemble":
        """Stay in eval mode."""
        return super().train(False)

    @property
    def other_sizes(self) -> tuple[int, ...]:
        """The sizes that teachers need beside that of the batch."""
        return tuple(sorted({size for size in self.img_sizes if size is not None}))

    @torch.no_grad()
    def teacher_logits(self, images_BCHW: Tensor, other_sizes: BySize = ONE_SIZE) -> Tensor:
        """Return each teacher's logits, float32 T x B x C.

        ``other_sizes`` has the images by every size of the property of this name.
        """
        seen = (images_BCHW if size is None else other_sizes[size] for size in self.img_sizes)
        calls = zip(self.calls, seen, strict=True)
        return torch.stack([teacher(images_BCHW).float() for teacher, images_BCHW in calls])

    def forward(self, images_BCHW: Tensor, other_sizes: BySize = ONE_SIZE) -> EnsembleOutput:
        return combine(self.teacher_logits(images_BCHW, other_sizes))


@contextmanager
def unchanged(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Give modules back as they were when the block ends, also after an error.

    That is the training flag and hooks of every submodule, and the same parameters and buffers with
    the same ``requires_grad``, device, dtype and memory layout, and gradients.
    """
    parts = list(dict.fromkeys(part for module in modules for part in module.modules()))
    modes = [(part, part.training, dict(part._forward_pre_hooks)) for part in parts]
    parameters = [
        (part, name, parameter, parameter.requires_grad)
        for part in parts
        for name, parameter in part.named_parameters(recurse=False, remove_duplicate=False)
    ]
    buffers = [
        (part, name, buffer)
        for part in parts
        for name, buffer in part.named_buffers(recurse=False, remove_duplicate=False)
    ]
    tensors = [parameter for _, _, parameter, _ in parameters] + [each for *_, each in buffers]
    values = [(tensor, tensor.data) for tensor in tensors]
    grads = [(t, t.grad, t.grad.data) for t in tensors if t.is_leaf and t.grad is not None]
    try:
        yield
    finally:
        for tensor, value in values:
            tensor.data = value
        for tensor, grad, value in grads:
            grad.data = value
            tensor.grad = grad
        for part, name, parameter, requires_grad in parameters:
            if part._parameters[name] is not parameter:
                part._parameters[name] = parameter
            parameter.requires_grad_(requires_grad)
        for part, name, buffer in buffers:
            if part._buffers[name] is not buffer:
                part._buffers[name] = buffer
        for part, training, hooks in modes:
            part.training = training
            part._forward_pre_hooks.clear()
            part._forward_pre_hooks.update(hooks)
