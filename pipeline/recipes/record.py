"""`mealv2 recipes record`: a finished run of a recipe as a row beside the published numbers."""

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mealv2 import recipes
from mealv2.errors import ConfigError, LabelSetError
from mealv2.label_set import read_manifest
from mealv2.storage.atomic import write_atomic
from mealv2.storage.json_format import canonical_json
from mealv2.storage.regular_files import read_regular
from pipeline import console
from pipeline.config import FREE_ON_RESUME, DistillConfig, RecipesRecordConfig, flag
from pipeline.recipes.finished_run import VERSIONS, is_utf8, read_records, read_run
from pipeline.recipes.table import ONLINE, TITLE, document

IMAGES, VAL_IMAGES = 1_281_167, 50_000  # ILSVRC 2012
# Settings with which a training is the same one: where it reads, its seeds, how it computes.
_SAME = FREE_ON_RESUME | {
    *("data_dir", "labels", "class_map", "recipe", "seed", "view_seed", "val_interval"),
    *("on_bad_image", "torchcompile", "amp", "amp_dtype"),  # the precision is in the table
}
_NO_GPU = ("cpu", "mps")


def run(config: RecipesRecordConfig) -> dict[str, Any]:
    """Record the run; write the results and their table; return the record.

    Raises ConfigError for a run that is not finished, or differs from its recipe without
    ``variant``, for damaged files, and for a table that is not its own.
    """
    record = _record(config.run)
    if record["differs"] and not config.variant:
        raise ConfigError(
            f"{config.run} is not a reproduction of {record['recipe']}: "
            f"{'; '.join(record['differs'])}; --variant records it in a table of its own"
        )
    records = [r for r in read_records(config.output) if r["run"] != record["run"]]
    records.append(record)
    table = config.output.with_suffix(".md")
    _require_own(table)
    text, results = document(records).encode(), canonical_json({"results": records}).encode()
    # the table first: a command that is stopped between the two is run again
    write_atomic(table, text)
    write_atomic(config.output, results)
    console.info(f"{_kind(record)} of {record['recipe']}: {_figures(record)}; see {table}")
    return record


def _require_own(table: Path) -> None:
    """Raise ConfigError for a file that was not written here."""
    try:
        if table.exists() and not read_regular(table).startswith(TITLE.encode()):
            raise ConfigError(f"{table} is another file, not a table of results; give --output")
    except OSError as error:
        raise ConfigError(f"cannot replace {table} ({error.strerror}); give --output") from None


def _kind(record: dict[str, Any]) -> str:
    if record["differs"]:
        return "variant"
    return "reproduction" if record["labels"] == ONLINE else "training from stored labels"


def _figures(record: dict[str, Any]) -> str:
    text = f"top-1 {record['top1']:.2f}"
    if record["difference"] is not None:
        text += f", published {record['published']['top1']:.2f} ({record['difference']:+.2f})"
    return text


def _record(run: Path) -> dict[str, Any]:
    """Return what a finished run reached, how, and what differs from its recipe."""
    path = str(run.resolve())  # one run has one row, by whatever name it is given
    if not is_utf8(path):
        raise ConfigError(f"{run} has a name that is not UTF-8, so no file of results can have it")
    finished = read_run(run)
    config, report, sessions = finished.config, finished.report, finished.sessions
    recipe = recipes.load(str(config.recipe))
    top1 = float(report["top1"])
    hours = sum(session["seconds"] for session in sessions) / 3600
    gpu_seconds = [s["seconds"] * s["ranks"] for s in sessions if s["device"] not in _NO_GPU]
    last = sessions[-1]
    return {
        "recipe": recipe.name,
        "published": {"top1": recipe.top1, "top5": recipe.top5},
        "top1": top1,
        "top5": float(report["top5"]),
        "difference": None if recipe.top1 is None else round(top1 - recipe.top1, 4),
        "epoch": report["selected_epoch"],
        "best_epoch": report["best_epoch"],
        "best_top1": report["best_top1"],
        "hours": round(hours, 3),
        "gpu_hours": round(sum(gpu_seconds) / 3600, 3) if gpu_seconds else None,
        "hardware": "; ".join(dict.fromkeys(map(_hardware, sessions))),
        "versions": {name: last["versions"][name] for name in VERSIONS},
        "labels": _labels(config, report),
        "date": f"{datetime.fromtimestamp(last['ended'], UTC):%Y-%m-%d}",
        "run": path,
        "differs": [*_changed_settings(config, recipe), *_changed_data(config, report, recipe)],
    }


def _hardware(session: dict[str, Any]) -> str:
    return f"{session['ranks']} x {session['device']}, {session['precision']}"


def _labels(config: DistillConfig, report: dict[str, Any]) -> str:
    """Return where the labels come from."""
    if config.online:
        return ONLINE
    labels = report["labels"]
    return f"{labels['num_views']} views, {labels['plan_sha256'][:12]}"


def _changed_settings(config: DistillConfig, recipe: recipes.Recipe) -> list[str]:
    """Return the settings of the run that are not the recipe's, or not the default."""
    settings = recipe.settings("distill", online=config.online)
    source = {"data_dir": config.data_dir, "labels": config.labels, "online": config.online}
    # a label set cannot have the CutMix of the published training, so no config would hold both
    possible = {name: value for name, value in settings.items() if name != "cutmix_target"}
    expected = DistillConfig.from_json(source | possible).as_json() | settings
    found = config.as_json()
    names = [name for name in found if name not in _SAME and found[name] != expected[name]]
    return [f"{flag(name)} {found[name]} (recipe: {expected[name]})" for name in names]


def _changed_data(
    config: DistillConfig, report: dict[str, Any], recipe: recipes.Recipe
) -> list[str]:
    """Return what is not ImageNet, and labels that are not of the recipe's teachers."""
    found = {"validation images": report["num_images"], "steps": report["steps"]}
    steps = recipe.distill["epochs"] * math.ceil(IMAGES / recipe.distill["batch_size"])
    expected = {"validation images": VAL_IMAGES, "steps": steps}
    if config.labels is not None:
        found |= _label_set(config, report)
        expected |= {"teachers": recipe.teachers["teacher"], "pixels": recipe.teachers["img_size"]}
        found["views"] = min(found["views"], recipe.precompute["num_views"])  # more is no change
        expected["views"] = recipe.precompute["num_views"]
    return [
        f"{name} {found[name]} (recipe: {expected[name]})"
        for name in expected
        if found[name] != expected[name]
    ]


def _label_set(config: DistillConfig, report: dict[str, Any]) -> dict[str, Any]:
    """Return teachers, pixels and views of the label set of a run, if it still exists."""
    labels = report["labels"]
    unknown = {"teachers": "unknown", "pixels": "unknown", "views": labels["num_views"]}
    try:
        manifest = read_manifest(Path(str(config.labels)))
    except (LabelSetError, OSError):
        return unknown
    if manifest["plan_sha256"] != labels["plan_sha256"]:
        return unknown
    plan = manifest["plan"]
    teachers = [teacher["model"] for teacher in plan.get("teachers", [])]
    return unknown | {"teachers": teachers, "pixels": plan["img_size"]}
