"""Classes: accuracy before and after, confused pairs, similar classes, t-SNE of features."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from mealv2.data.source import UNLABELLED
from mealv2.errors import MealError
from mealv2.models import Classifier
from mealv2.report import class_figures
from mealv2.report.averaged import open_labels
from mealv2.report.classes import (
    ClassResults,
    class_changes,
    class_similarity,
    confused_pairs,
    extremes,
    gains_by_similarity,
    similar_pairs,
)
from mealv2.report.labels import mean_labels
from mealv2.report.methods import methods_of
from mealv2.report.run import Run
from mealv2.report.sample import sample_labels
from mealv2.report.style import Figure
from pipeline.report import per_class
from pipeline.report.cells import number
from pipeline.report.label_data import label_data
from pipeline.report.sections import Inputs, Section

TITLE = "Classes"
_NUM_SHOWN = 10  # classes and pairs in each table
_NUM_DISSIMILAR = 2
_MAX_POINTS = 60  # of a class in a t-SNE
_MAX_OTHERS = 3  # methods beside the first: each runs on up to 2,000 images without a GPU
START = "start"


@dataclass(frozen=True)
class _Compared:
    """Models on the same images: what they are called, their results, features.

    ``after`` is the student of the first method, ``others`` are those of the other methods.
    """

    before: str
    after: str
    classes: list[str]
    results: tuple[ClassResults, ClassResults]
    others: dict[str, ClassResults]
    notes: list[str]
    size_text: str
    tsne: list[Figure]
    tsne_classes: list[str]


def section(inputs: Inputs) -> Section:
    """Return the section; the models run on the validation images of ``--data-dir``."""
    data = label_data(inputs)
    similarity_CC = None
    classes: list[str] = []
    if data is not None:
        classes = data.labels.classes
        means_CC = mean_labels(data.sample)
        if means_CC is not None and (data.sample.hard_N != UNLABELLED).any():
            similarity_CC = class_similarity(means_CC)
    ensemble = _ensemble(inputs)
    compared, missing = None, None
    try:
        compared = _compare(inputs, similarity_CC, classes)
    except (MealError, OSError) as error:
        missing = f"Accuracy before and after is not known: {error}."
    context: dict[str, Any] = {
        "similar": _similar_table(classes, similarity_CC),
        "sample": data.sample.size_text if data is not None else None,
        "compared": None,
        "ensemble": None,
    }
    if ensemble is not None:
        context["ensemble"] = _ensemble_table(classes, ensemble)
        context["ensemble_top1"] = f"{ensemble.top1:.2f}"
    figures: list[Figure] = []
    if compared is not None:
        is_same = compared.classes == classes
        figures = _compared_context(
            context, compared, similarity_CC if is_same else None, ensemble if is_same else None
        )
    if missing and context["similar"] is None and ensemble is None:
        return Section("classes", TITLE, missing=missing)
    return Section("classes", TITLE, "classes.html", context, figures, missing)


def _compared_context(
    context: dict[str, Any],
    compared: _Compared,
    similarity_CC: np.ndarray | None,
    ensemble: ClassResults | None,
) -> list[Figure]:
    """Add the tables of two models to the context of the template; return their figures."""
    before, after = compared.results
    rows = class_changes(compared.classes, before, after)
    more = dict(compared.others)
    if ensemble is not None:
        more["ensemble"] = ensemble
    rows = [
        {**row, **{_key(name): results.top1_of(row["class_id"]) for name, results in more.items()}}
        for row in rows
    ]
    gains, losses = extremes(rows, _NUM_SHOWN)
    context |= {
        "compared": compared,
        "top1": (f"{before.top1:.2f}", f"{after.top1:.2f}"),
        "columns": ["class", "images", compared.before, compared.after, "gain", *more],
        "methods": _method_table(compared) if compared.others else None,
        "gains": [_change_row(row) for row in gains],
        "losses": [_change_row(row) for row in losses],
        "num_classes": len(rows),
        "pairs": [
            [
                f"{pair['class']} and {pair['other']}",
                *(number(pair[n]) for n in ("images", "before", "after")),
                number(pair["change"], signed=True),
            ]
            for pair in confused_pairs(compared.classes, before, after, number=_NUM_SHOWN)
        ],
        "by_similarity": None,
        "tsne": [figure.name for figure in compared.tsne],
    }
    found = [class_figures.change_figure(rows, before=compared.before, after=compared.after)]
    if similarity_CC is not None and len(rows) >= 3:
        context["by_similarity"] = [
            [
                row["classes"],
                number(row["similarity"], 4),
                *(number(row[name], 2) for name in ("before", "after")),
                number(row["gain"], 2, signed=True),
            ]
            for row in gains_by_similarity(rows, similarity_CC)
        ]
        found.append(class_figures.similarity_figure(rows, similarity_CC))
    return [figure for figure in (*found, *compared.tsne) if figure is not None]


def _compare(
    inputs: Inputs, similarity_CC: np.ndarray | None, classes: list[str]
) -> _Compared | None:
    """Measure the first run's start (else the control) and its student; None without a run.

    Raises MealError with the reason where something is missing.
    """
    if not inputs.runs:
        return None
    if not any(run.student is not None for run in inputs.runs):
        raise MealError("no run has weights of a student yet")
    (after, run), *others = _first_runs(inputs)
    if inputs.data_dir is None:
        raise MealError("give the data set of the run with --data-dir")
    validation = per_class.open_validation(run, inputs.data_dir, inputs.data)
    student, student_size = per_class.load_student(validation, run.path)
    before, model, img_size = _before(inputs, validation, run, student_size)
    names = validation.source.classes
    chosen: list[int] = []
    if similarity_CC is not None and names == classes:
        chosen = _tsne_classes(similarity_CC, np.asarray(validation.source.labels))
    positions = validation.of_classes(chosen, _MAX_POINTS)
    first = per_class.measure(validation, model, img_size, positions)
    last = per_class.measure(validation, student, student_size, positions)
    results, notes = _others(validation, others, control=None if before == START else before)
    tsne: list[Figure] = []
    if first.features_MD is not None and last.features_MD is not None:
        tsne = class_figures.tsne_figures(
            {before: first.features_MD, after: last.features_MD},
            last.hard_M,
            {c: names[c] for c in chosen},
        )
    shown = [names[c] for c in chosen]
    pair = first.results, last.results
    size_text = validation.size_text
    return _Compared(before, after, names, pair, results, notes, size_text, tsne, shown)


def _first_runs(inputs: Inputs) -> list[tuple[str, Run]]:
    """Return the name and the first run with weights of each method, the controls last."""
    first = [
        (method.name, next((run for run in method.runs if run.student is not None), None))
        for method in methods_of([*inputs.runs, *inputs.control])
    ]
    return [(name, run) for name, run in first if run is not None]


def _others(
    validation: per_class.Validation, others: list[tuple[str, Run]], *, control: str | None
) -> tuple[dict[str, ClassResults], list[str]]:
    """Measure the students of other methods; return their results, and notes on those left out.

    ``control`` is the method that is measured already, if one is.
    """
    found: dict[str, ClassResults] = {}
    notes: list[str] = []
    others = [(name, run) for name, run in others if name != control]
    for name, run in others[:_MAX_OTHERS]:
        try:
            student, img_size = per_class.load_student(validation, run.path)
            found[name] = per_class.measure(validation, student, img_size, []).results
        except (MealError, OSError) as error:
            notes.append(f"{name} is left out: {error}.")
    if len(others) > _MAX_OTHERS:
        left_out = ", ".join(name for name, _ in others[_MAX_OTHERS:])
        notes.append(f"{_MAX_OTHERS + 1} methods are measured; left out: {left_out}.")
    return found, notes


def _method_table(compared: _Compared) -> list[list[Any]]:
    """Return a row per method: top-1, how many classes gain and lose, and the extremes."""
    before, after = compared.results
    table = []
    for name, results in {compared.after: after, **compared.others}.items():
        rows = class_changes(compared.classes, before, results)
        if not rows:
            continue
        counts = [sum(sign * row["gain"] > 0 for row in rows) for sign in (1, -1)]
        ends = [f"{row['class']} ({row['gain']:+.2f})" for row in (rows[0], rows[-1])]
        table.append([name, number(results.top1, 2), *map(number, counts), *ends])
    return table


def _before(
    inputs: Inputs, validation: per_class.Validation, run: Run, student_size: int
) -> tuple[str, Classifier, int]:
    """Return the name, model and image size to compare a student with; raises MealError."""
    try:
        start = per_class.load_start(validation, run, img_size=student_size)
        return START, start, student_size
    except MealError as error:
        for name, control in _first_runs(inputs):
            if control in inputs.control:
                return name, *per_class.load_student(validation, control.path)
        raise MealError(f"{error}, and there is no hard-label control with weights") from None


def _tsne_classes(similarity_CC: np.ndarray, labels_N: np.ndarray) -> list[int]:
    """Return the two most similar classes and two of the least similar (paper figure 2)."""
    present = np.unique(labels_N[labels_N != UNLABELLED])
    inside_CC = np.full_like(similarity_CC, -1.0)
    inside_CC[np.ix_(present, present)] = similarity_CC[np.ix_(present, present)]
    if len(present) <= 2 + _NUM_DISSIMILAR:
        return [int(c) for c in present]
    (a, b, _), *_ = similar_pairs(inside_CC, 1)
    nearest = {int(c): float(inside_CC[c].max()) for c in present if c not in (a, b)}
    return [a, b, *sorted(nearest, key=lambda c: nearest[c])[:_NUM_DISSIMILAR]]


def _ensemble(inputs: Inputs) -> ClassResults | None:
    """Return the ensemble's results by the labels of the validation images, if the set has any."""
    if inputs.labels is None:
        return None
    try:
        labels = open_labels(inputs.labels, split="val")
    except MealError:
        return None
    if not len(labels):
        return None
    sample = sample_labels(labels)
    is_labelled_N = sample.hard_N != UNLABELLED
    if not is_labelled_N.any():
        return None
    best_N = sample.best_NV[is_labelled_N, 0]
    return ClassResults.from_pairs(sample.hard_N[is_labelled_N], best_N, len(labels.classes))


