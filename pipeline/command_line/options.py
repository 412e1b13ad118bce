"""Click commands whose parameters are the fields of a config, grouped by heading in --help."""

import dataclasses
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from mealv2.storage.urls import Location, located
from pipeline import config as configs

REQUIRED, OTHER = "Required", "Other"
SECTIONS = (REQUIRED, *configs.GROUPS, OTHER)
SHORT = {"batch_size": "-b", "workers": "-j"}

Field = dataclasses.Field[Any]


class ConfigCommand(click.Command):
    """A command whose parameters make a config. Old names of its options are accepted, hidden.

    ``params`` come before those of the config, which are made when they are first asked for: most
    commands of a command line are not run.
    """

    _params: list[click.Parameter]
    _is_whole: bool

    def __init__(
        self, name: str, config: type[configs.Settings], *, raw_arguments: bool = False, **more: Any
    ) -> None:
        self.config = config
        self._is_raw = raw_arguments
        fields = configs.settings_of(config)
        current = {_word(f.metadata["alias"]): _word(f.name) for f in fields if f.metadata["alias"]}
        context = more.pop("context_settings", {}) | {
            "token_normalize_func": lambda word: current.get(word, word)
        }
        super().__init__(name, help=_help_text(config), context_settings=context, **more)

    @property
    def params(self) -> list[click.Parameter]:
        """The parameters, those of the config last."""
        if not self._is_whole:
            self._params += [
                _argument(f, is_raw=self._is_raw) if f.metadata["positional"] else _option(f)
                for f in _in_reading_order(self.config)
            ]
            self._is_whole = True
        return self._params

    @params.setter
    def params(self, first: list[click.Parameter]) -> None:
        self._params, self._is_whole = list(first), False

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under the headings of their groups."""
        sections: dict[str, list[tuple[str, str]]] = {name: [] for name in SECTIONS}
        for parameter in self.get_params(ctx):  # the help text lists the arguments
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                sections[getattr(parameter, "group", OTHER)].append(record)
        for name, records in sections.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)


class SettingOption(click.Option):
    """The option of a config field, with its heading in --help."""

    def __init__(self, names: list[str], group: str, **more: Any) -> None:
        super().__init__(names, **more)
        self.group = group


def number_list(kind: type[int] | type[float]) -> Callable[[Any], tuple[float, ...]]:
    """Return what reads numbers separated by commas, and raises click.BadParameter.

    It gets a list from a JSON file.
    """

    def read(value: Any) -> tuple[float, ...]:
        try:
            return tuple(
                kind(part) for part in (value.split(",") if isinstance(value, str) else value)
            )
        except (TypeError, ValueError):
            raise click.BadParameter(f"{value!r} is no list of numbers such as 1,2") from None

    return read


def local_path(value: Location) -> Path:
    """Return a path; raises click.BadParameter for a URL."""
    path = located(value)
    if isinstance(path, str):
        raise click.BadParameter("must be a local path, not a URL")
    return path


def integer_or(word: str) -> Callable[[int | str], int | str]:
    """Return what reads an integer, or a word in its place, and raises click.BadParameter."""

    def read(value: int | str) -> int | str:
        number: int | str = value if value == word else click.INT(value)
        return number

    return read


def _in_reading_order(config: type[configs.Settings]) -> list[Field]:
    """Return the fields: required ones, the command's own, those of many commands."""
    many = (configs.CropConfig, configs.NormalisationConfig)
    kinds = (*many, configs.RuntimeConfig, configs.SourceConfig)
    shared = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    fields = configs.settings_of(config)
    return sorted(fields, key=lambda f: (f.default is not configs.REQUIRED, f.name in shared))


def _help_text(config: type[configs.Settings]) -> str:
    """Return the description, the arguments, which click leaves out, and the example."""
    lines = [
        f"  {configs.spelling(field)}  {field.metadata['help']}"
        for field in configs.settings_of(config)
        if field.metadata["positional"]
    ]
    arguments = "\n".join(["\n\n\b\nArguments:", *lines]) if lines else ""
    about = inspect.cleandoc(config.__doc__ or "")
    return f"{about}{arguments}\n\n\b\nExample:\n  {_folded(config.example)}"


def _folded(example: str) -> str:
    """Return a command on lines of at most 88 characters, broken before options."""
    words = re.sub(" (?!--)", "\0", example)  # these spaces stay
    lines = textwrap.wrap(words, 86, subsequent_indent="      ", break_on_hyphens=False)
    return " \\\n".join(lines).replace("\0", " ")


def _word(name: str) -> str:
    """Return a flag without its dashes, the form that click normalises."""
    return configs.flag(name)[2:]


def _argument(field: Field, *, is_raw: bool) -> click.Argument:
    """Return the argument of a positional field; the config reports a missing one."""
    settings = _type_settings(field)
    if is_raw:
        settings["type"] = click.UNPROCESSED
    several = settings.pop("multiple", False)
    settings["metavar"] = configs.spelling(field) + ("..." if several else "")
    return click.Argument([field.name], nargs=-1 if several else 1, required=False, **settings)


def _option(field: Field) -> SettingOption:
    """Return the option of a field; the config reports a missing one."""
    about, settings = field.metadata, _type_settings(field)
    flag = configs.flag(field.name)
    names = [flag if settings else f"{flag}/--no-{flag[2:]}", field.name]
    names += [SHORT[field.name]] if field.name in SHORT else []
    has_default, convert = field.default is not configs.REQUIRED, about["convert"]
    need = about["need"] or ("" if has_default else "required")
    return SettingOption(
        names,
        REQUIRED if need else about["group"],
        help=about["help"] + (f"  [{need}]" if need else ""),
        default=field.default if has_default else () if settings.get("multiple") else None,
        show_default=not need and (about["shown"] or True),
        callback=convert and (lambda context, option, value: convert(value)),
        **settings,
    )


def _complete_path(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Let the shell complete a file or folder."""
    return [CompletionItem(incomplete, type="file")]


def _type_settings(field: Field) -> dict[str, Any]:
    """Return what click must know about a field's type; nothing for a switch."""
    if configs.is_location(field):
        return {"type": located, "metavar": "PATH|URL", "shell_complete": _complete_path}
    kind, settings = field.type, dict[str, Any]()
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        parts = [part for part in typing.get_args(kind) if part is not type(None)]
        if len(parts) > 1:
            (word,) = typing.get_args(parts[1])
            return {"type": integer_or(word), "metavar": f"INTEGER|{word.upper()}"}
        kind = parts[0]
    if field.metadata["commas"]:
        return {"type": number_list(typing.get_args(kind)[0]), "metavar": "N,…"}
    if typing.get_origin(kind) is tuple:
        kind, *others = typing.get_args(kind)
        settings = {"multiple": True} if others == [...] else {"nargs": 1 + len(others)}
    if kind is bool:
        return {}
    if typing.get_origin(kind) is typing.Literal:
        return settings | {"type": click.Choice(typing.get_args(kind))}
    if kind is not Path:
        return settings | {"type": kind}
    return settings | {"type": local_path, "metavar": "PATH", "shell_complete": _complete_path}
