"""What a training run prints and logs: notes before it, a line each epoch, the rest in files."""

import time

from mealv2.batches import num_steps, updates_per_epoch
from mealv2.models.layers import PERCENTILES, find_parameters, percentiles_of
from mealv2.runtime import library_versions
from mealv2.task import GRADIENT_RATIO
from pipeline import console
from pipeline.config import TrainConfig
from pipeline.runtime import env
from pipeline.runtime.device import Runtime
from pipeline.training.result import early_stop_message
from pipeline.training.run_folder import SESSION, WEIGHTS, RunFolder
from pipeline.training.spec import TrainingSpec
from pipeline.training.state import TrainingState
from pipeline.training.trackers import Trackers

FEW_STEPS = 4  # of an epoch
# means of an epoch; above both the discriminator wins
MAX_ACCURACY, MAX_GRADIENT_RATIO = 0.95, 0.5
_COLUMNS = {"top1": "top-1", "top5": "top-5"}
_MULTI_LABEL_COLUMNS = {"map": "mAP", "map_11point": "11-point mAP"}
_OF_EPOCH = {"top1": "top-1", **_MULTI_LABEL_COLUMNS, "ap": "AP", "ap50": "AP50"}
_OF_EPOCH |= {"agreement": "agreement"}
LOW_LR = "1e-4"  # of a discriminator that does not win


