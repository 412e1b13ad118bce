"""The README.md of an exported model: what is known of it, and nothing that was not measured."""

import dataclasses
import json
import re
import unicodedata
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mealv2.errors import LabelSetError
from mealv2.label_set import read_manifest
from mealv2.storage.json_format import read_json
from pipeline.config import (
    NO_SPLIT,
    DistillConfig,
    FinetuneConfig,
    TrainConfig,
    plain,
    split_commas,
)
from pipeline.runtime.device import library_versions
from pipeline.training.run_folder import LABELS_NAME, REPORT_NAME

SHOWN_CLASSES = 20

# Settings that stand elsewhere in the card, or change nothing about the model.
_LEFT_OUT = {
    *("model", "data_dir", "labels", "split", "val_split", "teacher", "recipe", "output", "resume"),
    *("workers", "device", "log_interval", "checkpoint_hist", "recovery_interval"),
}
# What report.json may say, with its unit.
_FIGURES = {
    "top1": ("top-1", "%"),
    "top5": ("top-5", "%"),
    "cross_entropy": ("cross-entropy", "nats"),
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
# license: yours to choose; mind the terms of the teachers, the starting weights and the images
---
"""


@dataclass(frozen=True)
class History:
    """What a run folder says of the model in it; all empty for a model folder without its run."""

    settings: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    measured_on: str | None = None
    plan: dict[str, Any] = field(default_factory=dict)
    labels_sha256: str | None = None
    online_teachers: list[dict[str, Any]] = field(default_factory=list)


def history_of(run: Path | None) -> History:
    """Read a run folder: settings, report, and the label set where it still lies.

    A label set that is not the one the report names is left out.
    """
    if run is None:
        return History()
    settings, report = _object(run / "config.json"), _object(run / REPORT_NAME)
    noted = report.get("labels") or _object(run / LABELS_NAME)
    known = noted.get("plan_sha256")
    manifest: dict[str, Any] = {}
    if isinstance(settings.get("labels"), str):
        try:
            manifest = read_manifest(Path(settings["labels"]))
        except (LabelSetError, OSError):
            manifest = {}
    if known and manifest.get("plan_sha256") != known:
        manifest = {}
    return History(
        settings,
        report,
        _date_of(run, report),
        manifest.get("plan", {}),
        known or manifest.get("plan_sha256"),
        noted.get("teachers", []),
    )


def model_card(stored: dict[str, Any], history: History) -> str:
    """Return the card of a model from its checkpoint's metadata and its run; Markdown."""
    name = escaped(stored["architecture"])
    parts = [
        f"{_FRONT_MATTER}\n# {name}, {len(stored['classes'])} classes\n",
        f"An image classifier in timm's format, {_how(history)}with "
        "[mealv2](https://arxiv.org/abs/2009.08453).\n",
        _table(["", ""], _facts(stored, history)),
        _accuracy(history),
        _settings(history),
        _usage(stored),
        _classes(stored["classes"]),
    ]
    return "\n".join(part for part in parts if part)


def escaped(text: object) -> str:
    """Return text that Markdown and HTML show as it is, on one line, in a table too."""
    line = "".join(" " if unicodedata.category(c)[0] in "CZ" else c for c in str(text))
    html = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()|~$!@^=:\"'])", r"\\\1", html).replace("#", "&#35;")


def _how(history: History) -> str:
    if "labels" in history.settings:
        return "distilled from an ensemble of teachers (MEAL V2) "
    return "trained on hard labels " if history.settings else ""


def _facts(stored: dict[str, Any], history: History) -> list[tuple[str, str]]:
    """Return the rows on student, teachers, data and labels that are known."""
    settings, plan, version = history.settings, history.plan, library_versions()
    recipe = settings.get("recipe") or history.report.get("recipe")
    rows = [
        ("recipe", escaped(_without_folders(recipe)) if recipe else ""),
        ("student", escaped(settings.get("model") or stored["architecture"])),
        ("teachers", ", ".join(map(escaped, _teachers(history)))),
        ("data", _data(history)),
        ("image size", f"{stored['img_size']} x {stored['img_size']}"),
        ("labels", _labels(history)),
        ("normalisation", f"mean {_triple(stored['mean'])}, std {_triple(stored['std'])}"),
        ("exported with", ", ".join(f"{n} {version[n]}" for n in ("mealv2", "torch", "timm"))),
    ]
    if plan and "labels" in settings:
        rows.insert(-2, ("views per image", str(plan["roles"]["train"]["num_views"])))
    return [(name, value) for name, value in rows if value]


