"""What runs reached: the table of start, control, student, teachers and ensemble, and the gaps."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from mealv2.intervals import interval
from mealv2.models.cost import Cost, model_cost, stored_parameters
from mealv2.report.methods import Comparison, Method, average, comparison_of
from mealv2.report.run import Row, Run
from mealv2.report.style import INK, MUTED, SERIES, Figure, drawing, new_figure, short_name
from mealv2.report.teachers import LabelSource, Teacher
from mealv2.storage.weight_files import EXPORT_FOLDER, WEIGHTS_NAME

START, CONTROL, LAST, BEST = "start", "control", "last", "best"
TEACHER, ENSEMBLE = "teacher", "ensemble"
# figures of a row, in the order of the columns: title, digits, divisor
COLUMNS: dict[str, tuple[str, int, float]] = {
    "top1": ("top-1 %", 2, 1.0),
    "top5": ("top-5 %", 2, 1.0),
    "map": ("mAP %", 2, 1.0),
    "map_11point": ("11-point mAP %", 2, 1.0),
    "parameters": ("parameters, M", 2, 1e6),
    "macs": ("GMACs", 3, 1e9),
    "agreement": ("agreement %", 2, 1.0),
    "kl": ("KL, nats", 4, 1.0),
    "ece": ("ECE %", 2, 1.0),
}
_MULTI_LABEL = {"map", "map_11point"}
_TO_ENSEMBLE = {"agreement", "kl"}
_IMG_SIZE = 224
_MAX_BARS = 30


@dataclass(frozen=True)
class Entry:
    """A row of the table: the values of each figure, one for each run that has it."""

    name: str
    kind: str
    method: str | None
    values: dict[str, list[float]]
    epochs: tuple[int, ...] = ()

    def mean(self, name: str) -> float | None:
        """Return the mean of a figure over the runs; None where no run has it."""
        return mean(self.values[name]) if self.values.get(name) else None

    def interval(self, name: str) -> tuple[float, float] | None:
        """Return the 95 % interval of the mean; None for one run, and for what is equal in all.

        That of a percentage ends at 0 and 100.
        """
        if (found := self._interval(name)) is None:
            return None
        low, high = found
        return (max(0.0, low), min(100.0, high)) if COLUMNS[name][0].endswith("%") else (low, high)

    def half_width(self, name: str) -> float | None:
        """Return half the width of the 95 % interval, for ±, also beyond 0 and 100 percent."""
        found = self._interval(name)
        return None if found is None else (found[1] - found[0]) / 2

    def _interval(self, name: str) -> tuple[float, float] | None:
        values = self.values.get(name, [])
        return interval(values) if len(set(values)) > 1 else None


@dataclass(frozen=True)
class Gap:
    """A student minus a teacher or the ensemble, in points of top-1 and top-5 (Table 5)."""

    teacher: str
    student: str
    of_teacher: Row
    of_student: Row

    @property
    def difference(self) -> Row:
        """The student minus the teacher."""
        return {name: self.of_student[name] - self.of_teacher[name] for name in self.of_teacher}


def table_rows(
    methods: Sequence[Method], *, control: Sequence[Method] = (), source: LabelSource | None = None
) -> list[Entry]:
    """Return the rows: starts, control, students, teachers, ensemble.

    The control's start is left out where it is that of a student.
    """
    starts = _merged([_start_entry(method) for method in [*methods, *control]])
    if len(starts) == 1:
        (only,) = starts
        starts = [Entry("student at the start", only.kind, None, only.values)]
    rows = [*starts]
    for method, kind in [*((m, CONTROL) for m in control), *((m, LAST) for m in methods)]:
        rows += list(_trained_entries(method, kind))
    return [*rows, *_teacher_entries(source)] if source else rows


def columns_of(rows: Sequence[Entry]) -> list[str]:
    """Return the columns of a table: those of accuracy and cost, mAP only where a row has it."""
    has_map = any("map" in row.values for row in rows)
    left_out = {"top1", "top5", "agreement", "kl", "ece"} if has_map else _MULTI_LABEL
    return [name for name in COLUMNS if name not in left_out]


def gaps_of(rows: Sequence[Entry]) -> list[Gap]:
    """Return the gap of each trained student to each teacher and to the ensemble, of last epochs.

    Means over the runs of a method.
    """
    students = [row for row in rows if row.kind in (LAST, CONTROL) and row.values.get("top1")]
    teachers = [row for row in rows if row.kind in (TEACHER, ENSEMBLE) and row.values.get("top1")]
    return [
        Gap(teacher.name, student.name, *_common(teacher, student))
        for student in students
        for teacher in teachers
    ]


def comparisons(
    methods: Sequence[Method], control: Sequence[Method] = (), *, metric: str = "top1"
) -> list[Comparison]:
    """Return each method minus each control; without a control, minus the first method."""
    pairs = [(m, c) for c in control or methods[:1] for m in methods if m is not c]
    found = (comparison_of(first, second, metric) for first, second in pairs)
    return [comparison for comparison in found if comparison is not None]


def costs_of(run: Run) -> Cost | None:
    """Return the cost of a run's student; None where it cannot be built from its name."""
    config = run.student or {}
    found = (config.get("pretrained_cfg") or {}).get("input_size")
    size = found[-1] if isinstance(found, list) and found else run.config.get("img_size")
    classes = config.get("num_classes")
    if not isinstance(classes, int) or config.get("model_args"):
        return None
    img_size = size if isinstance(size, int) else _IMG_SIZE
    return model_cost(str(config.get("architecture")), num_classes=classes, img_size=img_size)


