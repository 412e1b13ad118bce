"""mealv2.recipes: what was published, said completely, in settings and weights that exist."""

import configparser
import dataclasses
import functools
import shlex
import tomllib
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import cli
from mealv2 import recipes
from mealv2.errors import ConfigError
from pipeline.config import DistillConfig, PrecomputeConfig

NAMES = recipes.names()
EVERY = pytest.mark.parametrize("name", NAMES)
FOLDER = Path(recipes.__file__).parent

# Top-1, top-5 and parameters (millions) as the official README's table and the paper's text give
# them (ResNet-18's size is timm's).
PUBLISHED = {
    "resnet50-224": (80.67, 95.09, 25.6),
    "resnet50-380": (81.72, 95.81, 25.6),
    "resnet50-cutmix": (80.98, 95.35, 25.6),
    "mobilenetv3-small-075": (67.60, 87.23, 2.04),
    "mobilenetv3-small-100": (69.65, 88.71, 2.54),
    "mobilenetv3-large-100": (76.92, 93.32, 5.48),
    "efficientnet-b0": (78.29, 93.95, 5.29),
    "resnet18": (73.19, None, 11.69),
}
ABLATIONS = {
    "ablation-random-start": (77.07, None, 25.6),
    "ablation-torchvision-start": (79.48, None, 25.6),
    "ablation-timm-start": (80.67, 95.09, 25.6),
    "ablation-efficientnet-b0-ra-start": (78.23, None, 5.29),
    "ablation-weight-decay": (None, None, 25.6),
    "ablation-no-discriminator": (None, None, 25.6),
    "ablation-hard-labels": (None, None, 25.6),
}
# What an ablation changes of the recipe it is an ablation of; the rest is the same.
OFF: dict[str, Any] = {
    "discriminator": "off",
    "discriminator_lr": None,
    "discriminator_weight": None,
}
CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "ablation-random-start": (
        "resnet50-224",
        {
            "pretrained": False,
            "epochs": 120 + 180,
            "lr": 0.1,
            "decay_milestones": [120, 120 + 100],
            "discriminator_lr": 0.1,
        },
    ),
    "ablation-torchvision-start": ("resnet50-224", {"model": "resnet50.tv_in1k"}),
    "ablation-timm-start": ("resnet50-224", {}),
    "ablation-efficientnet-b0-ra-start": ("efficientnet-b0", {"model": "efficientnet_b0.ra_in1k"}),
    "ablation-weight-decay": ("resnet50-224", {"weight_decay": 1e-4}),
    "ablation-no-discriminator": ("resnet50-224", OFF),
    "ablation-hard-labels": ("resnet50-224", {**OFF, "hard_label_weight": 1.0}),
}
# The paper's section 6.1, the official code's discriminator at the rate in force, and ImageNet's
# statistics, for every published student.
SCHEDULE = {
    "pretrained": True,
    "epochs": 180,
    "batch_size": 512,
    "lr": 0.01,
    "decay_milestones": [100],
    "decay_rate": 0.1,
    "momentum": 0.9,
    "weight_decay": 0.0,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "discriminator": "official",
    "discriminator_lr": 0.01,
    "discriminator_weight": 1.0,
}
# Weights of 2020 under today's names, with their exact size.
NUM_PARAMS = {
    "senet154.gluon_in1k": 115_088_984,
    "resnet152s.gluon_in1k": 60_316_584,
    "tf_efficientnet_b4.ns_jft_in1k": 19_341_616,
    "tf_efficientnet_b4.aa_in1k": 19_341_616,
    "tf_efficientnet_b0.aa_in1k": 5_288_548,
    "efficientnet_b0.ra_in1k": 5_288_548,
    "tf_mobilenetv3_small_075.in1k": 2_041_872,
    "tf_mobilenetv3_small_100.in1k": 2_542_856,
    "tf_mobilenetv3_large_100.in1k": 5_483_032,
    "resnet50.ram_in1k": 25_557_032,
    "resnet50.tv_in1k": 25_557_032,
    "resnet18.tv_in1k": 11_689_512,
}


def models(name: str) -> list[str]:
    """Return the student and the teachers of a recipe."""
    recipe = recipes.load(name)
    return [recipe.distill["model"], *recipe.teachers["teacher"]]


@functools.cache
def num_params(model: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(model, pretrained=False).parameters())


def weights_of(model: str) -> tuple[str | None, str | None, str | None]:
    """Return where timm takes a model's weights from, by today's name or that of 2020."""
    current = timm.models.get_deprecated_models().get(model) or model
    config = timm.models.get_pretrained_cfg(current)
    return config.hf_hub_id, config.url, config.tag


