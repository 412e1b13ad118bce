"""Read the tensors of a checkpoint by plain keys, and load them into a model."""

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
from mealv2.storage.weight_files import find_checkpoint

# Keys of the weights in a training checkpoint: the first match counts, EMA first as in timm.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "net")
_PREFIXES = ("module.", "_orig_mod.")  # DataParallel and DDP; torch.compile


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a weights file on the CPU, by the model's plain keys.

    Reads safetensors and files of torch.save: a state dict, or a training checkpoint around one.
    Removes the prefixes of DataParallel, DDP and torch.compile. Executes nothing in the file.
    Raises ConfigError for any other file.
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
        raise ConfigError(f"checkpoint {path} holds a {type(state).__name__}, not weights")
    return {_plain_key(str(key)): value for key, value in state.items()}


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
        warnings.simplefilter("ignore")
        # timm: a training checkpoint stores its flags as a Namespace, a class with values only
        return torch.load(path, map_location="cpu", weights_only=True)


def _why(error: Exception) -> str:
    """Return torch's long message in one line."""
    if isinstance(error, PermissionError | SafetensorError):
        return str(error).strip().split("\n")[0]
    if found := re.search(r"GLOBAL (\S+)", str(error)):
        return f"it contains {found[1]}, which is never loaded; save only its state_dict"
    return "it is damaged or has no weights"


def _is_wrapped(state: object, name: str) -> bool:
    return isinstance(state, Mapping) and isinstance(state.get(name), Mapping)


def _plain_key(key: str) -> str:
    """Return timm's key: ``module.fc.bias`` -> ``fc.bias``."""
    while key.startswith(_PREFIXES):
        key = key.split(".", 1)[1]
    # official code: VGG and AlexNet wrap only their features
    return re.sub(r"^features\.module\.", "features.", key)


def load_weights(backbone: nn.Module, path: Path, *, new_head: bool = False) -> None:
    """Load a weights file into a timm model; raises ConfigError if it does not fit.

    With ``new_head`` a head with another class count keeps its initial weights, as in timm.
    """
    path = find_checkpoint(path)
    state, own = read_state(path), backbone.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unknown:
        raise ConfigError(
            f"checkpoint {path} is of another model: {len(missing)} tensors are missing "
            f"(first: {missing[:1] or 'none'}) and {len(unknown)} are unknown "
            f"(first: {unknown[:1] or 'none'})"
        )
    for key, tensor in own.items():
        if not isinstance(state[key], Tensor):
            raise ConfigError(f"checkpoint {path} holds no tensor under {key}")
        if tensor.shape == state[key].shape:
            continue
        if not (new_head and key.startswith(_heads(backbone))):
            raise ConfigError(
                f"checkpoint {path} does not fit: {key} is {tuple(state[key].shape)}, the model "
                f"has {tuple(tensor.shape)} (another class count?)"
            )
        state[key] = tensor
    backbone.load_state_dict(state)


def _heads(backbone: nn.Module) -> tuple[str, ...]:
    """Return the key prefixes of a timm model's classifier."""
    config: Mapping[str, Any] = backbone.pretrained_cfg  # type: ignore[assignment]
    names = config["classifier"]
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
