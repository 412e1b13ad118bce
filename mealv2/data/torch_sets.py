"""torchvision's small data sets in their published archives, as an image source."""

import contextlib
import http.client
import io
from typing import Any

import numpy as np
from torchvision import datasets

from mealv2.data.folder import UnorderedSource
from mealv2.data.torch_name import SETS, SPLITS, TorchName
from mealv2.errors import ConfigError, RemoteError
from mealv2.storage.cache import locked
from mealv2.storage.reachable import require_reachable
from mealv2.storage.transfer import reason


class TorchSet(UnorderedSource):
    """A split of a torchvision data set, whose images it keeps in memory.

    ``val`` and ``test`` are its test images. Keys are the positions in the archive; an image is the
    binary PPM (PGM if gray) of the archive's pixels. torchvision compares the MD5 of the archives.
    Raises ConfigError for an unknown set or split, and for files that are missing or differ.
    """

    def __init__(self, named: TorchName, split: str) -> None:
        named.check([split])
        named.require_folder()
        try:
            found = _load(named, split)
        except (RuntimeError, OSError) as error:
            why = str(error).partition(".")[0]
            raise ConfigError(f"torch/{named.name}: {named.advice(why)}") from None
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


def download(named: TorchName) -> None:
    """Download the archives that are missing in the folder; torchvision compares their MD5.

    Processes of one machine wait for each other. Raises RemoteError.
    """
    named.check([])
    named.folder.mkdir(parents=True, exist_ok=True)
    with locked(named.folder / named.name):
        for split in ("train", "test"):
            with contextlib.suppress(RuntimeError, OSError):
                _load(named, split)
                continue
            server = _server(getattr(datasets, SETS[named.name]))
            require_reachable(server, f"put the archives into {named.folder} by hand")
            try:
                # of MNIST, torchvision prints which mirror fails
                with contextlib.redirect_stdout(io.StringIO()):
                    _load(named, split, download=True)
            except (RuntimeError, OSError, http.client.HTTPException) as error:
                raise RemoteError(
                    f"cannot download torch/{named.name} from {server}: {reason(error)}; put the "
                    f"archives into {named.folder} by hand"
                ) from None


def _load(named: TorchName, split: str, *, download: bool = False) -> Any:
    kind = getattr(datasets, SETS[named.name])
    return kind(named.folder, train=SPLITS[split], download=download)


def _server(kind: type) -> str:
    """Return the address of the archives of a data set, of several mirrors the last."""
    return str(getattr(kind, "url", None) or getattr(kind, "mirrors", [])[-1])