def _similar_table(classes: list[str], similarity_CC: np.ndarray | None) -> list[list[Any]] | None:
    if similarity_CC is None:
        return None
    pairs = similar_pairs(similarity_CC, _NUM_SHOWN)
    return [[f"{classes[a]} and {classes[b]}", number(value, 4)] for a, b, value in pairs]


def _ensemble_table(classes: list[str], ensemble: ClassResults) -> list[list[Any]]:
    """Return the classes with the lowest accuracy of the ensemble."""
    rows = [
        (accuracy, name, int(ensemble.images_C[c]))
        for c, name in enumerate(classes)
        if (accuracy := ensemble.top1_of(c)) is not None
    ]
    rows.sort(key=lambda row: row[0])
    return [
        [name, number(images), number(accuracy, 2)] for accuracy, name, images in rows[:_NUM_SHOWN]
    ]


def _change_row(row: dict[str, Any]) -> list[Any]:
    cells: list[Any] = [row["class"], number(row["images"])]
    cells += [number(row["before"], 2), number(row["after"], 2)]
    cells.append(number(row["gain"], 2, signed=True))
    more = (value for key, value in row.items() if key.startswith(_key("")))
    return cells + [None if value is None else number(value, 2) for value in more]


def _key(name: str) -> str:
    """Return the column of another model's accuracy, in the rows of the classes."""
    return f"top-1, {name}"
