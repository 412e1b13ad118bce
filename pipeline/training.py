"""The one training loop: distil, fine-tune and what comes vary task and targets, not the loop."""

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mealv2.errors import DataError, MealError, StoppedError
from mealv2.images import ImageSource
from mealv2.models import (
    EXPORT_FOLDER,
    Classifier,
    Preprocessing,
    create_classifier,
    save_classifier,
)
from mealv2.targets import Targets
from pipeline import checkpoint, logs
from pipeline.config import TrainConfig
from pipeline.evaluation import Evaluator
from pipeline.loaders import (
    Pixels,
    Request,
    ViewReader,
    batches,
    epoch_order,
    read_views,
    refuse_failures,
)
from pipeline.meters import Meter
from pipeline.runtime import Runtime, StopFlag, StopRequested, stop_on_signal


@dataclass(frozen=True)
class Work:
    """What a run trains and on what: everything the loop does not decide itself.

    An epoch uses the images of ``source`` at ``positions``, each with the view that ``targets``
    names, cut under ``view_seed``. ``extra`` are modules beside the student that learn too, each
    with its initial learning rate. ``teachers`` are the accuracies to print before the first step.
    """

    command: str
    task: nn.Module
    student: Classifier
    source: ImageSource
    positions: list[int]
    targets: Targets
    img_size: int
    view_seed: int
    evaluator: Evaluator | None
    extra: dict[str, tuple[nn.Module, float]] = field(default_factory=dict)
    teachers: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass
class Place:
    """Where a run stands: ``step`` batches of ``epoch`` are done, ``total_steps`` in all."""

    epoch: int = 0
    step: int = 0
    total_steps: int = 0


