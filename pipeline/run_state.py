"""The state of a run: everything that the rest of it depends on, into a checkpoint and back."""

from dataclasses import dataclass
from typing import Any

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor

from mealv2.errors import DataError, LabelSetError
from mealv2.models import Classifier
from pipeline.config import DEFAULT_EMA_DECAY, TrainConfig
from pipeline.meters import Meter
from pipeline.runtime import Runtime, seed_rank
from pipeline.work import Work


@dataclass
class Place:
    """Where a run stands: ``step`` batches of ``epoch`` are done, ``total_steps`` in all."""

    epoch: int = 0
    step: int = 0
    total_steps: int = 0


class RunState:
    """Student, average, optimizer, scale, place and meters of a run; torch's generators go along.

    ``window`` means are those since the last log line, ``pass_means`` since the pass began,
    ``teacher_forwards`` counts the views that teachers were asked about.
    """

    def __init__(self, config: TrainConfig, machine: Runtime, work: Work) -> None:
        self._config = config
        self._device = machine.device
        self._ranks = machine.ranks
        self._work = work
        self._data_sha256 = work.data_sha256
        self.place = Place()
        self.window, self.pass_means = Meter(), Meter()
        self.teacher_forwards = 0
        self.optimizer = _make_optimizer(config, work, machine.device)
        self.ema = None
        if config.model_ema:
            decay = DEFAULT_EMA_DECAY if config.model_ema_decay is None else config.model_ema_decay
            # the decay grows from 0, so that the start does not weigh on a short run (timm)
            self.ema = ModelEmaV3(work.student, decay=decay, use_warmup=True)
        # float16 gradients underflow without a scale; bfloat16 and float32 need none
        self.scaler = torch.amp.GradScaler(
            machine.device.type, enabled=machine.amp_dtype is torch.float16
        )

    @property
    def result(self) -> Classifier:
        """The model that the run makes: the student, or its moving average."""
        model: Classifier = self._work.student if self.ema is None else self.ema.module
        return model

    @property
    def lr(self) -> float:
        """The student's learning rate now."""
        return float(self.optimizer.param_groups[0]["lr"])

    def set_lr(self, factor: float) -> None:
        """Set every group's learning rate to its initial one times ``factor``."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def backward(self, loss: Tensor) -> None:
        """Fill in the gradients."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def update(self) -> None:
        """Do the optimizer's step, and the moving average's."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self._work.student, step=self.place.total_steps)

    def collect(self) -> None:
        """Move what all ranks have counted to the first one; all have to call this."""
        self.window.collect(self._ranks)
        self.pass_means.collect(self._ranks)
        asked = self._ranks.totals({"asked": self.teacher_forwards})["asked"]
        self.teacher_forwards = int(asked) if self._ranks.is_first else 0

    def as_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, tensors and plain values, of the first rank.

        Of the others only the states of torch's generators, a row each: the rest is the same, or
        was collected. All have to call this.
        """
        on_cuda = self._device.type == "cuda"
        rng_cuda = torch.cuda.get_rng_state(self._device)[None] if on_cuda else None
        state = {
            "arch": self._work.student.tag,
            "args": self._config.as_json(),
            **vars(self.place),
            "state_dict": self._work.student.backbone.state_dict(),
            "extra": {name: module.state_dict() for name, (module, _) in self._work.extra.items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "meters": [self.window.state(), self.pass_means.state()],
            "teacher_forwards": self.teacher_forwards,
            "rng": torch.cat(self._ranks.rows(torch.get_rng_state()[None])),
            "rng_cuda": None if rng_cuda is None else torch.cat(self._ranks.rows(rng_cuda)),
            "data_sha256": self._data_sha256,
            "labels": self._work.labels,
        }
        if self.ema is not None:
            state["state_dict_ema"] = self.result.backbone.state_dict()  # timm's name
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a checkpoint's state.

        Raises DataError or LabelSetError where images, labels or teachers are not those that the
        run began with; KeyError, ValueError, TypeError or RuntimeError for the state of another
        kind of run.
        """
        self._check_same_work(state)
        self.place = Place(state["epoch"], state["step"], state["total_steps"])
        self._work.student.backbone.load_state_dict(state["state_dict"])
        for name, (module, _) in self._work.extra.items():
            module.load_state_dict(state["extra"][name])
        if self.ema is not None:
            self.result.backbone.load_state_dict(state["state_dict_ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["fused"] = _fused(self._device)  # this machine's, not the checkpoint's
        for parameter, kept in self.optimizer.state.items():
            if (momentum := kept.get("momentum_buffer")) is not None:
                # the fused kernel takes all to lie in memory as the weights do, and does not look
                kept["momentum_buffer"] = torch.empty_like(parameter).copy_(momentum)
        self.scaler.load_state_dict(state["scaler"])
        if self._ranks.is_first:
            for meter, kept in zip((self.window, self.pass_means), state["meters"], strict=True):
                meter.restore(kept, self._device)
            # runs before they were counted do not say
            self.teacher_forwards = state.get("teacher_forwards", 0)
        self._restore_generators(state)

    def _restore_generators(self, state: dict[str, Any]) -> None:
        """Take up this rank's states; seed anew where the run had another number of ranks."""
        ranks = self._ranks
        rows = _rows(state["rng"])
        if len(rows) != ranks.size:
            seed_rank(self._config.seed, rank=ranks.rank, step=self.place.total_steps)
            return
        torch.set_rng_state(rows[ranks.rank].clone())  # torch crashes on a view with an offset
        if state["rng_cuda"] is not None and self._device.type == "cuda":
            torch.cuda.set_rng_state(_rows(state["rng_cuda"])[ranks.rank].clone(), self._device)

    def _check_same_work(self, state: dict[str, Any]) -> None:
        advice = "bring them back, or start a new run"
        if state["data_sha256"] != self._data_sha256:
            name = self._work.source.name
            raise DataError(f"the images of {name} are not those this run began with; {advice}")
        before, now = state["labels"] or {}, self._work.labels or {}
        for name, what in (("plan_sha256", "labels"), ("teachers", "teachers' weights")):
            if before.get(name) != now.get(name):
                raise LabelSetError(f"the {what} are not those this run began with; {advice}")


def _rows(states: Tensor) -> Tensor:
    """Return a generator's states, a row for each rank; before there were ranks it was one."""
    return states.view(-1, states.shape[-1])


def _make_optimizer(config: TrainConfig, work: Work, device: torch.device) -> torch.optim.SGD:
    """SGD over the student and the extra modules, a group each (paper: one joint optimizer)."""
    learners = [(work.student, config.lr), *work.extra.values()]
    return torch.optim.SGD(
        [
            {"params": list(module.parameters()), "lr": lr, "initial_lr": lr}
            for module, lr in learners
        ],
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=_fused(device),
    )


def _fused(device: torch.device) -> bool | None:
    """Return whether SGD computes in one kernel; None leaves it to torch.

    On a CPU it takes 0.4 to 0.8 of the time of the plain loop. On a GPU it also looks at float16's
    gradients itself, where the other forms let the host wait for them in every step.
    """
    return True if device.type in ("cpu", "cuda") else None
