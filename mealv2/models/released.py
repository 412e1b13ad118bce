"""The eight models that the authors of MEAL V2 published: names, files, how to get them."""

import http.client
import urllib.error
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.hub

from mealv2.errors import ConfigError, MealError
from mealv2.models.weights import read_state
from mealv2.storage.atomic import atomic_file

BASE_URL = "https://github.com/szq0214/MEAL-V2/releases/download/v1.0.0/"

# official code: all eight, also the MobileNets, whose timm weights want 0.5
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

# what a connection may raise; a full disk or a missing permission is none of it
_NETWORK = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


@dataclass(frozen=True)
class Released:
    """A published model: ImageNet, 256/224 evaluation, accuracies (percent) as its authors say.

    ``names`` are the published hub name (some say resnest for resnet), its right spelling, which
    may be the same, and one with the size. ``architecture`` has the tag of timm's nearest relative;
    its weights are not used.
    """

    names: tuple[str, str, str]
    architecture: str
    file_name: str
    img_size: int
    top1: float
    top5: float

    @property
    def tag(self) -> str:
        """What a model with these weights is called: timm's architecture, then our name."""
        return f"{self.architecture.split('.')[0]}.{self.names[2]}"

    @property
    def url(self) -> str:
        """Where the file is published."""
        return BASE_URL + self.file_name

    @property
    def timm_config(self) -> dict[str, Any]:
        """What timm's own config of the architecture says wrongly of these weights."""
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


RELEASED = (
    Released(
        ("mealv1_resnest50", "mealv1_resnet50", "mealv1_resnet50_224"),
        "resnet50.ram_in1k",
        "MEALV1_ResNet50_224.pth",
        224,
        78.21,
        94.01,
    ),
    Released(
        ("mealv2_resnest50", "mealv2_resnet50", "mealv2_resnet50_224"),
        "resnet50.ram_in1k",
        "MEALV2_ResNet50_224.pth",
        224,
        80.67,
        95.09,
    ),
    Released(
        ("mealv2_resnest50_cutmix", "mealv2_resnet50_cutmix", "mealv2_resnet50_cutmix_224"),
        "resnet50.ram_in1k",
        "MEALV2_ResNet50_224_cutmix.pth",
        224,
        80.98,
        95.35,
    ),
    Released(
        ("mealv2_resnest50_380x380", "mealv2_resnet50_380x380", "mealv2_resnet50_380"),
        "resnet50.ram_in1k",
        "MEALV2_ResNet50_380.pth",
        380,
        81.72,
        95.81,
    ),
    Released(
        (
            "mealv2_mobilenetv3_small_075",
            "mealv2_mobilenetv3_small_075",
            "mealv2_mobilenetv3_small_075_224",
        ),
        "tf_mobilenetv3_small_075.in1k",
        "MEALV2_MobileNet_V3_Small_0.75_224.pth",
        224,
        67.60,
        87.23,
    ),
    Released(
        (
            "mealv2_mobilenetv3_small_100",
            "mealv2_mobilenetv3_small_100",
            "mealv2_mobilenetv3_small_100_224",
        ),
        "tf_mobilenetv3_small_100.in1k",
        "MEALV2_MobileNet_V3_Small_1.0_224.pth",
        224,
        69.65,
        88.71,
    ),
    Released(
        (
            "mealv2_mobilenet_v3_large_100",
            "mealv2_mobilenetv3_large_100",
            "mealv2_mobilenetv3_large_100_224",
        ),
        "tf_mobilenetv3_large_100.in1k",
        "MEALV2_MobileNet_V3_Large_1.0_224.pth",
        224,
        76.92,
        93.32,
    ),
    Released(
        ("mealv2_efficientnet_b0", "mealv2_efficientnet_b0", "mealv2_efficientnet_b0_224"),
        "tf_efficientnet_b0.aa_in1k",
        "MEALV2_EfficientNet_B0_224.pth",
        224,
        78.29,
        93.95,
    ),
)
NAMES = tuple(dict.fromkeys(name for model in RELEASED for name in model.names))


def find(name: str) -> Released | None:
    """Return the released model of a name in any of its spellings; None for another name."""
    return next((model for model in RELEASED if name in model.names), None)


def by_file(file_name: str) -> Released | None:
    """Return the released model whose file is called exactly so; None for another file."""
    return next((model for model in RELEASED if file_name == model.file_name), None)


def download(model: Released, *, progress: bool = True) -> Path:
    """Return the model's file in torch.hub's cache folder, fetched if it is not there.

    A file gets its final name after it came whole and was read as weights. Raises MealError where
    it cannot be had, OSError where the folder cannot be written.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / model.file_name
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_file(path) as temporary:
            torch.hub.download_url_to_file(model.url, str(temporary), progress=progress)
            read_state(temporary)  # torch takes a connection that was cut for the end of the file
    except _NETWORK as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise _download_error(model, folder, " ".join(str(error).split())) from error
    except ConfigError as error:
        raise _download_error(model, folder, "what came is damaged or no weights") from error
    return path


def _download_error(model: Released, folder: Path, reason: str) -> MealError:
    return MealError(
        f"cannot download {model.url} ({reason}); fetch it by hand and put it into {folder}, or "
        "give it with --checkpoint FILE, --initial-checkpoint FILE or --teacher NAME=FILE"
    )
