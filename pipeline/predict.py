"""Predict the most probable classes of image files, by name."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.data.imagenet_info import ImageNetInfo

from mealv2.data.folder import UnorderedSource
from mealv2.data.image_files import EXTENSIONS, MAX_BYTES
from mealv2.data.left_out import LeftOut
from mealv2.data.loader import on_device, read_views
from mealv2.data.requests import centre_requests, check_failures, failures_by_key
from mealv2.data.view_reader import ViewReader
from mealv2.data.walk import Walk
from mealv2.errors import ConfigError, DataError
from mealv2.models.released import find
from mealv2.storage.regular_files import read_regular
from mealv2.text import printable
from pipeline import console, load_model
from pipeline.config import PredictConfig
from pipeline.loading.sources import show_summary
from pipeline.runtime.device import Runtime, create_runtime
from pipeline.training.evaluator import finite_logits

IMAGENET_CLASSES = 1000


class ImageFiles(UnorderedSource):
    """An image source without classes; its keys are the paths as the user gives them.

    A folder stands for the images below it, sorted, without hidden files. A path that is given
    twice counts once. Raises ConfigError for a missing path, a folder without images, or a name
    that is not UTF-8.
    """

    name = ""
    split = ""

    def __init__(self, paths: tuple[Path, ...]) -> None:
        self.left_out = LeftOut()
        found = [str(image) for path in paths for image in _image_files(path, self.left_out)]
        self.keys = list(dict.fromkeys(found))
        self.labels: list[int] = []
        self.classes: list[str] = []

    @property
    def sizes(self) -> list[int]:
        """The size of each file in bytes."""
        return [Path(key).stat().st_size for key in self.keys]

    stored_sizes = sizes

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, position: int) -> bytes:
        """Return the encoded image at ``position``; raises OSError."""
        return read_regular(self.keys[position], max_bytes=MAX_BYTES)


def run(config: PredictConfig) -> dict[str, Any]:
    """Predict; print the classes as text without --json; return the report.

    Raises MealError and OSError.
    """
    runtime = create_runtime(config)
    source = ImageFiles(config.image)
    show_summary(source, strict=config.strict)
    found = load_model.load(config)
    names = _class_names(config, found)
    skipped: dict[str, str] = {}
    predictions = []
    for prediction in _predictions(config, runtime, source, found, skipped):
        best = [{"class_id": c, "class": names[c], "prob": prob} for c, prob in prediction["best"]]
        predictions.append({"image": prediction["image"], "best": best})
        if not config.json:
            console.result(_shown(predictions[-1]))
    if not predictions:
        raise DataError("no image could be read")
    for key, reason in skipped.items():
        console.info(f"skipped {key}: {reason}")
    report = {
        "model": found.model.tag,
        "img_size": found.img_size,
        "num_images": len(predictions),
        "skipped": skipped,
        "predictions": predictions,
    }
    if config.results_file is not None:
        rows = [
            {"image": prediction["image"], "rank": rank, **best}
            for prediction in predictions
            for rank, best in enumerate(prediction["best"], start=1)
        ]
        load_model.write_results(config.results_file, report, rows)
    return report


@torch.no_grad()
def _predictions(
    config: PredictConfig,
    runtime: Runtime,
    source: ImageFiles,
    found: load_model.LoadedModel,
    skipped: dict[str, str],
) -> Iterator[dict[str, Any]]:
    """Yield each image's best (class id, probability); unreadable images go to ``skipped``."""
    model = runtime.to_device(found.model).eval()
    loader = read_views(
        ViewReader(source, img_size=found.img_size, resize=config.resize),
        centre_requests(range(len(source)), config.batch_size),
        workers=config.workers,
        pin_memory=runtime.should_pin_memory,
    )
    shown = console.progress(
        loader,
        total=len(source),
        what="predicting",
        unit="images",
        size=lambda batch: len(batch.positions) + len(batch.failed),
    )
    for batch in on_device(shown, runtime.device):
        check_failures(source, batch.failed, config.on_bad_image)
        skipped.update(failures_by_key(source, batch.failed))
        if not batch.positions:
            continue
        logits = finite_logits(model, batch, runtime, advice="leave out --amp")
        probs, classes = logits.softmax(1).topk(min(config.topk, logits.shape[1]))
        rows = zip(batch.positions, classes.tolist(), probs.tolist(), strict=True)
        for position, ids, values in rows:
            best = list(zip(ids, values, strict=True))
            yield {"image": source.keys[position], "best": best}


def _image_files(path: Path, left_out: LeftOut) -> Iterator[Path]:
    """Yield an image, or the images below a folder in order; links are followed."""
    _check_name(path)
    if not path.is_dir():
        if not path.exists():
            raise ConfigError(f"{path} does not exist")
        if not path.is_file():
            raise ConfigError(f"{path} is not a file: give a picture or a folder")
        yield path
        return
    walk = Walk(path)
    found = sorted(image.path for image in walk.images(path))
    left_out.update(walk.left_out())
    if not found:
        raise ConfigError(f"folder {path} has no images ({', '.join(EXTENSIONS)})")
    for image in found:
        _check_name(image)
        yield image


def _check_name(path: Path) -> None:
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(f"the file name {str(path)!a} is not valid UTF-8; rename it") from None


def _class_names(config: PredictConfig, found: load_model.LoadedModel) -> list[str]:
    """Return the class names of the checkpoint, those of ImageNet for its models, or class ids."""
    if found.classes is not None:
        return found.classes
    num_classes = found.model.num_classes
    # timm: the tag of weights with an ImageNet-1k head ends in in1k
    tag = found.model.tag
    of_imagenet = "in1k" in f"{tag} {config.model}" or find(tag.partition(".")[2]) is not None
    if num_classes == IMAGENET_CLASSES and of_imagenet:
        return list(ImageNetInfo("imagenet-1k").label_descriptions())
    return [str(number) for number in range(num_classes)]


def _shown(prediction: dict[str, Any]) -> str:
    rows = [f"{100 * best['prob']:6.2f} %  {best['class']}" for best in prediction["best"]]
    return "\n".join(printable(row, is_line=True) for row in [prediction["image"], *rows])
