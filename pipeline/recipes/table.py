"""The table of reproduced recipes: a row for each recipe or run, in Markdown."""

import re
from collections.abc import Sequence
from typing import Any

from mealv2 import recipes
from mealv2.text import printable

_HEAD = ["recipe", "published top-1", "top-5", "ours top-1", "top-5", "difference"]
_HEAD += ["epoch", "hours", "GPU-hours", "hardware", "labels", "versions", "date", "run"]
ONLINE = "online"  # labels of the teachers on every crop, as published
TITLE = "# Results of the recipes\n"
_INTRODUCTION = f"""\
{TITLE}
Written by `mealv2 recipes record`. Top-1 and top-5 in per cent on the validation images, of the
last epoch unless the run selects the best; the difference is ours minus published, in points.
Hours are those of training and its validation, without stage one; GPU-hours are hours times GPUs.
"""
_STORED = """
## From stored labels

These runs have the settings of their recipe, but the teachers labelled some crops of each image
once, where the published training labelled every crop: another training.
"""
_VARIANTS = """
## Variants, which reproduce nothing

Settings or data of these runs differ from their recipe.
"""


def document(records: Sequence[dict[str, Any]]) -> str:
    """Return the file of the results: reproductions, runs from stored labels, variants."""
    text = f"{_INTRODUCTION}\n{reproductions(records)}"
    if stored := [r for r in records if not r["differs"] and r["labels"] != ONLINE]:
        text += f"{_STORED}\n{_table([_HEAD, *map(_row, stored)])}"
    if variants := [record for record in records if record["differs"]]:
        rows = [[*_row(record), _cell("; ".join(record["differs"]))] for record in variants]
        text += f"{_VARIANTS}\n{_table([[*_HEAD, 'differs'], *rows])}"
    return text


def reproductions(records: Sequence[dict[str, Any]]) -> str:
    """Return the table of the runs that follow their recipe, with the teachers online.

    A published model without a run has a row with empty cells.
    """
    rows = []
    for name in recipes.names():
        own = [r for r in records if r["recipe"] == name and r["labels"] == ONLINE]
        found = [_row(r) for r in own if not r["differs"]]
        if not found and not name.startswith(recipes.ABLATION):
            found = [_published(recipes.load(name))]
        rows += found
    return _table([_HEAD, *rows])


def _published(recipe: recipes.Recipe) -> list[str]:
    """Return the row of a recipe that has no run."""
    known = [f"`{recipe.name}`", _percent(recipe.top1), _percent(recipe.top5)]
    return known + [""] * (len(_HEAD) - len(known))


def _row(record: dict[str, Any]) -> list[str]:
    published, gpu_hours, epoch = record["published"], record["gpu_hours"], str(record["epoch"])
    if record["best_epoch"] != record["epoch"]:
        epoch += f" (best {record['best_top1']:.2f} at {record['best_epoch']})"
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    difference = record["difference"]
    return [
        f"`{_cell(record['recipe'])}`",
        _percent(published["top1"]),
        _percent(published["top5"]),
        _percent(record["top1"]),
        _percent(record["top5"]),
        "–" if difference is None else f"{difference:+.2f}",
        epoch,
        f"{record['hours']:.2f}",
        "–" if gpu_hours is None else f"{gpu_hours:.2f}",
        _cell(record["hardware"]),
        _cell(record["labels"]),
        _cell(versions),
        _cell(record["date"]),
        _cell(record["run"]),
    ]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _cell(text: str) -> str:
    """Return text that Markdown shows as it is."""
    return re.sub(r"[\\|<`\[]", r"\\\g<0>", printable(text, is_line=True))


def _table(rows: list[list[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
