"""The name of a torchvision data set as a path: ``torch/NAME:FOLDER``. torch is not imported."""

import re
from pathlib import Path
from typing import NamedTuple

from mealv2.data.tar_splits import own_split
from mealv2.errors import ConfigError

# The names, and their classes in torchvision.datasets.
SETS = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
    "kmnist": "KMNIST",
}
SPLITS = {"train": True, "val": False, "test": False}  # torchvision's ``train``
_NAMED = re.compile(r"(?:(?P<base>.*)/)?torch/(?P<name>[\w-]+):(?P<folder>.*)")


class TorchName(NamedTuple):
    """A data set of torchvision, and the folder of its archives."""

    name: str
    folder: Path

    def check(self, splits: list[str], *, made: str | None = None) -> None:
        """Raise ConfigError for an unknown set, or a split it does not have.

        ``made`` is a split that --val-fraction makes.
        """
        if self.name not in SETS:
            raise ConfigError(f"torch/{self.name} is unknown; known: {', '.join(SETS)}")
        if made in SPLITS:
            raise ConfigError(own_split(Path(f"torch/{self.name}"), str(made)))
        for split in splits:
            if split not in SPLITS:
                raise ConfigError(
                    f"torch/{self.name} has the splits {', '.join(SPLITS)}, not {split}"
                )

    def require_folder(self) -> None:
        """Raise ConfigError if the folder of the archives is missing."""
        if not self.folder.is_dir():
            raise ConfigError(f"torch/{self.name}: {self.advice('no archives')}")

    def advice(self, reason: str) -> str:
        """Return the end of a message about missing files."""
        return f"{reason} in {self.folder}; put the archives there, or add --download"


def torch_name(path: Path) -> TorchName | None:
    """Return the data set that a path names, None for any other path.

    A relative FOLDER is relative to the folder that ``torch/`` is in, so that the absolute path of
    a setting means the same. Raises ConfigError for a known name without a FOLDER.
    """
    found = _NAMED.fullmatch(path.as_posix())
    if found is None:
        if path.parent.name == "torch" and path.name in SETS and not path.exists():
            raise ConfigError(f"torch/{path.name}: name the folder of its archives: {path}:FOLDER")
        return None
    return TorchName(found["name"], Path(found["base"] or "") / found["folder"])