class RunLog:
    """The log of a run: stderr, metrics.jsonl, summary.csv and trackers.

    Ranks other than the main one print nothing, have a folder that writes nothing and no trackers.
    """

    def __init__(
        self,
        config: TrainConfig,
        spec: TrainingSpec,
        state: TrainingState,
        folder: RunFolder,
        trackers: Trackers | None,
    ) -> None:
        self._config = config
        self._spec = spec
        self._state = state
        self._folder = folder
        self._trackers = trackers
        # by this run before it was resumed, in an epoch that does not run again
        self._has_warned = 0 <= folder.logged.get("discriminator", -1) <= state.progress.epoch
        self._start: tuple[float, float] | None = None  # seconds and epochs

    def print_start(self, *, steps_of_pass: int) -> None:
        """Print the run folder, where a resumed run continues, and notes on a new one."""
        console.info(f"run folder {self._folder.path}")
        progress, num_epochs = self._state.progress, self._config.epochs
        if progress.total_steps == 0:
            self._print_steps()
            for note in self._spec.notes:
                console.info(note)
        elif message := early_stop_message(
            self._config, self._state, self._folder.path, metric=self._spec.metric
        ):
            console.info(message)
        elif progress.epoch < num_epochs:
            console.info(
                f"resuming in epoch {progress.epoch + 1}/{num_epochs} after {progress.step} of its "
                f"{steps_of_pass} steps ({progress.total_steps} in all)"
            )

    def log_session(self, runtime: Runtime) -> None:
        """Log that this process trains from here on: command, ranks, device, versions."""
        command = env.typed_command(self._spec.command)
        self._folder.log(
            SESSION,
            step=self._state.progress.total_steps,
            **({} if command is None else {"command": command}),
            ranks=runtime.ranks.size,
            device=runtime.device_name,
            precision=runtime.precision,
            versions=library_versions(),
        )

    def _print_steps(self) -> None:
        """Report that an epoch has few steps."""
        num_images, size = len(self._spec.positions), self._config.batch_size
        per_epoch = updates_per_epoch(self._config, num_images)
        is_few = self._config.max_steps is None and per_epoch < FEW_STEPS
        if is_few and num_images > FEW_STEPS:
            total = num_steps(self._config, num_images)
            console.info(
                f"{num_images} images at --batch-size {size}: {per_epoch:g} "
                f"step{'s' * (per_epoch != 1)} an epoch, "
                f"{total} in all; a smaller --batch-size or more --epochs takes more steps"
            )

    def print_accuracies(self, metrics: dict[str, float]) -> None:
        """Print the accuracy of the teachers and of the student before the next step."""
        if metrics:
            step = self._state.progress.total_steps
            known = {**self._spec.teachers, f"student at step {step}": metrics}
            if self._spec.teachers:  # labels that are made online are in no label set
                self._folder.log("teachers", step=step, accuracies=self._spec.teachers)
            is_multi_label = self._spec.metric != "top1"
            columns = _MULTI_LABEL_COLUMNS if is_multi_label else _COLUMNS
            rows = [[name, *(f"{m[c]:.2f}" for c in columns)] for name, m in known.items()]
            console.info(console.table([["before training", *columns.values()], *rows]))

    # --- a pass -----------------------------------------------------------------------------------

    def bar(self, num_views: int, *, last_epoch: int, epochs_of_step: float) -> console.ProgressBar:
        """Return the progress bar of a pass that ends with ``last_epoch``, over ``num_views``.

        Beside it are the loss and when the run ends. A step is ``epochs_of_step`` epochs.
        """
        if self._start is None:
            self._start = time.monotonic(), self._epochs_done(epochs_of_step)

        def note() -> str:
            loss = self._state.window.means().get("loss")  # waits for the device
            end = f"run ETA {console.clock(self._eta_s(epochs_of_step))}"
            return end if loss is None else f"loss {loss:.4f}, {end}"

        what = f"epoch {last_epoch}/{self._config.epochs}"
        return console.ProgressBar(num_views, what=what, unit="images", note=note)

    def _epochs_done(self, epochs_of_step: float = 0.0) -> float:
        progress = self._state.progress
        return progress.epoch + progress.step * epochs_of_step

    def _eta_s(self, epochs_of_step: float = 0.0) -> float:
        """Return the seconds to the end of the run, at the pace since this process began."""
        assert self._start is not None
        start_s, first = self._start
        done = self._epochs_done(epochs_of_step)
        pace_s = (time.monotonic() - start_s) / max(done - first, 1e-9)
        return (self._config.epochs - done) * pace_s

    def log_metrics(self, means: dict[str, float]) -> None:
        """Log the means, counts and speed since the last event of steps."""
        window, progress = self._state.window, self._state.progress
        step, figures = progress.total_steps, means | window.counts | window.speed()
        figures = {"lr": self._state.lr, **figures}
        self._folder.log("train", epoch=progress.epoch, step=step, **figures)
        self._track("train", figures, at=step)

    def _track(self, event: str, figures: dict[str, float], *, at: int, folder: str = "") -> None:
        """Send an event of this step to the trackers, its figures in a folder of that name."""
        if self._trackers is not None:
            named = {f"{folder or event}/{name}": value for name, value in figures.items()}
            step = self._state.progress.total_steps
            self._trackers.log(event, named, step=step, at=at)

    # --- after an epoch ---------------------------------------------------------------------------

    def log_epoch(
        self, trained: dict[str, float], metrics: dict[str, float], *, images_per_second: float
    ) -> None:
        """Print the line of an epoch; write all its figures to files and trackers.

        ``trained`` are the means and counts of its training, ``metrics`` those of its validation.
        """
        if not trained:  # the main rank has the means of all
            return
        progress = self._state.progress
        row = {
            "epoch": progress.epoch,
            "lr": self._state.lr,
            **{f"train_{name}": value for name, value in trained.items()},
            **{f"val_{name}": value for name, value in metrics.items() if name != "num_images"},
        }
        self._folder.log_epoch(row)
        self.log_weights()
        # not "step": a checkpoint of the same step may be from before the end of the epoch
        speed = {"images_per_second": images_per_second}
        self._folder.log("epoch", steps=progress.total_steps, **row, **speed)
        self._track("epoch", {"epoch": progress.epoch, **trained, **speed}, at=progress.epoch)
        num_epochs = self._config.epochs
        parts = [f"epoch {progress.epoch}/{num_epochs}", f"loss {trained['loss']:.4f}"]
        for name, title in _OF_EPOCH.items():
            if name in metrics:
                parts.append(f"{title} {metrics[name]:.2f}")
        if skipped := trained.get("images_skipped"):
            parts.append(f"skipped {skipped:.0f}")
        parts.append(f"lr {self._state.lr:.3g}")
        if images_per_second:
            parts.append(f"{images_per_second:.0f} img/s")
        if progress.epoch < num_epochs and self._start is not None:
            parts.append(f"ETA {console.clock(self._eta_s())}")
        console.info("  ".join(parts))
        self._warn_of_discriminator(trained)

    def _warn_of_discriminator(self, trained: dict[str, float]) -> None:
        """Report once that the discriminator tells student and teachers apart, and acts on it."""
        accuracy = trained.get("discriminator_accuracy", 0.0)
        ratio = trained.get(GRADIENT_RATIO, 0.0)
        if self._has_warned or accuracy <= MAX_ACCURACY or ratio <= MAX_GRADIENT_RATIO:
            return
        self._has_warned = True
        _, lr = self._spec.extra["discriminator"]
        advice = f"--discriminator-lr {LOW_LR}" if lr > float(LOW_LR) else "--discriminator off"
        text = (
            f"the discriminator wins: accuracy {accuracy:.3f}, and its gradient on the student is "
            f"{ratio:.2f} of that of the labels; with few classes this costs accuracy: use {advice}"
        )
        console.info(text)
        self._folder.log("discriminator", epoch=self._state.progress.epoch, text=text)

    def log_weights(self) -> None:
        """Log percentiles of the weights of the --log-weights layers, of the result so far."""
        epoch = self._state.progress.epoch
        # the start of a run that stopped before its first step may have been logged
        if not self._config.log_weights or (epoch == 0 and WEIGHTS in self._folder.logged):
            return
        layers = find_parameters(self._state.result.backbone, self._config.log_weights)
        for layer, weights in layers.items():
            values = percentiles_of(weights)
            self._folder.log(
                WEIGHTS, epoch=epoch, layer=layer, percentiles=PERCENTILES, values=values
            )

    def log_validation(self, epoch: int, metrics: dict[str, float]) -> None:
        """Log the metrics after ``epoch`` epochs."""
        self._folder.log("validation", epoch=epoch, **metrics)
        self._track("validation", metrics, at=epoch, folder="val")

    def log_task_warning(self, text: str) -> None:
        """Print and log what the task found in the first batch."""
        console.info(text)
        self._folder.log("prepared", step=self._state.progress.total_steps, text=text)
