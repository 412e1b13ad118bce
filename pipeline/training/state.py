"""The state of a run: everything that the rest of it depends on, into a checkpoint and back."""

from dataclasses import dataclass
from typing import Any

import torch
from timm.utils.model_ema import ModelEmaV3

from mealv2.batches import updates_per_epoch
from mealv2.errors import ConfigError, DataError, LabelSetError
from mealv2.models import Classifier
from pipeline.config import DEFAULT_EMA_DECAY, TrainConfig
from pipeline.runtime.device import Runtime
from pipeline.runtime.seeds import seed_rank
from pipeline.training import image_list
from pipeline.training.meters import Meter
from pipeline.training.optimizer import create_optimizer, create_schedule, restore_optimizer
from pipeline.training.spec import TrainingSpec


@dataclass
class Progress:
    """How far a run is: ``step`` batches of ``epoch`` are done, ``total_steps`` in all."""

    epoch: int = 0
    step: int = 0
    total_steps: int = 0


class TrainingState:
    """Student, moving average, optimizer, loss scale, progress and meters of a run; a checkpoint
    also keeps torch's generators and the state of the targets.

    ``window`` has the means since the last log line, ``pass_means`` since the start of the pass;
    ``teacher_forwards`` counts the views that went through the teachers. ``best`` is the best epoch
    so far: its number, its last step, its metrics, and which epoch was validated last.
    """

    def __init__(self, config: TrainConfig, runtime: Runtime, spec: TrainingSpec) -> None:
        self._config = config
        self._device = runtime.device
        self._ranks = runtime.ranks
        self._spec = spec
        self._data_sha256 = spec.data_sha256
        self.progress = Progress()
        self.window, self.pass_means = Meter(), Meter()
        self.teacher_forwards = 0
        self.best: dict[str, Any] | None = None
        self.optimizer = create_optimizer(config, spec, runtime.device)
        num_updates = updates_per_epoch(config, len(spec.positions))
        self.schedule = create_schedule(config, self.optimizer, updates_per_epoch=num_updates)
        self.ema = None
        if config.model_ema:
            decay = DEFAULT_EMA_DECAY if config.model_ema_decay is None else config.model_ema_decay
            # timm: the decay grows from 0, so that the start has no weight in a short run
            self.ema = ModelEmaV3(spec.student, decay=decay, use_warmup=True)
        # float16 gradients underflow without a scale; bfloat16 and float32 need none
        self.scaler = torch.amp.GradScaler(
            runtime.device.type, enabled=runtime.amp_dtype is torch.float16
        )

    @property
    def result(self) -> Classifier:
        """The model that the run makes: the student, or its moving average."""
        model: Classifier = self._spec.student if self.ema is None else self.ema.module
        return model

    @property
    def lr(self) -> float:
        """The student's learning rate now; with --layer-decay that of its head."""
        groups = self.optimizer.param_groups
        return next(float(g["lr"]) for g in groups if g.get("lr_scale", 1.0) == 1.0)

    def collect(self) -> None:
        """Move the counts of all ranks to the main one; all have to call this."""
        self.window.collect(self._ranks)
        self.pass_means.collect(self._ranks)
        forwards = self._ranks.all_reduce_counts({"forwards": self.teacher_forwards})["forwards"]
        self.teacher_forwards = int(forwards) if self._ranks.is_main_process else 0

    def as_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, tensors and plain values, of the main rank.

        Of the others only the states of torch's generators, a row each: the rest is the same on all
        ranks, or was collected. All have to call this.
        """
        on_cuda = self._device.type == "cuda"
        rng_cuda = torch.cuda.get_rng_state(self._device)[None] if on_cuda else None
        state = {
            "arch": self._spec.student.tag,
            "model_args": self._spec.student.model_args,
            "args": self._config.as_json(),
            **vars(self.progress),
            "state_dict": self._spec.student.backbone.state_dict(),
            "extra": {name: module.state_dict() for name, (module, _) in self._spec.extra.items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "meters": [self.window.state(), self.pass_means.state()],
            "teacher_forwards": self.teacher_forwards,
            "best": self.best,
            "rng": torch.cat(self._ranks.all_gather(torch.get_rng_state()[None])),
            "rng_cuda": None if rng_cuda is None else torch.cat(self._ranks.all_gather(rng_cuda)),
            "data_sha256": self._data_sha256,
            "labels": self._spec.labels,
            "preprocessing": self._preprocessing(),
            "targets": self._spec.targets.state(),
        }
        if self.ema is not None:
            state["state_dict_ema"] = self.result.backbone.state_dict()  # timm's name
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state.

        Raises DataError or LabelSetError where images, labels or teachers are not those that the
        run started with; KeyError, ValueError, TypeError or RuntimeError for the state of another
        kind of run.
        """
        self._check_same_inputs(state)
        self.progress = Progress(state["epoch"], state["step"], state["total_steps"])
        self._spec.student.backbone.load_state_dict(state["state_dict"])
        for name, (module, _) in self._spec.extra.items():
            module.load_state_dict(state["extra"][name])
        if self.ema is not None:
            self.result.backbone.load_state_dict(state["state_dict_ema"])
        self._spec.targets.restore(state.get("targets", {}))
        self.best = state.get("best")
        restore_optimizer(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self._ranks.is_main_process:
            for meter, kept in zip((self.window, self.pass_means), state["meters"], strict=True):
                meter.restore(kept, self._device)
            self.teacher_forwards = state["teacher_forwards"]
        self._restore_generators(state)

    def _restore_generators(self, state: dict[str, Any]) -> None:
        """Restore this rank's generators; seed them where the run had another number of ranks."""
        ranks = self._ranks
        rows = state["rng"]
        if len(rows) != ranks.size:
            seed_rank(self._config.seed, rank=ranks.rank, step=self.progress.total_steps)
            return
        torch.set_rng_state(rows[ranks.rank].clone())  # torch crashes on a view with an offset
        if state["rng_cuda"] is not None and self._device.type == "cuda":
            torch.cuda.set_rng_state(state["rng_cuda"][ranks.rank].clone(), self._device)

    def _check_same_inputs(self, state: dict[str, Any]) -> None:
        advice = "restore them, or start a new run"
        if state["data_sha256"] != self._data_sha256:
            name = self._spec.source.name
            differences = self._image_differences()
            raise DataError(
                f"the images of {name} are not those this run started with{differences}; {advice}"
            )
        before, now = state["labels"] or {}, self._spec.labels or {}
        for name, what in (("plan_sha256", "labels"), ("teachers", "teachers' weights")):
            if before.get(name) != now.get(name):
                hashes = ""
                if name == "plan_sha256":
                    hashes = f" (plan {str(before.get(name))[:8]}, here {str(now.get(name))[:8]})"
                raise LabelSetError(
                    f"the {what} are not those this run started with{hashes}; {advice}"
                )
        if state["preprocessing"] != self._preprocessing():
            raise ConfigError(
                f"the student was trained with mean and std {state['preprocessing']}, this "
                f"--initial-checkpoint has {self._preprocessing()}; give the one it started from"
            )

    def _preprocessing(self) -> list[list[float]]:
        found = self._spec.student.preprocessing
        return [list(found.mean), list(found.std)]

    def _image_differences(self) -> str:
        """Return how the images differ from those of the run to resume, as far as it is known."""
        kept = None if self._config.resume is None else image_list.read(self._config.resume)
        found = "" if kept is None else kept.differences(self._spec.source)
        only_missing = " missing" in found and " new" not in found and " changed" not in found
        advice = " (--on-bad-image skip skips them)" if only_missing else ""
        return f": {found}{advice}" if found else ""
