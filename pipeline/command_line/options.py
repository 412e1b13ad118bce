"""Click commands whose options are the fields of a config, grouped by heading in --help."""

import dataclasses
import inspect
import types
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mealv2.storage.urls import located
from pipeline import config as configs

REQUIRED, OTHER = "Required", "Other"
SECTIONS = (REQUIRED, *typing.get_args(configs.Group), OTHER)
SHORT = {"batch_size": "-b", "workers": "-j"}

Field = dataclasses.Field[Any]

if TYPE_CHECKING:
    _ParamType = click.ParamType[Any]
else:  # of click 8.1 it is no generic class
    _ParamType = click.ParamType


class ConfigCommand(click.Command):
    """A command whose parameters make a config."""

    def __init__(self, name: str, config: type[configs.Settings], **settings: Any) -> None:
        super().__init__(name, help=_help_text(config), **settings)
        self.config = config

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
    """The option of a config field; old spellings work and are hidden. The last one given wins."""

    def __init__(self, *names: str, group: str, hidden: Sequence[str], **settings: Any) -> None:
        super().__init__([*names, *hidden], **settings)
        self.group = group
        self._hidden = set(hidden)

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the spellings of today and the help text."""
        with self._hiding_old_names():
            return super().get_help_record(ctx)

    def get_error_hint(self, ctx: click.Context | None) -> str:
        """Return the spellings of today as error messages quote them."""
        with self._hiding_old_names():
            return super().get_error_hint(ctx)

    @contextmanager
    def _hiding_old_names(self) -> Iterator[None]:
        opts, secondary = self.opts, self.secondary_opts
        hidden = {*self._hidden, *(f"--no-{name[2:]}" for name in self._hidden)}
        try:
            self.opts = [name for name in opts if name not in hidden]
            self.secondary_opts = [name for name in secondary if name not in hidden]
            yield
        finally:
            self.opts, self.secondary_opts = opts, secondary


class PathType(_ParamType):
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


class IntegerOr(_ParamType):
    """An integer, or one of a few words."""

    def __init__(self, words: tuple[str, ...]) -> None:
        self.name = "|".join(["integer", *words])
        self._words = words

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        if value in self._words:
            return str(value)
        number: int = click.INT.convert(value, param, ctx)
        return number


def parameters_of(
    config: type[configs.Settings], *, raw_arguments: bool = False
) -> list[click.Parameter]:
    """Return the click parameters of a config's fields, in the order of --help.

    ``raw_arguments`` leaves the words of a positional field as they are.
    """
    make_argument = _raw_argument if raw_arguments else _argument
    return [
        make_argument(field) if field.metadata.get("positional") else _option(field)
        for field in _in_reading_order(config)
    ]


def _in_reading_order(config: type[configs.Settings]) -> list[Field]:
    """Return the fields: required ones, the command's own, those of the machine and the cache."""
    kinds = (configs.RuntimeConfig, configs.CacheConfig)
    shared = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    fields = dataclasses.fields(config)
    return sorted(fields, key=lambda f: (f.default is not dataclasses.MISSING, f.name in shared))


def _help_text(config: type[configs.Settings]) -> str:
    """Return the description, the arguments, which click leaves out, and the example."""
    lines = [
        f"  {configs.spelling(field)}  {field.metadata['help']}"
        for field in dataclasses.fields(config)
        if field.metadata.get("positional")
    ]
    arguments = "\n".join(["\n\n\b\nArguments:", *lines]) if lines else ""
    about = inspect.cleandoc(config.__doc__ or "")
    return f"{about}{arguments}\n\n\b\nExample:\n  {_folded(config.example)}"


def _folded(example: str) -> str:
    """Return a command on lines of at most 88 characters, broken before options."""
    first, *options = example.split(" --")
    lines = [first]
    for option in options:
        if len(lines[-1]) + len(option) > 80:
            lines[-1] += " \\"
            lines.append(f"      --{option}")
        else:
            lines[-1] += f" --{option}"
    return "\n".join(lines)


def _argument(field: Field) -> click.Argument:
    """Return the argument of a positional field; the config reports a missing one."""
    several = typing.get_origin(field.type) is tuple
    return click.Argument(
        [field.name],
        type=PathType(configs.is_location(field)),
        nargs=-1 if several else 1,
        required=False,
        metavar=configs.spelling(field) + ("..." if several else ""),
    )


def _raw_argument(field: Field) -> click.Argument:
    metavar = f"{configs.spelling(field)}..."
    return click.Argument([field.name], nargs=-1, type=click.UNPROCESSED, metavar=metavar)


def _option(field: Field) -> SettingOption:
    """Return the option of a field."""
    kind = _without_none(field.type)
    is_switch = kind is bool
    has_default = field.default is not dataclasses.MISSING
    default = field.default if has_default else None
    need = field.metadata["need"]
    settings: dict[str, Any] = {
        "default": default,
        "help": field.metadata["help"],
        "show_default": not need and (field.metadata["shown"] or has_default),
        "group": REQUIRED if need or not has_default else field.metadata["group"],
    }
    if need or not has_default:
        settings["help"] += f"  [{need or 'required'}]"
    if not is_switch:
        settings |= _type_settings(field, kind, default)
    if (convert := field.metadata["convert"]) is not None:
        settings["callback"] = lambda context, option, value: convert(value)
    names = [_declared(field.name, is_switch), field.name]
    names += [SHORT[field.name]] if field.name in SHORT else []
    hidden = [_declared(name, is_switch) for name in configs.aliases_of(field)]
    return SettingOption(*names, hidden=hidden, **settings)


def _declared(name: str, is_switch: bool) -> str:
    flag = configs.flag(name)
    return f"{flag}/--no-{flag[2:]}" if is_switch else flag


def _type_settings(field: Field, kind: Any, default: Any) -> dict[str, Any]:
    """Return what click must know of a field's type."""
    settings: dict[str, Any] = {}
    if typing.get_origin(kind) is tuple:
        items = typing.get_args(kind)
        if items[-1] is Ellipsis:
            settings |= {"multiple": True, "default": default or ()}
        else:
            settings["nargs"] = len(items)
        kind = items[0]
    if typing.get_origin(kind) is typing.Literal:
        settings["type"] = click.Choice(typing.get_args(kind))
    elif typing.get_origin(field.type) is typing.Union and kind is int:
        settings["type"] = IntegerOr(typing.get_args(typing.get_args(field.type)[1]))
    else:
        is_path = kind is Path
        settings["type"] = PathType(configs.is_location(field)) if is_path else kind
    return settings


def _without_none(kind: Any) -> Any:
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return next(part for part in typing.get_args(kind) if part is not type(None))
    return kind
