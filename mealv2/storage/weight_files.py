"""Find the weights file of a checkpoint, without importing torch."""

from pathlib import Path

from mealv2.errors import ConfigError

WEIGHTS_NAME = "model.safetensors"
EXPORT_FOLDER = "student"  # in a run folder: the trained model


def find_checkpoint(path: Path) -> Path:
    """Return the weights file at a path: the file itself, or that of a run or model folder."""
    candidates = (
        [path / EXPORT_FOLDER / WEIGHTS_NAME, path / WEIGHTS_NAME] if path.is_dir() else [path]
    )
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    looked = " or ".join(str(candidate) for candidate in candidates)
    raise ConfigError(f"no checkpoint at {path} (looked for {looked})")
