"""Released MEAL V2 models for torch.hub: ``torch.hub.load(REPO, "meal_v2", NAME)``."""

import timm as _timm
from torch import nn as _nn

from mealv2.errors import ConfigError as _ConfigError
from mealv2.models.fitting import load_weights as _load_weights
from mealv2.models.released import NAMES as _NAMES
from mealv2.models.released import download as _download
from mealv2.models.released import find as _find
from mealv2.models.released import pinned_sha256 as _pinned_sha256
from mealv2.models.released import split_pin as _split_pin

# torch.hub lists every public callable of this file as a model, hence the underscores.
dependencies = ["torch", "timm"]


def meal_v2(
    model_name: str, pretrained: bool = True, progress: bool = True, exportable: bool = False
) -> _nn.Module:
    """Return a released model as a plain timm module on the CPU, without normalisation.

    Normalise images with ImageNet's mean and std, also for the MobileNets. ``model_name`` may end
    in ``@sha256:HEX``, the hash of its file. Raises ConfigError for an unknown name and a file with
    another hash, MealError if the download fails.
    """
    model_name, pin = _split_pin(model_name)
    released = _find(model_name)
    if released is None:
        raise _ConfigError(f"unknown model {model_name!r}; known: {', '.join(_NAMES)}")
    model: _nn.Module = _timm.create_model(
        released.architecture, pretrained_cfg_overlay=released.timm_config, exportable=exportable
    )
    if pretrained:
        path = _download(released, progress=progress)
        _pinned_sha256(path, pin)
        _load_weights(model, path)
    return model
