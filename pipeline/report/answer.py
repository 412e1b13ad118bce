"""The answer first: what start, control, student, teachers and ensemble reach, and the gaps."""

from typing import Any

from mealv2.report import answer
from mealv2.report.answer import COLUMNS, Entry, Gap
from mealv2.report.measured import with_measured
from mealv2.report.methods import Comparison, Method, differing_settings, methods_of
from mealv2.report.teachers import label_source
from pipeline.report.cells import number
from pipeline.report.sections import Inputs, Section
from pipeline.report.to_ensemble import with_closeness

TITLE = "The answer"
_MAX_SETTINGS = 40  # rows of the table of differing settings


def section(inputs: Inputs) -> Section:
    """Return the section; raises LabelSetError for a damaged label set."""
    all_runs, not_compared = with_closeness(inputs, [*inputs.runs, *inputs.control])
    methods = methods_of(all_runs[: len(inputs.runs)])
    control = methods_of(all_runs[len(inputs.runs) :])
    source = with_measured(label_source(inputs.labels, inputs.runs), inputs.labels)
    rows = answer.table_rows(methods, control=control, source=source)
    columns = answer.columns_of(rows)
    missing = _missing(rows, columns, has_control=bool(control), has_source=source is not None)
    missing = " ".join(filter(None, [missing, *not_compared])) or None
    compared = answer.comparisons(methods, control)
    differing = differing_settings([*methods, *control])
    gain = answer.gain_figure(methods, control=control)
    gaps = answer.gaps_of(rows)
    context = {
        "states": [_state(method) for method in [*methods, *control]],
        "columns": ["", *(COLUMNS[name][0] for name in columns)],
        "rows": [[row.name, *(entry_cell(row, name) for name in columns)] for row in rows],
        "gaps": [_gap_row(gap) for gap in gaps],
        "comparisons": [_comparison_row(comparison) for comparison in compared],
        "has_intervals": any(len(method.runs) > 1 for method in [*methods, *control]),
        "methods": [method.name for method in [*methods, *control]],
        "differing": [
            [name, *map(_setting, values)]
            for name, values in list(differing.items())[:_MAX_SETTINGS]
        ],
    }
    figures = [] if gain is None else [gain]
    return Section("answer", TITLE, "answer.html", context, figures, missing)


def entry_cell(row: Entry, name: str) -> dict[str, Any] | None:
    """Return a cell of the table: the mean, with its interval or its epoch; None if unknown."""
    value = row.mean(name)
    if value is None:
        return None
    _, digits, divisor = COLUMNS[name]
    cell = number(value / divisor, digits)
    cell["value"] = value
    if (between := row.interval(name)) is not None:
        low, high = (f"{end / divisor:.{digits}f}" for end in between)
        cell["note"] = f"{low} to {high}"
    return cell


def _state(method: Method) -> list[Any]:
    states = list(dict.fromkeys(run.state for run in method.runs))
    seeds = ", ".join(str(run.seed) for run in method.runs)
    epochs = [run.best[0] for run in method.runs if run.best is not None]
    best = ", ".join(map(str, dict.fromkeys(epochs))) or None
    return [method.name, method.model, number(len(method.runs)), seeds, best, "; ".join(states)]


def _gap_row(gap: Gap) -> list[Any]:
    difference = gap.difference
    return [
        gap.student,
        gap.teacher,
        _pair(gap.of_teacher),
        _pair(gap.of_student),
        {
            "value": difference["top1"],
            "text": " / ".join(f"{value:+.2f}" for value in difference.values()),
            "note": None,
        },
    ]


def _pair(row: dict[str, float]) -> dict[str, Any]:
    text = " / ".join(f"{value:.2f}" for value in row.values())
    return {"value": row["top1"], "text": text, "note": None}


def _comparison_row(found: Comparison) -> list[Any]:
    between, p = found.interval, found.p
    return [
        f"{found.first} minus {found.second}",
        number(found.mean, 2, signed=True),
        f"{between[0]:+.2f} to {between[1]:+.2f}" if between else None,
        None
        if p is None
        else {"value": p, "text": "< 0.001" if p < 0.001 else f"{p:.3f}", "note": None},
        number(len(found.seeds)),
    ]


def _setting(value: Any) -> str:
    return "–" if value is None else str(value)


def _not_measured(rows: list[Entry]) -> list[str]:
    """Return what is not known of the teachers, and what it needs."""
    ensemble = [row for row in rows if row.kind == answer.ENSEMBLE]
    teachers = [row for row in rows if row.kind == answer.TEACHER]
    if (ensemble or teachers) and not any(row.values.get("ece") for row in (*ensemble, *teachers)):
        return ["ECE of the ensemble needs a label set with labels of the validation images."]
    if len(teachers) > 1 and not any(row.values.get("agreement") for row in teachers):
        return [
            "Agreement, KL and ECE of single teachers need their labels stored apart: "
            "mealv2 precompute --store per-teacher."
        ]
    return []


def _missing(
    rows: list[Entry], columns: list[str], *, has_control: bool, has_source: bool
) -> str | None:
    """Return what the table does not have, and how it would."""
    notes = []
    if not has_control:
        notes.append("No control: give runs with hard labels with --control.")
    if not has_source:
        notes.append("No teachers: no label set was found; give it with --labels.")
    if "ece" in columns:
        notes += _not_measured(rows)
    unknown = [name for name in columns if not any(row.values.get(name) for row in rows)]
    if unknown:
        names = ", ".join(COLUMNS[name][0] for name in unknown)
        notes.append(f"Not known for any row: {names}.")
    return " ".join(notes) or None
