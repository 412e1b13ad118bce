"""Students and teachers: timm models by pinned tag, with their weights and normalisation."""

import dataclasses
import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mealv2.errors import ConfigError
from mealv2.models.factory import call_factory, is_factory
from mealv2.models.fitting import Rebuild, load_weights
from mealv2.models.probe import check_forward
from mealv2.models.released import (
    MEAN,
    NAMES,
    STD,
    by_file,
    download,
    find,
    pinned_sha256,
    split_pin,
)
from mealv2.models.timm_models import (
    SOURCES,
    config_of_source,
    create_backbone,
    current_name,
    rebuild,
)
from mealv2.models.weights import read_state, state_sha256
from mealv2.storage.json_format import parse_json
from mealv2.storage.weight_files import SAFETENSORS, find_checkpoint, weights_format

CONFIG_NAME = "config.json"
METADATA_KEY = "mealv2"
DETECTION = "detection"  # the task in the metadata of a detector
_OF_FILES = ("pretrained", "checkpoint", "cache")  # arguments of timm.create_model


@dataclass(frozen=True)
class Preprocessing:
    """Per-channel mean and std, in units of images scaled to [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Classifier(nn.Module):
    """A timm model that normalises its input with its own mean and std.

    ``forward`` maps images B x 3 x H x W, uint8 or float in [0, 1], to float logits B x C. The
    ``state_dict`` of ``backbone`` has timm's keys. ``tag`` is timm's full name,
    ``resnet50.a1_in1k``, or the architecture alone if the weights are not from timm. ``notes`` are
    lines for the user about its weights: a new head, resampled tensors, the SHA-256 of a file.
    ``model_args`` are timm's arguments that change the architecture, kept with the weights.
    """

    mean_13: Tensor
    std_13: Tensor

    def __init__(self, backbone: nn.Module, *, tag: str, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.notes: list[str] = []
        self.model_args: dict[str, Any] = {}
        self.backbone = backbone
        self.tag = tag
        self.preprocessing = preprocessing
        for name, values in (("mean_13", preprocessing.mean), ("std_13", preprocessing.std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)

    @property
    def num_classes(self) -> int:
        """The number of logits."""
        return int(self.backbone.num_classes)  # type: ignore[arg-type]

    def normalise(self, images_BCHW: Tensor) -> Tensor:
        """Return the images as the backbone gets them."""
        scale = 255.0 if images_BCHW.dtype == torch.uint8 else 1.0
        return (images_BCHW.float() / scale - self.mean_13) / self.std_13

    def forward(self, images_BCHW: Tensor) -> Tensor:
        logits: Tensor = self.backbone(self.normalise(images_BCHW))
        return logits


def create_classifier(
    name: str,
    *,
    num_classes: int | None,
    pretrained: bool = False,
    checkpoint: Path | None = None,
    img_size: int | None = None,
    classes: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    new_head: bool = False,
    model_args: Mapping[str, Any] | None = None,
    **rates: float,
) -> Classifier:
    """Build a timm or released model with its own weights, those of a checkpoint, or random ones.

    ``name`` is also ``local-dir:PATH``, ``hf-hub:NAME`` or ``package.module:function``
    (``call_factory``), and may end in ``@sha256:HEX``, which the weights file must have.
    ``num_classes`` None keeps the model's head. ``classes`` are compared with the checkpoint's.
    ``preprocessing`` overrides that of the checkpoint, which overrides the model's own. With
    ``new_head`` a checkpoint of other classes gets a new head. ``model_args`` are arguments beside
    those of the checkpoint, ``rates`` drop_rate and drop_path_rate. Raises ConfigError for a name,
    weights or an ``img_size`` that do not fit, MealError if pretrained weights cannot be loaded.
    """
    name, pin = split_pin(name)
    is_own = is_factory(name)
    known = None if is_own else find(name)
    if known is not None:
        name = known.architecture
        if pretrained and checkpoint is None:
            checkpoint, new_head = download(known, progress=sys.stderr.isatty()), True
    _check_pin(name, pin, checkpoint)
    published = by_file(find_checkpoint(checkpoint).name) if checkpoint else None
    known = published or known
    config = {"architecture": name} if is_own else _timm_config(name)
    model_args = _kept_model_args(checkpoint, config["architecture"]) | dict(model_args or {})
    arguments = rates | model_args
    extra = _timm_arguments(config, num_classes, img_size) | arguments
    if known is not None:
        extra["pretrained_cfg_overlay"] = known.timm_config
        config |= {"mean": MEAN, "std": STD}
    from_name = pretrained and checkpoint is None
    if is_own:
        backbone = call_factory(name, num_classes, from_name, img_size, **arguments)
        config |= backbone.pretrained_cfg  # type: ignore[operator]
    else:
        backbone = create_backbone(name, config if from_name else None, **extra)
    stored, notes = dict[str, Any](), list[str]()
    if checkpoint:
        adapt = None if is_own else partial(rebuild, name, extra)
        stored, notes = _load_checkpoint(
            backbone, checkpoint, classes=classes, new_head=new_head, pin=pin, rebuild=adapt
        )
    if img_size and not (is_own and checkpoint is None):
        foreign = None if checkpoint is None or "weights_sha256" in stored else checkpoint
        check_forward(backbone, img_size, name=name, weights=foreign)
    tag = published.tag if published else _tag(config, pretrained=from_name)
    mean, std = (tuple(stored.get(name) or config[name]) for name in ("mean", "std"))
    model = Classifier(backbone, tag=tag, preprocessing=preprocessing or Preprocessing(mean, std))
    model.notes, model.model_args = notes, model_args
    return model


def _tag(config: Mapping[str, Any], *, pretrained: bool) -> str:
    name: str = config["architecture"]
    return f"{name}.{config['tag']}" if pretrained and config.get("tag") else name


def _timm_arguments(
    config: Mapping[str, Any], num_classes: int | None, img_size: int | None
) -> dict[str, Any]:
    extra = {} if num_classes is None else {"num_classes": num_classes}
    if img_size and config.get("fixed_input_size"):
        extra["img_size"] = img_size  # a vision transformer's position embedding depends on it
    return extra


def _check_pin(name: str, pin: str | None, checkpoint: Path | None) -> None:
    if pin and checkpoint is None:
        raise ConfigError(f"@sha256:{pin} pins a weights file, but {name} is used without one")


def _kept_model_args(checkpoint: Path | None, architecture: str) -> dict[str, Any]:
    """Return timm's arguments in a checkpoint of the same architecture, but for names of files."""
    own = read_metadata(checkpoint) if checkpoint else {}
    kept = own.get("model_args", {}) if own.get("architecture") == architecture else {}
    return {name: value for name, value in kept.items() if not name.startswith(_OF_FILES)}


