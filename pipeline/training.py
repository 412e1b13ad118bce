"""The one training loop: distil, fine-tune and what comes vary task and targets, not the loop."""

import json
import math
import signal
import time
from collections.abc import Iterator
from typing import Any

from mealv2.errors import DataError, LabelSetError, StoppedError
from mealv2.metrics import Evaluation
from mealv2.models import Classifier, save_classifier
from mealv2.targets import SKIPPED, TAUGHT
from mealv2.weights import EXPORT_FOLDER
from pipeline import beginning, checkpoint, logs
from pipeline.config import TrainConfig
from pipeline.loaders import Pixels, Request, read_views, refuse_failures
from pipeline.passes import Passes
from pipeline.prefetch import on_device
from pipeline.run_state import Place
from pipeline.runtime import Runtime, StopFlag, StopRequested, stop_on_signal
from pipeline.steps import Steps
from pipeline.work import Work


def train(config: TrainConfig, machine: Runtime, work: Work) -> dict[str, Any]:
    """Train to the last epoch and return the report; of several ranks the first one has it.

    Raises StoppedError when a signal came (everything is saved), DataError for an unreadable image
    or a loss that is not finite, OSError where the run folder cannot be written.
    """
    alone = not machine.ranks.are_several
    with stop_on_signal(signal.SIGINT, signal.SIGTERM, is_alone=alone) as stop:
        return _Trainer(config, machine, work, stop).run()


