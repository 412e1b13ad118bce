"""The command line `mealv2`: flags -> one frozen config -> one stage -> its report.

Options are built from the dataclasses in pipeline.config, the only place with defaults. torch is
imported only when a stage runs. The report goes to stdout as one JSON line, all talk to stderr.
"""

import dataclasses
import difflib
import errno
import importlib
import inspect
import json
import sys
import types
import typing
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import click

import mealv2
from mealv2 import recipes
from mealv2.errors import ConfigError, IncompleteError, MealError
from mealv2.locations import located
from pipeline import config as configs
from pipeline import copies, environment

# A run that is resumed keeps its settings, but for these.
RESUMABLE = {"resume", "workers", "device", "log_interval", "checkpoint_hist"}
RESUMABLE |= {"grad_accum_steps", "sync_bn"}  # of the machine it runs on
RESUMABLE |= {"cache_dir", "cache_size"}

# What torchrun may start several processes of; precompute takes them for parts of a job.
IN_RANKS = {"distill", "finetune", "precompute"}

IN_CONFIG = "mealv2.in_config"  # where a context keeps the names that --config gives

# A flag that is given sets aside what a recipe says of these: they would have no meaning beside it.
SET_ASIDE = {
    "initial_checkpoint": {"pretrained"},
    "discriminator": {"discriminator_lr", "discriminator_weight"},
    "epochs": {"lr_milestones"},
    "lr": {"discriminator_lr"},
    "sched": {"lr_milestones", "decay_rate"},
}

EXAMPLES = {
    "pack": "mealv2 pack --data-dir imagenet --to tar --out shards",
    "precompute": "mealv2 precompute --data-dir imagenet --num-views 30 --out labels "
    "--teacher senet154.gluon_in1k --teacher resnet152s.gluon_in1k",
    "distill": "mealv2 distill --data-dir imagenet --labels labels --model resnet50.ram_in1k",
    "finetune": "mealv2 finetune --data-dir pictures --model resnet18.tv_in1k --epochs 20",
    "evaluate": "mealv2 evaluate --data-dir imagenet --checkpoint runs/my-student",
    "predict": "mealv2 predict holiday.jpg pictures --checkpoint runs/my-student",
    "export": "mealv2 export runs/my-student --to onnx",
    "demo": "mealv2 demo --seeds 5",
    "bench": "mealv2 bench --lines loader-1,loader-4,labels --json speed.json",
    "labels info": "mealv2 labels info labels",
    "labels status": "mealv2 labels status labels --list missing.txt",
    "labels finish": "mealv2 labels finish labels --batch-size 256",
    "labels verify": "mealv2 labels verify labels --data-dir imagenet --relabel 1000",
    "labels merge": "mealv2 labels merge labels-a labels-b --out labels",
    "labels add-views": "mealv2 labels add-views labels --data-dir imagenet --num-views 60",
    "labels split": "mealv2 labels split labels --parts 4 --out parts",
    "labels import": "mealv2 labels import soft_labels --from fkd --data-dir imagenet --out labels",
    "labels export": "mealv2 labels export labels --to parquet --out tables",
    "labels convert": "mealv2 labels convert labels --rate 0.005 --out smaller",
    "slurm precompute": "mealv2 slurm precompute --array 64 --gpus 1 --time 4:00:00 "
    "--data-dir imagenet --teacher senet154.gluon_in1k --num-views 30 --out labels",
    "slurm distill": "mealv2 slurm distill --nodes 2 --gpus 4 --after 4711 "
    "--data-dir imagenet --labels labels --model resnet50.ram_in1k --output runs/student",
    "slurm sweep": "mealv2 slurm sweep --vary seed=0,1,2 --vary lr=0.01,0.02 --gpus 1 "
    "--data-dir imagenet --labels labels --model resnet50.ram_in1k --output runs/sweep",
}


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "terminal_width": 100},
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or config, 3 label set damaged or not "
    "matching, 4 stopped by a signal after saving.",
)
@click.version_option(mealv2.__version__, prog_name="mealv2")
def cli() -> None:
    """Label images once with an ensemble of teachers, distil any number of students (MEAL V2)."""


