"""The command line `mealv2`: flags -> one frozen config -> one command -> its report.

Options are built from the dataclasses in pipeline.config, the only place with defaults. torch is
imported only when a command runs. The report goes to stdout as one JSON line, messages to stderr;
commands with a flag --json print text and the report only with it.
"""

import dataclasses
import difflib
import errno
import importlib
import json
import sys
from collections.abc import Iterable
from functools import partial
from typing import Any, NoReturn

import click

import mealv2
from mealv2 import recipes
from mealv2.errors import IncompleteError, MealError, out_of_memory
from mealv2.recipes.script import script as script_of
from mealv2.text import printable, shortened, use_display_names
from pipeline import config as configs
from pipeline.command_line import options, settings
from pipeline.runtime import env, processes, signals

# Every command and its config; pipeline.NAME runs it (see module_of).
COMMANDS: dict[str, type[configs.Settings]] = {
    "pack": configs.PackConfig,
    "precompute": configs.PrecomputeConfig,
    "distill": configs.DistillConfig,
    "finetune": configs.FinetuneConfig,
    "transfer": configs.TransferConfig,
    "transfer-detection": configs.TransferDetectionConfig,
    "evaluate": configs.EvaluateConfig,
    "predict": configs.PredictConfig,
    "export": configs.ExportConfig,
    "push": configs.PushConfig,
    "report": configs.ReportConfig,
    "compare": configs.CompareConfig,
    "curves": configs.CurvesConfig,
    "demo": configs.DemoConfig,
    "bench": configs.BenchConfig,
    "labels info": configs.LabelsInfoConfig,
    "labels show": configs.LabelsShowConfig,
    "labels status": configs.LabelsStatusConfig,
    "labels finish": configs.LabelsFinishConfig,
    "labels verify": configs.LabelsVerifyConfig,
    "labels merge": configs.LabelsMergeConfig,
    "labels add-views": configs.LabelsAddViewsConfig,
    "labels split": configs.LabelsSplitConfig,
    "labels import": configs.LabelsImportConfig,
    "labels export": configs.LabelsExportConfig,
    "labels convert": configs.LabelsConvertConfig,
    "slurm precompute": configs.SlurmPrecomputeConfig,
    "slurm distill": configs.SlurmDistillConfig,
    "slurm sweep": configs.SlurmSweepConfig,
    "recipes record": configs.RecipesRecordConfig,
}

_AGAIN = "run the same command again"
_HINTS = {
    errno.ENOSPC: f"; free some disk space and {_AGAIN}",
    errno.EDQUOT: f"; free some disk space and {_AGAIN}",
    errno.EISDIR: "; a file is needed there: move the folder away and run the command again",
    errno.EROFS: "; it is read-only: give another folder",
    errno.EEXIST: "; a folder is needed there, but it is a file",
    errno.ENOTDIR: "; a folder is needed there, but a part of the path is a file",
}


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "terminal_width": 100},
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or config, 3 label set damaged or not "
    "matching, 4 stopped by a signal after saving.",
)
@click.version_option(mealv2.__version__, prog_name="mealv2")
def cli() -> None:
    """Label images once with an ensemble of teachers; distil any number of students (MEAL V2)."""


@cli.group("labels")
def _labels() -> None:
    """Inspect, check and convert label sets."""


@cli.group("slurm")
def _slurm() -> None:
    """Submit commands to Slurm as batch jobs. The scripts are kept."""


