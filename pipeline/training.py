"""The one training loop: distil, fine-tune and what comes vary task and targets, not the loop."""

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor

from mealv2.cutmix import Mix, draw_mix
from mealv2.errors import DataError, LabelSetError, MealError, StoppedError
from mealv2.images import fingerprint
from mealv2.models import EXPORT_FOLDER, Classifier, save_classifier
from mealv2.targets import SKIPPED, Answer
from mealv2.task import Mixture, Result
from pipeline import checkpoint, logs
from pipeline.config import DEFAULT_EMA_DECAY, TrainConfig
from pipeline.loaders import Pixels, ViewReader, read_views, refuse_failures
from pipeline.meters import Meter
from pipeline.passes import Passes
from pipeline.runtime import Runtime, StopFlag, StopRequested, stop_on_signal
from pipeline.work import Work


@dataclass
class Place:
    """Where a run stands: ``step`` batches of ``epoch`` are done, ``total_steps`` in all."""

    epoch: int = 0
    step: int = 0
    total_steps: int = 0


def train(config: TrainConfig, machine: Runtime, work: Work) -> dict[str, Any]:
    """Train to the last epoch and return the report.

    Raises StoppedError when a signal came (everything is saved), DataError for an unreadable image
    or a loss that is not finite, OSError where the run folder cannot be written.
    """
    with stop_on_signal() as stop:
        return _Trainer(config, machine, work, stop).run()


