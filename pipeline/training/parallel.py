"""Gradients over several ranks: DistributedDataParallel around a task, synchronised batch norm."""

import warnings

import torch
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mealv2.errors import ConfigError
from mealv2.targets import BatchTargets
from mealv2.task import Mixture, Task, TaskResult
from pipeline.runtime.device import Runtime


class _Replica(nn.Module):
    """A task as one of several ranks computes it: its rows of a batch may be none.

    DDP sees the weights only: statistics of batch normalisation stay each rank's own until the
    model is evaluated.
    """

    def __init__(self, task: Task, *, is_synced: bool) -> None:
        super().__init__()
        self._weights = nn.ParameterList(task.parameters())
        self._task = (task,)  # a tuple, so that it is no submodule
        self._is_synced = is_synced

    def forward(
        self, images_BCHW: Tensor | None, targets: BatchTargets | None, **mixture: Mixture
    ) -> TaskResult:
        (task,) = self._task
        if targets is not None:
            result: TaskResult = task(images_BCHW, targets, **mixture)
            return result
        # no rows: a loss of 0, with a gradient of 0 for every weight
        trained = [weight for weight in self._weights if weight.requires_grad]
        loss = torch.stack([(weight * 0.0).sum() for weight in trained]).sum()
        # the other ranks wait for its statistics; float32, which autocast would not keep here
        if self._is_synced and images_BCHW is not None:
            loss = loss + (task.student(images_BCHW).float() * 0.0).sum()
        return TaskResult(loss=loss, output=loss, parts={})


def in_parallel(task: Task, *, is_synced: bool) -> DistributedDataParallel:
    """Return a task whose gradients are averaged over the ranks, with the main rank's weights."""
    # DDP warns of layouts that differ in name only, as of weights of 64 x 1 x 7 x 7
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    replica = DistributedDataParallel(_Replica(task, is_synced=is_synced))
    # after the first backward pass DDP puts gradients into other buckets, and the order of a sum
    # over the ranks depends on the bucket: without this one a resumed run would differ in bits
    replica(None, None)["loss"].backward()
    replica.zero_grad()
    return replica


def enable_sync_bn(runtime: Runtime, student: nn.Module, *, name: str) -> None:
    """Let batch normalisation see the images of all ranks; raises ConfigError where it cannot."""
    if not runtime.ranks.is_distributed:
        raise ConfigError("--sync-bn has no effect in one process; leave it out, or use torchrun")
    if runtime.device.type != "cuda":
        raise ConfigError("--sync-bn needs GPUs: torch has it on no other device; leave it out")
    if not has_batch_norm(student):
        raise ConfigError(f"--sync-bn has no effect: {name} has no batch normalisation")
    convert_sync_batchnorm(student)  # type: ignore[no-untyped-call]


def has_batch_norm(network: nn.Module) -> bool:
    """Return whether a network normalises over the images that a process has of a batch."""
    return any(
        isinstance(module, nn.modules.batchnorm._BatchNorm)
        and not isinstance(module, nn.SyncBatchNorm)
        for module in network.modules()
    )
