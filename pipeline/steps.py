"""One step of a run: from the pixels of a batch, or of a rank's share of it, to new weights."""

import math
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mealv2.cutmix import Mix, draw_mix
from mealv2.errors import ConfigError, DataError
from mealv2.targets import Answer
from mealv2.task import Mixture, Result, Task
from pipeline import logs
from pipeline.compiling import Compiler
from pipeline.config import TrainConfig
from pipeline.loaders import Pixels, Request
from pipeline.ranks import has_batch_norm, pieces
from pipeline.run_state import RunState
from pipeline.runtime import Runtime
from pipeline.work import Work


@dataclass(frozen=True)
class Learned:
    """What a micro-batch gave: the loss and its parts, means still on the device, and who
    answered.
    """

    num_views: int
    parts: dict[str, Tensor]
    sources: dict[str, int]


class Steps:
    """The steps of a run, as one rank does them.

    A batch is cut into a share for every rank, a share into ``--grad-accum-steps`` micro-batches to
    save memory; the gradient is that of the mean loss over the whole batch. ``told`` is what
    the task said of the first one.
    """

    def __init__(self, config: TrainConfig, machine: Runtime, work: Work) -> None:
        self.config = config
        self.machine = machine
        self.work = work
        self.prepared = False
        self.told: str | None = None
        self._is_synced = config.sync_bn
        if config.sync_bn:
            _synchronise(machine, work)
        # batch normalisation cannot learn from one
        self._least = 2 if has_batch_norm(work.student) else 1
        machine.place(work.task)
        self._replica: nn.Module = work.task
        if machine.ranks.are_several:
            self._replica = _in_parallel(work.task, is_synced=self._is_synced)
        self.state = RunState(config, machine, work)

    def share(self, request: Request) -> Request:
        """Return this rank's share of a batch; what it reads."""
        sizes = [len(views) for _, views in request]
        least = self._least if self.machine.ranks.are_several else 1
        return self.machine.ranks.share(request, sizes, least=least)

    def usable(self, batch: Pixels) -> Pixels:
        """Return what there is to learn from of a share; nothing where skipping left too little.

        A share is cut such that batch normalisation can learn from it, but of images that are then
        found to be damaged all but one view may be left out.
        """
        if batch.failed and len(batch.positions) < self._least:
            return _rows(batch, range(0))
        return batch

    def compile(self, request: Request) -> None:
        """Compile the student for this rank's full micro-batches, as those of a full batch."""
        num_views = sum(len(views) for _, views in self.share(request))
        size = max(map(len, self._cut(num_views, num_views)))
        compiler = Compiler(self.config.compile, size)
        self.work.task.through = compiler.compiled(self.work.student)

    def say_sizes(self, request: Request) -> None:
        """Say how a full batch is spread, where it is: batch normalisation sees a part."""
        size, num_micro = self.machine.ranks.size, self.config.grad_accum_steps
        if size == num_micro == 1:
            return
        total = sum(len(views) for _, views in request)
        on_each = math.ceil(total / size)
        said = f"{size} rank{'s' * (size > 1)}: {total} views a step, {on_each} on each"
        if num_micro > 1:
            said += f", in {num_micro} micro-batches of {math.ceil(on_each / num_micro)}"
        if has_batch_norm(self.work.student) or self._is_synced:
            seen = math.ceil(on_each / num_micro) * (size if self._is_synced else 1)
            said += f"; batch normalisation sees {seen} (the paper: 64, of 512 on 8 GPUs)"
        logs.say(said)

    def update(self, batch: Pixels, num_views: int) -> list[Learned]:
        """Do one optimizer update on a share of a batch that has ``num_views`` in all.

        A share, or a micro-batch, may be empty: what all ranks do together is done all the same.
        """
        cuts = self._cut(len(batch.positions), num_views)
        learned = []
        for number, cut in enumerate(cuts):
            is_last = number == len(cuts) - 1
            # gradients of micro-batches add up here, and are averaged over the ranks once
            with nullcontext() if is_last else self._kept_apart():
                if cut:
                    part = _rows(batch, cut)
                    learned.append(self._learn(part, number, len(cut) / num_views))
                else:
                    self._learn_nothing(batch.images_BCHW[:0])
        self.state.update()
        return learned

    def _kept_apart(self) -> AbstractContextManager[None]:
        """Return the context in which gradients add up on this rank alone."""
        if isinstance(self._replica, DistributedDataParallel):
            return self._replica.no_sync()
        return nullcontext()

    def _cut(self, num_own: int, num_views: int) -> list[range]:
        """Return the rows of each micro-batch of a share; they differ by at most one."""
        num_micro, size = self.config.grad_accum_steps, self.machine.ranks.size
        if self._is_synced:  # all ranks do as many, and one of them has rows in each
            num_micro = min(num_micro, math.ceil(num_views / size))
            return pieces([1] * num_own, max(1, num_micro))
        cuts = pieces([1] * num_own, num_micro, least=self._least)
        return [cut for cut in cuts if cut] or cuts[:1]

    def _learn(self, batch: Pixels, number: int, share: float) -> Learned:
        """Add the gradient of a micro-batch, ``share`` of the whole batch."""
        work, images_BCHW, device = self.work, batch.images_BCHW, self.machine.device
        mix, mixture = self._draw_mix(len(images_BCHW), number), {}
        target = None if work.cutmix is None or mix is None else work.cutmix.target
        with self.machine.autocast():
            if mix is not None and target == "teachers":
                images_BCHW = mix.to(device).paste(images_BCHW)
            answer = work.targets.answer(batch.positions, batch.views, images_BCHW)
            if mix is not None and target == "mixed-labels":
                images_BCHW = mix.to(device).paste(images_BCHW)
                # of stored labels while they are on the CPU: of records on a GPU it would wait
                partner = answer.rows(mix.order_B).to(device)
                own_share = mix.own_share(work.img_size)
                mixture = {"mixture": Mixture(partner=partner, own_share=own_share)}
            answer = answer.to(device)
            self._prepare(images_BCHW, answer)
            result = self._compute(images_BCHW, answer, mixture)

        # DDP takes the mean over the ranks: sum_r (n_r / N) L_r = mean_r (R n_r / N) L_r
        weight = self.machine.ranks.size * share
        self.state.backward(result["loss"] if weight == 1.0 else result["loss"] * weight)
        parts = {"loss": result["loss"].detach(), **result["parts"]}
        return Learned(len(batch.positions), parts, answer.sources)

    def _learn_nothing(self, none_BCHW: Tensor) -> None:
        """Take part in a step without a row of one's own."""
        self._prepare(None, None)
        self.state.backward(self._replica(none_BCHW, None)["loss"])

    def _compute(self, images_BCHW: Tensor, answer: Answer, mixture: dict[str, Mixture]) -> Result:
        """Return the task's result; raises DataError for a batch too small to learn from."""
        try:
            result: Result = self._replica(images_BCHW, answer, **mixture)
        except ValueError as error:
            if len(images_BCHW) > 1 or "per channel" not in str(error):
                raise
            raise DataError(
                f"step {self.state.place.total_steps} has one image, and batch normalisation "
                "cannot learn from one: use a larger --batch-size"
            ) from error
        return result

    def _draw_mix(self, batch_size: int, number: int) -> Mix | None:
        """Draw how a micro-batch is mixed, if it is: each within itself."""
        if self.work.cutmix is None:
            return None
        place = (self.config.seed, self.state.place.epoch, self.state.place.step)
        part = (self.machine.ranks.rank, number)
        return draw_mix(
            batch_size,
            self.work.img_size,
            beta=self.work.cutmix.beta,
            probability=self.work.cutmix.probability,
            place=(*place, *part) if any(part) else place,
        )

    def _prepare(self, images_BCHW: Tensor | None, answer: Answer | None) -> None:
        """Let the task look at the first batch, all ranks' together, before the first step."""
        if self.prepared:
            return
        self.prepared = True
        ranks, task = self.machine.ranks, self.work.task
        self.told = task.prepare(images_BCHW, answer, joined=ranks.joined)
        # each rank has redrawn from a generator of its own
        ranks.same(list(task.parameters()))


