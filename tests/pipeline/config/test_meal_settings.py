"""pipeline.config.meal: settings without an effect are named, lists of numbers are read."""

from collections.abc import Callable
from typing import Any

import pytest

from conftest import Result
from mealv2.errors import ConfigError
from pipeline.config import DistillConfig

MEAL = ["--method", "meal", "--online", "--teacher", "a=r/a", "--teacher", "b=r/b"]
STORED: dict[str, Any] = {"online": False, "labels": "l", "teacher": ()}
REQUIRED = ["distill", "--data-dir", "d", "--model", "m"]


def make(**values: Any) -> DistillConfig:
    given = {"method": "meal", "online": True, "teacher": ("a", "b"), **values}
    return DistillConfig(data_dir="d", model="m", **given)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"method": "mealv2", "gamma": (2.0,)}, "--gamma has no effect with --method mealv2"),
        ({"method": "mealv2", "teacher_mode": "train"}, "--teacher-mode has no effect with"),
        ({"hard_label_weight": 0.5}, "--hard-label-weight has no effect with --method meal"),
        ({"label_temperature": 2.0}, "--label-temperature has no effect with --method meal"),
        ({"discriminator_weight": 2.0}, "--discriminator-weight has no effect with --method meal"),
        ({"discriminator_input": "logits"}, "--discriminator-input has no effect with"),
        ({"discriminator": "off", "eta": (2.0,)}, "--eta has no effect with --discriminator off"),
        ({"discriminator": "paper"}, "--discriminator paper is MEAL V2's"),
        ({"pool": "avg"}, "--pool has no effect with --out-layer -1"),
        ({"align": False}, "--align has no effect with --out-layer -1"),
        ({"out_layer": (0, -1), "align": False, "out_dims": (3,)}, "--out-dims .* --no-align"),
        (
            {"teacher": ("a",), "teacher_selection": "all"},
            "--teacher-selection has no effect with one --teacher",
        ),
        ({"out_layer": (0, -1), "torchcompile": "default"}, "--torchcompile has no effect with"),
        ({"out_layer": (0, 0)}, "twice"),
        ({"out_layer": (0, 1, 2), "gamma": (1.0, 1.0)}, "--gamma has 2 values, --out-layer 3"),
        ({"out_layer": (0, 1, -1), "out_dims": (5,)}, "--out-dims has 1 values, --out-layer 3"),
        ({"out_layer": (0, -1), "out_dims": (1,)}, "--out-dims must be at least 2"),
        ({"eta": (-1.0,)}, "--eta must be at least 0"),
        ({"gamma": (float("inf"),)}, "--gamma must be at least 0 and finite"),
        ({**STORED, "out_layer": (-2, -1)}, "--out-layer -2,-1: a label set has no features"),
        ({**STORED, "teacher_mode": "train"}, "--teacher-mode train needs the teachers themselves"),
        ({**STORED, "missing": "teach"}, "--missing teach: with --method meal"),
        ({**STORED, "labels": "s3://bucket/set"}, "--method meal needs a local --labels"),
    ],
)
def test_a_setting_without_effect_or_of_another_length_is_named(
    values: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        make(**values)


def test_the_discriminator_is_that_of_the_method() -> None:
    assert make().discriminator == "official"
    assert make(method="mealv2").discriminator == "paper"
    assert make(discriminator="adversarial").discriminator == "adversarial"


def test_one_weight_counts_for_all_blocks() -> None:
    config = make(out_layer=(0, 1, -1), gamma=(0.5,), eta=(1.0, 2.0, 3.0))
    assert config.of_blocks("gamma") == (0.5, 0.5, 0.5)
    assert config.of_blocks("eta") == (1.0, 2.0, 3.0)


def test_lists_of_numbers_are_separated_by_commas(config_of: Callable[..., Any]) -> None:
    lists = ["--out-layer", "-3,-2,-1", "--out-dims", "100,50", "--gamma", ".001,0.5,1"]
    config = config_of(*REQUIRED, *MEAL, *lists, "--eta", "2")
    assert config.out_layer == (-3, -2, -1)
    assert config.out_dims == (100, 50)
    assert config.gamma == (0.001, 0.5, 1.0)
    assert config.eta == (2.0,)
    again = DistillConfig.from_json(config.as_json())
    assert (again.out_layer, again.gamma) == (config.out_layer, config.gamma)


def test_what_is_no_list_of_numbers_is_refused_as_a_usage(run_cli: Callable[..., Result]) -> None:
    result = run_cli(*REQUIRED, *MEAL, "--out-layer", "0,x")
    assert result.code == 2
    assert "'0,x' is no list of numbers such as 1,2" in result.stderr