# --- what was published -------------------------------------------------------------------------


def test_every_published_training_and_ablation_has_its_recipe_and_numbers() -> None:
    assert {p.stem for p in FOLDER.glob("*.toml")} == set(NAMES)
    assert {
        name: (recipe.top1, recipe.top5, recipe.params_m)
        for name in NAMES
        for recipe in [recipes.load(name)]
    } == PUBLISHED | ABLATIONS
    assert [*sorted(PUBLISHED), *sorted(ABLATIONS)] == NAMES


@EVERY
def test_a_recipe_says_its_title_source_and_notes(name: str) -> None:
    recipe = recipes.load(name)
    assert recipe.title
    assert recipe.source.startswith("paper, ")
    assert recipe.notes
    assert all(note.endswith(".") for note in recipe.notes)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_pin_the_papers_schedule(name: str) -> None:
    settings = dict(recipes.load(name).distill)
    del settings["model"]
    extra = {"cutmix_target": "teachers"} if name == "resnet50-cutmix" else {}
    assert settings == SCHEDULE | extra


@EVERY
def test_teachers_go_with_the_resolution(name: str) -> None:
    """Paper, section 6.1: by the input size that the teachers were trained at."""
    teachers = recipes.load(name).teachers
    assert teachers.keys() == {"teacher", "img_size"}
    assert teachers["img_size"] == (380 if name == "resnet50-380" else 224)
    sizes = {timm.models.get_pretrained_cfg(t).input_size for t in teachers["teacher"]}
    assert sizes == {(3, teachers["img_size"], teachers["img_size"])}


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_changes_only_what_it_is_about(name: str) -> None:
    base, changes = CHANGES[name]
    ablation, recipe = recipes.load(name), recipes.load(base)
    expected = recipe.distill | changes
    assert ablation.distill == {key: v for key, v in expected.items() if v is not None}
    assert (ablation.teachers, ablation.precompute) == (recipe.teachers, recipe.precompute)


# --- models and weights -------------------------------------------------------------------------


@EVERY
def test_students_and_teachers_have_the_published_size(name: str) -> None:
    assert {model: num_params(model) for model in models(name)} == {
        model: NUM_PARAMS[model] for model in models(name)
    }
    shown = recipes.load(name).params_m
    digits = len(str(shown).split(".")[1])
    assert round(num_params(models(name)[0]) / 1e6, digits) == shown


@EVERY
def test_weights_are_pinned_to_a_tag_that_timm_has(name: str) -> None:
    for model in models(name):
        assert "." in model
        assert timm.list_pretrained(model) == [model]


@EVERY
def test_the_two_teachers_are_two(name: str) -> None:
    first, second = map(weights_of, recipes.load(name).teachers["teacher"])
    assert first[0] != second[0]  # two repositories
    assert first[1] != second[1]  # two files


def test_without_tags_the_teachers_at_380_would_be_one_model_twice() -> None:
    """The names of the official README, in today's timm: what the tags are for."""
    assert weights_of("tf_efficientnet_b4_ns") == weights_of("tf_efficientnet_b4")
    pinned = set(recipes.load("resnet50-380").teachers["teacher"])
    assert pinned == {"tf_efficientnet_b4.ns_jft_in1k", "tf_efficientnet_b4.aa_in1k"}


@pytest.mark.parametrize("model", ["resnet50.ram_in1k", "resnet18.tv_in1k"])
def test_without_tags_the_student_would_start_elsewhere(model: str) -> None:
    assert weights_of(model.split(".")[0]) != weights_of(model)


# --- settings and commands ----------------------------------------------------------------------


@EVERY
def test_every_setting_is_a_field_of_its_stage(name: str) -> None:
    recipe = recipes.load(name)
    stages = {"precompute": PrecomputeConfig, "distill": DistillConfig}
    for command, kind in stages.items():
        fields = {field.name for field in dataclasses.fields(kind)}
        settings = recipe.settings(command, online=True)  # type: ignore[arg-type]
        assert settings.keys() <= fields - {"data_dir", "output", "labels", "recipe", "online"}


@EVERY
def test_every_setting_is_one_that_the_flag_would_take(name: str) -> None:
    """A recipe goes past click: its values must be what click would have let through."""
    recipe = recipes.load(name)
    for command in ("precompute", "distill"):
        options = {option.name: option for option in cli.cli.commands[command].params}
        for key, value in recipe.settings(command, online=True).items():
            context = cli.cli.commands[command].make_context(command, [], resilient_parsing=True)
            option = options[key]
            given = [str(v) for v in value] if isinstance(value, list) else str(value)
            taken = option.type_cast_value(context, given)
            assert taken == (tuple(value) if isinstance(value, list) else value), key


