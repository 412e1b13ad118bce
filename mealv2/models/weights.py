"""Read the tensors of a weights file: others' containers and prefixes, nothing executed."""

import argparse
import re
import warnings
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from mealv2.errors import ConfigError
from mealv2.storage.weight_files import SAFETENSORS, weights_format

# Keys of the weights in a training checkpoint: the first match counts, averages first as in timm.
_CONTAINERS = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "params_ema"),
    *("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network"),
    *("params", "weights"),
)
_PREFIXES = ("module.", "_orig_mod.")  # DataParallel and DDP; torch.compile
# Wrappers inside a model: torch.compile of a part, FSDP, activation checkpointing.
_INSIDE = re.compile(r"(^|\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")


def read_state(path: Path) -> dict[str, Any]:
    """Return the tensors of a weights file on the CPU, by the model's plain keys.

    Reads safetensors and files of torch.save, by content: a state dict, or a training checkpoint
    around one. Removes the prefixes of DataParallel, DDP and torch.compile. Executes nothing in the
    file. Raises ConfigError for any other file.
    """
    try:
        state = _load(path)
    except (MemoryError, ConfigError):
        raise
    except Exception as error:  # torch, zip and pickle raise every kind for a damaged file
        raise ConfigError(f"cannot read checkpoint {path}: {_why(error)}") from error
    while inner := next((name for name in _CONTAINERS if _is_container(state, name)), None):
        state = state[inner]
    if not isinstance(state, Mapping):
        raise ConfigError(f"checkpoint {path} holds a {type(state).__name__}, not weights")
    return {_plain_key(str(key)): value for key, value in state.items()}


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 (hex) of a state: sorted names, types, shapes and values."""
    digest = sha256()
    for name, tensor in sorted(state.items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _load(path: Path) -> Any:
    if weights_format(path) == SAFETENSORS:
        return safetensors.torch.load_file(path)
    with warnings.catch_warnings(), torch.serialization.safe_globals(_ALLOWED):
        warnings.simplefilter("ignore")
        with path.open("rb") as file:  # a file's name does not tell torch what it is
            return torch.load(file, map_location="cpu", weights_only=True)


class _Ignored:
    """Stands for a value beside the weights. Nothing of NumPy or pathlib runs to make it."""

    def __init__(self, *values: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _ignored(*values: object) -> _Ignored:
    return _Ignored()


# timm: a training checkpoint stores its flags as a Namespace, a class with values only. A figure
# such as the best accuracy is often a NumPy scalar, a folder a Path.
_ALLOWED: list[Any] = [
    argparse.Namespace,
    *((_ignored, f"{name}.scalar") for name in ("numpy.core.multiarray", "numpy._core.multiarray")),
    *(
        (_ignored, f"{name}._reconstruct")
        for name in ("numpy.core.multiarray", "numpy._core.multiarray")
    ),
    *((_Ignored, f"numpy.{name}") for name in ("dtype", "ndarray")),
    (_ignored, "_codecs.encode"),
    *((_Ignored, f"pathlib.{name}") for name in ("PosixPath", "WindowsPath", "Path")),
]


def _why(error: Exception) -> str:
    """Return torch's long message in one line."""
    if isinstance(error, PermissionError | SafetensorError):
        return str(error).strip().split("\n")[0]
    if found := re.search(r"GLOBAL (\S+)", str(error)):
        return f"it contains {found[1]}, which is never loaded; save only its state_dict"
    return "it is damaged or has no weights"


def _is_container(state: object, name: str) -> bool:
    """Return whether a mapping has weights under a name, perhaps in another container."""
    inner = state.get(name) if isinstance(state, Mapping) else None
    return isinstance(inner, Mapping) and any(
        isinstance(value, Tensor | Mapping) for value in inner.values()
    )


def _plain_key(key: str) -> str:
    """Return timm's key: ``module.fc.bias`` -> ``fc.bias``."""
    while key.startswith(_PREFIXES):
        key = key.split(".", 1)[1]
    key = _INSIDE.sub("", key).removeprefix(".")
    # official code: VGG and AlexNet wrap only their features
    return re.sub(r"^features\.module\.", "features.", key)
