"""The settings of a command line: its flags, then --config, then --recipe, or a run's own."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import click

from mealv2 import recipes
from mealv2.errors import ConfigError
from mealv2.storage.json_format import read_json
from mealv2.storage.urls import CREDENTIALS_VARIABLE, is_url, with_secrets, without_secrets
from pipeline import config as configs
from pipeline.runtime import env
from pipeline.training.run_folder import CONFIG_NAME, has_checkpoint, saved_settings

# A flag on the left drops the settings on the right of the recipe, and those of --config if that
# file has another value of the flag: they have no effect with it, or follow from its value.
DROPPED = {
    "initial_checkpoint": {"pretrained"},
    "discriminator": {"discriminator_lr", "discriminator_weight", "eta"},
    "epochs": {"decay_milestones"},
    "lr": {"discriminator_lr"},
    "method": set(configs.MEAL_SETTINGS),
    "out_layer": {"align", "out_dims", "pool", "gamma", "eta"},
    "sched": {"decay_milestones", "decay_rate"},
}

_IN_CONFIG = "mealv2.in_config"  # in click's context: the settings of --config


def config_option() -> click.Option:
    """Return the option --config, which sets the defaults of the other options."""
    return click.Option(
        ["--config", "config_file"],
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        is_eager=True,
        callback=_read_config,
        help="JSON file of settings, e.g. RUN/config.json; flags override it.",
    )


def config_of(config: type[configs.Settings], context: click.Context) -> configs.Settings:
    """Return the config of a command line; raises ConfigError."""
    values = dict(context.params)
    config_file = values.pop("config_file", None)
    values = _without_dropped(config, configs.current_names(config, values), context)
    if _is_begun(values):
        if not values["auto_resume"]:
            _require_same_command(config, values, context)
        values = with_run(config, values | {"resume": values["output"]}, context, by_output=True)
    elif values.get("resume") is not None:
        if config_file is not None:
            raise ConfigError("--config has no effect with --resume: the run keeps its settings")
        values = with_run(config, values, context)
    elif values.get("recipe") is not None:
        values = with_recipe(config, values, context)
    known = env.url_credentials()
    values = {n: with_secrets(v, known) if is_url(v) else v for n, v in values.items()}
    return config.from_json(values)


def require_no_secrets(name: str, value: Any) -> None:
    """Raise ConfigError for a URL that a batch script could not keep."""
    configs.require(
        not is_url(value) or without_secrets(value) == value,
        f"{configs.flag(name)}: a batch script does not keep the password or signature of a URL; "
        f"leave it out of the URL and set {CREDENTIALS_VARIABLE} to the URL with it",
    )


def given_names(context: click.Context) -> set[str]:
    """Return the names of the settings that the command line gives."""
    on_command_line = click.core.ParameterSource.COMMANDLINE
    return {n for n in context.params if context.get_parameter_source(n) is on_command_line}


def _without_dropped(
    config: type[configs.Settings], values: dict[str, Any], context: click.Context
) -> dict[str, Any]:
    """Return the values without those of --config that a flag of another value drops."""
    settings, given = context.meta.get(_IN_CONFIG, {}), given_names(context)
    fields = {field.name: field for field in dataclasses.fields(config)}
    changed = {
        name
        for name in DROPPED.keys() & given & settings.keys()
        if configs.plain(values[name]) != configs.plain(configs.typed(fields[name], settings[name]))
    }
    dropped = {name for flag in changed for name in DROPPED[flag]}
    return values | {n: fields[n].default for n in (dropped & settings.keys()) - given}


def with_recipe(
    config: type[configs.Settings], values: dict[str, Any], context: click.Context
) -> dict[str, Any]:
    """Return the values, with the recipe's where neither a flag nor --config sets them."""
    command: Any = context.info_name
    settings = recipes.load(values["recipe"]).settings(command, online=values.get("online", False))
    settings = configs.current_names(config, settings)
    in_config, given = set(context.meta.get(_IN_CONFIG, ())), given_names(context)
    if "recipe" in given and in_config >= settings.keys():
        raise ConfigError("--recipe has no effect: --config has all its settings")
    given |= in_config
    dropped = {name for flag in DROPPED.keys() & given for name in DROPPED[flag]}
    return values | {n: value for n, value in settings.items() if n not in given | dropped}


def with_run(
    config: type[configs.Settings],
    values: dict[str, Any],
    context: click.Context,
    *,
    by_output: bool = False,
) -> dict[str, Any]:
    """Return the settings of the run to resume; ``by_output``: --output names it, not --resume.

    Raises ConfigError for a flag, or with --output a setting of --config, that contradicts it, and
    for a config.json that the checkpoint contradicts.
    """
    run = values["resume"]
    kept = _settings_of_run(config, run, context)
    saved = configs.current_names(config, saved_settings(run) or {})
    before = saved.get("epochs", kept.get("epochs"))
    in_config, given = set(context.meta.get(_IN_CONFIG, ())), given_names(context)
    changed = set()
    for name, value in values.items():
        is_given = name in given or (name in in_config and value not in (None, ()))
        if not is_given or (by_output and name in ("auto_resume", "output")):
            continue  # these two selected the run
        if name in configs.FREE_ON_RESUME - {"output", "auto_resume"}:
            kept[name] = value
        elif name in configs.CHANGEABLE_ON_RESUME:
            kept[name] = value
            changed.add(name)
        elif (new := configs.plain(value)) != (old := configs.plain(kept.get(name))):
            if _is_folder_of(config, name, new, old):
                continue
            raise ConfigError(
                f"{configs.flag(name)} {new} contradicts the run, which has {old}; "
                "leave it out, or start a new run"
            )
        elif is_url(value):
            kept[name] = value  # the run keeps URLs without passwords and signatures
    if not (kept.get("log_wandb") or kept.get("log_trackio")) and "wandb_project" not in given:
        kept.pop("wandb_project", None)  # of a tracker that is left out now
    _require_as_saved(run, kept, saved, changed)
    return {**_lengthened(kept, before), "resume": run}


