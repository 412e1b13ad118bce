"""Label statistics: certainty, entropy, bytes, by class; contradictions; teachers compared."""

from pathlib import Path
from typing import Any

from mealv2.report import label_figures
from mealv2.report.averaged import teacher_sets
from mealv2.report.classes import class_similarity, similar_classes
from mealv2.report.labels import (
    MAX_AVERAGED,
    LabelStatistics,
    TeacherComparison,
    compare_teachers,
    label_statistics,
)
from mealv2.report.style import Figure
from pipeline.report.cells import number
from pipeline.report.label_data import NO_LABELS, LabelData, label_data
from pipeline.report.sections import Inputs, Section

TITLE = "Label statistics"
_NUM_CLASSES = 10  # in each table
_MAX_SMALL = 6  # rows of a heat map of half the width
_NO_TEACHERS = (
    "Teachers are compared where their labels are stored apart, by mealv2 precompute "
    "--store per-teacher."
)


def section(inputs: Inputs) -> Section:
    """Return the section; raises LabelSetError for damaged labels."""
    data = label_data(inputs)
    if data is None:
        return Section("labels", TITLE, missing=NO_LABELS)
    statistics = label_statistics(data.sample)
    figures = label_figures.certainty_figures(data.sample, statistics)
    wide: list[Figure] = []
    notes = []
    if (by_class := label_figures.class_figure(statistics)) is not None:
        figures.append(by_class)
    if (means := _mean_labels(statistics)) is not None:
        (figures if len(means.data) <= _MAX_SMALL else wide).append(means)
    elif len(data.labels.classes) > MAX_AVERAGED:
        notes.append(f"Average soft labels are shown for up to {MAX_AVERAGED} classes.")
    comparison = None
    sets = teacher_sets(data.labels)
    if len(sets) > 1:
        comparison = compare_teachers(sets)
        teachers = label_figures.teacher_figure(comparison)
        (figures if len(sets) <= _MAX_SMALL else wide).append(teachers)
    else:
        notes.append(_NO_TEACHERS)
    context = {
        "sample": data.sample.size_text,
        "facts": _facts(data, statistics, inputs.labels or data.labels.folder),
        "small": [figure.name for figure in figures],
        "wide": [figure.name for figure in wide],
        "has_hard_labels": statistics.num_labelled > 0,
        "least": _class_table(statistics, highest=False),
        "most": _class_table(statistics, highest=True),
        "num_classes": len(data.labels.classes),
        "teachers": None if comparison is None else _teacher_table(comparison),
        "compared": None if comparison is None else comparison.size_text,
        "notes": notes,
    }
    return Section("labels", TITLE, "labels.html", context, [*figures, *wide])


def _mean_labels(statistics: LabelStatistics) -> Figure | None:
    if statistics.mean_label_CC is None:
        return None
    similarity_CC = class_similarity(statistics.mean_label_CC)
    chosen = similar_classes(similarity_CC, label_figures.MAX_NAMED)
    return label_figures.mean_label_figure(statistics, chosen)


def _facts(data: LabelData, statistics: LabelStatistics, folder: Path) -> list[tuple[str, str]]:
    """Return the figures of the whole sample as (what, value)."""
    views = f"{statistics.num_views:,}"
    teachers = [
        str(teacher["model"])
        for labels in teacher_sets(data.labels)
        for teacher in labels.manifest["plan"].get("teachers", [])
    ]
    facts = [
        ("label set", str(folder)),
        ("teachers", ", ".join(teachers) or "unknown"),
        ("encoding", str(data.labels.encoding)),
        ("views read", views),
        ("mean probability of the likeliest class", f"{statistics.top1:.3f}"),
        ("mean entropy", f"{statistics.entropy:.3f} nats"),
        ("mean disagreement between views of an image", f"{statistics.disagreement:.3f} nats"),
        ("stored bytes per view", f"{statistics.bytes:.1f}"),
    ]
    if statistics.hard_prob is None:
        return [*facts, ("hard labels", "the set has none")]
    percent = 100 * statistics.num_contradicting / statistics.num_labelled
    counts = statistics.images_contradicting
    return [
        *facts,
        ("mean probability of the hard label", f"{statistics.hard_prob:.3f}"),
        (
            "views whose likeliest class is not the hard label",
            f"{statistics.num_contradicting:,} of {statistics.num_labelled:,} ({percent:.2f} %)",
        ),
        (
            "images contradicted by no view, some views, all views",
            f"{counts['none']:,}, {counts['some']:,}, {counts['all']:,}",
        ),
    ]


def _class_table(statistics: LabelStatistics, *, highest: bool) -> list[list[Any]]:
    """Return rows of the classes with the most, or the least, certain labels."""
    rows = [row for row in statistics.classes if row["images"]]
    rows.sort(key=lambda row: float(row["hard_label_probability"]), reverse=highest)
    return [
        [
            row["class"],
            number(row["images"]),
            number(row["hard_label_probability"], 3),
            number(row["entropy"], 3),
            number(row["contradicting_percent"], 1),
            number(row["bytes_per_view"], 1),
        ]
        for row in rows[:_NUM_CLASSES]
    ]


def _teacher_table(comparison: TeacherComparison) -> list[list[Any]]:
    """Return a row per teacher: its accuracy against the hard labels, KL to every other one."""
    rows = []
    for at, name in enumerate(comparison.names):
        accuracy = float(comparison.accuracy_T[at])
        shown = None if accuracy != accuracy else number(accuracy, 2)
        rows.append([name, shown, *(number(float(kl), 3) for kl in comparison.kl_TT[at])])
    return rows
