"""The README.md of an exported model; every figure in it was measured."""

import dataclasses
import html
import json
import re
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mealv2.errors import LabelSetError
from mealv2.label_set import read_manifest
from mealv2.models import cifar
from mealv2.runtime import library_versions
from mealv2.storage.json_format import read_json
from mealv2.storage.regular_files import read_regular
from pipeline.config import (
    NO_SPLIT,
    DistillConfig,
    FinetuneConfig,
    TrainConfig,
    TransferConfig,
    plain,
)
from pipeline.training.run_folder import LABELS_NAME, METRICS_NAME, REPORT_NAME, parse_event

SHOWN_CLASSES = 20

# Settings that are elsewhere in the card, or do not change the model.
_OMITTED = {
    *("model", "data_dir", "labels", "split", "val_split", "teacher", "recipe", "output", "resume"),
    *("workers", "device", "log_interval", "checkpoint_hist", "recovery_interval"),
    *("download", "log_weights"),
}
# Figures of report.json, with name and unit.
_FIGURES = {
    "top1": ("top-1", "%"),
    "top5": ("top-5", "%"),
    "map": ("mean average precision", "%"),
    "map_11point": ("mean average precision, 11 points", "%"),
    "cross_entropy": ("cross-entropy", "nats"),
    "ece": ("expected calibration error", "%"),
    "agreement": ("agreement with the ensemble", "%"),
    "kl": ("KL(ensemble ‖ student)", "nats"),
}

_FRONT_MATTER = """---
library_name: timm
pipeline_tag: image-classification
tags:
- image-classification
- timm
- knowledge-distillation
- mealv2
{licence}
---
"""
_NO_LICENCE = (
    "# license: choose one; check the terms of the teachers, the starting weights and the images"
)
FOLDER = "local-dir:FOLDER"  # the name of a model in the folder of its card
REGISTERING = "import mealv2.models  # registers the cifar_ networks with timm"


@dataclass(frozen=True)
class History:
    """The record of a run folder; all fields are empty for a model folder without its run."""

    settings: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    measured_on: str | None = None
    plan: dict[str, Any] = field(default_factory=dict)
    labels_sha256: str | None = None
    online_teachers: list[dict[str, Any]] = field(default_factory=list)


def history_of(run: Path | None) -> History:
    """Read a run folder: settings, report, and the plan of its label set if that still exists.

    The plan of another label set in the same folder is ignored.
    """
    if run is None:
        return History()
    settings, report = _object(run / "config.json"), _object(run / REPORT_NAME)
    recorded = report.get("labels") or _object(run / LABELS_NAME)
    known = recorded.get("plan_sha256")
    manifest: dict[str, Any] = {}
    if isinstance(settings.get("labels"), str):
        with suppress(LabelSetError, OSError):
            manifest = read_manifest(Path(settings["labels"]))
    if known and manifest.get("plan_sha256") != known:
        manifest = {}
    return History(
        settings,
        report,
        _date_of(run, report),
        manifest.get("plan", {}),
        known or manifest.get("plan_sha256"),
        recorded.get("teachers", []),
    )


def model_card(
    stored: dict[str, Any], history: History, *, source: str = FOLDER, licence: str | None = None
) -> str:
    """Return the card, Markdown, from the metadata of a checkpoint and its run.

    ``source`` is the name by which timm loads the model, ``licence`` its identifier on the Hub.
    """
    front = _FRONT_MATTER.format(
        licence=f"license: {json.dumps(licence)}" if licence else _NO_LICENCE
    )
    name, how = escaped(stored["architecture"]), ""
    if history.settings:
        how = "trained on hard labels "
        if "labels" in history.settings:
            how = "distilled from an ensemble of teachers (MEAL V2) "
    parts = [
        f"{front}\n# {name}, {len(stored['classes'])} classes\n",
        f"An image classifier in timm's format, {how}with "
        "[mealv2](https://arxiv.org/abs/2009.08453).\n",
        table(["", ""], _facts(stored, history)),
        _accuracy(history),
        _settings(history),
        _usage(stored, source),
        _classes(stored["classes"]),
    ]
    return "\n".join(part for part in parts if part)


def escaped(text: object) -> str:
    """Return text that Markdown and HTML show literally, on one line, also in a table."""
    line = "".join(" " if unicodedata.category(c)[0] in "CZ" else c for c in str(text))
    line = html.escape(line, quote=False)
    return re.sub(r"([\\`*_{}\[\]()|~$!@^=:\"'])", r"\\\1", line).replace("#", "&#35;")