def _require_as_saved(
    run: Path, kept: dict[str, Any], saved: dict[str, Any], changed: set[str]
) -> None:
    """Raise ConfigError for a setting that differs from the checkpoint's, but for ``changed``."""
    for name in sorted(saved.keys() - configs.FREE_ON_RESUME - changed):
        if kept.get(name) != saved[name]:
            repeat = ""
            if name in configs.CHANGEABLE_ON_RESUME:
                repeat = f", or repeat {configs.flag(name)} on the command line to change it"
            raise ConfigError(
                f"{name} {saved[name]} in the checkpoint, {kept.get(name)} in {run / CONFIG_NAME}: "
                f"restore config.json{repeat}"
            )


def _lengthened(kept: dict[str, Any], before: Any) -> dict[str, Any]:
    """Return settings with more epochs than ``before``: the learning rate dropped where it did.

    Raises ConfigError for fewer epochs.
    """
    epochs = kept.get("epochs")
    if not (isinstance(epochs, int) and isinstance(before, int)) or epochs == before:
        return kept
    configs.require(
        epochs > before,
        f"--epochs {epochs} contradicts the run, which has {before}; a run can only be lengthened",
    )
    if kept.get("sched") == "multistep" and not kept.get("decay_milestones"):
        return kept | {"decay_milestones": [configs.paper_milestone(before)]}
    return kept


def _require_same_command(
    config: type[configs.Settings], values: dict[str, Any], context: click.Context
) -> None:
    """Raise ConfigError if a command would start another run than the one in its --output."""
    run = values["output"]
    kept = _settings_of_run(config, run, context)
    fresh = with_recipe(config, values, context) if values.get("recipe") is not None else values
    made = config.from_json(fresh)
    for name, value in made.as_json().items():
        if name not in configs.FREE_ON_RESUME and not _is_same(made, name, value, kept.get(name)):
            raise ConfigError(
                f"{run} already holds a run of other settings ({configs.flag(name)}: "
                f"{kept.get(name)} in the run, {value} in this command); continue it with "
                f"--resume {run}, or give another --output"
            )


def _is_same(config: configs.Settings, name: str, value: Any, kept: Any) -> bool:
    """Return whether a setting is the run's, which keeps a default that its classes set."""
    if name == "discriminator_lr" and value is None and isinstance(config, configs.DistillConfig):
        return kept in (None, *map(config.default_discriminator_lr, (1, configs.FEW_CLASSES)))
    return bool(value == kept) or _is_folder_of(type(config), name, value, kept)


def _is_folder_of(config: type[configs.Settings], name: str, value: Any, kept: Any) -> bool:
    """Return whether a backbone is the folder whose absolute path the run keeps."""
    is_start = name == "model" and issubclass(config, configs.ComparisonConfig)
    return is_start and bool(value) and os.path.abspath(value) == kept  # noqa: PTH100


def _settings_of_run(
    config: type[configs.Settings], run: Path, context: click.Context
) -> dict[str, Any]:
    path = run / CONFIG_NAME
    configs.require(path.is_file(), f"no run at {run}: it has no config.json")
    try:
        return {n: value for n, value in _read(config, path).items() if value is not None}
    except ConfigError as error:
        command = f"`mealv2 {context.info_name}`"
        raise ConfigError(f"{run} is not a run of {command}, or is damaged ({error})") from None


def _is_begun(values: dict[str, Any]) -> bool:
    """Return whether --output of a training holds a run to continue.

    All ranks get the same result: the first checkpoint is written after a step of all ranks, so a
    rank that starts late sees what was there before.
    """
    is_training = values.get("resume", "") is None and not values.get("dry_run")
    return bool(is_training and values["output"] and has_checkpoint(values["output"]))


def _read_config(context: click.Context, option: click.Parameter, path: Path | None) -> Path | None:
    """Make a JSON file's settings the defaults of the other options."""
    if path is not None:
        config: type[configs.Settings] = context.command.config  # type: ignore[attr-defined]
        settings = _read(config, path)
        context.meta[_IN_CONFIG] = settings
        # as on the command line, click gets numbers as text
        context.default_map = {
            name: str(value) if type(value) in (int, float) else value
            for name, value in settings.items()
            if value is not None
        }
    return path


def _read(config: type[configs.Settings], path: Path) -> dict[str, Any]:
    """Return the settings in a file under their current names; raises ConfigError."""
    try:
        values = read_json(path)
        configs.require(isinstance(values, dict), "it is not a JSON object")
        values = configs.current_names(config, values)
        for name in sorted(values.keys() - {field.name for field in configs.settings_of(config)}):
            raise ConfigError(f"unknown setting {name!r}")
    except (OSError, ValueError, ConfigError) as error:
        raise ConfigError(f"cannot read settings from {path}: {error}") from None
    return values
