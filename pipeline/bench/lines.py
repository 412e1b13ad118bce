"""The lines of the table: what is compared with what, the goal, and the figure of each round."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Literal

from pipeline.timing import Turn

_MIN_CPU_S = 0.05  # the counter has steps of 10 ms
HEAD = ["line", "what", "against", "figure", "range", "goal", ""]


class NotMeasuredError(Exception):
    """A line cannot be measured on this machine; the message is the reason."""


@dataclass(frozen=True)
class Goal:
    """The limit ``value`` for the figure of ``what`` compared with ``against``."""

    what: str
    against: str
    side: Literal[">=", "<=", "<"]
    value: float
    unit: str = "x"

    def is_met(self, figure: float) -> bool:
        """Return whether a figure meets the goal."""
        if self.side == ">=":
            return figure >= self.value
        return figure <= self.value if self.side == "<=" else figure < self.value

    def __str__(self) -> str:
        return f"{self.side} {self.value:g}{_spaced(self.unit)}"


_IMAGE_FOLDER = "torchvision ImageFolder + DataLoader"

GOALS = {
    "loader-1": Goal("loader, 1 view per image", _IMAGE_FOLDER, ">=", 1.8),
    "loader-packed": Goal("the same from re-packed JPEGs", "the same", ">=", 2.3),
    "loader-4": Goal("loader, 4 views per decode", "the same, per view", ">=", 3.6),
    "loader-16": Goal("stage one, 16 views per decode", "the same, per view", ">=", 6.0),
    "loader-tar": Goal("loader, tar shards", "webdataset's PIL pipeline", ">=", 2.0),
    "labels": Goal("labels of 512 views to the loss", "decoding their JPEGs", "<", 2.0, "%"),
    "step-hard": Goal("step with stored labels, time", "hard labels", "<=", 1.03),
    "step-online": Goal("step with stored labels, speed", "teachers online", ">=", 3.4),
    "stage-one": Goal("stage one, views/s", "its teachers alone", ">=", 0.95),
    "help": Goal("mealv2 --help", "-", "<", 0.3, "s"),
    "memory": Goal("stage one, growth of memory", "1/4 of the images; 30 views", "<", 5, "%"),
}


@dataclass(frozen=True)
class Line:
    """A measured line: one figure per round, all turns, notes; or ``why`` it was not measured.

    ``pictures`` says which pictures were read, where a line is measured on several kinds.
    """

    name: str
    figures: Sequence[float] = ()
    turns: dict[str, list[Turn]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    why: str | None = None
    pictures: str = ""

    @property
    def title(self) -> str:
        """The name, and the pictures if it is measured on several kinds."""
        return f"{self.name}, {self.pictures}" if self.pictures else self.name

    @property
    def figure(self) -> float:
        """The median of the rounds."""
        return median(self.figures)

    @property
    def verdict(self) -> str:
        """ "met", "missed", or the reason why the line was not measured."""
        if self.why is not None:
            return f"not measured: {self.why}"
        return "met" if GOALS[self.name].is_met(self.figure) else "missed"

    def row(self) -> list[str]:
        """Return the cells of the line in the table."""
        goal = GOALS[self.name]
        figure, spread = "-", "-"
        if self.why is None:
            figure = f"{self.figure:.3g}{_spaced(goal.unit)}"
            spread = f"{min(self.figures):.3g} to {max(self.figures):.3g}"
        return [self.title, goal.what, goal.against, figure, spread, str(goal), self.verdict]

    def summary(self) -> dict[str, Any]:
        """Return the line as JSON, without the turns."""
        goal = GOALS[self.name]
        measured = {}
        if self.why is None:
            measured = {
                "figure": round(self.figure, 4),
                "least": round(min(self.figures), 4),
                "most": round(max(self.figures), 4),
                "met": goal.is_met(self.figure),
            }
        return {
            "line": self.name,
            **({"pictures": self.pictures} if self.pictures else {}),
            "what": goal.what,
            "against": goal.against,
            "goal": str(goal),
            "unit": goal.unit,
            "verdict": self.verdict,
            **measured,
            **({"notes": self.notes} if self.notes else {}),
        }

    def raw(self) -> dict[str, Any]:
        """Return the line as JSON, with the figure and the turns of every round."""
        turns = {
            name: [{key: round(value, 6) for key, value in asdict(t).items()} for t in of_workload]
            for name, of_workload in self.turns.items()
        }
        figures = [round(figure, 5) for figure in self.figures]
        return {**self.summary(), "figures": figures, "turns": turns}


def by_cpu_time(turns: dict[str, list[Turn]], what: str, against: str) -> dict[str, float]:
    """Return, as a note, the CPU time per unit of ``against`` over that of ``what``.

    CPU time is summed over all cores. Rounds with too little of it to measure are left out.
    """
    found = [
        (b.cpu_seconds / b.units) / (a.cpu_seconds / a.units)
        for a, b in zip(turns[what], turns[against], strict=True)
        if min(a.cpu_seconds, b.cpu_seconds) > _MIN_CPU_S
    ]
    return {"by_cpu_time": round(median(found), 4)} if found else {}


def ratios(turns: dict[str, list[Turn]], what: str, against: str) -> list[float]:
    """Return the rate of ``what`` over that of ``against``, round by round."""
    return [a.rate / b.rate for a, b in zip(turns[what], turns[against], strict=True)]


def _spaced(unit: str) -> str:
    return unit if unit == "x" else f" {unit}"
