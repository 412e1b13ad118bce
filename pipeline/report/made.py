"""How the runs were made: commands, settings, hardware, versions, times, label set."""

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
from pipeline.report.commands import (
    command_of,
    given_settings,
    labelling_command,
    recipe_differences,
    text_of,
    typed_commands,
    words_of,
)
from pipeline.report.sections import Inputs, Section

TITLE = "How it was made"


def section(inputs: Inputs) -> Section:
    """Return the section."""
    runs = [*inputs.runs, *inputs.control]
    source = label_source(inputs.labels, inputs.runs)
    context = {
        "runs": [_described(run) for run in runs],
        "labels": None if source is None else _label_facts(inputs.labels, source),
        "labelling": None if source is None else labelling_command(source),
    }
    return Section("made", TITLE, "made.html", context)


def _described(run: Run) -> dict[str, Any]:
    command = command_of(run)
    given = given_settings(run, command)
    differences = recipe_differences(run)
    name = command or "COMMAND"
    config_file = os.path.abspath(run.path / CONFIG_NAME)  # noqa: PTH100  # links stay
    return {
        "path": str(run.path),
        "state": run.state,
        "typed": typed_commands(run),
        "differences": differences,
        "command": shlex.join(["mealv2", name, *words_of(given)]),
        "repeat": shlex.join(["mealv2", name, "--config", config_file, "--output", "NEW_FOLDER"]),
        "facts": _facts(run),
        "given": [[key, text_of(value)] for key, value in given.items()],
        "all": json.dumps(run.config, indent=2, ensure_ascii=False, sort_keys=True),
        "notes": run.notes,
    }


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
