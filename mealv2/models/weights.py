"""Reading weights: the tensors of a checkpoint by plain keys."""

import argparse
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mealv2.errors import ConfigError
from mealv2.weight_files import find_checkpoint

# Where others keep the weights in a checkpoint; the first there is counts, averages before the rest
# as in timm.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "net")
_PREFIXES = ("module.", "_orig_mod.")  # DataParallel and DDP; torch.compile


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a weights file on the CPU, by the model's plain keys.

    Reads safetensors and what torch.save wrote: a state dict, also one wrapped in a training
    checkpoint, with the prefixes of DataParallel, DDP and torch.compile taken off. Nothing in the
    file is executed. Raises ConfigError for a file that is no such thing.
    """
    try:
        state = _load(path)
    except MemoryError:
        raise
    except Exception as error:  # torch, zip and pickle raise every kind for a damaged file
        raise ConfigError(f"cannot read checkpoint {path}: {_why(error)}") from error
    while inner := next((name for name in _WRAPPERS if _is_wrapped(state, name)), None):
        state = state[inner]
    if not isinstance(state, Mapping):
        raise ConfigError(f"checkpoint {path} holds a {type(state).__name__}, no weights")
    return {_plain_key(str(key)): value for key, value in state.items()}


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
        warnings.simplefilter("ignore")
        # timm: a training checkpoint keeps its flags as a Namespace; that class holds values only
        return torch.load(path, map_location="cpu", weights_only=True)


def _why(error: Exception) -> str:
    """Say in a line what torch says in ten, or as a number."""
    if isinstance(error, PermissionError | SafetensorError):
        return str(error).strip().split("\n")[0]
    if found := re.search(r"GLOBAL (\S+)", str(error)):
        return f"it holds {found[1]}, which is never loaded; save its state_dict alone"
    return "it is damaged, or no weights at all"


def _is_wrapped(state: object, name: str) -> bool:
    return isinstance(state, Mapping) and isinstance(state.get(name), Mapping)


def _plain_key(key: str) -> str:
    """Return timm's key: ``module.fc.bias`` -> ``fc.bias``."""
    while key.startswith(_PREFIXES):
        key = key.split(".", 1)[1]
    # official code: of VGG and AlexNet only the features are wrapped
    return re.sub(r"^features\.module\.", "features.", key)


def load_weights(backbone: nn.Module, path: Path, *, new_head: bool = False) -> None:
    """Load a weights file into a timm model; raises ConfigError where it does not fit.

    With ``new_head`` a head of another class count stays as it is, as when timm starts from its
    own weights.
    """
    path = find_checkpoint(path)
    state, own = read_state(path), backbone.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unknown:
        raise ConfigError(
            f"checkpoint {path} is of another model: it lacks {len(missing)} tensors "
            f"(first: {missing[:1] or 'none'}) and has {len(unknown)} unknown ones "
            f"(first: {unknown[:1] or 'none'})"
        )
    for key, tensor in own.items():
        if not isinstance(state[key], Tensor):
            raise ConfigError(f"checkpoint {path} holds no tensor under {key}")
        if tensor.shape == state[key].shape:
            continue
        if not (new_head and key.startswith(_heads(backbone))):
            raise ConfigError(
                f"checkpoint {path} does not fit: {key} is {tuple(state[key].shape)} there and "
                f"{tuple(tensor.shape)} here (is its class count another?)"
            )
        state[key] = tensor
    backbone.load_state_dict(state)


def _heads(backbone: nn.Module) -> tuple[str, ...]:
    """Return the key prefixes of a timm model's classifier."""
    config: Mapping[str, Any] = backbone.pretrained_cfg  # type: ignore[assignment]
    names = config["classifier"]
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
