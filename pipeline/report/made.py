"""How the runs were made: commands, settings, hardware, versions, times, label set."""

import dataclasses
import json
import os
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mealv2.report.run import Run
from mealv2.report.teachers import LabelSource, label_source
from mealv2.storage.run_files import CONFIG_NAME
from pipeline import console
from pipeline.config import DistillConfig, FinetuneConfig, Settings, TransferConfig, flag
from pipeline.report.sections import Inputs, Section

TITLE = "How it was made"
_COMMANDS: dict[str, type[Settings]] = {
    "distill": DistillConfig,
    "finetune": FinetuneConfig,
    "transfer": TransferConfig,
}
# settings of the run folder, not of the training
_NOT_SHOWN = {"output", "resume", "auto_resume", "dry_run"}


def section(inputs: Inputs) -> Section:
    """Return the section."""
    runs = [*inputs.runs, *inputs.control]
    source = label_source(inputs.labels, inputs.runs)
    context = {
        "runs": [_described(run) for run in runs],
        "labels": None if source is None else _label_facts(inputs.labels, source),
    }
    return Section("made", TITLE, "made.html", context)


def command_of(run: Run) -> str | None:
    """Return which command trained a run, by the names of its settings; None for another."""
    names = run.config.keys()
    known = {name: {f.name for f in dataclasses.fields(c)} for name, c in _COMMANDS.items()}
    fitting = [name for name, fields in known.items() if names <= fields]
    # finetune knows fewer settings than transfer: the fewest that fit
    return min(fitting, key=lambda name: len(known[name]), default=None)


def _described(run: Run) -> dict[str, Any]:
    command = command_of(run)
    given = _given_settings(run, command)
    name = command or "COMMAND"
    config_file = os.path.abspath(run.path / CONFIG_NAME)  # noqa: PTH100  # links stay
    return {
        "path": str(run.path),
        "state": run.state,
        "command": shlex.join(["mealv2", name, *_words(given)]),
        "repeat": shlex.join(["mealv2", name, "--config", config_file, "--output", "NEW_FOLDER"]),
        "facts": _facts(run),
        "given": [[key, _text(value)] for key, value in given.items()],
        "all": json.dumps(run.config, indent=2, ensure_ascii=False, sort_keys=True),
        "notes": run.notes,
    }


def _given_settings(run: Run, command: str | None) -> dict[str, Any]:
    """Return the settings that are not the defaults of the command."""
    fields = {f.name: f for f in dataclasses.fields(_COMMANDS[command])} if command else {}
    found = {}
    for name, value in sorted(run.config.items()):
        field = fields.get(name)
        default = None if field is None or field.default is dataclasses.MISSING else field.default
        if isinstance(default, tuple):
            default = list(default)
        if name not in _NOT_SHOWN and value != default:
            found[name] = value
    return found


def _words(settings: dict[str, Any]) -> list[str]:
    """Return settings as words of a command line."""
    words = []
    for name, value in settings.items():
        if isinstance(value, bool):
            words.append(flag(name) if value else f"--no-{flag(name)[2:]}")
        elif isinstance(value, list):
            words += [word for item in value for word in (flag(name), _text(item))]
        elif value is not None:
            words += [flag(name), _text(value)]
    return words


def _facts(run: Run) -> list[tuple[str, str]]:
    """Return what is known of a run as (what, value)."""
    facts = [("student", run.model), ("state", run.state)]
    if recipe := run.config.get("recipe"):
        facts.append(("recipe", str(recipe)))
    if run.sessions:
        facts += _session_facts(run.sessions)
        facts.append(("time", console.duration(run.seconds)))
    if run.report is not None:
        for name in ("steps", "teacher_forwards"):
            if name in run.report:
                facts.append((name.replace("_", " "), f"{run.report[name]:,}"))
    labels = run.labels or {}
    if "plan_sha256" in labels:
        facts.append(("labels", f"{labels.get('path')}, plan {labels['plan_sha256']}"))
    return facts


def _session_facts(sessions: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    first, last = sessions[0], sessions[-1]
    devices = dict.fromkeys(
        f"{session.get('ranks', 1)} × {session.get('device')}, {session.get('precision')}"
        for session in sessions
    )
    versions = last.get("versions")
    versions = versions if isinstance(versions, dict) else {}
    facts = [("hardware", "; ".join(devices))]
    if isinstance(first.get("time"), int | float):
        facts.append(("started", _date(first["time"])))
    if len(sessions) > 1:
        facts.append(("started or resumed", f"{len(sessions)} times"))
    if versions:
        text = ", ".join(f"{name} {version}" for name, version in versions.items())
        facts.append(("versions", text))
    return facts


def _label_facts(folder: Path | None, source: LabelSource) -> list[tuple[str, str]]:
    """Return what is known of the label set as (what, value)."""
    plan, manifest = source.plan, source.manifest
    names = ", ".join(teacher.name for teacher in source.teachers)
    facts = [("teachers", names or "unknown")]
    if folder is not None:
        facts.insert(0, ("folder", str(folder)))
    for name in ("plan_sha256", "manifest_sha256"):
        if name in manifest:
            facts.append((name.replace("_sha256", " SHA-256"), str(manifest[name])))
    if plan:
        facts.append(("state", "finished" if manifest else "not finished: it has no manifest"))
        facts.append(("image size", f"{plan['img_size']} pixels"))
        facts.append(("format version", str(plan.get("format_version"))))
    for split, entry in plan.get("roles", {}).items():
        data = entry.get("data_sha256", "unknown")
        count = entry.get("num_images", "an unknown number of")
        views = console.count(entry["num_views"], "view")
        facts.append((split, f"{count} images, {views} each; data {data}"))
    versions = manifest.get("versions")
    if isinstance(versions, dict):
        facts.append(("versions", ", ".join(f"{n} {v}" for n, v in versions.items())))
    if "derived" in plan:
        facts.append(("made from", str(plan["derived"].get("how"))))
    return facts


def _date(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (ValueError, OverflowError, OSError):
        return "unknown"


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)
