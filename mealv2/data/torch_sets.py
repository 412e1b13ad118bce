"""torchvision's small data sets in their published archives, as an image source."""

import numpy as np
from torchvision import datasets

from mealv2.data.folder import UnorderedSource
from mealv2.data.torch_name import SETS, SPLITS, TorchName
from mealv2.errors import ConfigError


class TorchSet(UnorderedSource):
    """A split of a torchvision data set, whose images it keeps in memory.

    ``val`` and ``test`` are its test images. Keys are the positions in the archive; an image is the
    binary PPM (PGM if gray) of the archive's pixels. torchvision compares the MD5 of the archives.
    Raises ConfigError for an unknown set or split, and for files that are missing or differ.
    """

    def __init__(self, named: TorchName, split: str) -> None:
        named.check([split])
        try:
            found = getattr(datasets, SETS[named.name])(
                named.folder, train=SPLITS[split], download=False
            )
        except (RuntimeError, OSError) as error:
            reason = str(error).partition(".")[0]
            raise ConfigError(f"torch/{named.name}: {named.advice(reason)}") from None
        self.name, self.split = f"torch/{named.name} ({split})", split
        self.classes: list[str] = list(found.classes)
        self._pixels_NHW: np.ndarray = np.asarray(found.data)
        self.labels = [int(label) for label in found.targets]
        width = len(str(len(self.labels) - 1))
        self.keys = [f"{position:0{width}d}" for position in range(len(self.labels))]
        self.sizes = self.stored_sizes = [len(self.read(0))] * len(self.keys)

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, position: int) -> bytes:
        """Return the image at ``position`` as PPM or PGM."""
        image = self._pixels_NHW[position]
        height, width = image.shape[:2]
        head = f"P{6 if image.ndim == 3 else 5}\n{width} {height}\n255\n"
        pixels: bytes = image.tobytes()
        return head.encode() + pixels