def opening(name: str) -> list[list[str]]:
    """Return the commands in the comment that a recipe's file opens with, in words."""
    comment = recipes.text(name).split("\n\n")[0].splitlines()
    assert all(line.startswith("#") for line in comment)
    return [shlex.split(line[1:]) for line in comment if line.startswith("# mealv2 ")]


@EVERY
def test_a_recipe_opens_with_its_commands(name: str) -> None:
    mixed = ["--cutmix-target", "mixed-labels"] if name == "resnet50-cutmix" else []
    data, views = ["--data-dir", "imagenet"], ["--num-views", "30", "--output", "labels"]
    assert recipes.text(name).startswith(f"# mealv2 distill --recipe {name} --online ")
    assert opening(name) == [
        ["mealv2", "distill", "--recipe", name, "--online", *data],
        ["mealv2", "precompute", "--recipe", name, *data, *views],
        ["mealv2", "distill", "--recipe", name, "--labels", "labels", *data, *mixed],
    ]


@EVERY
def test_the_commands_reach_their_stages_with_the_recipes_settings(
    name: str, config_of: Callable[..., Any]
) -> None:
    recipe = recipes.load(name)
    online, label, cached = (config_of(*words[1:]) for words in opening(name))
    target = {"cutmix_target": "mixed-labels"} if name == "resnet50-cutmix" else {}

    for config, settings in (
        (online, recipe.teachers | recipe.distill),
        (label, recipe.teachers | recipe.precompute),
        (cached, recipe.distill | target),
    ):
        values = config.as_json()
        assert {key: values[key] for key in settings} == settings
        assert config.recipe == name
        assert config.data_dir == Path("imagenet")
    assert label.num_views == 30
    assert (cached.teacher, cached.img_size) == ((), None)


def test_one_label_set_serves_all_recipes_at_224() -> None:
    at_224 = [recipes.load(name) for name in NAMES if name != "resnet50-380"]
    assert len(at_224) > 1
    assert all(r.settings("precompute") == at_224[0].settings("precompute") for r in at_224)


# --- the room itself ----------------------------------------------------------------------------


def test_distill_has_teachers_only_when_online() -> None:
    recipe = recipes.load("resnet50-380")
    assert recipe.settings("distill") == recipe.distill
    assert recipe.settings("distill", online=True) == recipe.distill | recipe.teachers
    assert recipe.settings("precompute") == recipe.precompute | recipe.teachers


def test_a_recipe_is_its_file() -> None:
    recipe = dataclasses.asdict(recipes.load("resnet18"))
    read = tomllib.loads((FOLDER / "resnet18.toml").read_text(encoding="utf-8"))
    assert recipe == {"name": "resnet18", "top5": None, "finetune": {}, **read}


@pytest.mark.parametrize("read", [recipes.load, recipes.text])
@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("resnet50-22", "did you mean resnet50-224"),
        ("qqqq", "known: efficientnet-b0, .*ablation-weight-decay"),
        ("../resnet18", "unknown recipe"),
        ("resnet18.toml", "resnet18"),
    ],
)
def test_unknown_name_is_answered_with_the_nearest(
    read: Callable[[str], object], name: str, named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        read(name)


def test_the_files_are_package_data() -> None:
    setup = configparser.ConfigParser()
    setup.read(FOLDER.parent.parent / "setup.cfg", encoding="utf-8")
    patterns = setup["options.package_data"]["mealv2.recipes"].split()
    cifar = [f"cifar10/{name}.toml" for name in recipes.cifar10_names()]
    files = [*(f"{name}.toml" for name in NAMES), *cifar, "reproduce.sh"]
    assert all(any(fnmatch(file, p) for p in patterns) for file in files)


@EVERY
def test_the_document_has_the_recipes_numbers_and_source(name: str) -> None:
    text = (FOLDER.parent.parent / "docs" / "how-to" / "recipes.md").read_text(encoding="utf-8")
    (row,) = (line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
    recipe = recipes.load(name)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    shown = ["–" if value is None else f"{value:.2f}" for value in (recipe.top1, recipe.top5)]
    assert cells[-3:] == [*shown, recipe.source]
    if name in PUBLISHED:
        teachers = "B4 + B4" if name == "resnet50-380" else "SENet + ResNet"
        size = str(recipe.teachers["img_size"])
        assert cells[1:4] == [f"`{recipe.distill['model']}`", teachers, size]
