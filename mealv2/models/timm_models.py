"""Call timm: models by name, model folders, a state that timm adapts."""

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import timm
import torch
from torch import nn

import mealv2.models.cifar  # noqa: F401  # registers its networks with timm
from mealv2.errors import ConfigError, MealError
from mealv2.models.fitting import State
from mealv2.models.pretrained import weights_in_reach
from mealv2.own_code import reason_of

LOCAL_DIR = "local-dir:"
SOURCES = (LOCAL_DIR, "hf-hub:", "hf_hub:")  # timm: parse_model_name


def create_backbone(name: str, weights: Mapping[str, Any] | None, **extra: Any) -> nn.Module:
    """Call timm without its warnings; ``weights`` is the config of the pretrained ones, if wanted.

    Raises ConfigError if the model cannot be built, MealError if its pretrained weights cannot be
    loaded.
    """
    try:
        with nullcontext() if weights is None else weights_in_reach(weights):
            return call_timm(name, pretrained=weights is not None, **extra)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of timm and torch: every kind
        if weights is not None:
            with torch.device("meta"):
                # raises if the weights are not the reason
                create_backbone(name, None, **extra)
            raise MealError(
                f"cannot load the pretrained weights of {name} ({reason_of(error)}); check the "
                "network or the Hugging Face cache, pass a file (--initial-checkpoint FILE, "
                "--checkpoint FILE, --teacher NAME=FILE), or start from random weights with "
                "--no-pretrained"
            ) from error
        at_size = f" at --img-size {extra['img_size']}" if "img_size" in extra else ""
        raise ConfigError(f"model {name} cannot be built{at_size}: {reason_of(error)}") from error


def call_timm(name: str, **extra: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside timm do not concern the user
        backbone: nn.Module = timm.create_model(current_name(name), **extra)
    return backbone


def rebuild(name: str, extra: dict[str, Any], state: State) -> nn.Module:
    """Return timm's model with a state that timm adapts to it, as it does with its own weights."""
    overlay = extra.get("pretrained_cfg_overlay", {}) | {
        "state_dict": state,
        "source": "",
        "label_offset": 0,
        "custom_load": False,
    }
    if "num_classes" in extra:
        overlay["num_classes"] = extra["num_classes"]  # the head fits: timm shall not remove it
    with torch.random.fork_rng(devices=[]):
        return call_timm(name, pretrained=True, **extra | {"pretrained_cfg_overlay": overlay})


def config_of_source(name: str) -> dict[str, Any]:
    """Return the config of a model folder, local or on the hub, which timm reads."""
    is_local = name.startswith(LOCAL_DIR)
    try:
        in_reach = nullcontext() if is_local else weights_in_reach({"hf_hub_id": name})
        with in_reach, torch.device("meta"):
            found: Any = call_timm(name, pretrained=False)
    except Exception as error:  # of timm, huggingface_hub and requests: every kind
        raise ConfigError(
            f"model {name} cannot be read: {reason_of(error)}; local-dir: needs a folder with "
            "config.json and weights, hf-hub: the network or the Hugging Face cache"
        ) from error
    return {**found.pretrained_cfg, "tag": None}  # the tag would not find these weights again


def current_name(name: str) -> str:
    """Return the new name of a model that timm renamed: gluon_senet154 -> senet154.gluon_in1k."""
    renamed: str = timm.models.get_deprecated_models().get(name) or name
    return renamed
