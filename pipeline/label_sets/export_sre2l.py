"""Labels as the batch files of SRe2L, which its loader and LPLD's read."""

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from mealv2 import fkd
from mealv2.errors import ConfigError, LabelSetError
from mealv2.label_set import LabelSet, Rows, check_same_data
from mealv2.storage.atomic import atomic_file
from pipeline import console
from pipeline.config import LabelsExportConfig, require
from pipeline.label_sets.image_order import torchvision_order
from pipeline.label_sets.reading import boxes_of
from pipeline.loading.sources import open_labelled

_FOLDER = "labels"  # the loaders count what is in their folder
_MAX_BOXES = 1 << 24  # computed at once: 285 MB
_MIN_LOG = -104.0  # below the logarithm of every float32 above 0


def write_batches(config: LabelsExportConfig, labels: LabelSet) -> Callable[[], list[Path]]:
    """Return the function that writes the missing files and returns all.

    View v is epoch v of SRe2L. Raises ConfigError and LabelSetError for images that are not those
    of the set.
    """
    assert config.data_dir is not None
    plan = labels.manifest["plan"]
    if "extra" in plan["roles"]["train"]:
        raise ConfigError(
            f"{labels.folder} has labels of unlabelled pictures, which SRe2L's loader does not "
            "read; use --to parquet"
        )
    source = open_labelled(config, config.data_dir, plan, "train")
    check_same_data(labels, source)
    order = torchvision_order(source, config.data_dir, plan["roles"]["train"]["split"])
    keys = [source.keys[position] for position in order]
    if not (has_label := labels.has_labels(keys)).all():
        raise LabelSetError(
            f"{labels.folder} has no labels of {console.first_names(_without(keys, has_label))}, "
            f"but SRe2L's loader needs those of every image in {source.name}"
        )
    require(
        config.batch_size <= len(keys),
        f"--batch-size {config.batch_size} exceeds the {console.count(len(keys), 'image')}; "
        "give the batch size of SRe2L's training, at most that",
    )
    boxes_of(labels, labels.blocks[0][1][0])  # raises without image sizes
    return lambda: _write(config, labels, keys)


def _without(keys: Sequence[str], has_label: np.ndarray) -> list[str]:
    return [key for key, has in zip(keys, has_label, strict=True) if not has]


def _write(config: LabelsExportConfig, labels: LabelSet, keys: Sequence[str]) -> list[Path]:
    folder, size = config.output / _FOLDER, config.batch_size
    paths = []
    orders = fkd.sampled_order(len(keys))
    epochs = range(labels.num_views)
    for epoch in console.progress(epochs, total=len(epochs), what="exporting", unit="views"):
        if epoch % (step := max(1, _MAX_BOXES // len(keys))) == 0:
            views = range(epoch, min(epoch + step, labels.num_views))
            boxes_VN4, flips_VN = _boxes(labels, keys, views)
        order = next(orders)
        for batch, start in enumerate(range(0, len(keys), size)):
            path = fkd.batch_path(folder, epoch, batch)
            paths.append(path)
            if path.exists():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            images = order[start : start + size]
            rows = labels.rows([keys[i] for i in images], [epoch] * len(images))
            boxes, flips = boxes_VN4[epoch - views.start], flips_VN[epoch - views.start]
            fkd.write_batch(path, boxes[images], flips[images], _logits(labels, rows))
    paths.append(folder / fkd.ORDER_NAME)
    _write_order(paths[-1], islice(fkd.sampled_order(len(keys)), labels.num_views))
    return paths


def _write_order(path: Path, orders: Iterator[np.ndarray]) -> None:
    """Write the order of the images in each epoch, as LPLD does, unless the file exists."""
    if path.exists():
        return
    with atomic_file(path) as temporary, temporary.open("x") as stream:
        for epoch, order in enumerate(orders):
            stream.write(f'{", " if epoch else "{"}"{epoch}": {json.dumps(order.tolist())}')
        stream.write("}")


def _boxes(labels: LabelSet, keys: Sequence[str], views: range) -> tuple[np.ndarray, np.ndarray]:
    """Return boxes, V x N x 4 float32, and flips of some views of all images, V x N."""
    rows_N = labels.image_rows(keys)
    parts = [boxes_of(labels, file, views) for file in labels.blocks[0][1]]
    boxes_NV4 = np.concatenate([boxes.astype(np.float32) for boxes, _ in parts])[rows_N]
    flips_NV = np.concatenate([flips for _, flips in parts])[rows_N]
    return boxes_NV4.swapaxes(0, 1), flips_NV.T


def _logits(labels: LabelSet, rows: Rows) -> torch.Tensor:
    """Return logits whose softmax is each label: log q, or what the teacher gave."""
    has_one_teacher = len(labels.manifest["plan"]["teachers"]) == 1
    if rows.logits is not None and labels.encoding.is_dense and has_one_teacher:
        return rows.logits.to_dense(rows.labels.kept(), labels.num_classes)
    # the mean logits of several teachers have another softmax than their mean probabilities
    return rows.labels.to_dense().log().clamp_min(_MIN_LOG)
