"""The one training loop: distil, finetune and others vary its task and targets, not the loop."""

import itertools
import math
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from mealv2.batches import BatchSampler
from mealv2.data.loader import WaitTimer, on_device
from mealv2.data.requests import Batch, BatchRequest, check_failures, num_views_of
from mealv2.errors import DataError, LabelSetError, StoppedError
from mealv2.models import Classifier
from mealv2.models.layers import find_parameters
from mealv2.targets import ONLINE, SKIPPED
from pipeline.config import TrainConfig
from pipeline.loading.cache import image_cache
from pipeline.runtime.device import Runtime
from pipeline.runtime.signals import StopFlag, StopRequested, stop_on_signal
from pipeline.training import checkpoint
from pipeline.training.result import RunResult, best_step, is_stopped_early, update_best
from pipeline.training.resume import open_run, require_same_inputs
from pipeline.training.run_log import RunLog
from pipeline.training.spec import TrainingSpec
from pipeline.training.step import TrainStep
from pipeline.training.trackers import Trackers

IMAGES_SKIPPED = "images_skipped"  # that cannot be read, in the log


def train(config: TrainConfig, runtime: Runtime, spec: TrainingSpec) -> dict[str, Any]:
    """Train to the last epoch and return the report; of several ranks the main one has it.

    Raises StoppedError after a signal (everything is saved), DataError for an unreadable image or a
    loss that is not finite, OSError where the run folder cannot be written.
    """
    alone = not runtime.ranks.is_distributed
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    with stop_on_signal(*signals, is_alone=alone) as stop, ExitStack() as stack:
        return _Trainer(config, runtime, spec, stop, stack).run()