class _Replica(nn.Module):
    """A task as one of several ranks computes it: its share of a batch may be empty.

    DDP sees the weights only: statistics of batch normalisation stay each rank's own until the
    model is looked at.
    """

    def __init__(self, task: Task, *, is_synced: bool) -> None:
        super().__init__()
        self._weights = nn.ParameterList(task.parameters())
        self._task = (task,)  # no module of this one
        self._is_synced = is_synced

    def forward(
        self, images_BCHW: Tensor | None, answer: Answer | None, **mixture: Mixture
    ) -> Result:
        (task,) = self._task
        if answer is not None:
            result: Result = task(images_BCHW, answer, **mixture)
            return result
        # nothing to learn from: a loss of 0, with a gradient of 0 for every weight
        learning = [weight for weight in self._weights if weight.requires_grad]
        loss = torch.stack([(weight * 0.0).sum() for weight in learning]).sum()
        # others wait for its statistics; these are float32, which autocast would not keep here
        if self._is_synced and images_BCHW is not None:
            loss = loss + (task.student(images_BCHW).float() * 0.0).sum()
        return Result(loss=loss, output=loss, parts={})


def _in_parallel(task: Task, *, is_synced: bool) -> DistributedDataParallel:
    """Return a task whose gradients are averaged over the ranks, with the first one's weights."""
    # it tells apart weights whose layouts differ in name only, as of 64 x 1 x 7 x 7
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    replica = DistributedDataParallel(_Replica(task, is_synced=is_synced))
    # after the first backward pass DDP puts gradients into other buckets, and the order of a sum
    # over the ranks depends on the bucket: without this one a resumed run would differ in bits
    replica(None, None)["loss"].backward()
    replica.zero_grad()
    return replica


def _synchronise(machine: Runtime, work: Work) -> None:
    """Let batch normalisation see the images of all ranks; raises ConfigError where it cannot."""
    if not machine.ranks.are_several:
        raise ConfigError("--sync-bn has no effect in one process; leave it out, or use torchrun")
    if machine.device.type != "cuda":
        raise ConfigError("--sync-bn needs GPUs: torch has it on no other device; leave it out")
    if not has_batch_norm(work.student):
        raise ConfigError(f"--sync-bn has no effect: {work.student.tag} has no batch normalisation")
    convert_sync_batchnorm(work.student)  # type: ignore[no-untyped-call]


def _rows(batch: Pixels, cut: range) -> Pixels:
    """Return some neighbouring rows of a batch."""
    if len(cut) == len(batch.positions):
        return batch
    rows = slice(cut.start, cut.stop)
    return replace(
        batch,
        images_BCHW=batch.images_BCHW[rows],
        sizes_B2=batch.sizes_B2[rows],
        boxes_B5=batch.boxes_B5[rows],
        positions=batch.positions[rows],
        views=batch.views[rows],
        failed={},
    )