class _Trainer:
    def __init__(self, config: TrainConfig, machine: Runtime, work: Work, stop: StopFlag) -> None:
        self.config = config
        self.machine = machine
        self.work = work
        self.stop = stop
        self.ranks = machine.ranks
        if not work.positions:
            raise DataError(f"{work.source.name} has no image to train on")
        beginning.insist_on_the_same_work(config, self.ranks, work)
        self.passes = Passes(config, work.source, work.positions, work.targets)
        self.steps = Steps(config, machine, work)
        self.state = self.steps.state
        if config.compile != "off":
            self.steps.compile(self._full_batch())
        self.folder = beginning.open_folder(config, self.ranks, work, self.state)
        self.steps.prepared = self.place.total_steps > 0
        self.state.teacher_forwards += work.teacher_forwards

    def _full_batch(self) -> Request:
        """Return a request as long as that of a full batch."""
        width = self.passes.width(0)
        images = math.ceil(self.config.batch_size / width)
        return [(0, tuple(range(width)))] * min(images, len(self.work.positions))

    @property
    def place(self) -> Place:
        return self.state.place

    def run(self) -> dict[str, Any]:
        logs.say(f"run folder {self.folder.path}")
        self._say_where()
        self.steps.say_sizes(self._full_batch())
        try:
            return self._run()
        except StopRequested as signal_name:
            self._save()
            start = "torchrun … -m mealv2" if self.ranks.are_several else "mealv2"
            raise StoppedError(
                f"stopped by {signal_name} in epoch {self.place.epoch + 1}, saved; "
                f"continue with: {start} {self.work.command} --resume {self.folder.path}"
            ) from None

    def _run(self) -> dict[str, Any]:
        began = time.monotonic()
        place, last = self.place, self.config.epochs
        figures: dict[str, float] = {}
        if place.epoch == last and (report := self._finished()) is not None:
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
        self.state.collect()
        return self._finish(figures, seconds=time.monotonic() - began)

    def _finished(self) -> dict[str, Any] | None:
        """Return the report of a run that had ended; the first rank knows it."""
        text = self.ranks.text(json.dumps(self.folder.report()) if self.ranks.is_first else "")
        report: dict[str, Any] | None = json.loads(text)
        return report if report is None or self.ranks.is_first else {}

    def _finish(self, figures: dict[str, float], *, seconds: float) -> dict[str, Any]:
        """Write the report and return it; nothing on other ranks than the first."""
        if not self.ranks.is_first:
            return {}
        of_labels = {"labels": self.work.labels, "teacher_forwards": self.state.teacher_forwards}
        report = {
            "run": str(self.folder.path),
            "model": self.work.student.tag,
            "epochs": self.place.epoch,
            "steps": self.place.total_steps,
            "seconds": round(seconds, 2),
            **(of_labels if self.work.labels else {}),
            **figures,
        }
        self.folder.finish(report)
        return report

    def _train_pass(self, pixels: Iterator[Pixels]) -> dict[str, float]:
        """Train on what is left of the pass; return the mean of every part of the loss."""
        config, work, place = self.config, self.work, self.place
        self.state.set_lr(config.lr_factor(place.epoch))
        requests = self.passes.requests(place.epoch)
        left_out = self.passes.num_left_out(place.epoch, requests)
        if place.step == 0 and left_out and self.ranks.is_first:
            self.state.pass_means.count({SKIPPED: left_out})
        requests = requests[place.step :]
        work.task.train()

        shown = logs.progress(
            zip(requests, pixels, strict=False),
            total=sum(map(_num_views, requests)),
            what=f"epoch {place.epoch + self.passes.width(place.epoch)}/{config.epochs}",
            unit="images",
            size=lambda item: _num_views(item[0]),
        )
        for _, batch in self.state.window.timed(shown):
            # leave out what could not be read
            refuse_failures(work.source, batch.failed, config.on_bad_image)
            batch = self.steps.usable(batch)
            place.step += 1
            place.total_steps += 1
            num_views, stopped_by = self.ranks.agree(len(batch.positions), self.stop.signal_name)
            if num_views == 0:
                continue

            # forward, backward, update
            for learned in self.steps.update(batch, num_views):
                for meter in (self.state.window, self.state.pass_means):
                    meter.add(learned.num_views, learned.parts)
                    meter.count(learned.sources)
                self.state.teacher_forwards += learned.sources.get(TAUGHT, 0)
            self._tell_prepared()

            # log: the only place where the host waits for the device
            if place.total_steps % config.log_interval == 0:
                self._log()
            if config.checkpoint_every and place.total_steps % config.checkpoint_every == 0:
                self._save()
            if stopped_by is not None:
                raise StopRequested(stopped_by)
        self.state.pass_means.collect(self.ranks)
        if self.ranks.is_first and not self.state.pass_means.num_images:
            raise DataError(
                f"epoch {place.epoch + 1}: no image of {work.source.name} could be used"
            )
        means = self._finite(self.state.pass_means.means())
        return {**means, **self.state.pass_means.counts}

    def _tell_prepared(self) -> None:
        """Say and log what the task found in the first batch."""
        if self.steps.told is not None:
            logs.say(self.steps.told)
            self.folder.log("prepared", step=self.place.total_steps, text=self.steps.told)
            self.steps.told = None

    def _read(self) -> Iterator[Pixels]:
        """Read the pixels of every batch from here to the end of the run, passes in a row."""
        loader = read_views(
            self.work.reader(),
            self.passes.requests_from(self.place.epoch, self.place.step, share=self.steps.share),
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
        figures = self._evaluated(self.state.result).summary()
        if self.state.ema is not None:
            figures["student_top1"] = self._evaluated(self.work.student).top1
        if (
            self.place.epoch < self.config.epochs
        ):  # a finished run that is asked again has logged it
            self.folder.log("validation", epoch=epoch, **figures)
        return figures

    def _evaluated(self, model: Classifier) -> Evaluation:
        """Return the figures of a model, the same on all ranks."""
        assert self.work.evaluator is not None
        # each rank has its own statistics of batch normalisation
        self.ranks.same(list(model.buffers()))
        return self.work.evaluator(model, num_classes=model.num_classes, stop=self.stop)

    def _say_where(self) -> None:
        """Say where a run that was taken up goes on."""
        epoch, last = self.place.epoch, self.config.epochs
        if self.place.total_steps == 0 or epoch == last:
            return
        logs.say(
            f"goes on in epoch {epoch + 1}/{last} after {self.place.step} of its "
            f"{len(self.passes.requests(epoch))} steps ({self.place.total_steps} in all)"
        )

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
        if self.ranks.is_first:
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
        self.state.window.collect(self.ranks)
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
        """Write a checkpoint: all that the rest of the run depends on; the first rank writes it.

        No rank goes on before it is there: one that ended would take the others along. Raises
        DataError rather than keep weights that a loss which is not finite has spoilt.
        """
        self.state.collect()
        self._finite(self.state.pass_means.means())
        try:
            self.work.targets.flush()
        except (OSError, LabelSetError):
            self._save_state()  # the run can go on from here once there is room
            raise
        self._save_state()

    def _save_state(self) -> None:
        keep, step = self.config.checkpoint_hist, self.place.total_steps
        state = self.state.as_dict()
        if self.ranks.is_first:
            checkpoint.save(self.folder.path, state, step=step, keep=keep)
        self.ranks.wait()


def _num_views(request: Request) -> int:
    return sum(len(views) for _, views in request)
