"""Features on disk: a file for each backbone, set of images and choice of views, for later runs."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from mealv2.data.content_hash import content_hash, content_line
from mealv2.data.requests import announce
from mealv2.data.source import ImageSource
from mealv2.data.view_reader import ViewReader
from mealv2.errors import DataError, MealError
from mealv2.models.frozen import FrozenClassifier
from mealv2.models.weights import state_sha256
from mealv2.storage.atomic import atomic_file, write_atomic
from mealv2.storage.json_format import canonical_json, json_sha256, read_json
from mealv2.views import DrawnViews
from pipeline import console
from pipeline.runtime.device import Runtime
from pipeline.training.features import FeatureTable

_FORMAT_VERSION = 2
_CHUNK = 64  # images that a thread hashes at a time


def feature_key(
    model: FrozenClassifier,
    reader: ViewReader,
    runtime: Runtime,
    views: Sequence[int],
    *,
    workers: int,
) -> str:
    """Return a SHA-256 (hex) of everything that features depend on; "" if an image is unreadable.

    The backbone's weights and architecture, the images by name and content in the order of the
    source, the views and how they are cut, precision and device. Reads every image.
    """
    images = _images_sha256(reader.source, workers)
    if images is None:
        return ""
    head = f"{model.head_name}."
    state = model.backbone.state_dict()
    drawn = reader.views
    assert drawn is None or isinstance(drawn, DrawnViews), "views of a seed"
    return json_sha256(
        {
            "format_version": _FORMAT_VERSION,
            "weights": state_sha256({n: t for n, t in state.items() if not n.startswith(head)}),
            "model": [model.tag.split(".")[0], model.head_name, model.model_args],
            "preprocessing": [list(v) for v in asdict(model.preprocessing).values()],
            "images": images,
            "views": None if drawn is None else [drawn.seed, drawn.recipe.entry(), list(views)],
            "size": [reader.img_size, reader.resize],
            "precision": [runtime.precision, runtime.device.type],
        }
    )


def save_features(folder: Path, key: str, table: FeatureTable) -> None:
    """Write a table as KEY.npy, then KEY.json with its hash; one with bad images is not kept."""
    if table.failed:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / f"{key}.npy") as temporary, temporary.open("xb") as file:
        np.save(file, table.features_NVD, allow_pickle=False)
    about = {
        "format_version": _FORMAT_VERSION,
        "xxh3_64": _hash(table.features_NVD),
        "shape": list(table.features_NVD.shape),
    }
    write_atomic(folder / f"{key}.json", canonical_json(about).encode())


def load_features(folder: Path, key: str, views: Sequence[int]) -> FeatureTable | None:
    """Return a table, None without one; raises MealError for a file that is damaged."""
    path = folder / f"{key}.npy"
    try:
        about: dict[str, Any] = dict(read_json(folder / f"{key}.json"))
        features_NVD = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise MealError(f"{path} is damaged ({error}); remove it and its .json") from None
    is_float32 = isinstance(features_NVD, np.ndarray) and features_NVD.dtype == np.float32
    if not is_float32 or _hash(features_NVD) != about.get("xxh3_64"):
        raise MealError(f"{path} is damaged: its hash differs; remove it and its .json")
    return FeatureTable(features_NVD, views)


def _images_sha256(source: ImageSource, workers: int) -> str | None:
    """Return one hash of the names and contents of all images, in the order of the source.

    None if an image cannot be read. Reading is all it costs: XXH3 runs at the speed of memory.
    """
    starts = range(0, len(source), _CHUNK)
    chunks = [range(start, min(start + _CHUNK, len(source))) for start in starts]
    announce(source, [[(position, ()) for position in chunk] for chunk in chunks])

    def lines(chunk: range) -> list[bytes]:
        return [content_line(source.keys[p], content_hash(source.read(p))) for p in chunk]

    digest = sha256()
    with ThreadPoolExecutor(max(1, workers), "mealv2-hash") as pool:
        try:
            for found in console.progress(
                pool.map(lines, chunks),
                total=len(source),
                what=f"content of {source.split}",
                unit="images",
                size=len,
            ):
                digest.update(b"".join(found))
        except (DataError, OSError):
            pool.shutdown(cancel_futures=True)
            return None
    return digest.hexdigest()


def _hash(features_NVD: np.ndarray) -> str:
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(features_NVD).data)