def _teachers(history: History) -> list[str]:
    """Return the teachers' names, from the label set or from the command; never a path."""
    if known := history.plan.get("teachers") or history.online_teachers:
        return [str(teacher["model"]) for teacher in known]
    given = history.settings.get("teacher") or []
    return [spec.partition("=")[0].strip() for spec in split_commas(given)]


def _data(history: History) -> str:
    """Return the split that was trained on, and how many images it has if that was recorded."""
    part = history.plan.get("roles", {}).get("train", {})
    if part:
        return f"split {escaped(part['split'])}, {part['num_images']} images"
    split = history.settings.get("split")
    return f"split {escaped(split)}" if split else ""


def _labels(history: History) -> str:
    return f"plan\\_sha256 `{history.labels_sha256}`" if history.labels_sha256 else ""


def _accuracy(history: History) -> str:
    """Return the measured figures with their split, count and date; words where there are none."""
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
    return f"## Accuracy\n\nOn split {split}{images}:\n\n{_table(['', ''], rows)}"


def _settings(history: History) -> str:
    """Return the settings that differ from the command's defaults."""
    if not history.settings:
        return ""
    command: type[TrainConfig] = DistillConfig if "labels" in history.settings else FinetuneConfig
    rows = []
    for known in dataclasses.fields(command):
        value = history.settings.get(known.name)
        default = None if known.default is dataclasses.MISSING else known.default
        if known.name not in _LEFT_OUT and value is not None and value != plain(default):
            rows.append((known.name.replace("_", " "), escaped(_without_folders(value))))
    recorded = _table(["", ""], rows) if rows else "None.\n"
    return f"## Settings that differ from the defaults\n\n{recorded}"


def _without_folders(value: Any) -> str:
    """Return a setting as text; of a path, also behind NAME=, only the last name."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_without_folders, value))
    parts = [part.rpartition("=") for part in str(value).split(",")]
    return ",".join(
        name + mark + (Path(rest).name if Path(rest).is_absolute() else rest)
        for name, mark, rest in parts
    )


def _usage(stored: dict[str, Any]) -> str:
    size, mean, std = stored["img_size"], _triple(stored["mean"]), _triple(stored["std"])
    return f"""## Use

```python
import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
```

`FOLDER` is where this file lies. The model takes B x 3 x {size} x {size} images in [0, 1] after
`(image - mean) / std` per channel, mean {mean}, std {std}; validation resizes the shorter side to
{int(256 / 224 * size)} (bilinear, antialiased) and cuts out the centre.
"""


def _classes(classes: list[str]) -> str:
    rows = [(str(number), escaped(name)) for number, name in enumerate(classes[:SHOWN_CLASSES])]
    more = len(classes) - SHOWN_CLASSES
    rest = f"And {more} more; all" if more > 0 else "They"
    listed = _table(["id", "class"], rows)
    return f"## Classes\n\n{listed}\n{rest} stand in `config.json` under `label_names`.\n"


def _triple(values: Any) -> str:
    return "(" + ", ".join(f"{float(value):.6g}" for value in values) + ")"


def _table(head: list[str], rows: list[tuple[str, str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _object(path: Path) -> dict[str, Any]:
    """Return a JSON object, empty where there is none."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _date_of(run: Path, report: dict[str, Any]) -> str | None:
    """Return the UTC date of the validation that the report repeats, as metrics.jsonl says it."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        events = [json.loads(line) for line in lines]
        last = next(
            event
            for event in reversed(events)
            if event.get("event") == "validation" and event.get("epoch") == report.get("epochs")
        )
        return f"{datetime.fromtimestamp(last['time'], UTC):%Y-%m-%d}"
    except (OSError, ValueError, StopIteration, KeyError):
        return None