def make_student(config: TrainConfig, *, classes: list[str], img_size: int) -> Classifier:
    """Build the student from timm's weights, a checkpoint, or at random."""
    given = Preprocessing(config.mean, config.std) if config.mean and config.std else None
    return create_classifier(
        config.model,
        num_classes=len(classes),
        pretrained=config.from_pretrained,
        checkpoint=config.initial_checkpoint,
        img_size=img_size,
        classes=classes,
        preprocessing=given,
        new_head=True,
    )


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
        if not work.positions:
            raise DataError(f"{work.source.name} has no image to train on")
        work.task.to(machine.device)
        self.optimizer = self._make_optimizer()
        # float16 gradients underflow without a scale; bfloat16 and float32 need none
        self.scaler = torch.amp.GradScaler(
            machine.device.type, enabled=machine.amp_dtype is torch.float16
        )
        if config.resume is not None and checkpoint.exists(config.resume):
            state = checkpoint.load_newest(config.resume)
            try:
                self._restore(state)
            except (KeyError, ValueError, RuntimeError, TypeError) as error:
                reason = str(error).strip().split("\n")[0]
                raise MealError(
                    f"checkpoint {checkpoint.newest(config.resume)} is damaged or of another run: "
                    f"{reason}; remove it to use the one before"
                ) from error
            place = self.place
            self.folder = logs.RunFolder.reopen(
                config.resume, epoch=place.epoch, step=place.total_steps
            )
        else:
            name = f"{work.command}-{config.model}"
            output = config.resume or config.output
            self.folder = logs.RunFolder.create(output, config.as_json(), name=name)

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
        if place.total_steps == 0 or place.epoch == last:
            figures = self._validate(place.epoch)
            self._say_start(figures)
        pixels = iter(self._read())
        while place.epoch < last:
            trained = self._train_epoch(pixels)
            epoch = place.epoch + 1
            due = epoch % self.config.val_interval == 0 or epoch == last
            figures = self._validate(epoch) if due else {}
            place.epoch, place.step = epoch, 0
            self._end_epoch(trained, figures)
        report = {
            "run": str(self.folder.path),
            "model": self.work.student.tag,
            "epochs": place.epoch,
            "steps": place.total_steps,
            "seconds": round(time.monotonic() - began, 2),
            **figures,
        }
        self.folder.finish(report)
        return report

    def _train_epoch(self, pixels: Iterator[Pixels]) -> dict[str, float]:
        """Train on what is left of the epoch; return the mean of every part of the loss."""
        config, work, place = self.config, self.work, self.place
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * config.lr_factor(place.epoch)
        requests = self._requests(place.epoch)[place.step :]
        window, epoch = Meter(), Meter()
        work.task.train()

        shown = logs.progress(
            itertools.islice(pixels, len(requests)),
            total=sum(map(len, requests)),
            what=f"epoch {place.epoch + 1}/{config.epochs}",
            unit="images",
            size=lambda batch: len(batch.positions) + len(batch.failed),
        )
        for batch in window.timed(shown):
            # leave out what could not be read
            refuse_failures(work.source, batch.failed, config.on_bad_image)
            place.step += 1
            place.total_steps += 1
            if not batch.positions:
                continue

            # forward, backward, update
            parts = self._update(batch)
            for meter in (window, epoch):
                meter.add(len(batch.positions), parts)

            # log: the only place where the host waits for the device
            if place.total_steps % config.log_interval == 0:
                self._log(window)
            self.stop.check()
        if not epoch.num_images and requests:  # a resumed epoch may have none left
            raise DataError(f"no image of {work.source.name} could be read")
        return self._finite(epoch.means())

    def _update(self, batch: Pixels) -> dict[str, Tensor]:
        """Do one optimizer update; return the loss and its parts, still on the device."""
        answers = self.work.targets.answer(batch.positions, batch.views)
        images_BCHW = self.machine.images(batch.images_BCHW)
        with self.machine.autocast():
            result = self.work.task(images_BCHW, answers.to(self.machine.device))

        self.scaler.scale(result["loss"]).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

        return {"loss": result["loss"].detach(), **result["parts"]}

    def _read(self) -> Iterator[Pixels]:
        """Read the pixels of every batch from here to the end of the run, epochs in a row."""
        rest = (
            request
            for epoch in range(self.place.epoch, self.config.epochs)
            for request in self._requests(epoch)
        )
        loader = read_views(
            ViewReader(self.work.source, img_size=self.work.img_size, seed=self.work.view_seed),
            itertools.islice(rest, self.place.step, None),
            workers=self.config.workers,
            pin_memory=self.machine.device.type == "cuda",
        )
        return iter(loader)

    def _requests(self, epoch: int) -> list[Request]:
        """Return an epoch's batches: every image once, with the view that the targets name."""
        positions, keys, view = self.work.positions, self.work.source.keys, self.work.targets.view
        order = epoch_order(len(positions), seed=self.config.seed, epoch=epoch)
        in_order = [positions[i] for i in order]
        return [
            [(p, (view(keys[p], epoch),)) for p in batch]
            for batch in batches(in_order, self.config.batch_size)
        ]

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
        """Return the student's figures after ``epoch`` epochs; none without a validation split."""
        if self.work.evaluator is None:
            return {}
        student, classes = self.work.student, self.work.student.num_classes
        figures = self.work.evaluator(student, num_classes=classes, stop=self.stop).summary()
        self.folder.log("validation", epoch=epoch, **figures)
        return figures

    def _say_start(self, figures: dict[str, float]) -> None:
        """Print how good the teachers and the student are before the first step."""
        if figures:
            known = {**self.work.teachers, f"student at step {self.place.total_steps}": figures}
            rows = [[name, f"{f['top1']:.2f}", f"{f['top5']:.2f}"] for name, f in known.items()]
            logs.say(logs.table([["before training", "top-1", "top-5"], *rows]))

    def _end_epoch(self, trained: dict[str, float], figures: dict[str, float]) -> None:
        """Write the epoch's row, the model and a checkpoint."""
        row = {
            "epoch": self.place.epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            **{f"train_{name}": value for name, value in trained.items()},
            **{f"val_{name}": value for name, value in figures.items() if name != "num_images"},
        }
        self.folder.epoch_row(row)
        shown = "  ".join(f"{name} {row[name]:.4g}" for name in row if name != "epoch")
        logs.say(f"epoch {self.place.epoch}/{self.config.epochs}  {shown}")
        save_classifier(
            self.folder.path / EXPORT_FOLDER,
            self.work.student,
            classes=self.work.source.classes,
            img_size=self.work.img_size,
        )
        self._save()

    def _log(self, window: Meter) -> None:
        """Write the means since the last line to metrics.jsonl."""
        self.folder.log(
            "train",
            epoch=self.place.epoch,
            step=self.place.total_steps,
            lr=self.optimizer.param_groups[0]["lr"],
            **self._finite(window.means()),
            **window.speed(),
        )
        window.clear()

    def _finite(self, means: dict[str, float]) -> dict[str, float]:
        if all(map(math.isfinite, means.values())):
            return means
        raise DataError(
            f"the loss is {means['loss']} at step {self.place.total_steps}; lower --lr, "
            "or leave out --amp"
        )

    def _save(self) -> None:
        on_cuda = self.machine.device.type == "cuda"
        state = {
            "arch": self.work.student.tag,
            "args": self.config.as_json(),
            **vars(self.place),
            "state_dict": self.work.student.backbone.state_dict(),
            "extra": {name: module.state_dict() for name, (module, _) in self.work.extra.items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state_all() if on_cuda else [],
        }
        keep = self.config.checkpoint_hist
        checkpoint.save(self.folder.path, state, step=self.place.total_steps, keep=keep)

    def _restore(self, state: dict[str, Any]) -> None:
        self.place = Place(state["epoch"], state["step"], state["total_steps"])
        self.work.student.backbone.load_state_dict(state["state_dict"])
        for name, (module, _) in self.work.extra.items():
            module.load_state_dict(state["extra"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
        if state["rng_cuda"] and self.machine.device.type == "cuda":
            torch.cuda.set_rng_state_all(state["rng_cuda"])