def main() -> None:
    """Run the command line and exit with the documented code."""
    if (code := env.saved_exit_code()) is not None:
        sys.exit(code)
    if env.has_parent():
        processes.end_with_parent()
    try:
        with signals.interrupts_kept():
            cli.main(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        command = _command_of(error)
        _fail(f"{error.format_message()} (see {command} --help)", error.exit_code)
    except MealError as error:
        _fail(use_display_names(str(error)), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        advice = f"; finished work is kept: {_AGAIN} to continue"
        _fail(f"stopped{'' if env.is_child_process() else advice}", 4)
    except (MemoryError, RuntimeError) as error:
        if (reason := out_of_memory(error)) is None:
            raise
        _fail(reason, MealError.exit_code)
    except OSError as error:
        if error.errno is None:
            raise
        where = f": {error.filename}" if error.filename else ""
        _fail(f"{error.strerror}{where}{_HINTS.get(error.errno, '')}", MealError.exit_code)


def _command_of(error: click.ClickException) -> str:
    """Return the command with the wrong usage, as the documents spell it: mealv2 GROUP NAME."""
    context, words = getattr(error, "ctx", None), []
    while context is not None and context.parent is not None:
        words.insert(0, context.info_name)
        context = context.parent
    return " ".join(["mealv2", *words])


def _fail(message: str, code: int) -> NoReturn:
    """Exit with a code, after the message. Of several ranks with one message, one prints it."""
    if message and _claims(message):
        line = printable(message, is_line=True)
        click.echo(f"mealv2: {shortened(line)}", err=True)
        env.save_exit_code(code)
    sys.exit(code)


def _claims(message: str) -> bool:
    if not env.has_torchrun_store():
        return True
    distributed = importlib.import_module("pipeline.runtime.distributed")
    return bool(distributed.claim_message(message, env.rank()))


def _print_report(report: dict[str, Any]) -> None:
    """Print a report as one line of ASCII; JSON escapes all control characters but DEL."""
    click.echo(json.dumps(report).replace("\x7f", "\\u007f"))


def module_of(name: str) -> str:
    """Return the module that runs a command: pipeline.label_sets.NAME for `labels NAME`."""
    module = name.replace("labels ", "label_sets ").replace(" ", ".").replace("-", "_")
    return f"pipeline.{module.replace('.import', '.import_')}"


def _check_paths(config: configs.Settings, *, skip: Iterable[str] = ()) -> None:
    """Raise MealError for a path that cannot be used; needs numpy, but not torch."""
    importlib.import_module("pipeline.command_line.paths").check_paths(config, skip=skip)


def _add_command(name: str, config: type[configs.Settings]) -> None:
    """Make `mealv2 NAME` from a config class."""
    group, _, word = name.rpartition(" ")

    def callback(**values: Any) -> None:
        made = settings.config_of(config, click.get_current_context())
        if not config.in_ranks:
            env.require_single_process(name)
        _check_paths(made)
        if made.first_line:
            click.echo(printable(use_display_names(made.first_line), is_line=True), err=True)
        try:
            report = importlib.import_module(module_of(name)).run(made)
        except IncompleteError as error:
            _print_report(error.report)
            raise
        # only the main process has one, and a command with --json has printed its text
        if report and getattr(made, "json", True):
            _print_report(report)

    params = [settings.config_option()]
    command = options.ConfigCommand(word, config, params=params, callback=callback)
    above = cli.commands[group] if group else cli
    assert isinstance(above, click.Group)
    above.add_command(command)


# --- batch jobs ---------------------------------------------------------------------------------


def _add_slurm_command(name: str, config: type[configs.SlurmJob]) -> None:
    """Make `mealv2 slurm WORD`: Slurm's options, mixed with the flags of another command."""

    def callback(**values: Any) -> None:
        job = config.from_json(values)
        # a job that waits, or is only printed, may name folders that do not exist yet
        later = config.stage != "precompute" and bool(job.print_ or job.after)
        checked = partial(_checked_command, config.stage, has_paths=not later)
        try:
            checked(job.first_flags)  # before torch is imported
            report = importlib.import_module(module_of(name)).run(job, checked)
        except click.NoSuchOption as error:
            _suggest(error, command)
            raise
        if isinstance(report, str):
            # a terminal would act on control characters in names; a file gets the exact script:
            # color=True, or click removes what looks like a colour
            is_shown = sys.stdout.isatty()
            click.echo(printable(report) if is_shown else report, color=True)
        else:
            _print_report(report)

    command = options.ConfigCommand(
        name.removeprefix("slurm "),
        config,
        raw_arguments=True,
        callback=callback,
        context_settings={"ignore_unknown_options": True},  # the flags of the other command
    )
    _slurm.add_command(command)


def _suggest(error: click.NoSuchOption, command: click.Command) -> None:
    """Suggest an option of Slurm's if it is closer than those of the other command."""
    known = [opt for param in command.params for opt in param.opts]
    names = [*known, *(error.possibilities or ())]
    closest = difflib.get_close_matches(error.option_name, names, n=1)
    if closest and closest[0] in known:
        error.possibilities, error.ctx = closest, click.get_current_context()


def _checked_command(name: str, words: Iterable[str], *, has_paths: bool) -> configs.StageCommand:
    """Return the command `mealv2 NAME WORDS`, checked as if it were run.

    Its label set may be missing: a job that runs earlier can make it.
    """
    command = cli.commands[name]
    above = click.Context(cli, info_name="mealv2")
    with command.make_context(name, list(words), parent=above) as context:
        given = settings.given_names(context)
        params = {str(p.name): p for p in command.params if p.name in given}
        texts = {n: _words_of(param, context.params[n]) for n, param in params.items()}
        for n in given:
            settings.require_no_secrets(n, context.params[n])
        config = settings.config_of(COMMANDS[name], context)
    if has_paths:
        _check_paths(config, skip=("labels",))
    return configs.StageCommand(name, texts, config)


def _words_of(option: click.Option, value: Any) -> tuple[str, ...]:
    """Return an option and its value as words of the command line, with absolute paths."""
    flag, value = option.opts[0], configs.plain(value)
    if isinstance(value, bool):
        return (flag if value else option.secondary_opts[0],)
    if option.multiple:
        return tuple(word for item in value for word in (flag, str(item)))
    return (flag, *map(str, value if isinstance(value, list) else [value]))


# --- recipes -------------------------------------------------------------------------------------


@cli.group("recipes", invoke_without_command=True)
@click.pass_context
def _recipes(context: click.Context) -> None:
    """List the published trainings that --recipe accepts: on ImageNet, then on CIFAR-10."""
    if context.invoked_subcommand is None:
        names = [*recipes.names(), *recipes.cifar10_names()]
        listed = [_summary(recipes.load(name)) for name in names]
        rows = [list(listed[0]), *([_cell(value) for value in r.values()] for r in listed)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            click.echo("  ".join(cells).rstrip())
        click.echo(json.dumps({"recipes": listed}))


def _summary(recipe: recipes.Recipe) -> dict[str, Any]:
    figures = {name: getattr(recipe, name) for name in ("top1", "top5", "title", "source")}
    return {"name": recipe.name, "student": recipe.distill["model"], **figures}


def _cell(value: str | float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else value


@_recipes.command("show")
@click.argument("name")
@click.option(
    "--script",
    "as_script",
    is_flag=True,
    help="Print a bash script that reproduces it instead: from ImageNet to the published number.",
)
def _show(name: str, as_script: bool) -> None:
    """Print the recipe NAME as TOML, then as one line of JSON."""
    if as_script:
        click.echo(script_of(recipes.load(name)), nl=False)
        return
    click.echo(recipes.text(name))
    click.echo(json.dumps(dataclasses.asdict(recipes.load(name))))


for _name, _config in COMMANDS.items():
    if issubclass(_config, configs.SlurmJob):
        _add_slurm_command(_name, _config)
    else:
        _add_command(_name, _config)


if __name__ == "__main__":
    main()
