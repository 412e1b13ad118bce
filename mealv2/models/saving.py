"""Save a classifier as a folder that timm loads."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from mealv2.errors import MealError
from mealv2.models.classifier import CONFIG_NAME, METADATA_KEY, Classifier, weights_sha256
from mealv2.models.factory import is_factory
from mealv2.models.fitting import State
from mealv2.own_code import reason_of
from mealv2.storage.atomic import write_atomic
from mealv2.storage.json_format import canonical_json
from mealv2.storage.weight_files import WEIGHTS_NAME

_KEPT_CONFIG = ("first_conv", "classifier", "fixed_input_size")  # what timm needs to load a model


def save_classifier(
    folder: Path,
    model: Classifier,
    *,
    classes: Sequence[str],
    img_size: int,
    held_out: Sequence[str] = (),
) -> None:
    """Write ``config.json`` and ``model.safetensors`` in timm's folder format.

    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads it. The header of the weights
    file has the class names, the size and the normalisation as well, and ``held_out``, the flags
    that held out the validation images. Raises OSError, and MealError
    for tensors of a kind that safetensors cannot hold.
    """
    folder.mkdir(parents=True, exist_ok=True)
    architecture = model.tag if is_factory(model.tag) else model.tag.split(".")[0]
    mean, std = model.preprocessing.mean, model.preprocessing.std
    stored = {
        "architecture": architecture,
        "classes": list(classes),
        "img_size": img_size,
        "mean": mean,
        "std": std,
        "weights_sha256": weights_sha256(model.backbone),
    }
    own_args: dict[str, Any] = {"model_args": model.model_args} if model.model_args else {}
    if held_out:
        own_args["held_out"] = list(held_out)
    state = _unshared(model.backbone.state_dict())
    # one entry: safetensors writes several entries in random order
    metadata = {METADATA_KEY: json.dumps(stored | own_args, sort_keys=True)}
    try:
        data = safetensors.torch.save(state, metadata)
    except (SafetensorError, ValueError, RuntimeError, KeyError) as error:
        raise MealError(f"model {model.tag} cannot be saved: {reason_of(error)}") from error
    write_atomic(folder / WEIGHTS_NAME, data)
    of_timm = dict(model.backbone.pretrained_cfg)  # type: ignore[arg-type]
    config = {
        "architecture": architecture,
        "num_classes": model.num_classes,
        "num_features": int(getattr(model.backbone, "num_features", 0)),
        "label_names": list(classes),
        # timm builds windows and position embeddings of this size; others take any size
        "model_args": ({"img_size": img_size} if of_timm.get("fixed_input_size") else {})
        | model.model_args,
        "pretrained_cfg": {
            "tag": "mealv2",
            "num_classes": model.num_classes,
            "input_size": [3, img_size, img_size],
            "mean": mean,
            "std": std,
            "interpolation": "bilinear",
            "crop_pct": 224 / 256,
            **{name: of_timm[name] for name in _KEPT_CONFIG if name in of_timm},
        },
    }
    write_atomic(folder / CONFIG_NAME, canonical_json(config).encode())


def _unshared(state: Mapping[str, Tensor]) -> State:
    """Return a state on the CPU without shared memory, which safetensors rejects.

    timm's CoaT uses one tensor under several names; a file has it under each.
    """
    found, used = {}, set[int]()
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if pointer in used else tensor
        used.add(pointer)
    return found