def main() -> None:
    """Run the command line and exit with the documented code."""
    if (code := environment.refused()) is not None:
        sys.exit(code)
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        _fail(f"{error.format_message()} (see {_command_of(error)} --help)", error.exit_code)
    except MealError as error:
        _fail(copies.told(str(error)), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        advice = "; what was finished is kept: run the same command again to go on"
        _fail(f"stopped{'' if environment.is_spoken_for() else advice}", 4)
    except OSError as error:
        if error.errno is None:
            raise
        hint = {
            errno.ENOSPC: "; free some room and run the same command again",
            errno.EDQUOT: "; free some room and run the same command again",
            errno.EISDIR: "; a file is needed there: move the folder away and run it again",
            errno.EROFS: "; it may not be written to: give a folder elsewhere",
            errno.EEXIST: "; a folder is needed there, and it is a file",
            errno.ENOTDIR: "; a folder is needed there, and a part of it is a file",
        }.get(error.errno, "")
        where = f": {error.filename}" if error.filename else ""
        _fail(f"{error.strerror}{where}{hint}", MealError.exit_code)


def _command_of(error: click.ClickException) -> str:
    """Return the command that was used wrongly, as it is typed."""
    context, words = getattr(error, "ctx", None), []
    while context is not None and context.parent is not None:
        words.insert(0, context.info_name)
        context = context.parent
    return " ".join(["mealv2", *words])


def _fail(message: str, code: int) -> typing.NoReturn:
    if message and _says(message):  # there is none where another rank has said why it ended
        click.echo(f"mealv2: {message}", err=True)
        environment.leave(code)
    sys.exit(code)


def _says(message: str) -> bool:
    """Return whether a message is this process's to say: of several ranks the first to find it."""
    if not environment.has_store():
        return True
    said: bool = importlib.import_module("pipeline.ranks").claim(message, environment.rank())
    return said


def _add_command(name: str, config: type[configs.Settings]) -> None:
    """Make `mealv2 NAME` from a config class; the stage is pipeline.NAME.

    The stage of `labels NAME` is pipeline.label_sets.NAME.
    """
    group, _, word = name.rpartition(" ")

    def command(**values: Any) -> None:
        settings = _settings_of(config, click.get_current_context())
        if name not in IN_RANKS:
            environment.refuse_ranks(name)
        stage = importlib.import_module(module_of(name))
        try:
            report = stage.run(settings)
        except IncompleteError as error:
            click.echo(json.dumps(error.report))
            raise
        if report:  # of several ranks the first one has it
            click.echo(json.dumps(report))

    text = f"{_about(config)}\n\n\b\nExample:\n  {_folded(EXAMPLES[name])}"
    command = click.option(
        "--config",
        "config_file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        is_eager=True,
        expose_value=True,
        callback=_read_config,
        help="JSON file of settings of this command, as RUN/config.json is; flags go before it.",
    )(command)
    for field in reversed(_in_reading_order(config)):
        make = _argument if field.metadata.get("positional") else _option
        command = make(field)(command)
    (_labels if group else cli).command(word, help=text)(command)


def _settings_of(config: type[configs.Settings], context: click.Context) -> configs.Settings:
    """Return the config that a command line makes, with those of its --config, recipe or run."""
    values = dict(context.params)
    config_file = values.pop("config_file")
    if values.get("auto_resume") and _is_begun(values):
        values = _resumed(values | {"resume": values["output"]}, context)
    elif values.get("resume") is not None:
        if config_file is not None:
            raise ConfigError("--config has no effect with --resume: the run keeps its settings")
        values = _resumed(values, context)
    elif values.get("recipe") is not None:
        values = _with_recipe(values, context)
    return config.from_json(values)


def module_of(name: str) -> str:
    """Return the module of a command's stage."""
    module = name.replace("labels ", "label_sets.").replace("slurm ", "slurm.").replace("-", "_")
    return f"pipeline.{module.replace('.import', '.import_')}"


def _in_reading_order(config: type[configs.Settings]) -> "list[dataclasses.Field[Any]]":
    """Return the fields as a reader wants them: required ones, the stage's own, the machine's."""
    kinds = (configs.Machine, configs.Caching)
    machine = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    return sorted(
        dataclasses.fields(config),
        key=lambda f: (f.default is not dataclasses.MISSING, f.name in machine),
    )


def _about(config: type[configs.Settings]) -> str:
    """Return what --help says of a command before its example."""
    return inspect.cleandoc(config.__doc__ or "") + _arguments(config)


def _arguments(config: type[configs.Settings]) -> str:
    """Return what --help says of the positional settings, which click leaves out."""
    lines = [
        f"  {configs.spelling(field)}  {field.metadata['help']}"
        for field in dataclasses.fields(config)
        if field.metadata.get("positional")
    ]
    return "\n".join(["\n\n\b\nArguments:", *lines]) if lines else ""


def _argument(field: "dataclasses.Field[Any]") -> Any:
    """Return the click argument of a positional config field; the config says if it is missing."""
    several = typing.get_origin(field.type) is tuple
    return click.argument(
        field.name,
        type=_Place(configs.is_location(field)),
        nargs=-1 if several else 1,
        required=False,
        metavar=configs.spelling(field) + ("..." if several else ""),
    )


def _option(field: "dataclasses.Field[Any]") -> Any:
    """Return the click option of a config field."""
    flag = configs.flag(field.name)
    has_default = field.default is not dataclasses.MISSING
    default = field.default if has_default else None
    shown = field.metadata["shown"]
    text = field.metadata["help"]
    settings: dict[str, Any] = {"default": default, "show_default": shown or has_default}
    kind = _without_none(field.type)
    if kind is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", field.name, help=text, **settings)
    if typing.get_origin(kind) is tuple:
        items = typing.get_args(kind)
        if items[-1] is Ellipsis:
            settings |= {"multiple": True, "default": default or ()}
        else:
            settings["nargs"] = len(items)
        kind = items[0]
    if not has_default:
        text = f"{text}  [required]"
    if typing.get_origin(kind) is typing.Literal:
        settings["type"] = click.Choice(typing.get_args(kind))
    elif typing.get_origin(field.type) is typing.Union and kind is int:
        settings["type"] = _NumberOr(typing.get_args(typing.get_args(field.type)[1]))
    else:
        settings["type"] = _Place(configs.is_location(field)) if kind is Path else kind
    if (convert := field.metadata.get("convert")) is not None:
        settings["callback"] = lambda context, option, value: convert(value)
    names = {"--batch-size": ("-b",), "--workers": ("-j",)}.get(flag, ())
    return click.option(flag, field.name, *names, help=text, **settings)


class _Place(click.ParamType):
    """A path of this machine or, where that is possible, a URL."""

    def __init__(self, may_be_url: bool) -> None:
        self.name = "path|url" if may_be_url else "path"
        self._may_be_url = may_be_url

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Path | str:
        place = located(value)
        if isinstance(place, str) and not self._may_be_url:
            self.fail("must be a path of this machine, not a URL", param, ctx)
        return place


class _NumberOr(click.ParamType):
    """A whole number, or one of a few words."""

    def __init__(self, words: tuple[str, ...]) -> None:
        self.name = "|".join(["integer", *words])
        self._words = words

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        return value if value in self._words else click.INT.convert(value, param, ctx)


def _without_none(kind: Any) -> Any:
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return next(part for part in typing.get_args(kind) if part is not type(None))
    return kind


def _read_config(context: click.Context, option: click.Parameter, path: Path | None) -> Path | None:
    """Make a JSON file's settings the defaults of the other options."""
    if path is not None:
        settings = _settings(path, context)
        context.meta[IN_CONFIG] = set(settings)
        # numbers go to click as text, as on the command line
        context.default_map = {
            name: str(value) if type(value) in (int, float) else value
            for name, value in settings.items()
            if value is not None
        }
    return path


def _settings(path: Path, context: click.Context) -> dict[str, Any]:
    """Return what a settings file says; raises ConfigError where it says what no flag is called."""
    known = {parameter.name for parameter in context.command.params} - {"config_file"}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read settings from {path}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not a JSON object of settings")
    unknown = sorted(values.keys() - known)
    if unknown:
        raise ConfigError(f"{path}: unknown setting {unknown[0]!r}")
    return values


def _with_recipe(values: dict[str, Any], context: click.Context) -> dict[str, Any]:
    """Return the values with a recipe's where neither a flag nor --config says anything."""
    recipe = recipes.load(values["recipe"])
    settings = recipe.settings(context.info_name, online=values.get("online", False))
    in_config = context.meta.get(IN_CONFIG, set())
    given = {name for name in values if _on_command_line(context, name)}
    if "recipe" in given and in_config >= settings.keys():
        raise ConfigError("--recipe has no effect with a --config that has all its settings")
    given |= in_config
    aside = {name for flag in SET_ASIDE.keys() & given for name in SET_ASIDE[flag]}
    return values | {n: value for n, value in settings.items() if n not in given | aside}


def _is_begun(values: dict[str, Any]) -> bool:
    """Return whether --output holds a run to go on with.

    All ranks find the same: a checkpoint is written after the first step, which all take together,
    and what a rank that starts late would see was there before.
    """
    checkpoint = importlib.import_module("pipeline.training.checkpoint")
    has_run = values["output"] is not None and checkpoint.exists(values["output"])
    return has_run and values["resume"] is None


def _on_command_line(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def _resumed(values: dict[str, Any], context: click.Context) -> dict[str, Any]:
    """Return the settings of the run to resume; a flag that contradicts them is an error.

    With --auto-resume so is a setting of --config.
    """
    path = values["resume"] / "config.json"
    if not path.is_file():
        raise ConfigError(f"no run at {values['resume']}: it has no config.json")
    try:
        kept = {n: value for n, value in _settings(path, context).items() if value is not None}
    except ConfigError as error:
        raise ConfigError(
            f"{values['resume']} is no run of `mealv2 {context.info_name}`, or damaged ({error})"
        ) from None
    in_config = context.meta.get(IN_CONFIG, set())
    for name, value in values.items():
        given = _on_command_line(context, name) or (name in in_config and value not in (None, ()))
        if values["auto_resume"] and name in ("auto_resume", "output"):
            continue  # how this run was found
        if name in RESUMABLE:
            if given:
                kept[name] = value
        elif given and configs.plain(value) != kept.get(name):
            raise ConfigError(
                f"{configs.flag(name)} {value} contradicts the run, which has {kept.get(name)}; "
                "leave it out, or start a new run"
            )
    return {**kept, "resume": values["resume"]}


@cli.group("recipes", invoke_without_command=True)
@click.pass_context
def _recipes(context: click.Context) -> None:
    """List the published trainings that --recipe of precompute and distill knows."""
    if context.invoked_subcommand is None:
        listed = [_line_of(recipes.load(name)) for name in recipes.names()]
        rows = [list(listed[0]), *([_cell(value) for value in r.values()] for r in listed)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            click.echo("  ".join(cells).rstrip())
        click.echo(json.dumps({"recipes": listed}))


def _line_of(recipe: recipes.Recipe) -> dict[str, Any]:
    return {
        "name": recipe.name,
        "student": recipe.distill["model"],
        "top1": recipe.top1,
        "top5": recipe.top5,
        "title": recipe.title,
        "source": recipe.source,
    }


def _cell(value: str | float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else value


@_recipes.command("show")
@click.argument("name")
def _show(name: str) -> None:
    """Print the recipe NAME: its file, then the same as one line of JSON."""
    click.echo(recipes.text(name))
    click.echo(json.dumps(dataclasses.asdict(recipes.load(name))))


def _folded(example: str) -> str:
    return example.replace(" --out", " \\\n      --out")


@cli.group("labels")
def _labels() -> None:
    """Look at label sets, check them, and make new ones of them."""


# --- batch jobs ---------------------------------------------------------------------------------


@cli.group("slurm")
def _slurm() -> None:
    """Submit stages to Slurm as batch jobs, by scripts that can be read and kept."""


def _add_slurm_command(name: str, config: type[configs.SlurmJob]) -> None:
    """Make `mealv2 slurm NAME`: Slurm's options, and among them the flags of a stage."""

    def command(**values: Any) -> None:
        jobs = importlib.import_module(module_of(f"slurm {name}"))
        try:
            report = jobs.run(config.from_json(values), partial(_checked_command, config.stage))
        except click.NoSuchOption as error:  # it may have been meant for Slurm
            known = [opt for param in _slurm.commands[name].params for opt in param.opts]
            near = difflib.get_close_matches(
                error.option_name, [*known, *(error.possibilities or ())], n=1
            )
            if near and near[0] in known:
                error.possibilities, error.ctx = near, click.get_current_context()
            raise
        click.echo(report if isinstance(report, str) else json.dumps(report))

    text = f"{_about(config)}\n\n\b\nExample:\n  {_folded(EXAMPLES[f'slurm {name}'])}"
    for field in reversed(_in_reading_order(config)):
        command = (_rest if field.metadata.get("positional") else _option)(field)(command)
    settings = {"ignore_unknown_options": True}  # they are the stage's, and checked by its command
    _slurm.command(name, help=text, context_settings=settings)(command)


def _rest(field: "dataclasses.Field[Any]") -> Any:
    """Return the click argument that takes what is no option of the command, as it is."""
    return click.argument(
        field.name, nargs=-1, type=click.UNPROCESSED, metavar=configs.spelling(field) + "..."
    )


def _checked_command(name: str, words: Iterable[str]) -> configs.StageCommand:
    """Return the command `mealv2 NAME WORDS`, checked as if it were run."""
    command = cli.commands[name]
    above = click.Context(cli, info_name="mealv2")
    with command.make_context(name, list(words), parent=above) as context:
        given = [p for p in command.params if _on_command_line(context, str(p.name))]
        options = {str(p.name): _words_of(p, context.params[str(p.name)]) for p in given}
        return configs.StageCommand(name, options, _settings_of(CONFIGS[name], context))


def _words_of(option: click.Option, value: Any) -> tuple[str, ...]:
    """Return how a value is given on the command line, paths absolute."""
    flag, value = option.opts[0], configs.plain(value)
    if isinstance(value, bool):
        return (flag if value else option.secondary_opts[0],)
    if option.multiple:
        return tuple(word for item in value for word in (flag, str(item)))
    return (flag, *map(str, value if isinstance(value, list) else [value]))


CONFIGS: dict[str, type[configs.Settings]] = {
    "pack": configs.PackConfig,
    "precompute": configs.PrecomputeConfig,
    "distill": configs.DistillConfig,
    "finetune": configs.FinetuneConfig,
    "evaluate": configs.EvaluateConfig,
    "predict": configs.PredictConfig,
    "export": configs.ExportConfig,
    "demo": configs.DemoConfig,
    "bench": configs.BenchConfig,
    "labels info": configs.LabelsInfoConfig,
    "labels status": configs.LabelsStatusConfig,
    "labels finish": configs.LabelsFinishConfig,
    "labels verify": configs.LabelsVerifyConfig,
    "labels merge": configs.LabelsMergeConfig,
    "labels add-views": configs.LabelsAddViewsConfig,
    "labels split": configs.LabelsSplitConfig,
    "labels import": configs.LabelsImportConfig,
    "labels export": configs.LabelsExportConfig,
    "labels convert": configs.LabelsConvertConfig,
}
for _name, _config in CONFIGS.items():
    _add_command(_name, _config)
for _name, _job in {
    "precompute": configs.SlurmPrecomputeConfig,
    "distill": configs.SlurmDistillConfig,
    "sweep": configs.SlurmSweepConfig,
}.items():
    _add_slurm_command(_name, _job)


if __name__ == "__main__":
    main()
