"""`mealv2 compare`: what runs reached, as a table in the terminal."""

from typing import Any

from mealv2.report import answer
from mealv2.report.answer import COLUMNS, Entry
from mealv2.report.measured import with_measured
from mealv2.report.methods import Comparison, methods_of
from mealv2.report.run import open_run
from mealv2.report.teachers import find_labels, label_source
from pipeline import console
from pipeline.config import CompareConfig


def run(config: CompareConfig) -> dict[str, Any]:
    """Print the table, the gaps and the differences without --json; return the report.

    Raises MealError.
    """
    runs, control_runs = [open_run(path) for path in config.run], map(open_run, config.control)
    methods, control = methods_of(runs), methods_of(list(control_runs))
    folder = config.labels or find_labels(runs)
    source = with_measured(label_source(folder, runs), folder)
    rows = answer.table_rows(methods, control=control, source=source)
    gaps, compared = answer.gaps_of(rows), answer.comparisons(methods, control)
    if not config.json:
        parts = [_table(rows), *(f"{run.path}: {run.state}" for run in runs if not run.is_finished)]
        if gaps:
            head = ["student minus teacher, points", "top-1", "top-5"]
            cells = [
                [f"{gap.student} minus {gap.teacher}", *_signed(gap.difference)] for gap in gaps
            ]
            parts.append(console.table([head, *cells]))
        if compared:
            head = ["difference of top-1, points", "mean", "95 % interval", "p", "seeds"]
            parts.append(console.table([head, *map(_comparison_cells, compared)]))
        console.result("\n\n".join(parts))
    return {
        "rows": [
            {"name": row.name, "kind": row.kind, "method": row.method, "values": row.values}
            for row in rows
        ],
        "gaps": [
            {"student": gap.student, "teacher": gap.teacher, **gap.difference} for gap in gaps
        ],
        "comparisons": [
            {
                "methods": [found.first, found.second],
                "seeds": list(found.seeds),
                "differences": list(found.differences),
                "mean": found.mean,
                "interval_95": found.interval,
                "p": found.p,
            }
            for found in compared
        ],
    }


def _table(rows: list[Entry]) -> str:
    columns = [n for n in answer.columns_of(rows) if any(row.values.get(n) for row in rows)]
    head = ["", *(COLUMNS[name][0] for name in columns)]
    return console.table([head, *([row.name, *(_cell(row, n) for n in columns)] for row in rows)])


def _cell(row: Entry, name: str) -> str:
    value = row.mean(name)
    if value is None:
        return "–"
    _, digits, divisor = COLUMNS[name]
    text = f"{value / divisor:.{digits}f}"
    if (half := row.half_width(name)) is not None:
        text += f" ± {half / divisor:.{digits}f}"
    return text


def _signed(difference: dict[str, float]) -> list[str]:
    return [f"{difference[n]:+.2f}" if n in difference else "–" for n in ("top1", "top5")]


def _comparison_cells(found: Comparison) -> list[str]:
    between, p = found.interval, found.p
    return [
        f"{found.first} minus {found.second}",
        f"{found.mean:+.2f}",
        f"{between[0]:+.2f} to {between[1]:+.2f}" if between else "–",
        "–" if p is None else f"{p:.3f}",
        str(len(found.seeds)),
    ]