def _load_checkpoint(
    backbone: nn.Module,
    checkpoint: Path,
    *,
    classes: Sequence[str] | None,
    new_head: bool,
    pin: str | None,
    rebuild: Rebuild | None,
) -> tuple[dict[str, Any], list[str]]:
    """Load a weights file; return its metadata, and lines for the user; raises ConfigError."""
    path = find_checkpoint(checkpoint)
    stored = read_metadata(path)
    if stored.get("task") == DETECTION:
        raise ConfigError(
            f"checkpoint {path} is a detector of `mealv2 transfer-detection`, not a classifier"
        )
    sha256 = pinned_sha256(path, pin) if pin else None  # before anything of the file is parsed
    state = read_state(path)
    if sha256 is None and "weights_sha256" not in stored:
        sha256 = pinned_sha256(path, None)
    notes = [f"weights {path}: SHA-256 {sha256}"] if sha256 else []
    if "weights_sha256" in stored and stored["weights_sha256"] != state_sha256(state):
        raise ConfigError(
            f"checkpoint {path} is damaged: its weights do not match their SHA-256; copy or export "
            "it again"
        )
    is_other = False
    if (known := stored.get("classes")) is not None and classes is not None:
        is_other = list(known) != list(classes)
        if is_other and not new_head:
            raise _other_classes(checkpoint, known, classes)
    notes += load_weights(
        backbone, path, state=state, new_head=new_head, other_classes=is_other, rebuild=rebuild
    )
    return stored, notes


def _timm_config(name: str) -> dict[str, Any]:
    """Return timm's pretrained config of a model; raises ConfigError with the nearest names."""
    if name.startswith(SOURCES):
        return config_of_source(name)
    current = current_name(name)
    if timm.is_model(current):
        try:
            config = timm.models.get_pretrained_cfg(current)
            return dataclasses.asdict(config) if config else {}
        except RuntimeError:
            architecture = name.split(".")[0]
            full_names = timm.list_pretrained(f"{architecture}.*")
            tags = ", ".join(full.split(".", 1)[1] for full in full_names) or "none"
            raise ConfigError(f"{architecture} has no weights {name!r}; tags: {tags}") from None
    every = [*timm.list_models(), *timm.list_pretrained(), *NAMES]
    suggestion = difflib.get_close_matches(name, every, n=4)
    hint = f"did you mean {', '.join(suggestion)}?" if suggestion else "see timm.list_models()"
    if Path(name).exists():
        own = read_metadata(Path(name)).get("architecture") if Path(name).is_dir() else None
        hint = (
            f"it is a path: write {own or 'MODEL'}={name} for a teacher, or --model "
            f"{own or 'MODEL'} --initial-checkpoint {name} for a start"
        )
    raise ConfigError(f"unknown model {name!r}; {hint}")


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a checkpoint written by this project; empty for other files.

    Keys: architecture, classes, img_size, mean, std, weights_sha256, and model_args if there are
    any. A released file, recognised by its exact name, has no classes and no hash.
    """
    path = find_checkpoint(path)
    if known := by_file(path.name):
        return {
            "architecture": known.architecture,
            "img_size": known.img_size,
            "mean": list(MEAN),
            "std": list(STD),
        }
    if weights_format(path) != SAFETENSORS:
        return {}
    try:
        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY, "{}")
        stored = parse_json(text.encode())
    except (SafetensorError, ValueError, OSError) as error:
        raise ConfigError(f"cannot read checkpoint {path}: {error}") from None
    return stored if isinstance(stored, dict) else {}


def _other_classes(path: Path, stored: Sequence[str], classes: Sequence[str]) -> ConfigError:
    different = [f"{a!r} / {b!r}" for a, b in zip(stored, classes, strict=False) if a != b][:1]
    return ConfigError(
        f"checkpoint {path} was trained on other classes: it has {len(stored)}, the data "
        f"{len(classes)}; first difference: {', '.join(different) or 'their number'}"
    )


def weights_sha256(module: nn.Module) -> str:
    """Return a SHA-256 (hex) of a module's state: sorted names, types, shapes and values."""
    return state_sha256(module.state_dict())
