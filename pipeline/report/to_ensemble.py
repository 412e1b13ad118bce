"""Measure students that were not compared with the ensemble: of hard labels, or of old runs."""

from collections.abc import Sequence
from dataclasses import replace

from mealv2.errors import ConfigError, LabelSetError, MealError
from mealv2.label_set import LabelSet
from mealv2.report.averaged import open_labels
from mealv2.report.run import Run
from mealv2.storage.urls import Location
from pipeline.report import per_class
from pipeline.report.sections import Inputs
from pipeline.training.evaluator import Evaluator

MAX_RUNS = 4
_FIGURES = ("agreement", "kl", "ece")
_MAX_DIFFERENCE = 0.5  # points of top-1 between the log and the weights


def with_closeness(inputs: Inputs, runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """Return runs with agreement, KL and calibration error of their results, and what is missing.

    The results that have none are run on the validation images of ``--data-dir``.
    """
    unmeasured = [run for run in runs if _is_unmeasured(run)]
    if inputs.labels is None or not unmeasured:
        return list(runs), []
    try:
        labels = open_labels(inputs.labels, split="val")
    except LabelSetError:
        return list(runs), []  # the ensemble has no labels to compare with
    if inputs.data_dir is None:
        return list(runs), [
            "Agreement, KL and ECE that a run did not log are measured with --data-dir."
        ]
    found, notes = {run.path: run for run in runs}, []
    for run in unmeasured[:MAX_RUNS]:
        try:
            found[run.path] = _measured(inputs, inputs.data_dir, labels, run)
        except (MealError, OSError) as error:
            notes.append(f"Agreement and KL of {run.path} are not known: {error}.")
    if len(unmeasured) > MAX_RUNS:
        notes.append(f"Agreement and KL were measured for {MAX_RUNS} runs of {len(unmeasured)}.")
    return [found[run.path] for run in runs], notes


def _is_unmeasured(run: Run) -> bool:
    """Return whether the figures of the epoch that is the result are not all known."""
    row = run.validations.get(_result_epoch(run))
    return row is not None and "top1" in row and any(name not in row for name in _FIGURES)


def _result_epoch(run: Run) -> int:
    """Return the epoch whose weights the run keeps; -1 for a run that is not finished."""
    epoch = (run.report or {}).get("selected_epoch")
    return epoch if isinstance(epoch, int) else -1


def _measured(inputs: Inputs, data_dir: Location, labels: LabelSet, run: Run) -> Run:
    """Return a run with the figures of its result; raises MealError with the reason."""
    validation = per_class.open_validation(run, data_dir, inputs.data)
    source, epoch = validation.source, _result_epoch(run)
    if labels.classes != list(source.classes):
        raise ConfigError("the label set has other classes")
    if len(validation.positions) < len(source):
        raise ConfigError(f"without a GPU at most {per_class.MAX_ON_CPU:,} images are measured")
    student, img_size = per_class.load_student(validation, run.path)
    model = validation.runtime.to_device(student)
    resize = validation.config.resize
    evaluator = Evaluator(
        source,
        validation.runtime,
        validation.config,
        img_size=img_size,
        resize=resize,
        labels=labels,
    )
    figures = evaluator(model, num_classes=model.num_classes).summary()
    known = run.validations[epoch]
    if abs(figures["top1"] - known["top1"]) > _MAX_DIFFERENCE:
        raise ConfigError(
            f"on these images its top-1 is {figures['top1']:.2f} %, and its log has "
            f"{known['top1']:.2f} %"
        )
    row = {**{name: figures[name] for name in _FIGURES if name in figures}, **known}
    return replace(run, validations={**run.validations, epoch: row})
