"""What a run delivers: the epoch whose model is the result, the report, the checkpoints kept."""

import copy
import json
from pathlib import Path
from typing import Any

from mealv2.errors import MealError
from mealv2.models import Classifier, save_classifier
from mealv2.models.detector import Detector, save_detector
from mealv2.storage.weight_files import EXPORT_FOLDER
from pipeline import console
from pipeline.config import TrainConfig
from pipeline.runtime.distributed import Ranks
from pipeline.training import checkpoint, summary
from pipeline.training.run_folder import RunFolder, checkpoint_path, checkpoint_paths
from pipeline.training.spec import TrainingSpec
from pipeline.training.state import Progress, TrainingState


def update_best(state: TrainingState, metrics: dict[str, float], *, metric: str = "top1") -> bool:
    """Return whether the epoch that ended is the best so far, and remember it.

    ``metric`` is what counts. Of equal epochs the later one is the best: it has trained longer, at
    a lower rate.
    ``improved`` stays the first of them: the patience of --early-stopping counts from there.
    """
    value, epoch, best = metrics.get(metric), state.progress.epoch, state.best
    if value is None:
        return False
    is_best = best is None or value >= best["metrics"][metric]
    if best is None or is_best:
        is_equal = best is not None and value == best["metrics"][metric]
        improved = _improved_epoch(best) if best is not None and is_equal else epoch
        at = {"epoch": epoch, "step": state.progress.total_steps, "improved": improved}
        state.best = best = {**at, "metrics": dict(metrics)}
    best["validated"] = epoch
    return is_best


def _improved_epoch(best: dict[str, Any]) -> int:
    """Return the last epoch that was better than all before it; old checkpoints lack it."""
    return int(best.get("improved", best["epoch"]))


def best_step(config: TrainConfig, state: TrainingState) -> int | None:
    """Return the step whose checkpoint is kept beside the newest ones."""
    return state.best["step"] if config.selects_best and state.best is not None else None


def is_stopped_early(config: TrainConfig, state: TrainingState) -> bool:
    """Return whether --early-stopping epochs have passed without a better epoch."""
    best, epoch = state.best, state.progress.epoch
    if config.early_stopping is None or best is None or best["validated"] != epoch:
        return False
    return epoch - _improved_epoch(best) >= config.early_stopping and state.progress.step == 0


def early_stop_message(
    config: TrainConfig, state: TrainingState, run: Path, *, metric: str = "top1"
) -> str | None:
    """Return why a run ended before its last epoch, and how it continues; None if it did not.

    ``metric`` is what chooses the best epoch.
    """
    best, epoch = state.best, state.progress.epoch
    if best is None or epoch == config.epochs or not is_stopped_early(config, state):
        return None
    improved, patience = _improved_epoch(best), config.early_stopping or 0
    return (
        f"stopped early: no better {summary.METRICS[metric]} since epoch {improved}; "
        f"--resume {run} --early-stopping {epoch - improved + patience} continues"
    )


