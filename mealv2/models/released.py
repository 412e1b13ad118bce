"""The eight models that the authors of MEAL V2 published: names, files, download."""

import http.client
import re
import urllib.error
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.hub

from mealv2.errors import ConfigError, MealError
from mealv2.models.weights import read_state
from mealv2.storage.atomic import atomic_file, file_sha256
from mealv2.storage.reachable import unreachable

BASE_URL = "https://github.com/szq0214/MEAL-V2/releases/download/v1.0.0/"

# official code: for all eight models, also the MobileNets, whose timm weights use 0.5
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

# errors of a connection; a full disk or a missing permission is not among them
_NETWORK = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)

_PIN = "@sha256:"  # between a model's name and the hash of its weights file


@dataclass(frozen=True)
class Released:
    """A published model: ImageNet, 256/224 evaluation, accuracies (percent) of its authors.

    ``hub_name`` is the published name. ``architecture`` has the tag of timm's nearest relative,
    whose weights are not used.
    """

    hub_name: str
    architecture: str
    file_name: str
    img_size: int
    top1: float
    top5: float

    @property
    def names(self) -> tuple[str, str, str]:
        """The published name, its corrected spelling (may be the same), and one with the size."""
        name = self.hub_name.replace("resnest", "resnet").replace("mobilenet_v3", "mobilenetv3")
        return self.hub_name, name, f"{name.removesuffix('_380x380')}_{self.img_size}"

    @property
    def tag(self) -> str:
        """The full name of a model with these weights: timm's architecture, then our name."""
        return f"{self.architecture.split('.')[0]}.{self.names[2]}"

    @property
    def url(self) -> str:
        """The address of the file."""
        return BASE_URL + self.file_name

    @property
    def timm_config(self) -> dict[str, Any]:
        """The entries in which these weights differ from timm's config of the architecture."""
        return {
            "tag": self.names[2],
            "mean": MEAN,
            "std": STD,
            "input_size": (3, self.img_size, self.img_size),
            "test_input_size": None,
            "interpolation": "bilinear",
            "crop_pct": 224 / 256,
            "test_crop_pct": None,
        }


# fmt: off
RELEASED = (
    Released("mealv1_resnest50", "resnet50.ram_in1k",
             "MEALV1_ResNet50_224.pth", 224, 78.21, 94.01),
    Released("mealv2_resnest50", "resnet50.ram_in1k",
             "MEALV2_ResNet50_224.pth", 224, 80.67, 95.09),
    Released("mealv2_resnest50_cutmix", "resnet50.ram_in1k",
             "MEALV2_ResNet50_224_cutmix.pth", 224, 80.98, 95.35),
    Released("mealv2_resnest50_380x380", "resnet50.ram_in1k",
             "MEALV2_ResNet50_380.pth", 380, 81.72, 95.81),
    Released("mealv2_mobilenetv3_small_075", "tf_mobilenetv3_small_075.in1k",
             "MEALV2_MobileNet_V3_Small_0.75_224.pth", 224, 67.60, 87.23),
    Released("mealv2_mobilenetv3_small_100", "tf_mobilenetv3_small_100.in1k",
             "MEALV2_MobileNet_V3_Small_1.0_224.pth", 224, 69.65, 88.71),
    Released("mealv2_mobilenet_v3_large_100", "tf_mobilenetv3_large_100.in1k",
             "MEALV2_MobileNet_V3_Large_1.0_224.pth", 224, 76.92, 93.32),
    Released("mealv2_efficientnet_b0", "tf_efficientnet_b0.aa_in1k",
             "MEALV2_EfficientNet_B0_224.pth", 224, 78.29, 93.95),
)
# fmt: on
NAMES = tuple(dict.fromkeys(name for model in RELEASED for name in model.names))


def split_pin(name: str) -> tuple[str, str | None]:
    """Return a model's name and the SHA-256 it is pinned to: ``NAME@sha256:HEX``.

    HEX is the whole hash or its first 8 digits or more; it is returned in lower case. Raises
    ConfigError.
    """
    name, at, pin = name.partition(_PIN)
    if at and not re.fullmatch(r"[0-9a-fA-F]{8,64}", pin):
        raise ConfigError(
            f"{name}{_PIN}{pin}: write NAME{_PIN}HEX, 8 to 64 hexadecimal digits of the SHA-256 of "
            "the weights file"
        )
    return name, pin.lower() or None


def pinned_sha256(path: Path, pin: str | None) -> str:
    """Return the SHA-256 (hex) of a weights file.

    Raises ConfigError if it does not begin with ``pin``.
    """
    sha256 = file_sha256(path)
    if pin and not sha256.startswith(pin):
        raise ConfigError(f"checkpoint {path} has SHA-256 {sha256}, not @sha256:{pin}")
    return sha256


def find(name: str) -> Released | None:
    """Return the released model with this name, in any spelling, pinned or not, or None.

    official code: capitals do not count.
    """
    plain = name.partition(_PIN)[0].lower()
    return next((model for model in RELEASED if plain in model.names), None)


def by_file(file_name: str) -> Released | None:
    """Return the released model with exactly this file name, or None."""
    return next((model for model in RELEASED if file_name == model.file_name), None)


def download(model: Released, *, progress: bool = True) -> Path:
    """Return the model's file in torch.hub's cache folder; download it if it is missing.

    A file gets its final name when it is complete and readable as weights. Raises MealError if the
    download fails, OSError if the folder is not writable.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / model.file_name
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    if why := unreachable(model.url):
        raise _download_error(model, folder, why)
    try:
        with atomic_file(path) as temporary:
            torch.hub.download_url_to_file(model.url, str(temporary), progress=progress)
            read_state(temporary)  # torch reports no error when the connection is cut
    except _NETWORK as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise _download_error(model, folder, " ".join(str(error).split())) from error
    except ConfigError as error:
        raise _download_error(model, folder, "the file is damaged or has no weights") from error
    return path


def _download_error(model: Released, folder: Path, reason: str) -> MealError:
    return MealError(
        f"cannot download {model.url} ({reason}); download it by hand to {folder}, or pass the "
        "file with --checkpoint FILE, --initial-checkpoint FILE or --teacher NAME=FILE"
    )
