"""cli: flags, help and one clear line for whatever goes wrong."""

import ast
import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
import huggingface_hub.constants
import pytest

import cli
import mealv2
from conftest import Result
from mealv2 import recipes
from mealv2.recipes.script import script
from pipeline import config as configs
from pipeline.command_line import options, settings

Run = Callable[..., Result]
ROOT = Path(cli.__file__).resolve().parent


CONFIGS = cli.COMMANDS
COMMANDS = sorted(CONFIGS)
OTHERS = ["recipes show"]  # commands without a config
GROUPS = sorted({name.split()[0] for name in COMMANDS if " " in name})


# --- help ---------------------------------------------------------------------------------------


def _command(name: str) -> click.Command:
    command: click.Command = cli.cli
    for word in name.split():
        assert isinstance(command, click.Group)
        command = command.commands[word]
    return command


def test_there_is_a_command_for_every_config() -> None:
    """A config has an example; classes that others extend have none."""
    kinds = {kind for kind in vars(configs).values() if isinstance(kind, type)}
    named = {kind for kind in kinds if issubclass(kind, configs.Settings) and kind.example}
    assert sorted(named, key=str) == sorted(CONFIGS.values(), key=str)
    there = [*cli.cli.commands]
    for name in GROUPS:
        group = _command(name)
        assert isinstance(group, click.Group)
        there += [f"{name} {word}" for word in group.commands]
    assert sorted(there) == sorted([*COMMANDS, *OTHERS, *GROUPS])
    assert {"precompute", "distill", "finetune", "evaluate"} <= set(COMMANDS)


@pytest.mark.slow
@pytest.mark.timing
def test_help_comes_in_a_third_of_a_second() -> None:
    command = [Path(sys.executable).parent / "mealv2", "--help"]
    seconds = []
    for _ in range(9):
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.3  # `mealv2 bench` says the median, on a machine with time for it


