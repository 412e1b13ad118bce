"""The one training loop: distil, fine-tune and what comes vary task and targets, not the loop."""

import itertools
import math
import signal
import time
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from mealv2.cutmix import Mix, draw_mix
from mealv2.errors import DataError, LabelSetError, MealError, StoppedError
from mealv2.models import save_classifier
from mealv2.targets import SKIPPED, Answer
from mealv2.task import Mixture, Result
from mealv2.weights import EXPORT_FOLDER
from pipeline import checkpoint, logs
from pipeline.compiling import Compiler
from pipeline.config import TrainConfig
from pipeline.loaders import Pixels, read_views, refuse_failures
from pipeline.passes import Passes
from pipeline.prefetch import on_device
from pipeline.run_state import Place, RunState
from pipeline.runtime import Runtime, StopFlag, StopRequested, stop_on_signal
from pipeline.work import Work


def train(config: TrainConfig, machine: Runtime, work: Work) -> dict[str, Any]:
    """Train to the last epoch and return the report.

    Raises StoppedError when a signal came (everything is saved), DataError for an unreadable image
    or a loss that is not finite, OSError where the run folder cannot be written.
    """
    with stop_on_signal(signal.SIGINT, signal.SIGTERM) as stop:
        return _Trainer(config, machine, work, stop).run()


class _Trainer:
    def __init__(self, config: TrainConfig, machine: Runtime, work: Work, stop: StopFlag) -> None:
        self.config = config
        self.machine = machine
        self.work = work
        self.stop = stop
        self.prepared = False
        if not work.positions:
            raise DataError(f"{work.source.name} has no image to train on")
        self.passes = Passes(config, work.source, work.positions, work.targets)
        machine.place(work.task)
        if config.compile != "off":
            compiler = Compiler(config.compile, self._batch_size)
            work.task.through = compiler.compiled(work.student)
        self.state = RunState(config, machine, work)
        if config.resume is not None and checkpoint.exists(config.resume):
            self.folder = self._resume()
        else:
            name = f"{work.command}-{config.model}"
            output = config.resume or config.output
            self.folder = logs.RunFolder.create(
                output, config.as_json(), name=name, labels=work.labels
            )

    @property
    def place(self) -> Place:
        return self.state.place

    @property
    def _batch_size(self) -> int:
        """How many views a full batch has."""
        width = self.passes.width(0)
        images = math.ceil(self.config.batch_size / width)
        return min(images, len(self.work.positions)) * width

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
        self.state.set_lr(config.lr_factor(place.epoch))
        requests = self.passes.requests(place.epoch)
        if place.step == 0 and (left_out := self.passes.num_left_out(place.epoch, requests)):
            self.state.pass_means.count({SKIPPED: left_out})
        requests = requests[place.step :]
        work.task.train()

        shown = logs.progress(
            itertools.islice(pixels, len(requests)),
            total=sum(len(views) for request in requests for _, views in request),
            what=f"epoch {place.epoch + self.passes.width(place.epoch)}/{config.epochs}",
            unit="images",
            size=lambda batch: len(batch.positions) + len(batch.failed),
        )
        for batch in self.state.window.timed(shown):
            # leave out what could not be read
            refuse_failures(work.source, batch.failed, config.on_bad_image)
            place.step += 1
            place.total_steps += 1
            if not batch.positions:
                continue

            # forward, backward, update
            parts, sources = self._update(batch)
            for meter in (self.state.window, self.state.pass_means):
                meter.add(len(batch.positions), parts)
                meter.count(sources)

            # log: the only place where the host waits for the device
            if place.total_steps % config.log_interval == 0:
                self._log()
            if config.checkpoint_every and place.total_steps % config.checkpoint_every == 0:
                self._save()
            self.stop.check()
        if not self.state.pass_means.num_images:
            raise DataError(
                f"epoch {place.epoch + 1}: no image of {work.source.name} could be used"
            )
        means = self._finite(self.state.pass_means.means())
        return {**means, **self.state.pass_means.counts}

    def _update(self, batch: Pixels) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Do one optimizer update; return the loss and its parts, still on the device, and how
        many answers came from where.
        """
        work, images_BCHW, device = self.work, batch.images_BCHW, self.machine.device
        mix, mixture = self._draw_mix(len(images_BCHW)), {}
        target = None if work.cutmix is None or mix is None else work.cutmix.target
        with self.machine.autocast():
            if mix is not None and target == "teachers":
                images_BCHW = mix.to(device).paste(images_BCHW)
            answer = work.targets.answer(batch.positions, batch.views, images_BCHW)
            if mix is not None and target == "mixed-labels":
                images_BCHW = mix.to(device).paste(images_BCHW)
                # of stored labels while they are on the CPU: of records on a GPU it would wait
                partner = answer.rows(mix.order_B).to(device)
                share = mix.own_share(work.img_size)
                mixture = {"mixture": Mixture(partner=partner, own_share=share)}
            answer = answer.to(device)
            if not self.prepared:
                self._prepare(images_BCHW, answer)
            result = self._compute(images_BCHW, answer, mixture)

        self.state.backward(result["loss"])
        self.state.update()

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
        loader = read_views(
            self.work.reader(),
            self.passes.requests_from(self.place.epoch, self.place.step),
            workers=self.config.workers,
            pin_memory=self.machine.pins,
        )
        return on_device(loader, self.machine.device)

    def _validate(self, epoch: int) -> dict[str, float]:
        """Return the result's figures after ``epoch`` epochs; none without a validation split.

        With a moving average they are the average's; the student's own accuracy stands beside.
        """
        if self.work.evaluator is None:
            return {}
        classes = self.state.result.num_classes
        figures = self.work.evaluator(
            self.state.result, num_classes=classes, stop=self.stop
        ).summary()
        if self.state.ema is not None:
            own = self.work.evaluator(self.work.student, num_classes=classes, stop=self.stop)
            figures["student_top1"] = own.top1
        if (
            self.place.epoch < self.config.epochs
        ):  # a finished run that is asked again has logged it
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
            "lr": self.state.lr,
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
            self.state.result,
            classes=self.work.source.classes,
            img_size=self.work.img_size,
        )
        self.state.pass_means.clear()
        self._save()

    def _log(self) -> None:
        """Write the means since the last line to metrics.jsonl."""
        self.folder.log(
            "train",
            epoch=self.place.epoch,
            step=self.place.total_steps,
            lr=self.state.lr,
            **self._finite(self.state.window.means()),
            **self.state.window.counts,
            **self.state.window.speed(),
        )
        self.state.window.clear()

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
        self._finite(self.state.pass_means.means())
        try:
            self.work.targets.flush()
        except (OSError, LabelSetError):
            self._save_state()  # the run can go on from here once there is room
            raise
        self._save_state()

    def _save_state(self) -> None:
        keep, step = self.config.checkpoint_hist, self.place.total_steps
        checkpoint.save(self.folder.path, self.state.as_dict(), step=step, keep=keep)

    def _resume(self) -> logs.RunFolder:
        """Take up the newest whole checkpoint of the run folder; return the folder."""
        assert self.config.resume is not None
        path, state, damaged = checkpoint.load_newest(self.config.resume)
        for what in damaged:
            logs.say(f"{what}; going on from the one before, {path.name}")
        try:
            self.state.restore(state)
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            reason = str(error).strip().split("\n")[0]
            raise MealError(f"checkpoint {path} is of another run: {reason}") from error
        self.prepared = self.place.total_steps > 0
        return logs.RunFolder.reopen(
            self.config.resume, epoch=self.place.epoch, step=self.place.total_steps
        )