class _Trainer:
    def __init__(self, config: TrainConfig, machine: Runtime, work: Work, stop: StopFlag) -> None:
        self.config = config
        self.machine = machine
        self.work = work
        self.stop = stop
        self.place = Place()
        self.window, self.epoch = Meter(), Meter()
        self.prepared = self.finished = False
        if not work.positions:
            raise DataError(f"{work.source.name} has no image to train on")
        self.data_sha256 = fingerprint(work.source)
        self.passes = Passes(config, work.source, work.positions, work.targets)
        work.task.to(machine.device)
        self.optimizer = self._make_optimizer()
        self.ema = None
        if config.model_ema:
            decay = DEFAULT_EMA_DECAY if config.model_ema_decay is None else config.model_ema_decay
            # the decay grows from 0, so that the start does not weigh on a short run (timm)
            self.ema = ModelEmaV3(work.student, decay=decay, use_warmup=True)
        # float16 gradients underflow without a scale; bfloat16 and float32 need none
        self.scaler = torch.amp.GradScaler(
            machine.device.type, enabled=machine.amp_dtype is torch.float16
        )
        if config.resume is not None and checkpoint.exists(config.resume):
            self.folder = self._resume()
        else:
            name = f"{work.command}-{config.model}"
            output = config.resume or config.output
            self.folder = logs.RunFolder.create(
                output, config.as_json(), name=name, labels=work.labels
            )

    @property
    def result(self) -> Classifier:
        """The model that the run makes: the student, or its moving average."""
        model: Classifier = self.work.student if self.ema is None else self.ema.module
        return model

    def run(self) -> dict[str, Any]:
        logs.say(f"run folder {self.folder.path}")
        try:
            return self._run()
        except StopRequested as signal_name:
            self._save()
            raise StoppedError(
                f"stopped by {signal_name} in epoch {self.place.epoch + 1}, saved; "
                f"continue with: mealv2 {self.work.command} --resume {self.folder.path}"
            ) from None

    def _run(self) -> dict[str, Any]:
        began = time.monotonic()
        place, last = self.place, self.config.epochs
        figures: dict[str, float] = {}
        if place.epoch == last and (report := self.folder.report()) is not None:
            return report
        if place.total_steps == 0 or place.epoch == last:
            figures = self._validate(place.epoch)
            self._say_start(figures)
        pixels = iter(self._read())
        while place.epoch < last:
            trained = self._train_pass(pixels)
            epoch = place.epoch + self.passes.width(place.epoch)
            interval = self.config.val_interval
            due = epoch // interval > place.epoch // interval or epoch == last
            figures = self._validate(epoch) if due else {}
            place.epoch, place.step = epoch, 0
            self._end_pass(trained, figures)
        report = {
            "run": str(self.folder.path),
            "model": self.work.student.tag,
            "epochs": place.epoch,
            "steps": place.total_steps,
            "seconds": round(time.monotonic() - began, 2),
            **({"labels": self.work.labels} if self.work.labels else {}),
            **figures,
        }
        self.folder.finish(report)
        return report

    def _train_pass(self, pixels: Iterator[Pixels]) -> dict[str, float]:
        """Train on what is left of the pass; return the mean of every part of the loss."""
        config, work, place = self.config, self.work, self.place
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * config.lr_factor(place.epoch)
        requests = self.passes.requests(place.epoch)
        if place.step == 0 and (left_out := self.passes.num_left_out(place.epoch, requests)):
            self.epoch.count({SKIPPED: left_out})
        requests = requests[place.step :]
        work.task.train()

        shown = logs.progress(
            itertools.islice(pixels, len(requests)),
            total=sum(len(views) for request in requests for _, views in request),
            what=f"epoch {place.epoch + self.passes.width(place.epoch)}/{config.epochs}",
            unit="images",
            size=lambda batch: len(batch.positions) + len(batch.failed),
        )
        for batch in self.window.timed(shown):
            # leave out what could not be read
            refuse_failures(work.source, batch.failed, config.on_bad_image)
            place.step += 1
            place.total_steps += 1
            if not batch.positions:
                continue

            # forward, backward, update
            parts, sources = self._update(batch)
            for meter in (self.window, self.epoch):
                meter.add(len(batch.positions), parts)
                meter.count(sources)

            # log: the only place where the host waits for the device
            if place.total_steps % config.log_interval == 0:
                self._log()
            if config.checkpoint_every and place.total_steps % config.checkpoint_every == 0:
                self._save()
            self.stop.check()
        if not self.epoch.num_images:
            raise DataError(
                f"epoch {place.epoch + 1}: no image of {work.source.name} could be used"
            )
        means = self._finite(self.epoch.means())
        return {**means, **self.epoch.counts}

    def _update(self, batch: Pixels) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Do one optimizer update; return the loss and its parts, still on the device, and how
        many answers came from where.
        """
        work, images_BCHW = self.work, self.machine.images(batch.images_BCHW)
        mix, mixture = self._draw_mix(len(images_BCHW)), {}
        target = None if work.cutmix is None or mix is None else work.cutmix.target
        with self.machine.autocast():
            if mix is not None and target == "teachers":
                images_BCHW = mix.paste(images_BCHW)
            answer = work.targets.answer(batch.positions, batch.views, images_BCHW)
            answer = answer.to(self.machine.device)
            if mix is not None and target == "mixed-labels":
                images_BCHW = mix.paste(images_BCHW)
                share = mix.own_share(work.img_size)
                mixture = {"mixture": Mixture(partner=answer.rows(mix.order_B), own_share=share)}
            if not self.prepared:
                self._prepare(images_BCHW, answer)
            result = self._compute(images_BCHW, answer, mixture)

        self.scaler.scale(result["loss"]).backward()  # type: ignore[no-untyped-call]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(work.student, step=self.place.total_steps)

        return {"loss": result["loss"].detach(), **result["parts"]}, answer.sources

    def _compute(self, images_BCHW: Tensor, answer: Answer, mixture: dict[str, Mixture]) -> Result:
        """Return the task's result; raises DataError for a batch too small to learn from."""
        try:
            result: Result = self.work.task(images_BCHW, answer, **mixture)
        except ValueError as error:
            if len(images_BCHW) > 1 or "per channel" not in str(error):
                raise
            raise DataError(
                f"step {self.place.total_steps} has one image, and batch normalisation cannot "
                "learn from one: use a larger --batch-size"
            ) from error
        return result

    def _draw_mix(self, batch_size: int) -> Mix | None:
        """Draw how this step's batch is mixed, if it is."""
        if self.work.cutmix is None:
            return None
        return draw_mix(
            batch_size,
            self.work.img_size,
            beta=self.work.cutmix.beta,
            probability=self.work.cutmix.probability,
            place=(self.config.seed, self.place.epoch, self.place.step),
            device=self.machine.device,
        )

    def _prepare(self, images_BCHW: Tensor, answer: Answer) -> None:
        """Let the task look at the first batch before the first step."""
        self.prepared = True
        said = self.work.task.prepare(images_BCHW, answer)
        if said is not None:
            logs.say(said)
            self.folder.log("prepared", step=self.place.total_steps, text=said)

    def _read(self) -> Iterator[Pixels]:
        """Read the pixels of every batch from here to the end of the run, passes in a row."""
        rest = self.passes.requests_from(self.place.epoch)
        loader = read_views(
            ViewReader(self.work.source, img_size=self.work.img_size, seed=self.work.view_seed),
            itertools.islice(rest, self.place.step, None),
            workers=self.config.workers,
            pin_memory=self.machine.device.type == "cuda",
        )
        return iter(loader)

    def _make_optimizer(self) -> torch.optim.SGD:
        """SGD over the student and the extra modules, a group each (paper: one joint optimizer)."""
        learners = [(self.work.student, self.config.lr), *self.work.extra.values()]
        return torch.optim.SGD(
            [
                {"params": list(module.parameters()), "lr": lr, "initial_lr": lr}
                for module, lr in learners
            ],
            momentum=self.config.momentum,
            weight_decay=self.config.weight_decay,
        )

    def _validate(self, epoch: int) -> dict[str, float]:
        """Return the result's figures after ``epoch`` epochs; none without a validation split.

        With a moving average they are the average's; the student's own accuracy stands beside.
        """
        if self.work.evaluator is None:
            return {}
        classes = self.result.num_classes
        figures = self.work.evaluator(self.result, num_classes=classes, stop=self.stop).summary()
        if self.ema is not None:
            own = self.work.evaluator(self.work.student, num_classes=classes, stop=self.stop)
            figures["student_top1"] = own.top1
        if not self.finished:  # what a finished run is asked again, it has logged
            self.folder.log("validation", epoch=epoch, **figures)
        return figures

    def _say_start(self, figures: dict[str, float]) -> None:
        """Print how good the teachers and the student are before the first step."""
        if figures:
            known = {**self.work.teachers, f"student at step {self.place.total_steps}": figures}
            rows = [[name, f"{f['top1']:.2f}", f"{f['top5']:.2f}"] for name, f in known.items()]
            logs.say(logs.table([["before training", "top-1", "top-5"], *rows]))

    def _end_pass(self, trained: dict[str, float], figures: dict[str, float]) -> None:
        """Write the epoch's row, the model and a checkpoint."""
        row = {
            "epoch": self.place.epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            **{f"train_{name}": value for name, value in trained.items()},
            **{f"val_{name}": value for name, value in figures.items() if name != "num_images"},
        }
        self.folder.epoch_row(row)
        shown = "  ".join(
            f"{name} {value:.4g}{self.work.legend.get(name, '')}"
            for name, value in row.items()
            if name != "epoch"
        )
        logs.say(f"epoch {self.place.epoch}/{self.config.epochs}  {shown}")
        save_classifier(
            self.folder.path / EXPORT_FOLDER,
            self.result,
            classes=self.work.source.classes,
            img_size=self.work.img_size,
        )
        self.epoch.clear()
        self._save()

    def _log(self) -> None:
        """Write the means since the last line to metrics.jsonl."""
        self.folder.log(
            "train",
            epoch=self.place.epoch,
            step=self.place.total_steps,
            lr=self.optimizer.param_groups[0]["lr"],
            **self._finite(self.window.means()),
            **self.window.counts,
            **self.window.speed(),
        )
        self.window.clear()

    def _finite(self, means: dict[str, float]) -> dict[str, float]:
        if all(map(math.isfinite, means.values())):
            return means
        raise DataError(
            f"the loss is {means['loss']} at step {self.place.total_steps}; lower --lr, "
            "or leave out --amp"
        )

    def _save(self) -> None:
        """Write a checkpoint: all that the rest of the run depends on.

        Raises DataError rather than keep weights that a loss which is not finite has spoilt.
        """
        self._finite(self.epoch.means())
        try:
            self.work.targets.flush()
        except (OSError, LabelSetError):
            self._save_state()  # the run can go on from here once there is room
            raise
        self._save_state()

    def _save_state(self) -> None:
        on_cuda = self.machine.device.type == "cuda"
        state = {
            "arch": self.work.student.tag,
            "args": self.config.as_json(),
            **vars(self.place),
            "state_dict": self.work.student.backbone.state_dict(),
            "extra": {name: module.state_dict() for name, (module, _) in self.work.extra.items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "meters": [self.window.state(), self.epoch.state()],
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state(self.machine.device) if on_cuda else None,
            "data_sha256": self.data_sha256,
            "labels": self.work.labels,
        }
        if self.ema is not None:
            state["state_dict_ema"] = self.result.backbone.state_dict()  # timm's name
        keep = self.config.checkpoint_hist
        checkpoint.save(self.folder.path, state, step=self.place.total_steps, keep=keep)

    def _resume(self) -> logs.RunFolder:
        """Take up the newest whole checkpoint of the run folder; return the folder."""
        assert self.config.resume is not None
        path, state, damaged = checkpoint.load_newest(self.config.resume)
        self._check_same_work(state)
        for what in damaged:
            logs.say(f"{what}; going on from the one before, {path.name}")
        try:
            self._restore(state)
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            reason = str(error).strip().split("\n")[0]
            raise MealError(f"checkpoint {path} is of another run: {reason}") from error
        self.prepared = self.place.total_steps > 0
        self.finished = self.place.epoch == self.config.epochs
        return logs.RunFolder.reopen(
            self.config.resume, epoch=self.place.epoch, step=self.place.total_steps
        )

    def _check_same_work(self, state: dict[str, Any]) -> None:
        """Raise where images, labels or teachers are not those that the run began with."""
        advice = "bring them back, or start a new run"
        if state.get("data_sha256", self.data_sha256) != self.data_sha256:
            raise DataError(
                f"the images of {self.work.source.name} are not those this run began with; {advice}"
            )
        if "labels" not in state:  # of another run, as restoring it will say
            return
        before, now = state["labels"] or {}, self.work.labels or {}
        for name, what in (("plan_sha256", "labels"), ("teachers", "teachers' weights")):
            if before.get(name) != now.get(name):
                raise LabelSetError(f"the {what} are not those this run began with; {advice}")

    def _restore(self, state: dict[str, Any]) -> None:
        self.place = Place(state["epoch"], state["step"], state["total_steps"])
        self.work.student.backbone.load_state_dict(state["state_dict"])
        for name, (module, _) in self.work.extra.items():
            module.load_state_dict(state["extra"][name])
        if self.ema is not None:
            self.result.backbone.load_state_dict(state["state_dict_ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        for meter, kept in zip((self.window, self.epoch), state["meters"], strict=True):
            meter.restore(kept, self.machine.device)
        torch.set_rng_state(state["rng"])
        if state["rng_cuda"] is not None and self.machine.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng_cuda"], self.machine.device)
