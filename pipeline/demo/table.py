"""The figures of the demo: gains with their intervals, and the table at the end."""

import textwrap
from statistics import mean
from typing import Any

from mealv2.intervals import interval
from pipeline import console
from pipeline.config import DemoConfig
from pipeline.demo import parts
from pipeline.demo.pictures import UNLABELLED, num_pictures

_NOTE_WIDTH = 100


def report_of(config: DemoConfig, reports: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of the demo from the reports of its parts by name."""
    students = {
        arm: [reports[parts.run_name(seed, arm)] for seed in config.all_seeds]
        for arm in (parts.START, parts.HARD, parts.HARD_LONGER, parts.SOFT, parts.EXTRA)
    }
    labels = reports[parts.LABELS]
    return {
        "output": str(config.output),
        "seeds": list(config.all_seeds),
        "teachers": [
            {"model": teacher["model"], "top1": teacher["top1"]}
            for teacher in labels["accuracy"]["teachers"]
        ],
        "ensemble": labels["accuracy"]["ensemble"]["top1"],
        "students": {
            arm: {"steps": runs[0]["steps"], "top1": [run["top1"] for run in runs]}
            for arm, runs in students.items()
        },
        "gains": {
            arm: _gain(students[arm], students[parts.HARD])
            for arm in (parts.HARD_LONGER, parts.SOFT, parts.EXTRA)
        },
        "label_sets": {
            name: {"views": reports[name]["views"], "bytes": reports[name]["bytes"]}
            for name in (parts.LABELS, parts.EXTRA_LABELS)
        },
    }


def _gain(arm: list[dict[str, Any]], control: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the differences to the control of the same seeds, in points."""
    differences = [run["top1"] - other["top1"] for run, other in zip(arm, control, strict=True)]
    return {
        "differences": differences,
        "mean": mean(differences),
        "interval_95": interval(differences),
    }


def table_of(report: dict[str, Any]) -> str:
    """Return the figures as a table, and what it needs to be understood."""
    rows = [["", "pictures", "labels", "steps", "top-1 %", "gain", "95 % interval"]]
    for teacher in report["teachers"]:
        size = f"{num_pictures('teacher-train'):,} others"
        rows.append([f"teacher {teacher['model']}", size, "hard", "", f"{teacher['top1']:.1f}"])
    rows.append(["ensemble of the teachers", "", "", "", f"{report['ensemble']:.1f}"])
    few = num_pictures("train")
    for arm, title, pictures, labels in (
        (parts.START, "student: start", few, "hard"),
        (parts.HARD, "hard labels: the control", few, "hard"),
        (parts.HARD_LONGER, f"hard labels, {parts.LONGER} times the steps", few, "hard"),
        (parts.SOFT, "(a) soft labels", few, "soft"),
        (parts.EXTRA, "(b) soft labels, more pictures", few + num_pictures(UNLABELLED), "soft"),
    ):
        figures = report["students"][arm]
        top1 = f"{mean(figures['top1']):.1f}"
        row = [title, f"{pictures:,}", labels, f"{figures['steps']}", top1]
        rows.append(row + _gain_cells(report["gains"].get(arm)))
    width = len(rows[0])
    table = console.table([row + [""] * (width - len(row)) for row in rows])
    return "\n".join([table, "", *_notes(report)])


def _gain_cells(gain: dict[str, Any] | None) -> list[str]:
    if gain is None:
        return []
    between = gain["interval_95"]
    spread = f"{between[0]:+.1f} to {between[1]:+.1f}" if between else "--seeds 3 gives it"
    return [f"{gain['mean']:+.1f}", spread]


def _notes(report: dict[str, Any]) -> list[str]:
    """Return what was measured, and what the figures show and do not show."""
    seeds, gains = report["seeds"], report["gains"]
    which = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    notes = [
        f"(a) {_verdict(gains[parts.SOFT])} Same start, pictures, views and steps as the control: "
        "only the labels differ.",
        f"(b) {_verdict(gains[parts.EXTRA])} Two things differ from the control, labels and "
        f"pictures: {num_pictures(UNLABELLED):,} of them have no class label, only the teachers "
        "label them.",
        f"Top-1 on {num_pictures('val'):,} pictures that no model was trained on; the students "
        f"({parts.STUDENT}): mean of {which}. Gain: points over the control, seed by seed.",
        "Interval: 95 %, Student's t over the seeds. There is one split of the pictures and one "
        "pair of teachers: the interval does not say how others would do.",
        f"The teachers were trained elsewhere, on {num_pictures('teacher-train'):,} other pictures "
        "with class labels.",
    ]
    if parts.CHOSEN_ON in seeds:
        notes.append(
            f"The setting was chosen on seed {parts.CHOSEN_ON}; --seed {parts.FIRST_FRESH} has "
            "seeds that chose nothing."
        )
    return [line for note in notes for line in textwrap.wrap(note, _NOTE_WIDTH)]


def _verdict(gain: dict[str, Any]) -> str:
    """Return whether a gain can be chance, in one sentence."""
    between, points = gain["interval_95"], f"{gain['mean']:+.1f} points:"
    if between is None:
        return f"{points} one seed has no interval, so this can be chance (--seeds 3)."
    if between[0] > 0:
        return f"{points} the interval is above 0, so not chance over seeds."
    if between[1] < 0:
        return f"{points} the interval is below 0: soft labels did harm, not by chance over seeds."
    return f"{points} the interval contains 0: too few seeds to tell (more: --seeds 10)."
