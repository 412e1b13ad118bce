"""Features on disk: a file for each backbone, set of images and choice of views, for later runs."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from mealv2.data.source import fingerprint
from mealv2.data.view_reader import ViewReader
from mealv2.errors import MealError
from mealv2.models.frozen import FrozenClassifier
from mealv2.models.weights import state_sha256
from mealv2.storage.atomic import atomic_file, write_atomic
from mealv2.storage.json_format import canonical_json, json_sha256, read_json
from mealv2.views import DrawnViews
from pipeline.runtime.device import Runtime
from pipeline.training.features import FeatureTable

_FORMAT_VERSION = 1


def feature_key(
    model: FrozenClassifier, reader: ViewReader, runtime: Runtime, views: Sequence[int]
) -> str:
    """Return a SHA-256 (hex) of everything that features depend on.

    The backbone's weights and architecture, the images by name, class and size in bytes, the views
    and how they are cut, precision and device. An image of another content, but of the same name
    and size, gives the same.
    """
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
            "images": fingerprint(reader.source),
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


def _hash(features_NVD: np.ndarray) -> str:
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(features_NVD).data)
