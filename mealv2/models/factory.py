"""Models that are not timm's: a function of the user's own code, ``package.module:function``."""

import inspect
from pathlib import Path
from typing import Any

from torch import nn

from mealv2.errors import ConfigError
from mealv2.models.probe import num_logits
from mealv2.models.released import MEAN, STD
from mealv2.own_code import folder_first, import_function, is_function_name, reason_of

_DEFAULT_SIZE = 224
is_factory = is_function_name  # of a model


def call_factory(
    name: str, num_classes: int | None, pretrained: bool, img_size: int | None, **arguments: Any
) -> nn.Module:
    """Import a function, call it, and return its model.

    The module is looked up in the current folder first, as with ``python -m``. The function gets
    ``num_classes``, ``pretrained`` and ``img_size`` as far as it has parameters of these names, and
    all ``arguments``. The model gets ``num_classes`` and ``pretrained_cfg`` (ImageNet's mean and
    std) if it has none. Raises ConfigError if one of these steps fails, or for logits of another
    shape than B x C.
    """
    settings = {"num_classes": num_classes, "pretrained": pretrained, "img_size": img_size}
    with folder_first(Path.cwd()):
        function = import_function(name, f"model {name}")
        try:
            known = inspect.signature(function).parameters.values()
            takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known)
            names = {"num_classes"} if takes_all else {parameter.name for parameter in known}
            given = {k: v for k, v in settings.items() if k in names and v is not None}
            model = function(**given | arguments)
        except (MemoryError, ConfigError):
            raise
        except Exception as error:  # of the user's code: every kind
            raise ConfigError(f"model {name} cannot be built: {reason_of(error)}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model {name}: the function returns a {type(model).__name__}, no module")
    found = num_logits(model, img_size or _DEFAULT_SIZE, name=name)
    if num_classes not in (None, found):
        raise ConfigError(
            f"model {name} gives {found} logits, {num_classes} classes are needed: give the "
            "function a parameter num_classes"
        )
    attributes: Any = model
    attributes.num_classes = found
    if not getattr(model, "pretrained_cfg", None):
        attributes.pretrained_cfg = {"mean": MEAN, "std": STD}
    return model
