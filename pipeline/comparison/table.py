"""The table of many runs in the form of the paper's Tables 6 and 7, with intervals over seeds."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from mealv2.intervals import interval
from pipeline import console

METRICS = ("top1", "map_11point", "map")  # a report's first of these is its figure
_TITLES = {
    "scratch": "From scratch",
    "fine-tune": "Fine-tune",
    "frozen": "Freeze backbone",
    "freeze-first-stage": "Freeze first stage",
}
_METRICS = {"top1": "top-1", "map": "mAP", "map_11point": "VOC2007's 11-point mAP"}
_NAMES = {"base": "Base model", "distilled": "Distilled", "model": "Model"}
_MEAN = "mean"


@dataclass(frozen=True)
class Form:
    """What the columns are: the data sets, or metrics of one set, their titles by name."""

    metrics: dict[str, str] = field(default_factory=dict)


SETS = Form()
AVERAGE_PRECISIONS = Form(
    {
        "ap": "AP",
        "ap50": "AP50",
        "ap75": "AP75",
        "ap_small": "APSmall",
        "ap_medium": "APMedium",
        "ap_large": "APLarge",
    }
)


@dataclass(frozen=True)
class Run:
    """A run of the grid, by data set, mode, model (base, distilled) and seed, and its report."""

    data_set: str
    mode: str
    model: str
    seed: int
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def metric(self) -> str:
        """The name of the figure: top-1, of several classes per image the mAP."""
        report = self.report
        if "last_map_11point" in report:  # VOC2007: the loop chose by it
            return "map_11point"
        return next(name for name in ("top1", "map") if name in report)

    @property
    def value(self) -> float:
        """The figure in percent."""
        return float(self.report[self.metric])


def grid_report(runs: Sequence[Run], form: Form = SETS) -> dict[str, Any]:
    """Return all figures: values by seed, means and 95 % intervals, and differences by seed."""
    by_row = _by_row(runs, form)
    differences = _differences(by_row).items()
    if form.metrics:
        return {
            "results": [
                {"metric": metric, "mode": mode, "model": model} | _of(values)
                for (metric, mode, model), values in by_row.items()
            ],
            "differences": [
                {"metric": metric, "mode": mode} | _of(values)
                for (metric, mode), values in differences
            ],
        }
    rows = []
    for (data_set, mode, model), values in by_row.items():
        metric = next(run.metric for run in runs if (run.data_set, run.mode) == (data_set, mode))
        rows.append({"set": data_set, "mode": mode, "model": model, "metric": metric} | _of(values))
    return {
        "results": rows,
        "differences": [
            {"set": data_set, "mode": mode} | _of(values)
            for (data_set, mode), values in differences
        ],
        "means": [
            {"mode": mode, "model": model} | _of(values)
            for (mode, model), values in _means(by_row).items()
        ],
    }


def grid_table(runs: Sequence[Run], form: Form = SETS, *, as_markdown: bool = False) -> str:
    """Return the table: a column for each metric, or each set and, of several, their mean."""
    of_one_set = "" if form.metrics else _METRICS[runs[0].metric]
    rows = _table_rows(_by_row(runs, form), form, of_one_set)
    if as_markdown:
        lines = [f"| {' | '.join(cells)} |" for cells in rows]
        lines.insert(1, f"|{' --- |' * len(rows[0])}")
        return "\n".join([*lines, "", *_notes(runs, form)])
    return "\n".join([console.table(rows), *_notes(runs, form)])


def _table_rows(rows: "Rows", form: Form, of_one_set: str) -> list[list[str]]:
    columns = list(dict.fromkeys(column for column, _, _ in rows))
    means = _means(rows) if len(columns) > 1 and not form.metrics else {}
    titles = [form.metrics.get(name, name or of_one_set) for name in columns]
    shown = [["", *titles, *([_MEAN] if means else [])]]
    differences = _differences(rows)
    for mode in dict.fromkeys(mode for _, mode, _ in rows):
        models = list(dict.fromkeys(model for _, m, model in rows if m == mode))
        for model in models:
            title = _TITLES[mode] if mode == "scratch" else f"{_TITLES[mode]}: {_NAMES[model]}"
            cells = [_cell(rows.get((c, mode, model), {})) for c in columns]
            shown.append([title, *cells, *([_cell(means[mode, model])] if means else [])])
        if len(models) > 1:
            cells = [_difference_cell(differences.get((c, mode), {})) for c in columns]
            if means:
                base, distilled = (means[mode, model] for model in models)
                cells.append(_difference_cell({s: distilled[s] - base[s] for s in base}))
            shown.append([f"{_TITLES[mode]}: difference", *cells])
    return shown


# Values by seed; by data set, mode and model.
Values = dict[int, float]
Rows = dict[tuple[str, str, str], Values]


def _by_row(runs: Iterable[Run], form: Form) -> Rows:
    """Return the values by column (data set or metric), mode and model."""
    rows: Rows = {}
    for run in runs:
        values = {run.data_set: run.value} if not form.metrics else run.report
        for column, value in values.items():
            if column in form.metrics or not form.metrics:
                rows.setdefault((column, run.mode, run.model), {})[run.seed] = float(value)
    order = list(form.metrics)
    return dict(sorted(rows.items(), key=lambda row: order.index(row[0][0]))) if order else rows


def _differences(rows: Rows) -> dict[tuple[str, str], Values]:
    """Return the second model's figures less the first's of the same seeds."""
    found = {}
    for (data_set, mode, model), values in rows.items():
        base = rows.get((data_set, mode, "base"))
        if model == "distilled" and base is not None:
            found[data_set, mode] = {seed: values[seed] - base[seed] for seed in values}
    return found


def _means(rows: Rows) -> dict[tuple[str, str], Values]:
    """Return the means over the data sets, seed by seed."""
    grouped: dict[tuple[str, str], list[Values]] = {}
    for (_, mode, model), values in rows.items():
        grouped.setdefault((mode, model), []).append(values)
    return {
        key: {seed: mean(values[seed] for values in several) for seed in several[0]}
        for key, several in grouped.items()
    }


def _of(values: Values) -> dict[str, Any]:
    figures = list(values.values())
    return {
        "values": {str(seed): value for seed, value in values.items()},
        "mean": mean(figures),
        "interval_95": interval(figures) if len(figures) > 1 else None,
    }


def _cell(values: Values) -> str:
    """Return a mean and half the width of its interval: 80.70 ± 0.31."""
    figures = list(values.values())
    if not figures:
        return "-"
    between = interval(figures) if len(figures) > 1 else None
    half = "" if between is None else f" ± {(between[1] - between[0]) / 2:.2f}"
    return f"{mean(figures):.2f}{half}"


def _difference_cell(values: Values) -> str:
    """Return a mean difference and its interval: +3.00 [+2.10, +3.90]."""
    figures = list(values.values())
    if not figures:
        return "-"
    between = interval(figures) if len(figures) > 1 else None
    text = "" if between is None else f" [{between[0]:+.2f}, {between[1]:+.2f}]"
    return f"{mean(figures):+.2f}{text}"


def _notes(runs: Sequence[Run], form: Form) -> list[str]:
    """Return what the figures are."""
    metrics = ["COCO's average precision"]
    if not form.metrics:
        of_set = {run.data_set: run.metric for run in runs}
        metrics = sorted({_METRICS[metric] for metric in of_set.values()})
    seeds = len({run.seed for run in runs})
    over = f"mean of {seeds} seeds, 95 % interval (Student's t)" if seeds > 1 else "one seed"
    return [f"{' and '.join(metrics)} in percent; {over}."]