class RunResult:
    """Writes the result of a run into its folder; ranks other than the main one write nothing."""

    def __init__(
        self,
        config: TrainConfig,
        ranks: Ranks,
        spec: TrainingSpec,
        folder: RunFolder,
        *,
        is_resumed: bool,
    ) -> None:
        self._config = config
        self._ranks = ranks
        self._spec = spec
        self._folder = folder
        self._is_resumed = is_resumed

    def save_model(self, model: Classifier) -> None:
        """Write a model as the result so far."""
        if self._ranks.is_main_process:
            save = save_detector if isinstance(model, Detector) else save_classifier
            save(
                self._folder.path / EXPORT_FOLDER,
                model,
                classes=self._spec.source.classes,
                img_size=self._spec.img_size,
                held_out=self._spec.held_out_flags,
            )

    def finalize(
        self, state: TrainingState, metrics: dict[str, float], *, seconds: float
    ) -> dict[str, Any]:
        """Write the result and the report, and return it; nothing on other ranks than the main one.

        Raises MealError if the checkpoint of the best epoch cannot be read.
        """
        if not self._ranks.is_main_process:
            return {}
        spec, progress, best = self._spec, state.progress, state.best
        last = metrics
        label_fields = {"labels": spec.labels, "teacher_forwards": state.teacher_forwards}
        selected: dict[str, Any] = {}
        if best is not None and metrics:
            selected = {
                "selected_epoch": progress.epoch,
                f"last_{spec.metric}": metrics[spec.metric],
                "best_epoch": best["epoch"],
                f"best_{spec.metric}": best["metrics"][spec.metric],
            }
            if self._config.selects_best and best["epoch"] != progress.epoch:
                self._save_best(state, best["step"])
                metrics = best["metrics"]
                selected["selected_epoch"] = best["epoch"]
        report = {
            "run": str(self._folder.path),
            "model": spec.student.tag,
            "epochs": progress.epoch,
            "steps": progress.total_steps,
            "seconds": round(seconds, 2),
            **(label_fields if spec.labels else {}),
            **metrics,
            **selected,
        }
        self._folder.write_report(report)
        self._remove_old_checkpoints(best_step(self._config, state))
        self._print_summary(state, last, report)
        return report

    def finished_report(self, state: TrainingState) -> dict[str, Any] | None:
        """Return the report of a run that is already finished; the main rank has it."""
        text = self._ranks.broadcast_text(
            json.dumps(self._folder.report()) if self._ranks.is_main_process else ""
        )
        report: dict[str, Any] | None = json.loads(text)
        if report is None or not self._ranks.is_main_process:
            return None if report is None else {}
        console.info(
            f"the run is finished after {state.progress.epoch} epochs; --resume "
            f"{self._folder.path} with more {self._longer(state.progress)} lengthens it"
        )
        self._remove_old_checkpoints(best_step(self._config, state))
        return report

    def _longer(self, progress: Progress) -> str:
        return "--epochs" if progress.epoch == self._config.epochs else "--early-stopping"

    def _save_best(self, state: TrainingState, step: int) -> None:
        """Write the model of the best epoch, from its checkpoint."""
        path = checkpoint_path(self._folder.path, step)
        try:
            kept = checkpoint.load(path)
            model = copy.deepcopy(state.result)
            model.backbone.load_state_dict(kept.get("state_dict_ema", kept["state_dict"]))
        except Exception as error:  # zip, pickle and runtime errors, as the damage has it
            reason = str(error).strip().split("\n")[0]
            raise MealError(
                f"checkpoint {path} of the best epoch cannot be read: {reason}; a run with "
                "--select last needs none"
            ) from error
        self.save_model(model)

    def _print_summary(
        self, state: TrainingState, last: dict[str, float], report: dict[str, Any]
    ) -> None:
        """Print the accuracies of start, teachers and student, the result and what comes next.

        ``last`` are the metrics of the last epoch.
        """
        spec, run, epoch = self._spec, self._folder.path, state.progress.epoch
        if state.best is not None and last:
            start = self._folder.start_metrics()
            rows = {} if start is None else {"student at the start": start}
            rows |= spec.teachers | summary.student_rows(last, state.best, last_epoch=epoch)
            console.info(summary.accuracies(rows))
        since = " since it was resumed" if self._is_resumed else ""
        time = f"{console.count(epoch, 'epoch')}, {console.duration(report['seconds'])}{since}"
        selected = report.get("selected_epoch", epoch)
        console.info(summary.model_line(spec, run, epoch=selected, trained=time))
        if message := early_stop_message(self._config, state, run, metric=spec.metric):
            console.info(message)
        for number, command in enumerate(summary.next_commands(self._config, spec, run)):
            console.info(f"{'      ' if number else 'next: '}{command}")

    def _remove_old_checkpoints(self, best: int | None) -> None:
        """Remove all but the newest --checkpoint-hist; report how many are kept, and their size."""
        run, keep = self._folder.path, self._config.checkpoint_hist
        paths = checkpoint_paths(run)
        if keep != "all" and paths:
            checkpoint.remove_old(run, keep=keep, last=paths[-1], best=best)
            paths = checkpoint_paths(run)
        needed = set(paths[-1:]) | (set() if best is None else {checkpoint_path(run, best)})
        if set(paths) - needed:
            size = console.size_of(sum(path.stat().st_size for path in paths))
            console.info(
                f"{len(paths)} checkpoints ({size}) are kept; --resume {run} --checkpoint-hist 1 "
                f"keeps only the last{'' if best is None else ' and the best'}"
            )
