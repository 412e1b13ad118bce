"""One training step: targets, forward, backward, optimizer, moving average."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from timm.models import model_parameters
from timm.utils import dispatch_clip_grad  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from mealv2.batches import rank_rows, split_evenly
from mealv2.codec import to_device
from mealv2.data.requests import Batch, BatchRequest, num_views_of
from mealv2.data.source import UNLABELLED
from mealv2.errors import DataError
from mealv2.targets import BatchTargets
from mealv2.task import Mixture
from pipeline import console
from pipeline.compile import Compiler
from pipeline.config import TrainConfig
from pipeline.runtime.device import Runtime
from pipeline.training.parallel import enable_sync_bn, has_batch_norm, in_parallel
from pipeline.training.spec import TrainingSpec
from pipeline.training.state import TrainingState


@dataclass(frozen=True)
class StepOutput:
    """What one micro-batch gives: loss terms and other scalars, means still on the device.

    ``label_counts`` says how many of its ``num_views`` labels were stored and how many online.
    """

    num_views: int
    parts: dict[str, Tensor]
    label_counts: dict[str, int]


class TrainStep:
    """The training step of one rank.

    A batch is spread over the ranks, and a rank's rows over ``--grad-accum-steps`` micro-batches to
    save memory; the gradient is that of the mean loss over the whole batch. ``warning`` holds what
    the task finds in the first batch. ``phase`` opens a context around each named phase of a step:
    regions of torch's profiler by default.
    """

    def __init__(self, config: TrainConfig, runtime: Runtime, spec: TrainingSpec) -> None:
        self.config = config
        self.runtime = runtime
        self.spec = spec
        self.warning: str | None = None
        self.phase: Any = record_function
        self.is_prepared = False
        self._autocast = runtime.autocast()
        self._num_ranks = runtime.ranks.size
        if config.sync_bn:
            enable_sync_bn(runtime, spec.student, name=spec.student.tag)
        # batch normalisation cannot learn from one view
        self._min_views = 2 if has_batch_norm(spec.student) else 1
        runtime.to_device(spec.task)
        self._has_accuracy = _has_accuracy(spec)
        self._model: nn.Module = spec.task
        if self._num_ranks > 1:
            self._model = in_parallel(spec.task, is_synced=config.sync_bn)
        self.state = TrainingState(config, runtime, spec)

    # --- one update -------------------------------------------------------------------------------

    def update(self, batch: Batch, num_views: int) -> list[StepOutput]:
        """Do one optimizer update on this rank's rows of a batch of ``num_views`` on all ranks.

        A rank's rows, or a micro-batch, may be empty: what all ranks do together is done all the
        same. Raises DataError for a batch too small to learn from.
        """
        state, outputs = self.state, []
        micro_batches = self._micro_batches(len(batch.positions), num_views)
        for number, rows in enumerate(micro_batches):
            # gradients of micro-batches add up on this rank; the last one averages over the ranks
            is_last = number == len(micro_batches) - 1
            with nullcontext() if is_last else self._without_averaging():
                if rows:
                    fraction = len(rows) / num_views
                    outputs.append(self._forward_backward(_take(batch, rows), number, fraction))
                else:
                    self._backward_without_rows(batch.images_BCHW[:0])

        with self.phase("optimizer"):
            if self.config.clip_grad is not None:
                self._clip(self.config.clip_grad)
            state.scaler.step(state.optimizer)  # float16: skipped where gradients overflowed
            state.scaler.update()
            state.optimizer.zero_grad()
            if state.ema is not None:
                state.ema.update(self.spec.student, step=state.progress.total_steps)
        return outputs

    def _clip(self, limit: float) -> None:
        """Limit the student's gradient, as timm does; that of the discriminator stays."""
        mode = self.config.clip_mode or "norm"
        self.state.scaler.unscale_(self.state.optimizer)
        backbone = self.spec.student.backbone
        parameters = model_parameters(backbone, exclude_head=mode == "agc")
        dispatch_clip_grad(parameters, limit, mode=mode)

    def _forward_backward(self, batch: Batch, number: int, fraction: float) -> StepOutput:
        """Add the gradient of a micro-batch, ``fraction`` of the whole batch."""
        with self._autocast:
            with self.phase("labels"):
                images_BCHW, targets, mixture = self._targets(batch, number)
                self._prepare(images_BCHW, targets)
            with self.phase("forward and loss"):
                result = self._forward(images_BCHW, targets, mixture)
        accuracy = self._accuracy(result["output"], batch.positions)

        with self.phase("backward"):
            # DDP takes the mean over the ranks: sum_r (n_r / N) L_r = mean_r (R n_r / N) L_r
            weight = self._num_ranks * fraction
            loss = result["loss"] if weight == 1.0 else result["loss"] * weight
            self.state.scaler.scale(loss).backward()

        parts = {"loss": result["loss"].detach(), **result["parts"], **accuracy}
        return StepOutput(len(batch.positions), parts, targets.label_counts)

    @torch.no_grad()
    def _accuracy(self, logits_BC: Tensor, positions: Sequence[int]) -> dict[str, Tensor]:
        """Return top-1 and top-5 on the hard labels in percent, still on the device."""
        if not self._has_accuracy:
            return {}
        classes_B = torch.tensor([self.spec.source.labels[p] for p in positions])
        top_BK = logits_BC.topk(min(5, logits_BC.shape[1]), dim=1).indices
        hits_BK = top_BK == to_device(classes_B, logits_BC.device)[:, None]
        percent = 100.0 / len(positions)
        return {"top1": hits_BK[:, 0].sum() * percent, "top5": hits_BK.sum() * percent}

    def _targets(
        self, batch: Batch, number: int
    ) -> tuple[Tensor, BatchTargets, dict[str, Mixture]]:
        """Return the images as the student sees them, their targets, and how they are mixed."""
        spec, images_BCHW, device = self.spec, batch.images_BCHW, self.runtime.device
        positions, views, by_size = batch.positions, batch.views, batch.other_sizes
        step = self.state.progress.total_steps
        find = partial(spec.targets.batch, positions, views, step=step)
        mix = None
        if spec.mixing is not None:
            progress, rank = self.state.progress, self.runtime.ranks.rank
            seed = (self.config.seed, progress.epoch, progress.step)
            micro = (rank, number) if rank or number else ()  # each micro-batch within itself
            mix = spec.mixing.draw(len(images_BCHW), spec.img_size, seed=(*seed, *micro))
        if spec.mixing is None or mix is None:
            return images_BCHW, find(images_BCHW, by_size).to(device), {}
        placed = mix.to(device)
        mixed_BCHW = placed.apply(images_BCHW)
        if spec.mixing.target(mix) == "teachers":  # the teachers label the mixed images
            by_size = {s: placed.at(s / spec.img_size).apply(x) for s, x in by_size.items()}
            return mixed_BCHW, find(mixed_BCHW, by_size).to(device), {}
        targets = find(images_BCHW, by_size)
        # stored labels are on the CPU: picking rows of records on a GPU would wait for it
        partner = targets.rows(mix.order_B).to(device)
        mixture = Mixture(partner=partner, lam=mix.lam(spec.img_size))
        return mixed_BCHW, targets.to(device), {"mixture": mixture}

    def _forward(self, images_BCHW: Tensor, targets: BatchTargets, mixture: Any) -> Any:
        try:
            return self._model(images_BCHW, targets, **mixture)
        except ValueError as error:
            if len(images_BCHW) > 1 or "per channel" not in str(error):
                raise
            raise DataError(
                f"step {self.state.progress.total_steps} has one image, and batch normalisation "
                "cannot learn from one: use a larger --batch-size"
            ) from error

    # --- rows of a rank and of its micro-batches --------------------------------------------------

    def local_rows(self, request: BatchRequest) -> BatchRequest:
        """Return this rank's rows of a batch; what it reads."""
        ranks = self.runtime.ranks
        return rank_rows(request, ranks.rank, ranks.size, min_views=self._min_views)

    def without_failures(self, batch: Batch) -> Batch:
        """Return the rows to learn from; none where skipped images leave too few.

        A rank gets enough rows for batch normalisation, but damaged images are known only after
        reading.
        """
        if len(batch.positions) < self._min_views:
            return _take(batch, range(0))
        return batch

    def _micro_batches(self, num_rows: int, num_views: int) -> list[range]:
        """Return the rows of each micro-batch; their sizes differ by at most one."""
        num_micro = self.config.grad_accum_steps
        if num_micro == 1:
            return [range(num_rows)]
        if self.config.sync_bn:  # all ranks do as many, and one of them has rows in each
            num_micro = min(num_micro, math.ceil(num_views / self._num_ranks))
            return split_evenly([1] * num_rows, max(1, num_micro))
        cuts = split_evenly([1] * num_rows, num_micro, min_size=self._min_views)
        return [cut for cut in cuts if cut] or cuts[:1]

    def _without_averaging(self) -> AbstractContextManager[None]:
        """Return the context in which gradients add up on this rank alone."""
        if isinstance(self._model, DistributedDataParallel):
            return self._model.no_sync()
        return nullcontext()

    def _backward_without_rows(self, none_BCHW: Tensor) -> None:
        """Take part in a step without a row of one's own."""
        self._prepare(None, None)
        loss = self._model(none_BCHW, None)["loss"]
        self.state.scaler.scale(loss).backward()

    # --- before the first step --------------------------------------------------------------------

    def compile(self, request: BatchRequest) -> None:
        """With --torchcompile, compile the student for the micro-batches of a full batch."""
        if self.config.torchcompile == "off":
            return
        num_views = num_views_of(self.local_rows(request))
        size = max(map(len, self._micro_batches(num_views, num_views)))
        compiler = Compiler(self.config.torchcompile, size)
        self.spec.task.compiled_student = compiler.compiled(self.spec.student)

    def log_sizes(self, request: BatchRequest) -> None:
        """Report how a full batch is spread over ranks and micro-batches, where it is."""
        num_ranks, num_micro = self._num_ranks, self.config.grad_accum_steps
        if num_ranks == num_micro == 1:
            return
        total = num_views_of(request)
        on_each = math.ceil(total / num_ranks)
        text = f"{num_ranks} rank{'s' * (num_ranks > 1)}: {total} views a step, {on_each} on each"
        if num_micro > 1:
            text += f", in {num_micro} micro-batches of {math.ceil(on_each / num_micro)}"
        is_synced = self.config.sync_bn
        if has_batch_norm(self.spec.student) or is_synced:
            seen = math.ceil(on_each / num_micro) * (num_ranks if is_synced else 1)
            text += f"; batch normalisation sees {seen} (the paper: 64, of 512 on 8 GPUs)"
        console.info(text)

    def _prepare(self, images_BCHW: Tensor | None, targets: BatchTargets | None) -> None:
        """Let the task look at the first batch, the rows of all ranks, before the first step."""
        if self.is_prepared:
            return
        self.is_prepared = True
        ranks, task = self.runtime.ranks, self.spec.task
        self.warning = task.prepare(images_BCHW, targets, gather_rows=ranks.gather_rows)
        # each rank redraws from its own generator
        ranks.broadcast(list(task.parameters()))


def _has_accuracy(spec: TrainingSpec) -> bool:
    """Return whether every view has one hard label: not where views are mixed."""
    if spec.mixing is not None or spec.metric != "top1" or not spec.source.labels:
        return False
    return all(spec.source.labels[p] != UNLABELLED for p in spec.positions)


def _take(batch: Batch, cut: range) -> Batch:
    """Return neighbouring rows of a batch."""
    if len(cut) == len(batch.positions):
        return batch
    rows = slice(cut.start, cut.stop)
    return replace(
        batch.with_images(lambda images_BCHW: images_BCHW[rows]),
        sizes_B2=batch.sizes_B2[rows],
        boxes_B5=batch.boxes_B5[rows],
        positions=batch.positions[rows],
        views=batch.views[rows],
        failed={},
    )
