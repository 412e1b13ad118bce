"""The recipes of MEAL for CIFAR-10: the values in force in its code, in commands that run."""

import dataclasses
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import mealv2.models  # noqa: F401  # registers cifar_*
from mealv2 import recipes
from mealv2.errors import ConfigError
from mealv2.recipes.script import script
from pipeline.config import DistillConfig, FinetuneConfig

NAMES = recipes.cifar10_names()
EVERY = pytest.mark.parametrize("name", NAMES)
PAGE = Path(recipes.__file__).parent.parent.parent / "docs" / "how-to" / "meal-v1.md"

# MEAL's main.py: random crops of 32 with 4 pixels added, CIFAR-10's statistics, SGD.
COMMON = {
    "pretrained": False,
    "img_size": 32,
    "crop": "pad",
    "padding": 4,
    "lr": 0.1,
    "decay_rate": 0.1,
    "momentum": 0.9,
    "mean": [0.4914, 0.4822, 0.4465],
    "std": [0.2023, 0.1994, 0.2010],
}
PLAIN = {"batch_size": 128, "weight_decay": 5e-4, "epochs": 350, "decay_milestones": [150, 250]}
MEAL = {
    "method": "meal",
    "online": True,
    "teacher_mode": "train",
    "block_loss": "ce",
    "discriminator": "official",
    "discriminator_lr": 1e-3,
}
# README of MEAL: its two examples.
DISTILL: dict[str, dict[str, Any]] = {
    "meal-vgg19": COMMON
    | PLAIN
    | MEAL
    | {
        "model": "cifar_vgg19_bn",
        "out_layer": [0, 1, 2, 3, 4],
        "out_dims": [10000, 5000, 1000, 500, 10],
        "pool": "avg",
        "gamma": [0.001, 0.01, 0.05, 0.1, 1.0],
        "eta": [1.0] * 5,
    },
    "meal-densenet": COMMON
    | MEAL
    | {
        "model": "cifar_densenet",
        "batch_size": 64,
        "opt": "nesterov",
        "weight_decay": 1e-4,
        "epochs": 700,
        "decay_milestones": [300, 500],
        "teacher_selection": "random",
        "out_layer": [-1],
        "gamma": [1.0],
        "eta": [1.0],
    },
}
TEACHERS = {
    "meal-vgg19": ["cifar_vgg19_bn"],
    "meal-densenet": [
        *("cifar_vgg19_bn", "cifar_dpn92", "cifar_resnet18", "cifar_preactresnet18"),
        "cifar_densenet",
    ],
}


def opening(name: str) -> list[list[str]]:
    """Return the commands in the comment that a recipe's file opens with, in words."""
    comment = recipes.text(name).split("\n\n")[0].splitlines()
    assert all(line.startswith("# mealv2 ") for line in comment)
    return [shlex.split(line)[2:] for line in comment]


def test_the_two_examples_of_the_readme_have_recipes() -> None:
    assert sorted(DISTILL) == NAMES
    assert not set(NAMES) & set(recipes.names())


@EVERY
def test_a_recipe_has_the_values_in_force(name: str) -> None:
    recipe = recipes.load(name)
    assert recipe.distill == DISTILL[name]
    model = {"model": "cifar_vgg19_bn"} if name == "meal-vgg19" else {}
    assert recipe.finetune == COMMON | PLAIN | {"select": "last"} | model
    assert (recipe.top1, recipe.top5, recipe.teachers, recipe.precompute) == (None, None, {}, {})


@EVERY
def test_students_have_the_size_of_the_original(name: str) -> None:
    recipe = recipes.load(name)
    with torch.device("meta"):
        student = timm.create_model(recipe.distill["model"], num_classes=10)
    num_params = sum(p.numel() for p in student.parameters())
    assert round(num_params / 1e6, 2) == recipe.params_m


@EVERY
def test_the_commands_train_each_teacher_then_the_student_with_the_recipes_settings(
    name: str, config_of: Callable[..., Any]
) -> None:
    recipe = recipes.load(name)
    *training, distilling = opening(name)
    teachers = []
    for words in training:
        config = config_of(*words)
        assert isinstance(config, FinetuneConfig)
        values = config.as_json()
        assert {key: values[key] for key in recipe.finetune} == recipe.finetune
        teachers.append(f"{config.model}={config.output}")
    assert [teacher.split("=")[0] for teacher in teachers] == TEACHERS[name]
    config = config_of(*distilling)
    assert isinstance(config, DistillConfig)
    values = config.as_json()
    assert {key: values[key] for key in recipe.distill} == recipe.distill
    assert list(config.teacher) == [
        f"{word.split('=')[0]}={Path(word.split('=')[1]).absolute()}" for word in teachers
    ]


@EVERY
def test_a_command_without_a_part_in_it_and_a_script_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="no settings for precompute"):
        recipes.load(name).settings("precompute")
    with pytest.raises(ConfigError, match=f"mealv2 recipes show {name}"):
        script(recipes.load(name))


def test_a_recipe_for_imagenet_has_none_for_finetune() -> None:
    with pytest.raises(ConfigError, match="recipe resnet18 has no settings for finetune"):
        recipes.load("resnet18").settings("finetune")


@EVERY
def test_notes_are_sentences_and_the_guide_has_its_commands(name: str) -> None:
    recipe = recipes.load(name)
    assert all(note.endswith(".") for note in recipe.notes)
    text = PAGE.read_text(encoding="utf-8")
    for words in opening(name):
        assert f"mealv2 {shlex.join(words)}" in text
    assert dataclasses.asdict(recipe)["source"].startswith("README of MEAL")
