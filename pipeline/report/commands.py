"""Commands of runs and label sets: as typed, or from the settings that were kept."""

import dataclasses
import json
import shlex
from typing import Any

from mealv2 import recipes
from mealv2.data.pixels import resize_of
from mealv2.errors import ConfigError
from mealv2.report.run import Run
from mealv2.report.teachers import LabelSource
from mealv2.view_recipe import ViewRecipe
from mealv2.views import DrawnViews
from pipeline.config import (
    DEFAULT_SHARD_SIZE,
    NO_SPLIT,
    DistillConfig,
    FinetuneConfig,
    Settings,
    TransferConfig,
    flag,
    plain,
    typed,
)

_COMMANDS: dict[str, type[Settings]] = {
    "distill": DistillConfig,
    "finetune": FinetuneConfig,
    "transfer": TransferConfig,
}
# settings of the run folder, not of the training
_NOT_SHOWN = {"output", "resume", "auto_resume", "dry_run"}
_SPLITS = {"train": "train_split", "val": "val_split"}


def command_of(run: Run) -> str | None:
    """Return which command trained a run, by the names of its settings; None for another."""
    names = run.config.keys()
    known = {name: {f.name for f in dataclasses.fields(c)} for name, c in _COMMANDS.items()}
    fitting = [name for name, fields in known.items() if names <= fields]
    # finetune knows fewer settings than transfer: the fewest that fit
    return min(fitting, key=lambda name: len(known[name]), default=None)


def typed_commands(run: Run) -> list[str]:
    """Return the commands that started and resumed a run, as they were typed, without repeats."""
    found = [session.get("command") for session in run.sessions]
    return list(dict.fromkeys(text for text in found if isinstance(text, str)))


def given_settings(run: Run, command: str | None) -> dict[str, Any]:
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


def words_of(settings: dict[str, Any]) -> list[str]:
    """Return settings as words of a command line."""
    words = []
    for name, value in settings.items():
        if isinstance(value, bool):
            words.append(flag(name) if value else f"--no-{flag(name)[2:]}")
        elif isinstance(value, list):
            words += [word for item in value for word in (flag(name), text_of(item))]
        elif value is not None:
            words += [flag(name), text_of(value)]
    return words


def text_of(value: Any) -> str:
    """Return a value of config.json as text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def recipe_differences(run: Run) -> list[tuple[str, str, str]] | None:
    """Return (setting, the recipe's value, the run's) where they differ; None without a recipe."""
    name, command = run.config.get("recipe"), command_of(run)
    if not isinstance(name, str) or command not in ("distill", "finetune"):
        return None
    fields = {f.name: f for f in dataclasses.fields(_COMMANDS[command])}
    online = bool(run.config.get("teacher"))
    try:
        known = recipes.load(name).settings(command, online=online)  # type: ignore[arg-type]
        expected = {n: plain(typed(fields[n], v)) for n, v in known.items() if n in fields}
    except ConfigError:  # a recipe of another version
        return None
    found = [(n, value, run.config.get(n)) for n, value in expected.items()]
    return [(flag(n), text_of(a), text_of(b)) for n, a, b in found if a != b]


def labelling_command(source: LabelSource) -> str | None:
    """Return the command that makes a label set, by its plan; None for a set that is derived.

    A plan has no paths: DATA stands for the data set, and a teacher for its own checkpoint.
    """
    plan = source.plan
    if not plan or "derived" in plan:
        return None
    try:
        words = _labelling_words(source, plan)
    except (KeyError, TypeError, ValueError):  # a set of a newer version, or written by others
        return None
    return shlex.join(["mealv2", "precompute", *words])


def _labelling_words(source: LabelSource, plan: dict[str, Any]) -> list[str]:
    train, labels = plan["roles"]["train"], plan["labels"]
    views = DrawnViews.from_entry(train["views"])
    words = ["--data-dir", "DATA", "--output", "LABELS"]
    for teacher in source.teachers:
        words += ["--teacher", teacher.name]
    words += ["--num-views", str(train["num_views"]), "--view-seed", str(views.seed)]
    words += ["--img-size", str(plan["img_size"]), *_teacher_size(plan)]
    if labels.get("rate") is not None:
        words += ["--rate", str(labels["rate"])]
    else:
        is_all = labels["form"] != "curve" and labels["topk"] >= len(plan["classes"])
        words += ["--topk", "all" if is_all else str(labels["topk"])]
        words += [] if labels["form"] == "curve" else ["--label-dtype", labels["form"]]
    words += ["--store-logits"] if labels.get("logits") else []
    words += _split_words(plan["roles"])
    library, _, filter_name = resize_of(plan["interpolation"]).partition("-")
    words += ["--exact-pil"] if library == "pil" else []
    words += ["--interpolation", filter_name] if filter_name else []
    if plan.get("shard_size") not in (None, DEFAULT_SHARD_SIZE):
        words += ["--shard-size", str(plan["shard_size"])]
    if plan.get("precision") in ("bfloat16", "float16"):
        words += ["--amp", "--amp-dtype", plan["precision"]]
    return [*words, *_view_words(views.recipe)]


def _teacher_size(plan: dict[str, Any]) -> list[str]:
    sizes = {teacher.get("img_size") for teacher in plan["teachers"]}
    return ["--teacher-img-size", str(*sizes)] if len(sizes) == 1 and None not in sizes else []


def _split_words(splits: dict[str, Any]) -> list[str]:
    """Return the flags of the splits; what is as usual is left out."""
    words = []
    for name, setting in _SPLITS.items():
        split = splits.get(name, {}).get("split", NO_SPLIT)
        words += [] if split == name else [flag(setting), split]
    if held_out := splits["train"].get("held_out"):
        words += ["--val-fraction", str(held_out["fraction"])]
        words += ["--split-seed", str(held_out["seed"])]
    for extra in splits["train"].get("extra", ()):
        words += ["--extra-data", str(extra["name"])]
    return words


def _view_words(recipe: ViewRecipe) -> list[str]:
    """Return the flags of the views that are not the paper's."""
    words = []
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if value != field.default:
            values = value if isinstance(value, tuple) else (value,)
            words += [flag(field.name), *map(str, values)]
    return words
