"""What a backbone starts from: a model name, NAME=CHECKPOINT, or the folder of a run or model."""

import os
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import timm

from mealv2.errors import ConfigError
from mealv2.models import Classifier, read_metadata
from mealv2.models.released import find, split_pin
from mealv2.storage.weight_files import find_checkpoint
from pipeline.config import LOCAL_DIR, ComparisonConfig
from pipeline.load_model import require_own_code_named
from pipeline.runtime.distributed import Ranks
from pipeline.training.resume import rebuild_student
from pipeline.training.run_folder import has_checkpoint
from pipeline.training.spec import create_student

Config = TypeVar("Config", bound=ComparisonConfig)


def with_absolute_starts(config: Config) -> Config:
    """Return the settings with an absolute path for each folder of a run or model.

    Only here, with timm's names known, is one without a slash told from a model.
    """
    compared = config.compare and (_absolute(config.compare[0]), _absolute(config.compare[1]))
    return replace(config, model=_absolute(config.model), compare=compared)


def create_start(
    config: ComparisonConfig, ranks: Ranks, *, classes: list[str], img_size: int
) -> Classifier:
    """Build what --model names with a head for these classes; all ranks call this.

    Of a run to resume, its architecture comes from the checkpoint and its weights are random: what
    it started from may be gone, or have other weights. A model that timm reads from a folder or the
    hub has its architecture from there, as long as the folder exists.
    """
    if config.resume is None or not has_checkpoint(config.resume):
        return create_student(with_start(config), classes=classes, img_size=img_size)
    name = "" if _is_path(config.model) else split_pin(config.model.partition("=")[0])[0]
    if name.startswith(LOCAL_DIR) and not Path(name.removeprefix(LOCAL_DIR)).is_dir():
        name = ""
    return rebuild_student(config, ranks, name=name, classes=classes, img_size=img_size)


def with_start(config: Config) -> Config:
    """Return the settings with the model, and the weights if a file has them, that --model names.

    A name of timm or of a released model is that model, also beside a folder of this name. Raises
    ConfigError for a path without weights, or whose weights name no model.
    """
    start = config.model
    name, equals, path = start.partition("=")
    if not _is_path(start):
        _require_known(name, start)
        return _with_weights(config, name, Path(path)) if equals else config
    checkpoint = find_checkpoint(Path(start))
    architecture = read_metadata(checkpoint).get("architecture")
    if architecture is None:
        raise ConfigError(f"{checkpoint} does not name its model; write NAME={start}")
    require_own_code_named(architecture, checkpoint)
    return _with_weights(config, architecture, Path(start))


def _require_known(name: str, start: str) -> None:
    """Raise ConfigError for a name of no model, before anything is trained.

    Names with a scheme (local-dir:, hf-hub:) and own code, which has a colon too, are not checked.
    """
    plain = split_pin(name)[0]
    if ":" in plain or timm.is_model(plain.split(".")[0]) or find(plain) is not None:
        return
    if os.sep in name:
        raise ConfigError(f"--model or --compare {start}: there is no run or model {name}")
    raise ConfigError(
        f"--model or --compare {start}: unknown model {name!r}; see timm.list_models()"
    )


def _absolute(start: str) -> str:
    """Return an absolute path for a folder with weights that is no name of a model."""
    if not start or not _is_path(start):
        return start
    find_checkpoint(Path(start))
    return os.path.abspath(start)  # noqa: PTH100  # symbolic links stay


def _is_path(start: str) -> bool:
    is_known = timm.is_model(start.split(".")[0]) or find(start) is not None
    return not is_known and os.path.exists(start)  # noqa: PTH110  # a name may be too long


def _with_weights(config: Config, model: str, path: Path) -> Config:
    """Return the settings with a model and its weights file; from scratch without the file."""
    find_checkpoint(path)
    if config.initial_checkpoint is not None:
        raise ConfigError(f"--model {config.model} has weights: leave out --initial-checkpoint")
    if getattr(config, "mode", None) == "scratch":
        return replace(config, model=model)
    return replace(config, model=model, initial_checkpoint=path.absolute())
