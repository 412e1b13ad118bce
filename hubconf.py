"""torch.hub's door to the released MEAL V2 models: ``torch.hub.load(REPO, "meal_v2", NAME)``."""

import timm as _timm
from torch import nn as _nn

from mealv2.errors import ConfigError as _ConfigError
from mealv2.models.released import NAMES as _NAMES
from mealv2.models.released import download as _download
from mealv2.models.released import find as _find
from mealv2.models.weights import load_weights as _load_weights

# torch.hub lists every callable here without an underscore as a model.
dependencies = ["torch", "timm"]


def meal_v2(
    model_name: str, pretrained: bool = True, progress: bool = True, exportable: bool = False
) -> _nn.Module:
    """Return a released model as timm's plain module on the CPU, without normalisation.

    Images are to be normalised with ImageNet's mean and std, for the MobileNets too. Raises
    ConfigError, which lists the names, for an unknown one, and MealError when the file cannot be
    had.
    """
    released = _find(model_name)
    if released is None:
        raise _ConfigError(f"unknown model {model_name!r}; there are: {', '.join(_NAMES)}")
    model: _nn.Module = _timm.create_model(
        released.architecture, pretrained_cfg_overlay=released.timm_config, exportable=exportable
    )
    if pretrained:
        _load_weights(model, _download(released, progress=progress))
    return model