def gain_figure(methods: Sequence[Method], *, control: Sequence[Method] = ()) -> Figure | None:
    """Return bars of the top-1 accuracy of each method, with its gain over its start.

    The paper's Figure 1. A control is a bar too. None where no run has both figures.
    """
    bars = [bar for method in [*control, *methods] if (bar := _bar(method)) is not None]
    if not bars:
        return None
    bars = bars[:_MAX_BARS]
    canvas, (axes,) = new_figure(size=(5.0, 0.8 + 0.42 * len(bars)))
    lowest = min(min(bar["start"], bar["last"]) for bar in bars)
    floor = max(0.0, 5.0 * ((lowest - 5.0) // 5.0))
    with drawing():
        names = [short_name(bar["method"], most=24) for bar in bars]
        for row, bar in enumerate(bars):
            low, high = sorted((bar["start"], bar["last"]))
            axes.barh(row, low - floor, left=floor, color=MUTED, alpha=0.45, height=0.6)
            colour = SERIES[0] if bar["gain"] >= 0 else SERIES[1]
            axes.barh(row, high - low, left=low, color=colour, height=0.6)
            text = f"{bar['last']:.2f} ({bar['gain']:+.2f})"
            axes.annotate(
                text, (high, row), (4, 0), textcoords="offset points", va="center", color=INK
            )
        axes.set_yticks(range(len(bars)), names)
        axes.invert_yaxis()
        top = max(max(bar["start"], bar["last"]) for bar in bars)
        axes.set_xlim(floor, top + 0.42 * (top - floor))
        axes.set_xlabel("top-1 accuracy, validation, %")
        axes.grid(axis="y", visible=False)
    alt = "Bars of top-1 accuracy: " + "; ".join(
        f"{bar['method']} from {bar['start']:.2f} to {bar['last']:.2f} ({bar['gain']:+.2f})"
        for bar in bars
    )
    title = "Gain over the start: grey is the accuracy of the start, colour what training added"
    return Figure("gain", title, alt, canvas, bars)


def _bar(method: Method) -> dict[str, Any] | None:
    """Return the means of start, last and gain over the runs that have both."""
    pairs = [
        (run.start["top1"], run.last[1]["top1"])
        for run in method.runs
        if run.start and run.last and "top1" in run.start and "top1" in run.last[1]
    ]
    if not pairs:
        return None
    start, last = (mean(values) for values in zip(*pairs, strict=True))
    return {
        "method": method.name,
        "runs": len(pairs),
        "start": start,
        "last": last,
        "gain": last - start,
    }


def _start_entry(method: Method) -> Entry:
    rows = [run.start for run in method.runs]
    return Entry(f"{method.name}: start", START, method.name, _values(rows) | _cost(method))


def _trained_entries(method: Method, kind: str) -> Iterator[Entry]:
    """Yield the last and the best epoch of a method; one row where they are the same."""
    title = f"{method.name} (control)" if kind == CONTROL else method.name
    last = [run.last for run in method.runs if run.last is not None]
    best = [run.best for run in method.runs if run.best is not None]
    cost = _cost(method)
    for name, found, its_kind in ((LAST, last, kind), (BEST, best, BEST)):
        if name == BEST and (not best or [e for e, _ in best] == [e for e, _ in last]):
            continue
        suffix = (
            "last, best" if name == LAST and [e for e, _ in best] == [e for e, _ in last] else name
        )
        epochs = tuple(epoch for epoch, _ in found)
        values = _values([row for _, row in found]) | cost
        yield Entry(f"{title}: {suffix}", its_kind, method.name, values, epochs)


def _teacher_entries(source: LabelSource) -> Iterator[Entry]:
    costs = [_teacher_cost(teacher, source) for teacher in source.teachers]
    for teacher, cost in zip(source.teachers, costs, strict=True):
        values = _values([teacher.metrics]) | _of_cost(cost)
        yield Entry(f"teacher {teacher.name}", TEACHER, None, values)
    if source.ensemble is not None:
        known = [cost for cost in costs if cost is not None]
        total = Cost(sum(c.parameters for c in known), sum(c.macs for c in known))
        cost = total if known and len(known) == len(costs) else None
        yield Entry("ensemble", ENSEMBLE, None, _values([source.ensemble.metrics]) | _of_cost(cost))


def _teacher_cost(teacher: Teacher, source: LabelSource) -> Cost | None:
    if source.num_classes is None:
        return None
    size = teacher.img_size or _IMG_SIZE
    return model_cost(teacher.name, num_classes=source.num_classes, img_size=size)


def _cost(method: Method) -> dict[str, list[float]]:
    """Return the cost of the student; of one without a known architecture only its parameters."""
    run = method.runs[0]
    if (cost := costs_of(run)) is not None:
        return _of_cost(cost)
    parameters = stored_parameters(run.path / EXPORT_FOLDER / WEIGHTS_NAME)
    return {} if parameters is None else {"parameters": [parameters]}


def _of_cost(cost: Cost | None) -> dict[str, list[float]]:
    return {} if cost is None else {"parameters": [cost.parameters], "macs": [cost.macs]}


def _values(rows: Sequence[Row | None]) -> dict[str, list[float]]:
    found = {name: average(rows, name) for name in COLUMNS}
    return {name: values for name, values in found.items() if values}


def _merged(starts: Iterable[Entry]) -> list[Entry]:
    """Return the starts that were measured; those of equal accuracy and cost as one.

    Only a run with soft labels knows its agreement.
    """
    found: dict[str, Entry] = {}
    for entry in starts:
        known = {name: value for name, value in entry.values.items() if name not in _TO_ENSEMBLE}
        if set(known) - {"parameters", "macs"}:
            earlier = found.setdefault(repr(known), entry)
            earlier.values.update(entry.values)
    return list(found.values())


def _common(teacher: Entry, student: Entry) -> tuple[Row, Row]:
    """Return the accuracies that both have, as means."""
    pairs = {n: (teacher.mean(n), student.mean(n)) for n in ("top1", "top5")}
    both = {n: (a, b) for n, (a, b) in pairs.items() if a is not None and b is not None}
    return {n: a for n, (a, _) in both.items()}, {n: b for n, (_, b) in both.items()}