def _facts(stored: dict[str, Any], history: History) -> list[tuple[str, str]]:
    """Return the known rows on student, teachers, data and labels."""
    settings, plan, labels = history.settings, history.plan, history.labels_sha256
    version = library_versions()
    recipe = settings.get("recipe") or history.report.get("recipe")
    rows = [
        ("recipe", escaped(_without_folders(recipe)) if recipe else ""),
        ("student", escaped(settings.get("model") or stored["architecture"])),
        ("teachers", ", ".join(map(escaped, _teachers(history)))),
        ("data", _data(history)),
        ("image size", f"{stored['img_size']} x {stored['img_size']}"),
        ("labels", f"plan\\_sha256 `{labels}`" if labels else ""),
        ("normalisation", f"mean {_triple(stored['mean'])}, std {_triple(stored['std'])}"),
        ("exported with", ", ".join(f"{n} {version[n]}" for n in ("mealv2", "torch", "timm"))),
    ]
    if plan and "labels" in settings:
        rows.insert(-2, ("views per image", str(plan["roles"]["train"]["num_views"])))
    return [(name, value) for name, value in rows if value]


def _teachers(history: History) -> list[str]:
    """Return the names of the teachers, from the label set or the command; never a path."""
    if known := history.plan.get("teachers") or history.online_teachers:
        return [str(teacher["model"]) for teacher in known]
    given = history.settings.get("teacher") or []
    return [spec.partition("=")[0].strip() for spec in given]  # one spec per teacher


def _data(history: History) -> str:
    """Return the training split, with its number of images if that was recorded."""
    part = history.plan.get("roles", {}).get("train", {})
    if part:
        return f"split {escaped(part['split'])}, {part['num_images']} images"
    split = history.settings.get("split")
    return f"split {escaped(split)}" if split else ""


def _accuracy(history: History) -> str:
    """Return the measured figures with their split, number of images and date."""
    report = history.report
    rows = [
        (label, f"{report[name]:.{2 if unit == '%' else 4}f} {unit}")
        for name, (label, unit) in _FIGURES.items()
        if isinstance(report.get(name), int | float)
    ]
    if not rows:
        return "## Accuracy\n\nNot recorded with this model.\n"
    split = escaped(history.settings.get("val_split", NO_SPLIT))
    when = f", {history.measured_on}" if history.measured_on else ""
    images = f" ({report['num_images']} images{when})" if "num_images" in report else when
    return f"## Accuracy\n\nOn split {split}{images}:\n\n{table(['', ''], rows)}"


def _settings(history: History) -> str:
    """Return the settings that differ from the defaults of the command."""
    if not history.settings:
        return ""
    command: type[TrainConfig] = DistillConfig if "labels" in history.settings else FinetuneConfig
    if "mode" in history.settings:
        command = TransferConfig
    rows = []
    for known in dataclasses.fields(command):
        value = history.settings.get(known.name)
        default = None if known.default is dataclasses.MISSING else known.default
        if known.name not in _OMITTED and value is not None and value != plain(default):
            rows.append((known.name.replace("_", " "), escaped(_without_folders(value))))
    recorded = table(["", ""], rows) if rows else "None.\n"
    return f"## Settings that differ from the defaults\n\n{recorded}"


def _without_folders(value: Any) -> str:
    """Return a setting as text; of a path, also after NAME=, only the file name."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_without_folders, value))
    parts = [part.rpartition("=") for part in str(value).split(",")]
    return ",".join(
        name + mark + (Path(rest).name if Path(rest).is_absolute() else rest)
        for name, mark, rest in parts
    )


def _usage(stored: dict[str, Any], source: str) -> str:
    where = "`FOLDER` is the folder of this file. " if source == FOLDER else ""
    registering = f"\n{REGISTERING}\n" if stored["architecture"] in cifar.NAMES else ""
    size, mean, std = stored["img_size"], _triple(stored["mean"]), _triple(stored["std"])
    return f"""## Use

```python
import timm
{registering}
model = timm.create_model("{source}", pretrained=True).eval()
```

{where}The model takes B x 3 x {size} x {size} images in [0, 1] after
`(image - mean) / std` per channel, mean {mean}, std {std}; validation resizes the shorter side to
{int(256 / 224 * size)} (bilinear, antialiased) and crops the centre.
"""


def _classes(classes: list[str]) -> str:
    rows = [(str(number), escaped(name)) for number, name in enumerate(classes[:SHOWN_CLASSES])]
    more = len(classes) - SHOWN_CLASSES
    rest = f"And {more} more; all" if more > 0 else "They"
    listed = table(["id", "class"], rows)
    return f"## Classes\n\n{listed}\n{rest} are in `config.json` under `label_names`.\n"


def _triple(values: Any) -> str:
    return "(" + ", ".join(f"{float(value):.6g}" for value in values) + ")"


def table(head: list[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of cells that are escaped already."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, empty if there is none."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _date_of(run: Path, report: dict[str, Any]) -> str | None:
    """Return the UTC date of the last validation, from metrics.jsonl."""
    try:
        lines = read_regular(run / METRICS_NAME).splitlines()
        for event in filter(None, map(parse_event, reversed(lines))):
            if (event.get("event"), event.get("epoch")) == ("validation", report.get("epochs")):
                return f"{datetime.fromtimestamp(event['time'], UTC):%Y-%m-%d}"
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        pass
    return None