class _Trainer:
    def __init__(
        self,
        config: TrainConfig,
        runtime: Runtime,
        spec: TrainingSpec,
        stop: StopFlag,
        stack: ExitStack,
    ) -> None:
        self.config = config
        self.runtime = runtime
        self.spec = spec
        self.stop = stop
        self.ranks = runtime.ranks
        if not spec.positions:
            raise DataError(f"{spec.source.name} has no image to train on")
        require_same_inputs(config, self.ranks, spec)
        find_parameters(spec.student.backbone, config.log_weights)  # before anything is written
        self.sampler = BatchSampler(config, spec.source, spec.positions, spec.targets)
        self.step = TrainStep(config, runtime, spec)
        self.state = self.step.state
        self.step.compile(self.sampler.full_batch())
        self.folder = open_run(config, self.ranks, spec, self.state, stack)
        self.progress = self.state.progress
        trackers = None
        if self.ranks.is_main_process:
            steps = self.progress.total_steps
            trackers = Trackers(config, self.folder, stack, total_steps=steps)
        self.log = RunLog(config, spec, self.state, self.folder, trackers)
        is_resumed = self.progress.total_steps > 0
        self.result = RunResult(config, self.ranks, spec, self.folder, is_resumed=is_resumed)
        self.step.is_prepared = is_resumed
        self.state.teacher_forwards += spec.teacher_forwards

    def run(self) -> dict[str, Any]:
        is_over = self.progress.epoch == self.config.epochs
        num_steps = 0 if is_over else len(self.sampler.batches(self.progress.epoch))
        self.log.print_start(steps_of_pass=num_steps)
        self.step.log_sizes(self.sampler.full_batch())
        try:
            return self._run()
        except StopRequested as signal_name:
            self._save()
            start = "torchrun … -m mealv2" if self.ranks.is_distributed else "mealv2"
            raise StoppedError(
                f"stopped by {signal_name} in epoch {self.progress.epoch + 1}, saved; "
                f"continue with: {start} {self.spec.command} --resume {self.folder.path}"
            ) from None

    def _run(self) -> dict[str, Any]:
        start_s = time.monotonic()
        progress, num_epochs = self.progress, self.config.epochs
        metrics: dict[str, float] = {}
        if self._is_over() and (report := self.result.finished_report(self.state)) is not None:
            return report
        self.log.log_session(self.runtime)
        if (progress.total_steps == 0 and self.spec.validates_start) or self._is_over():
            metrics = self._validate(progress.epoch)
            self.log.print_accuracies(metrics)
        if progress.total_steps == 0 and self.ranks.is_main_process:
            self.log.log_weights()
        batches = WaitTimer(self._read())
        while not self._is_over():
            train_metrics, images_per_second = self._train_pass(batches)
            epoch = progress.epoch + self.sampler.num_epochs(progress.epoch)
            interval = self.config.val_interval
            is_due = epoch // interval > progress.epoch // interval or epoch == num_epochs
            metrics = self._validate(epoch) if is_due else {}
            progress.epoch, progress.step = epoch, 0
            self._end_pass(train_metrics, metrics, images_per_second=images_per_second)
        self.state.collect()
        return self.result.finalize(self.state, metrics, seconds=time.monotonic() - start_s)

    def _is_over(self) -> bool:
        return self.progress.epoch == self.config.epochs or is_stopped_early(
            self.config, self.state
        )

    def _steps_left(self) -> int | None:
        """Return how many steps a run of --iterations still has; None for all of its epochs."""
        limit = self.config.max_steps
        return None if limit is None else limit - self.progress.total_steps

    # --- one pass over the images -----------------------------------------------------------------

    def _read(self) -> Iterator[Batch]:
        """Read the images of every batch from here to the end of the run, passes in a row."""
        requests = self.sampler.batches_from(
            self.progress.epoch, self.progress.step, local=self.step.local_rows
        )
        loader = self.spec.load(
            map(self._with_labels, itertools.islice(requests, self._steps_left())),
            cache=image_cache(self.config, self.spec.source),
            workers=self.config.workers,
            pin_memory=self.runtime.should_pin_memory,
        )
        return on_device(loader, self.runtime.device)

    def _with_labels(self, request: BatchRequest) -> BatchRequest:
        """Return a request whose labels a thread of the loader has read, if they are remote."""
        rows = [(position, view) for position, views in request for view in views]
        self.spec.targets.read_ahead([p for p, _ in rows], [view for _, view in rows])
        return request

    def _train_pass(self, batches: WaitTimer[Batch]) -> tuple[dict[str, float], float]:
        """Train on the rest of the pass; return the mean of every part of the loss, and the speed
        in images a second.
        """
        config, spec, state, progress = self.config, self.spec, self.state, self.progress
        batches_of_pass = self.sampler.batches(progress.epoch)
        steps_per_epoch = len(batches_of_pass) / self.sampler.num_epochs(progress.epoch)
        requests = batches_of_pass[progress.step :][: self._steps_left()]
        num_skipped = self.sampler.num_skipped(progress.epoch)
        if progress.step == 0 and num_skipped and self.ranks.is_main_process:
            state.pass_means.count({SKIPPED: num_skipped})
        spec.task.train()

        last = progress.epoch + self.sampler.num_epochs(progress.epoch)
        total = sum(map(num_views_of, requests))
        with self.log.bar(total, last_epoch=last, epochs_of_step=1 / steps_per_epoch) as bar:
            for request in requests:
                batch = next(batches)
                if batch.failed:  # raise, or leave out images that cannot be read
                    check_failures(spec.source, batch.failed, config.on_bad_image)
                    for meter in (state.window, state.pass_means):
                        meter.count({IMAGES_SKIPPED: len(batch.failed)})
                    batch = self.step.without_failures(batch)
                state.schedule.set_lr(
                    progress.epoch, progress.step, steps_per_epoch=steps_per_epoch
                )
                progress.step += 1
                progress.total_steps += 1
                num_views, stop_signal = len(batch.positions), self.stop.signal_name
                if self.ranks.size > 1:  # all ranks take the same steps, and stop at the same one
                    num_views, stop_signal = self.ranks.sync_step(num_views, stop_signal)
                if num_views == 0:
                    continue

                # forward, backward, update: no wait for the device
                for output in self.step.update(batch, num_views):
                    for meter in (state.window, state.pass_means):
                        meter.add(output.num_views, output.parts)
                        meter.count(output.label_counts)
                    state.teacher_forwards += output.label_counts.get(ONLINE, 0)
                if self.step.warning is not None:
                    self.log.log_task_warning(self.step.warning)
                    self.step.warning = None

                # log: the only place where the host waits for the device
                if progress.total_steps % config.log_interval == 0:
                    state.window.waited_s = batches.take()
                    self._log_metrics()
                if (
                    config.recovery_interval
                    and progress.total_steps % config.recovery_interval == 0
                ):
                    self._save()
                if stop_signal is not None:
                    raise StopRequested(stop_signal)
                bar.update(num_views_of(request))
            metrics = self._pass_metrics()  # waits for the device
            return metrics, bar.rate

    def _pass_metrics(self) -> dict[str, float]:
        """Return the means and counts of the pass, on the main rank those of all."""
        means = self.state.pass_means
        means.collect(self.ranks)
        if self.ranks.is_main_process and not means.num_images:
            name, epoch = self.spec.source.name, self.progress.epoch + 1
            raise DataError(f"epoch {epoch}: no image of {name} could be used")
        return {**self._check_finite(means.means()), **means.counts}

    def _end_pass(
        self, trained: dict[str, float], metrics: dict[str, float], *, images_per_second: float
    ) -> None:
        """Write the epoch's row, the model and a checkpoint."""
        is_best = update_best(self.state, metrics, metric=self.spec.metric)
        self.log.log_epoch(trained, metrics, images_per_second=images_per_second)
        if is_best or self.state.best is None or not self.config.selects_best:
            self.result.save_model(self.state.result)
        self.state.pass_means.clear()
        self._save()

    # --- validation -------------------------------------------------------------------------------

    def _validate(self, epoch: int) -> dict[str, float]:
        """Return the result's metrics after ``epoch`` epochs; none without a validation split.

        With a moving average they are the average's, and the student's own accuracy is added.
        """
        if self.spec.evaluator is None:
            return {}
        metrics, metric = self._evaluate(self.state.result), self.spec.metric
        if self.state.ema is not None:
            metrics[f"student_{metric}"] = self._evaluate(self.spec.student)[metric]
        if not self._is_over():  # a finished run has it in its log
            self.log.log_validation(epoch, metrics)
        return metrics

    def _evaluate(self, model: Classifier) -> dict[str, float]:
        """Return the metrics of a model, the same on all ranks."""
        assert self.spec.evaluator is not None
        # each rank has its own statistics of batch normalisation
        self.ranks.broadcast(list(model.buffers()))
        evaluate = self.spec.evaluator.summary
        return evaluate(model, num_classes=model.num_classes, stop=self.stop)

    # --- log, checkpoint --------------------------------------------------------------------------

    def _log_metrics(self) -> None:
        """Write the means since the last line to metrics.jsonl."""
        window = self.state.window
        window.collect(self.ranks)
        self.log.log_metrics(self._check_finite(window.means()))
        window.clear()

    def _check_finite(self, means: dict[str, float]) -> dict[str, float]:
        if all(map(math.isfinite, means.values())):
            return means
        raise DataError(
            f"the loss is {means['loss']} at step {self.progress.total_steps}; lower --lr, "
            "or leave out --amp"
        )

    def _save(self) -> None:
        """Write a checkpoint: all that the rest of the run depends on; the main rank writes it.

        No rank continues before it is written: one that ended would end the others too. Raises
        DataError rather than keep weights after a loss that is not finite.
        """
        self.state.collect()
        self._check_finite(self.state.pass_means.means())
        try:
            self.spec.targets.flush()
        except (OSError, LabelSetError):
            self._save_state()  # the run can resume here once the disk has space
            raise
        self._save_state()

    def _save_state(self) -> None:
        keep, step = self.config.checkpoint_hist, self.progress.total_steps
        state = self.state.as_dict()
        if self.ranks.is_main_process:
            self.folder.require_lock()
            best = best_step(self.config, self.state)
            checkpoint.save(self.folder.path, state, step=step, keep=keep, best=best)
        self.ranks.barrier()
