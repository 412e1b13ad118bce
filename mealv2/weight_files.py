"""Where the weights of a checkpoint are; imports no torch."""

from pathlib import Path

from mealv2.errors import ConfigError

WEIGHTS_NAME = "model.safetensors"
EXPORT_FOLDER = "student"  # where a run folder keeps the model it trained


def find_checkpoint(path: Path) -> Path:
    """Return the weights file that a path means: itself, or the model of a run or model folder."""
    candidates = (
        [path / EXPORT_FOLDER / WEIGHTS_NAME, path / WEIGHTS_NAME] if path.is_dir() else [path]
    )
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    looked = " or ".join(str(candidate) for candidate in candidates)
    raise ConfigError(f"no checkpoint at {path} (looked for {looked})")