def test_no_help_imports_torch_or_numpy() -> None:
    names = ["", *COMMANDS, *OTHERS, *GROUPS]
    code = (
        "import sys, cli\n"
        f"for name in {names!r}:\n"
        "    cli.cli.main([*name.split(), '--help'], 'mealv2', standalone_mode=False)\n"
        "    print('LOADED', name, *{'torch', 'numpy', 'PIL'} & sys.modules.keys())\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.count("Usage: mealv2") == len(names)
    loaded = [line.split() for line in run.stdout.splitlines() if line.startswith("LOADED")]
    assert loaded == [["LOADED", *name.split()] for name in names]


def test_python_cli_py_is_the_same_command() -> None:
    commands = [[Path(sys.executable).parent / "mealv2"], [sys.executable, ROOT / "cli.py"]]
    said = [
        subprocess.run([*command, "distill", "--help"], capture_output=True, text=True, check=True)
        for command in commands
    ]
    assert said[0].stdout.split("Required:")[1] == said[1].stdout.split("Required:")[1]


def test_help_names_every_command_and_the_exit_codes(done: Run) -> None:
    said = " ".join(done("--help").stdout.split())
    first_words = {name.split()[0] for name in [*COMMANDS, *OTHERS]}
    assert all(re.search(rf" {name} +[A-Z]", said) for name in first_words)
    for group in GROUPS:
        listed = " ".join(done(group, "--help").stdout.split())
        names = [name.split()[1] for name in COMMANDS if name.startswith(f"{group} ")]
        assert all(re.search(rf" {name} +[A-Z]", listed) for name in names)
    for code in ("0 done", "1 failed", "2 wrong usage", "3 label set", "4 stopped"):
        assert code in said


def test_version_is_the_packages(done: Run) -> None:
    assert mealv2.__version__ in done("--version").stdout


def test_the_module_is_the_command() -> None:
    """What torchrun starts."""
    command = [sys.executable, "-m", "mealv2", "distill", "--help"]
    said = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert said.startswith("Usage: python -m mealv2 distill")


def _entries(text: str) -> dict[str, str]:
    """Return what --help says of each option, by its long flag, in one line."""
    listed = [entry for options in _sections(text).values() for entry in options]
    return {re.search(r"--[\w-]+", entry)[0]: entry for entry in listed}


def _sections(text: str) -> dict[str, list[str]]:
    """Return what --help says under each heading: an entry per option, in one line."""
    headings = "|".join(options.SECTIONS)
    found = re.findall(rf"^({headings}):\n((?:  .*\n?)+)", text, flags=re.MULTILINE)
    sections = {}
    for heading, body in found:
        blocks = re.split(r"\n(?=  (?:-\w, )?--)", "\n" + body)[1:]
        flat = [re.sub(r"-\n +", "-", block) for block in blocks]
        sections[heading] = [" ".join(block.split()) for block in flat]
    return sections


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_the_default_of_every_option_or_that_it_is_required(done: Run, name: str) -> None:
    text = done(*name.split(), "--help").stdout
    said = _entries(text)
    words = [f for f in configs.settings_of(CONFIGS[name]) if f.metadata["positional"]]
    for field in words:
        assert re.search(rf"^Usage: .* {field.name.upper()}\b", text)
        assert f"{field.name.upper()}  {field.metadata['help']}" in text
    fields = [f for f in configs.settings_of(CONFIGS[name]) if f not in words]
    own = {"--help"} if name.startswith("slurm ") else {"--config", "--help"}
    assert said.keys() == {configs.flag(f.name) for f in fields} | own
    for field in fields:
        flag, default = configs.flag(field.name), field.default
        text = said[flag].replace("- ", "-")
        if default is dataclasses.MISSING:
            assert text.endswith("[required]"), text
            continue
        if need := field.metadata["need"]:
            assert text.endswith(f"[{need}]"), text
            continue
        if isinstance(default, bool):
            shown = flag[2:] if default else f"no-{flag[2:]}"
        else:
            shown = f"({field.metadata['shown']})" if field.metadata["shown"] else str(default)
        assert text.endswith(f"[default: {shown}]"), text


def test_help_of_distill_groups_options_and_begins_with_what_is_required(done: Run) -> None:
    sections = _sections(done("distill", "--help").stdout)
    assert list(sections) == [
        "Required",
        "Labels",
        "Data",
        "Views",
        "Model",
        "Optimisation",
        "Loss",
        "Run and checkpoints",
        "Hardware",
        "Other",
    ]
    flags = {
        name: [re.search(r"--[\w-]+", e)[0] for e in found] for name, found in sections.items()
    }
    assert flags["Required"] == ["--data-dir", "--model", "--labels", "--online"]
    assert all("required" in entry for entry in sections["Required"])
    assert flags["Other"] == ["--config", "--help"]
    assert {"--lr", "--sched", "--decay-milestones"} <= set(flags["Optimisation"])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_group_and_required_ones_come_first(name: str) -> None:
    fields = [f for f in configs.settings_of(CONFIGS[name]) if not f.metadata["positional"]]
    assert all(field.metadata["group"] in options.SECTIONS for field in fields)
    listed = _sections(_command(name).get_help(click.Context(_command(name))))
    required = [f for f in fields if f.default is dataclasses.MISSING or f.metadata["need"]]
    assert len(listed.get("Required", [])) == len(required)
    assert not required or next(iter(listed)) == "Required"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_hides_the_old_spellings(done: Run, name: str) -> None:
    text = done(*name.split(), "--help").stdout
    for field in configs.settings_of(CONFIGS[name]):
        if alias := field.metadata["alias"]:
            assert not re.search(rf"{configs.flag(alias)}\b(?!-)", text)


OLD_NAMES = [
    pytest.param(name, alias, field, id=f"{name}-{alias}")
    for name, kind in CONFIGS.items()
    for field in configs.settings_of(kind)
    if (alias := field.metadata["alias"])
]


def test_the_renamed_flags_keep_their_old_spelling() -> None:
    renamed = {(p.values[1], p.values[2].name) for p in OLD_NAMES}
    assert renamed == {
        ("checkpoint_every", "recovery_interval"),
        ("compile", "torchcompile"),
        ("cutmix_beta", "cutmix"),
        ("cutmix_prob", "mixup_prob"),
        ("json", "results_file"),
        ("keep_checkpoints", "checkpoint_hist"),
        ("lr_milestones", "decay_milestones"),
        ("out", "output"),
        ("role", "split"),
        ("split", "train_split"),
    }


@pytest.mark.parametrize(("name", "alias", "field"), OLD_NAMES)
def test_an_old_spelling_sets_the_same_setting_and_the_last_one_given_wins(
    name: str, alias: str, field: dataclasses.Field[Any]
) -> None:
    (option,) = (p for p in _command(name).params if p.name == field.name)
    values = ["default", "max-autotune"] if alias == "compile" else ["1", "2"]
    values = ["val", "train"] if alias == "role" else values
    old, new = configs.flag(alias), configs.flag(field.name)
    assert option.opts[0] == new

    def value(*words: str) -> Any:
        return (
            _command(name)
            .make_context(name, list(words), resilient_parsing=True)
            .params[field.name]
        )

    assert value(old, values[0]) == value(new, values[0])
    if option.multiple:
        assert value(old, values[0], new, values[1]) == (1, 2)
    else:
        assert value(old, values[0], new, values[1]) == value(new, values[1])
        assert value(new, values[0], old, values[1]) == value(new, values[1])


def test_an_error_names_the_spelling_of_today(run_cli: Run) -> None:
    result = run_cli("distill", "--decay-milestones", "x")
    assert result.code == 2
    assert "--decay-milestones" in result.stderr
    assert "--lr-milestones" not in result.stderr


def test_a_config_file_may_use_old_names(config_of: Run, run_cli: Run, tmp_path: Path) -> None:
    settings = {"lr_milestones": [3], "compile": "default", "split": "train", "online": True}
    settings |= {"teacher": ["a"], "model": "m", "data_dir": "d"}
    (tmp_path / "c.json").write_text(json.dumps(settings))
    found = config_of("distill", "--config", tmp_path / "c.json")
    assert (found.decay_milestones, found.torchcompile) == ((3,), "default")
    assert found.train_split == "train"
    (tmp_path / "c.json").write_text(json.dumps(settings | {"decay_milestones": [4]}))
    result = run_cli("distill", "--config", tmp_path / "c.json")
    _said_in_one_line(result, 2, "'lr_milestones' is the old name of 'decay_milestones'")


def test_a_run_with_old_names_can_be_resumed(config_of: Run, run_cli: Run, tmp_path: Path) -> None:
    settings = {"lr_milestones": [3], "compile": "default", "model": "m", "data_dir": "/d"}
    (tmp_path / "config.json").write_text(json.dumps(settings | {"labels": "/l"}))
    found = config_of("distill", "--resume", tmp_path, "--decay-milestones", 3)
    assert (found.decay_milestones, found.torchcompile) == ((3,), "default")
    result = run_cli("distill", "--resume", tmp_path, "--lr-milestones", 4)
    _said_in_one_line(result, 2, "--decay-milestones [4] contradicts the run")


def test_a_recipe_may_use_old_names(config_of: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipes.load("resnet18")
    settings = {
        "lr_milestones" if n == "decay_milestones" else n: v for n, v in recipe.distill.items()
    }
    old = dataclasses.replace(recipe, distill=settings)
    monkeypatch.setattr(recipes, "load", lambda name: old)
    found = config_of("distill", "--recipe", "resnet18", "--data-dir", "d", "--labels", "l")
    assert found.decay_milestones == (100,)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_one_example_with_flags_that_exist(done: Run, name: str) -> None:
    said = done(*name.split(), "--help").stdout
    assert said.count("Example:") == 1
    example = said.split("Example:")[1].split("\n\n")[0].replace("\\\n", " ")
    words = shlex.split(example)
    path = ["mealv2", *name.split()]
    assert words[: len(path)] == path
    given = _given(name, words[len(path) :])
    flags = set(given.values()) - given.keys()
    if name.startswith("slurm "):  # what is left over are flags of a stage
        rest = _context(name, words[len(path) :]).params["flags"]
        flags |= set(_given(CONFIGS[name].stage, rest).values())
    assert flags == {w for w in words if w.startswith("--")}
    required = {
        f.name for f in configs.settings_of(CONFIGS[name]) if f.default is dataclasses.MISSING
    }
    assert required <= given.keys()


def _context(name: str, words: Iterable[str]) -> click.Context:
    return _command(name).make_context(name, list(words), resilient_parsing=True)


def _given(name: str, words: Iterable[str]) -> dict[str, str]:
    """Return the settings that words give, with how they are spelled."""
    context = _context(name, words)
    return {
        str(p.name): p.opts[0]
        for p in context.command.params
        if context.get_parameter_source(str(p.name)) is click.core.ParameterSource.COMMANDLINE
    }


# --- flags and configs --------------------------------------------------------------------------

SAMPLES: dict[str, list[str]] = {
    "gamma": ["0.5,2"],
    "eta": ["0.5,2"],
    "out_dims": ["7,8"],
    "out_layer": ["0,-1"],
    "topk": ["3"],
    "checkpoint_hist": ["3"],
    "batch_size": ["77"],
    "results_file": ["x.csv"],
    "val_split": ["other"],
}


def _sample(option: click.Option) -> list[str]:
    """Return values that an option takes and that are not its default."""
    if option.name in SAMPLES:
        return SAMPLES[option.name]
    if isinstance(option.type, click.Choice):
        return [next(c for c in option.type.choices if c != option.default)]
    word = {"integer": "77", "float": "0.125"}.get(option.type.name, "something")
    return [word] * option.nargs


@pytest.mark.parametrize(
    ("name", "field"),
    [
        pytest.param(name, field, id=f"{name}-{field.name}")
        for name, kind in CONFIGS.items()
        for field in configs.settings_of(kind)
        if len(getattr(field.type, "__args__", "several")) > 1  # --from has one choice so far
    ],
)
def test_every_setting_is_reachable_as_a_flag(
    name: str, field: dataclasses.Field[Any], monkeypatch: pytest.MonkeyPatch, run_cli: Run
) -> None:
    """The flag alone changes the value that reaches the config, and no other."""
    reached: dict[str, Any] = {}

    class ReachedError(Exception):
        pass

    def catch(values: dict[str, Any]) -> None:
        reached.update(values)
        raise ReachedError

    monkeypatch.setattr(CONFIGS[name], "from_json", catch)
    for name_of in ("with_run", "with_recipe"):
        monkeypatch.setattr(settings, name_of, lambda config, values, context: values)
    (option,) = (p for p in _command(name).params if p.name == field.name)
    flag = configs.flag(field.name)
    is_switch = isinstance(option, click.Option) and option.is_flag
    switch = (option.secondary_opts if field.default is True else option.opts)[0]
    given = [switch] if is_switch else [flag, *_sample(option)]
    positional = [f.name for f in configs.settings_of(CONFIGS[name]) if f.metadata["positional"]]
    before = positional[: positional.index(field.name)] if field.name in positional else []
    if field.metadata["positional"]:
        given = ["something"] * (1 + len(before))
    else:
        assert option.opts[0] == flag
    with pytest.raises(ReachedError):
        run_cli(*name.split())
    plain, defaults = dict(reached), {f.name: f.default for f in configs.settings_of(CONFIGS[name])}
    assert all(
        plain[key] == default or plain[key] in ((), None) for key, default in defaults.items()
    )
    with pytest.raises(ReachedError):
        run_cli(*name.split(), *given)
    assert {key for key in reached if reached[key] != plain[key]} == {*before, field.name}


def test_defaults_stand_in_config_alone() -> None:
    """No option is written out in cli.py, and no stage has a default of its own."""
    parts = [ROOT / "cli.py", *(ROOT / "pipeline" / "command_line").glob("*.py")]
    flags = {
        node.value
        for path in parts
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch("--[a-z-]+", node.value)
    }
    # `recipes show` has no config: it does not run
    assert flags <= {"--help", "--config", "--no-", "--script"}
    found = [
        f"{path.name}: {line.strip()}"
        for path in [
            ROOT / "cli.py",
            *(p for p in (ROOT / "pipeline").rglob("*.py") if p.parent.name != "config"),
            *(ROOT / "pipeline" / "command_line").glob("*.py"),
        ]
        for line in path.read_text().splitlines()
        if re.match(r"_?[A-Z_]*DEFAULT[A-Z_]*\b.*=", line)
    ]
    assert found == []


def test_config_file_for_stage_one_is_read_and_flags_go_before_it(
    done: Run,
    precompute_flags: list[str],
    teacher_dirs: dict[str, Path],
    labels_dir: Path,
    data_dir: Path,
    tmp_path: Path,
    contents: Callable[..., dict[str, bytes]],
) -> None:
    settings = {
        "data_dir": str(data_dir),
        "teacher": [f"{name}={path}" for name, path in teacher_dirs.items()],
        "img_size": 32,
        "num_views": 4,
        "view_seed": 7,
        "topk": "2",
        "label_dtype": "float16",
        "shard_size": 999,
        "batch_size": 16,
        "workers": 0,
        "val_split": None,
    }
    (tmp_path / "c.json").write_text(json.dumps(settings))
    flags = ["--config", tmp_path / "c.json", "--shard-size", 10, "--output", tmp_path / "labels"]
    done("precompute", *flags)
    assert contents(tmp_path / "labels") == contents(labels_dir)


# --- recipes --------------------------------------------------------------------------------------


def test_recipes_are_listed_and_the_last_line_is_json(done: Run) -> None:
    result = done("recipes")
    lines = result.stdout.splitlines()[:-1]
    assert lines[0].split() == ["name", "student", "top1", "top5", "title", "source"]
    names = [*recipes.names(), *recipes.cifar10_names()]
    assert [line.split()[0] for line in lines[1:]] == names
    assert [listed["name"] for listed in result.report["recipes"]] == names
    (cutmix,) = (line for line in lines if line.startswith("resnet50-cutmix"))
    assert re.search(r" resnet50\.ram_in1k +80\.98 +95\.35 .*CutMix +paper, Table 3", cutmix)
    (unpublished,) = (line for line in lines if line.startswith("ablation-weight-decay"))
    assert re.search(r" resnet50\.ram_in1k +- +- ", unpublished)
    assert result.stderr == ""


def test_a_recipe_is_shown_as_its_file_and_as_json(done: Run) -> None:
    result = done("recipes", "show", "efficientnet-b0")
    assert result.stdout.startswith(recipes.text("efficientnet-b0"))
    assert result.report == dataclasses.asdict(recipes.load("efficientnet-b0"))


def test_a_recipe_is_shown_as_a_script_that_bash_reads(done: Run) -> None:
    shown = done("recipes", "show", "resnet18", "--script").stdout
    assert shown == script(recipes.load("resnet18"))
    subprocess.run(["bash", "-n"], input=shown, text=True, check=True)


@pytest.mark.parametrize(
    "command",
    [
        "recipes show {}",
        "recipes show --script {}",
        "precompute --recipe {}",
        "distill --recipe {}",
    ],
)
def test_unknown_recipe_is_one_line_with_the_nearest(run_cli: Run, command: str) -> None:
    result = run_cli(*command.format("resnet50-22").split())
    _said_in_one_line(result, 2, "resnet50-224")
    assert "unknown recipe 'resnet50-22'" in result.stderr


def test_wrong_usage_of_a_command_in_a_group_names_all_its_words(run_cli: Run) -> None:
    _said_in_one_line(run_cli("recipes", "show"), 2, "(see mealv2 recipes show --help)")


def test_flags_go_before_config_before_recipe_before_default(
    config_of: Run, tmp_path: Path
) -> None:
    settings = {"lr": 0.5, "momentum": 0.5, "data_dir": "elsewhere", "recipe": "resnet18"}
    (tmp_path / "c.json").write_text(json.dumps(settings))
    flags = ["--config", tmp_path / "c.json", "--lr", 0.25, "--labels", "labels"]
    found = config_of("distill", *flags)
    assert found.recipe == "resnet18"
    assert found.lr == 0.25  # the flag's, against both
    assert (found.momentum, found.data_dir) == (0.5, Path("elsewhere"))  # the file's
    assert (found.model, found.discriminator) == ("resnet18.tv_in1k", "official")  # the recipe's
    assert found.decay_milestones == (100,)
    assert found.workers == configs.DistillConfig.workers  # nobody's


def test_recipe_flag_goes_before_the_recipe_of_a_config(config_of: Run, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('{"recipe": "resnet18", "data_dir": "d", "labels": "l"}')
    found = config_of("distill", "--config", tmp_path / "c.json", "--recipe", "efficientnet-b0")
    assert (found.recipe, found.model) == ("efficientnet-b0", "tf_efficientnet_b0.aa_in1k")


def test_flag_given_at_its_default_value_goes_before_the_recipe(config_of: Run) -> None:
    given = ["--recipe", "resnet18", "--data-dir", "d", "--labels", "l"]
    assert (
        config_of("distill", "--data-dir", "d", "--model", "m", "--labels", "l").discriminator
        == "paper"
    )
    assert config_of("distill", *given).discriminator == "official"
    assert config_of("distill", *given, "--discriminator", "paper").discriminator == "paper"


def test_teachers_of_a_recipe_are_for_precompute_and_for_distill_online(config_of: Run) -> None:
    given = ["--recipe", "resnet50-380", "--data-dir", "imagenet"]
    teachers = ("tf_efficientnet_b4.ns_jft_in1k", "tf_efficientnet_b4.aa_in1k")

    cached = config_of("distill", *given, "--labels", "labels")
    online = config_of("distill", *given, "--online")
    label = config_of("precompute", *given, "--output", "labels")
    other = config_of("precompute", *given, "--output", "labels", "--teacher", "resnet18.tv_in1k")

    assert (cached.teacher, cached.img_size) == ((), None)
    assert (online.teacher, online.img_size) == (teachers, 380)
    assert (label.teacher, label.img_size) == (teachers, 380)
    assert (other.teacher, other.img_size) == (("resnet18.tv_in1k",), 380)


@pytest.mark.parametrize("command", ["precompute", "distill"])
def test_without_a_recipe_nothing_is_filled_in(config_of: Run, command: str) -> None:
    rest = {
        "precompute": ["--teacher", "resnet18.tv_in1k", "--output", "o"],
        "distill": ["--model", "resnet18.tv_in1k", "--labels", "l"],
    }[command]
    found = config_of(command, "--data-dir", "d", *rest)
    kind = CONFIGS[command]
    fields = [f for f in configs.settings_of(kind) if f.default is not dataclasses.MISSING]
    changed = {f.name for f in fields if getattr(found, f.name) != f.default}
    # The method decides what the discriminator is where nobody says it.
    assert changed <= {"labels", "discriminator"}


@pytest.mark.parametrize(
    ("flags", "left_out"),
    [
        (["--initial-checkpoint", "c"], ["pretrained"]),
        (["--discriminator", "off"], ["discriminator_lr", "discriminator_weight"]),
    ],
)
def test_flag_sets_aside_what_has_no_meaning_beside_it(
    config_of: Run, flags: list[str], left_out: list[str]
) -> None:
    found = config_of("distill", "--recipe", "resnet18", "--data-dir", "d", "--labels", "l", *flags)
    defaults = {f.name: f.default for f in configs.settings_of(found)}
    recipe = recipes.load("resnet18").distill
    assert {name: getattr(found, name) for name in left_out} == {n: defaults[n] for n in left_out}
    kept = recipe.keys() - {*left_out, "discriminator"}
    assert {n: found.as_json()[n] for n in kept} == {n: recipe[n] for n in kept}


@pytest.mark.parametrize(
    ("flags", "rate"),
    [
        ([], 1e-4),
        (["--lr", 0.02], 1e-4),  # as in the file
        (["--lr", 0.1], None),
        (["--discriminator", "official"], None),
        (["--discriminator", "off"], None),
        (["--lr", 0.1, "--discriminator-lr", 0.3], 0.3),
    ],
)
def test_flag_sets_aside_what_follows_from_it_in_a_config(
    config_of: Run, run_cli: Run, tmp_path: Path, flags: list[object], rate: float | None
) -> None:
    """A run's config.json has the discriminator's rate that followed from --lr and the classes."""
    of_run = configs.DistillConfig(
        data_dir=Path("/d"), labels=Path("/l"), model="m", lr=0.02, discriminator_weight=0.5
    )
    path = tmp_path / "config.json"
    path.write_text(json.dumps(of_run.resolved(10).as_json()))
    found = config_of("distill", "--config", path, *flags)
    assert found.discriminator_lr == rate
    assert found.discriminator_weight == (1.0 if "--discriminator" in flags else 0.5)


def test_a_config_keeps_what_follows_from_a_flag_that_it_does_not_have(
    config_of: Run, tmp_path: Path
) -> None:
    path = tmp_path / "own.json"
    path.write_text('{"data_dir": "d", "labels": "l", "model": "m", "discriminator_lr": 0.001}')
    assert config_of("distill", "--config", path, "--lr", 0.1).discriminator_lr == 0.001


def test_what_a_recipe_can_be_set_aside_for_exists() -> None:
    fields = {field.name for field in configs.settings_of(configs.DistillConfig)}
    dropped = settings.DROPPED
    assert fields >= {*dropped, *(name for names in dropped.values() for name in names)}


def test_a_run_of_a_recipe_keeps_its_name_and_repeats_from_its_config(
    done: Run, config_of: Run, run_cli: Run, distill_flags: list[str], tmp_path: Path
) -> None:
    done(
        *distill_flags, "--recipe", "resnet18", "--decay-milestones", 1, "--output", tmp_path / "r"
    )
    kept = json.loads((tmp_path / "r" / "config.json").read_text())
    assert kept["recipe"] == "resnet18"
    assert (kept["discriminator"], kept["mean"]) == ("official", [0.485, 0.456, 0.406])
    assert (kept["model"], kept["pretrained"], kept["epochs"]) == ("test_resnet", None, 2)

    config = ["--config", tmp_path / "r" / "config.json"]
    assert config_of("distill", *config).as_json() == kept
    no_effect = run_cli("distill", *config, "--recipe", "efficientnet-b0")
    _said_in_one_line(no_effect, 2, "--recipe has no effect")


@pytest.mark.parametrize(("name", "accepted"), [("resnet18", True), ("resnet50-224", False)])
def test_a_resumed_run_keeps_its_settings_whatever_the_recipe_says_today(
    config_of: Run, run_cli: Run, tmp_path: Path, name: str, accepted: bool
) -> None:
    settings = {"recipe": "resnet18", "lr": 0.125, "model": "m", "data_dir": "/d", "labels": "/l"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    given = ["distill", "--resume", tmp_path, "--recipe", name]
    if accepted:
        found = config_of(*given)
        assert (found.lr, found.model, found.decay_milestones) == (0.125, "m", None)
    else:
        _said_in_one_line(run_cli(*given), 2, f"--recipe {name} contradicts the run")


# --- whatever goes wrong: one line, the documented code, no traceback ----------------------------


@pytest.fixture(scope="session")
def world(
    data_dir: Path,
    labels_dir: Path,
    student_dir: Path,
    make_model: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """What wrong commands are made of, by the name that WRONG uses. Nothing may change it."""
    tmp = tmp_path_factory.mktemp("world")
    shutil.copytree(data_dir, tmp / "dodos")
    (tmp / "dodos" / "train" / "dodo").mkdir()
    for name in ("text", "text.pth", "text.safetensors"):
        (tmp / name).write_text("hello\n")
    (tmp / "empty").mkdir()
    return {
        "tmp": tmp,
        "data": data_dir,
        "labels": labels_dir,
        "student": student_dir,
        "two": make_model("test_resnet", classes=("ants", "bees")),
        "four": make_model("test_resnet", classes=("ants", "bees", "dogs", "wasps")),
        "xyz": make_model("test_resnet", classes=("x", "y", "z")),
    }


@pytest.fixture(scope="session")
def usual(
    precompute_flags: list[str], distill_flags: list[str], finetune_flags: list[str]
) -> dict[str, list[str]]:
    """Commands that work but for where they write, to be spoilt by what is added to them."""
    evaluate = ["evaluate", "--data-dir", precompute_flags[2], "--workers", "0"]
    return {
        "precompute": precompute_flags,
        "distill": distill_flags,
        "finetune": finetune_flags,
        "evaluate": evaluate,
        "resume": ["distill"],
    }


# exit code, usual command, what is added to it, what the line must name
WRONG = [
    # data
    (2, "precompute", "--data-dir /nowhere", "/nowhere/train"),
    (2, "precompute", "--data-dir {tmp}/dodos", "dodos/train/dodo"),
    (2, "finetune", "--data-dir {tmp}/dodos", "dodos/train/dodo"),
    (2, "finetune", "--data-dir {tmp}/text", "text/train"),
    (2, "finetune", "--train-split trian", "train, val"),
    (2, "finetune", "--train-split train/ants", "no class folders"),
    (2, "evaluate", "--checkpoint {student} --val-split vla", "data/vla"),
    # models
    (2, "distill", "--model resnet5O", "resnet50"),
    (2, "finetune", "--model test_resnt", "test_resnet"),
    (2, "precompute", "--teacher test_vlt", "test_vit"),
    (2, "evaluate", "--model test_resnet.imagenet", "r160_in1k"),
    (2, "finetune", "--model qqqqqqqqqqqq", "timm.list_models()"),
    (2, "evaluate", "", "--checkpoint"),
    # checkpoints
    (2, "precompute", "--teacher test_resnet={two}", "class"),
    (2, "evaluate", "--checkpoint {four}", "class"),
    (2, "evaluate", "--checkpoint {xyz}", "'ants'"),
    (2, "evaluate", "--checkpoint {student} --model test_efficientnet", "another model"),
    (2, "evaluate", "--checkpoint /nowhere", "/nowhere"),
    (2, "distill", "--initial-checkpoint /nowhere", "/nowhere"),
    (2, "precompute", "--teacher test_vit=/nowhere", "/nowhere"),
    (2, "evaluate", "--checkpoint {tmp}/text.safetensors", "text.safetensors"),
    (2, "evaluate", "--checkpoint {tmp}/text.pth --model test_resnet", "text.pth"),
    (2, "evaluate", "--checkpoint {tmp}/text.pth", "give --model"),
    # label sets
    (3, "distill", "--labels /nowhere", "/nowhere"),
    (3, "distill", "--labels {tmp}/text", "text"),
    (3, "distill", "--labels {tmp}/empty", "no label set"),
    # places to write to
    (2, "precompute", "--output {tmp}/text/labels", "text"),
    (1, "precompute", "--output /proc/labels", "/proc/labels"),
    (2, "distill", "--output {tmp}/text/run", "text"),
    (1, "finetune", "--output /proc/run", "/proc/run"),
    (2, "evaluate", "--checkpoint {student} --results-file {tmp}/text/r.csv", "text"),
    (2, "evaluate", "--checkpoint {student} --results-file {tmp}/r.xls", "--results-file"),
    # label sets looked at, checked and made of others
    (3, "labels info", "{tmp}/text", "text"),
    (3, "labels verify", "/nowhere", "no label set in"),
    (3, "labels verify", "{tmp}/empty", "no label set in"),
    (2, "labels info", "", "LABELS is required"),
    (3, "labels merge", "{tmp}/empty {labels} --output {made}", "empty"),
    (3, "labels convert", "{tmp}/empty --output {made}", "no label set in"),
    (2, "labels convert", "{labels}", "--output is required"),
    (2, "labels convert", "{labels} --rate 0.1 --output {labels}", "is the label set itself"),
    (2, "labels convert", "{labels} --output {data}", "is not a label set and not empty"),
    (2, "labels convert", "{labels} --output {tmp}/text", "text"),
    (2, "labels convert", "{labels} --output {tmp}/text/set", "text"),
    (1, "labels convert", "{labels} --output /proc/set", "/proc/set"),
    (2, "labels split", "{labels} --output {tmp}/text", "text"),
    (2, "labels export", "{labels} --output {tmp}/text", "text"),
    (2, "labels export", "{labels} --output {data}", "not empty"),
    (3, "labels export", "{tmp}/empty --output {made}", "no label set in"),
    (3, "labels import", "{tmp}/empty --data-dir {data} --output {made}", "no label files"),
    (2, "labels import", "{tmp}/empty --data-dir /nowhere --output {made}", "/nowhere"),
    (2, "labels import", "{tmp}/empty --output {made}", "--data-dir is required"),
    (2, "labels add-views", "{labels} --num-views 9", "--data-dir is required"),
    # batch jobs: nothing is submitted before everything was looked at
    (2, "slurm precompute", "", "FLAGS is required"),
    (2, "slurm precompute", "--array 0 --output {made}", "--array"),
    (2, "slurm precompute", "--data-dir {data} --output {made}", "--teacher is required"),
    (2, "slurm precompute", "--data-dir /nowhere --teacher t --output {made}", "/nowhere/train"),
    (2, "slurm precompute", "--data-dir {data} --teacher t --output {data}", "is not a label set"),
    (3, "slurm precompute", "--data-dir {data} --teacher t --output {labels}", "--num-views is 4"),
    (2, "slurm precompute", "--data-dir d --teacher t --output o --job-index 1", "--job-index"),
    (2, "slurm distill", "--data-dir {data} --labels l --model m", "--output is required"),
    (2, "slurm distill", "--data-dir d --labels l --model m --epochs 0 --output o", "--epochs"),
    (2, "slurm distill", "--time '1 day' --data-dir d", "--time"),
    (2, "slurm distill", "--after finish --data-dir d", "--after"),
    (2, "slurm distill", "--sbatch-arg exclusive --data-dir d", "--sbatch-arg"),
    (2, "slurm distill", "--nodes 0 --data-dir d", "--nodes"),
    (2, "slurm sweep", "--data-dir d", "--vary is required"),
    (2, "slurm sweep", "--vary seed --data-dir d", "--vary must be FLAG="),
    (2, "slurm sweep", "--vary labels=a,b --data-dir d", "--vary labels"),
    (2, "slurm sweep", "--vary seed=0,1 --seed 2 --data-dir d", "--seed is given and also varied"),
    (2, "slurm sweep", "--vary amp=1 --output o", "--vary amp must be yes or no"),
    # values
    (2, "precompute", "--topk 4", "--topk 4"),
    (2, "precompute", "--topk most", "--topk"),
    (2, "precompute", "--label-dtype float32 --batch-size 0", "--batch-size"),
    (2, "distill", "--lr nan", "--lr"),
    (2, "distill", "--lr inf", "--lr"),
    (2, "finetune", "--mean nan nan nan --std 1 1 1", "--mean"),
    (2, "distill", "--workers -1", "--workers"),
    (2, "distill", "--device abacus", "--device abacus"),
    # settings without effect
    (2, "distill", "--discriminator off --discriminator-lr 0.1", "--discriminator-lr"),
    (2, "distill", "--discriminator off --discriminator-weight 2", "--discriminator-weight"),
    (2, "distill", "--decay-milestones 2", "--decay-milestones 2"),
    (2, "finetune", "--mean 0.1 0.2 0.3", "--std"),
    (2, "distill", "--pretrained", "--initial-checkpoint"),
    (2, "distill", "--amp-dtype float16", "--amp-dtype"),
    # runs to continue
    (2, "resume", "--resume /nowhere", "/nowhere"),
    (2, "resume", "--resume {tmp}/empty", "config.json"),
]


def _said_in_one_line(result: Result, code: int, named: str) -> None:
    assert result.code == code, result.stderr
    lines = [
        line
        for line in result.stderr.splitlines()
        if not line.startswith(("run folder", "image "))  # what a command may say before it fails
    ]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("mealv2: ")
    assert named in lines[0]
    assert result.stdout == ""


@pytest.mark.parametrize(("code", "command", "added", "named"), WRONG)
def test_what_goes_wrong_is_said_in_one_line(
    run_cli: Run,
    world: dict[str, Path],
    usual: dict[str, list[str]],
    tmp_path: Path,
    code: int,
    command: str,
    added: str,
    named: str,
) -> None:
    place = {"precompute": "--output", "distill": "--output", "finetune": "--output"}.get(command)
    made = tmp_path / "made"
    words = shlex.split(added.format(**world, made=made))
    result = run_cli(
        *usual.get(command, command.split()), *([place, made] if place else []), *words
    )
    _said_in_one_line(result, code, named)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        *(("precompute", flag) for flag in ("--data-dir", "--output", "--teacher")),
        *(("distill", flag) for flag in ("--data-dir", "--model")),
        *(("finetune", flag) for flag in ("--data-dir", "--model")),
        ("evaluate", "--data-dir"),
    ],
)
def test_required_flag_left_out_is_named(
    run_cli: Run, usual: dict[str, list[str]], command: str, flag: str
) -> None:
    flags = usual[command]
    if command == "precompute" and flag != "--output":
        flags = [*flags, "--output", "/nowhere"]
    while flag in flags:
        place = flags.index(flag)
        flags = [*flags[:place], *flags[place + 2 :]]
    if command == "evaluate":
        flags = [*flags, "--model", "test_resnet"]
    _said_in_one_line(run_cli(*flags), 2, f"{flag} is required")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{'lr': 1}", "c.json"),
        ("[]", "c.json"),
        ("", "c.json"),
        ('{"learning_rate": 1}', "'learning_rate'"),
        ('{"config_file": "x.json"}', "'config_file'"),
        ('{"epochs": "many"}', "epochs"),
        ('{"lr": NaN}', "number NaN"),
        ('{"mean": [0.5]}', "mean"),
        ('{"data_dir": 3}', "data"),
    ],
)
def test_config_file_that_cannot_be_used_is_said_in_one_line(
    run_cli: Run, finetune_flags: list[str], tmp_path: Path, text: str, named: str
) -> None:
    (tmp_path / "c.json").write_text(text)
    given = [*finetune_flags, "--output", tmp_path / "made"]
    for name in ("data-dir", "epochs"):  # a flag would go before the file
        if name.replace("-", "_") in text:
            place = given.index(f"--{name}")
            given = [*given[:place], *given[place + 2 :]]
    _said_in_one_line(run_cli(*given, "--config", tmp_path / "c.json"), 2, named)


@pytest.mark.parametrize(
    ("flags", "suggested"),
    [
        (["distill", "--eopchs", "3"], "--epochs"),
        (["precompute", "--teachers", "x"], "--teacher"),
        (["finetune", "--learning-rate", "x"], None),
        (["distil"], "distill"),
        (["distill", "--discriminator", "ofical"], "official"),
        (["lables", "info"], "labels"),
        (["labels", "mrege"], "merge"),
        (["labels", "addviews"], "add-views"),
        (["labels", "verify", "l", "--datadir", "x"], "--data-dir"),
        (["labels", "export", "l", "--to", "parkuet"], "parquet"),
        (["labels", "import", "l", "--label_type", "x"], "--label-type"),
        (["slurm", "precompute", "--num-view", "3"], "--num-views"),
        (["slurm", "distill", "--output", "o", "--eopchs", "3"], "--epochs"),
        (["slurm", "sweep", "--vary", "sed=0,1", "--output", "o"], "--seed"),
    ],
)
def test_wrong_usage_ends_with_2_and_a_suggestion(
    run_cli: Run, flags: list[str], suggested: str | None
) -> None:
    result = run_cli(*flags)
    assert result.code == 2
    assert any(word in result.stderr for word in (flags[-1], *flags[:2]))
    if suggested:
        assert suggested in result.stderr
    assert "Traceback" not in result.stderr


def test_weights_that_cannot_be_had_are_one_line(
    run_cli: Run, usual: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    result = run_cli(*usual["evaluate"], "--model", "test_resnet.r160_in1k")
    _said_in_one_line(result, 1, "cannot load the pretrained weights of test_resnet.r160_in1k")


def test_error_of_the_code_itself_keeps_its_traceback(
    run_cli: Run, usual: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(config: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("pipeline.evaluate.run", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run_cli(*usual["evaluate"], "--model", "test_resnet")
