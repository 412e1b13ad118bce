"""What the parts of the report page are given, and what each returns."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mealv2.report.run import Run
from mealv2.report.style import Figure
from mealv2.storage.urls import Location
from pipeline.config import ExtraDataConfig

DATA_FOLDER = "data"
# what ends a script element or a line of JavaScript, but not a string of JSON
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


@dataclass(frozen=True)
class Inputs:
    """What a report is made from.

    ``output`` is the folder that is being made: a section may write files below it. ``labels`` is
    None where neither ``--labels`` nor a run names a label set that can be read. ``data_dir`` is
    what ``--data-dir`` names, ``data`` how it is read.
    """

    runs: tuple[Run, ...]
    control: tuple[Run, ...]
    labels: Path | None
    data_dir: Location | None
    output: Path
    data: ExtraDataConfig = field(default_factory=ExtraDataConfig)


@dataclass
class Section:
    """A part of the page: the template ``ID.html`` with its ``context``.

    The template also has ``figures`` by their names in the order of ``figures``, and ``missing``: a
    sentence on what cannot be shown, and why. ``scripts`` are paths below the report's folder, in
    the order in which they are loaded. Without a template the page has the title and ``missing``.
    """

    id: str
    title: str
    template: str | None = None
    context: dict[str, Any] = field(default_factory=dict)
    figures: Sequence[Figure] = ()
    missing: str | None = None
    scripts: tuple[str, ...] = ()


def write_data(output: Path, name: str, value: Any) -> str:
    """Write a JSON value as ``window.mealv2Data[NAME]``; return the script's path.

    A page that is opened from a file can load a script, but no JSON. No text in the value can end
    the script.
    """
    path = output / DATA_FOLDER / f"{name}.js"
    path.parent.mkdir(exist_ok=True)
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    key = json.dumps(name)
    path.write_text(
        "window.mealv2Data = window.mealv2Data || {};\n"
        f"window.mealv2Data[{key}] = {text.translate(_ESCAPES)};\n",
        encoding="utf-8",
        errors="backslashreplace",  # names of files that are no Unicode
    )
    return path.relative_to(output).as_posix()
