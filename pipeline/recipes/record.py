"""`mealv2 recipes record`: a finished run of a recipe as a row beside the published numbers."""

import math
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mealv2 import recipes
from mealv2.errors import ConfigError, LabelSetError
from mealv2.label_set import read_manifest
from mealv2.storage.atomic import write_atomic
from mealv2.storage.json_format import canonical_json, read_json
from mealv2.storage.regular_files import read_regular
from pipeline import console
from pipeline.config import FREE_ON_RESUME, DistillConfig, RecipesRecordConfig, flag
from pipeline.recipes.table import document
from pipeline.training.run_folder import (
    CONFIG_NAME,
    METRICS_NAME,
    REPORT_NAME,
    SESSION,
    parse_event,
)

IMAGES, VAL_IMAGES = 1_281_167, 50_000  # ILSVRC 2012
# Settings with which a training is the same one: where it reads, its seeds, how it computes.
_SAME = FREE_ON_RESUME | {
    *("data_dir", "labels", "class_map", "recipe", "seed", "view_seed", "val_interval"),
    *("on_bad_image", "torchcompile", "amp", "amp_dtype"),  # the precision is in the table
}
_VERSIONS = ("mealv2", "torch", "timm")
_OF_SESSION = {"time", "ranks", "device", "precision", "versions"}


def run(config: RecipesRecordConfig) -> dict[str, Any]:
    """Record the run; write the results and their table; return the record.

    Raises ConfigError for a run that is not finished, or differs from its recipe without
    ``variant``, and for a damaged file of results.
    """
    record = _record(config.run)
    if record["differs"] and not config.variant:
        raise ConfigError(
            f"{config.run} is not a reproduction of {record['recipe']}: "
            f"{'; '.join(record['differs'])}; --variant records it in a table of its own"
        )
    records = [r for r in _read_results(config.output) if r["run"] != record["run"]]
    records.append(record)
    table = config.output.with_suffix(".md")
    # the table first: a command that is stopped between the two is run again
    write_atomic(table, document(records).encode())
    write_atomic(config.output, canonical_json({"results": records}).encode())
    what = "variant" if record["differs"] else "reproduction"
    console.info(f"{what} of {record['recipe']}: {_figures(record)}; see {table}")
    return record


def _figures(record: dict[str, Any]) -> str:
    text = f"top-1 {record['top1']:.2f}"
    if record["difference"] is not None:
        text += f", published {record['published']['top1']:.2f} ({record['difference']:+.2f})"
    return text


def _read_results(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        found = [dict(record) for record in read_json(path)["results"]]
        document(found)  # has all that a row needs
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"cannot read results from {path}: {error!r}; give another --output"
        ) from None
    return found


def _record(run: Path) -> dict[str, Any]:
    """Return what a finished run reached, how, and what differs from its recipe."""
    config, report = _finished(run)
    recipe = recipes.load(str(config.recipe))
    top1 = float(report["top1"])
    sessions = _sessions(run)
    hours = sum(seconds for seconds, _ in sessions) / 3600
    gpu_seconds = [s * of["ranks"] for s, of in sessions if of["device"] not in ("cpu", "mps")]
    last = sessions[-1][1]
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
        "hardware": "; ".join(dict.fromkeys(_hardware(of) for _, of in sessions)),
        "versions": {name: last["versions"][name] for name in _VERSIONS},
        "labels": _labels(config, report),
        "date": f"{datetime.fromtimestamp(last['ended'], UTC):%Y-%m-%d}",
        "run": str(run.absolute()),
        "differs": [*_changed_settings(config, recipe), *_changed_data(config, report, recipe)],
    }


def _finished(run: Path) -> tuple[DistillConfig, dict[str, Any]]:
    """Return the settings and the report of a run of a recipe; raises ConfigError."""
    try:
        config = DistillConfig.from_json(read_json(run / CONFIG_NAME))
    except (OSError, ValueError, TypeError, ConfigError) as error:
        raise ConfigError(f"{run} is not a run of `mealv2 distill` ({error})") from None
    if config.recipe is None:
        raise ConfigError(f"{run} is not a run of a recipe; train with --recipe")
    try:
        report = dict(read_json(run / REPORT_NAME))
    except FileNotFoundError:
        raise ConfigError(
            f"{run} is not finished: it has no {REPORT_NAME}; continue it with "
            f"`mealv2 distill --resume {run}`"
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{run / REPORT_NAME} is damaged ({error})") from None
    if "top1" not in report or "selected_epoch" not in report:
        raise ConfigError(f"{run} has no accuracy: it was trained with --val-split none")
    return config, report


def _sessions(run: Path) -> list[tuple[float, dict[str, Any]]]:
    """Return the seconds and the first event of every process that trained the run.

    ``ended`` in it is the time of its last event that counts. Steps that were lost and made again
    count once. Raises ConfigError without any.
    """
    found: list[dict[str, Any]] = []
    with suppress(OSError):
        for event in filter(None, map(parse_event, read_regular(run / METRICS_NAME).splitlines())):
            if event.get("event") == SESSION and event.keys() >= _OF_SESSION:
                found.append(event)
            if found and isinstance(event.get("time"), float | int):
                found[-1]["ended"] = event["time"]
    if not found:
        raise ConfigError(
            f"{run / METRICS_NAME} does not say on what the run was trained: the run is of an "
            "earlier version, or the file was removed"
        )
    return [(event["ended"] - event["time"], event) for event in found]


def _hardware(session: dict[str, Any]) -> str:
    return f"{session['ranks']} x {session['device']}, {session['precision']}"


def _labels(config: DistillConfig, report: dict[str, Any]) -> str:
    """Return where the labels come from."""
    if config.online:
        return "online"
    labels = report.get("labels") or {}
    return f"{labels.get('num_views')} views, {str(labels.get('plan_sha256'))[:12]}"


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
    labels = report.get("labels") or {}
    unknown = {"teachers": "unknown", "pixels": "unknown", "views": labels.get("num_views") or 0}
    try:
        manifest = read_manifest(Path(str(config.labels)))
    except (LabelSetError, OSError):
        return unknown
    if manifest["plan_sha256"] != labels.get("plan_sha256"):
        return unknown
    plan = manifest["plan"]
    teachers = [teacher["model"] for teacher in plan.get("teachers", [])]
    return unknown | {"teachers": teachers, "pixels": plan["img_size"]}
