"""What a backbone starts from: a model name, NAME=CHECKPOINT, or the folder of a run or model."""

from dataclasses import replace
from pathlib import Path

from mealv2.errors import ConfigError
from mealv2.models import read_metadata
from mealv2.storage.weight_files import find_checkpoint
from pipeline.config import TransferConfig
from pipeline.load_model import require_own_code_named


def with_start(config: TransferConfig, start: str) -> TransferConfig:
    """Return the settings with the model, and the weights if a file has them, that a start names.

    Raises ConfigError for a path without weights, or whose weights name no model.
    """
    name, equals, path = start.partition("=")
    if equals and not Path(start).exists():
        if config.initial_checkpoint is not None:
            raise ConfigError(f"{start} names weights: leave out --initial-checkpoint")
        return _with_weights(config, name, Path(path))
    if not Path(start).exists():
        return replace(config, model=start)
    checkpoint = find_checkpoint(Path(start))
    architecture = read_metadata(checkpoint).get("architecture")
    if architecture is None:
        raise ConfigError(f"{checkpoint} does not name its model; write NAME={start}")
    require_own_code_named(architecture, checkpoint)
    if config.initial_checkpoint is not None:
        raise ConfigError(f"{start} has weights: leave out --initial-checkpoint")
    return _with_weights(config, architecture, Path(start))


def _with_weights(config: TransferConfig, model: str, path: Path) -> TransferConfig:
    """Return the settings with a model and its weights file; from scratch without the file."""
    find_checkpoint(path)
    if config.mode == "scratch":
        return replace(config, model=model)
    return replace(config, model=model, initial_checkpoint=path.absolute())
