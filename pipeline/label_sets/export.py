"""`mealv2 labels export`: labels as files of FKD or SRe2L, in tar shards, or as tables."""

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mealv2 import fkd
from mealv2.data.source import is_unlabelled
from mealv2.data.tar_writer import sample, sample_names, tar_writer
from mealv2.errors import ConfigError, DataError, LabelSetError
from mealv2.label_set import (
    FittedLogits,
    LabelSet,
    Rows,
    ShardFile,
    check_same_data,
    member_bytes,
)
from mealv2.soft_labels import EncodedLabels, top_k
from mealv2.storage.atomic import atomic_file, list_folder, write_atomic
from mealv2.storage.json_format import canonical_json
from mealv2.storage.regular_files import read_regular
from pipeline import console
from pipeline.config import LabelsExportConfig, plain, require
from pipeline.label_sets.export_sre2l import write_batches
from pipeline.label_sets.reading import blocks_of, boxes_of, has_plain_boxes, rows_of, shards
from pipeline.label_sets.writing import require_outside
from pipeline.labelling.compatibility import image_check
from pipeline.loading.sources import open_labelled

# readers of a folder of tables ignore names that start with an underscore
_PLAN_NAME = "_plan.json"
_REPORT_NAME = "_export.json"

Export = Callable[[], list[Path]]  # writes the missing files; returns all


def run(config: LabelsExportConfig) -> dict[str, Any]:
    """Export; return the report. Raises MealError and OSError.

    Writes _plan.json before the first file and _export.json, the report, after the last one. Files
    of an earlier run of the same export are kept.
    """
    require_outside(config.output, config.labels)
    labels = LabelSet.open(config.labels, split=config.split)
    if labels.num_appended:
        console.info(f"left out: {console.count(labels.num_appended, 'appended label')}")
    labels = LabelSet.open(config.labels, split=config.split, appended=[])
    exporters = {
        "fkd": _fkd,
        "sre2l": write_batches,
        "webdataset": _webdataset,
        "parquet": _parquet,
    }
    export = exporters[config.to](config, labels)
    _claim(config, labels)
    files = export()
    report: dict[str, Any] = {
        "to": config.to,
        "images": len(labels),
        "views": len(labels) * labels.num_views,
        "files": len(files),
        "bytes": sum(path.stat().st_size for path in files),
    }
    write_atomic(config.output / _REPORT_NAME, canonical_json(report).encode())
    size = console.size_of(report["bytes"])
    console.info(f"{config.output}: {console.count(len(files), 'file')}, {size}")
    return {"output": str(config.output), **report}


def _claim(config: LabelsExportConfig, labels: LabelSet) -> None:
    """Write _plan.json; raises ConfigError if --output has another export or other files."""
    plan = {
        "to": config.to,
        "role": config.split,
        "num_views": labels.num_views,
        "label_set": labels.manifest["plan"],
        **(_fkd_plan(config) if config.to == "fkd" else {}),
        **({"batch_size": config.batch_size} if config.to == "sre2l" else {}),
    }
    path = config.output / _PLAN_NAME
    config.output.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        if read_regular(path) != canonical_json(plan).encode():
            raise ConfigError(f"--output {config.output} has another export; give a new folder")
        return
    if names := list_folder(config.output):
        raise ConfigError(
            f"--output {config.output} is not empty ({names[0]}, …); give a new folder"
        )
    write_atomic(path, canonical_json(plan).encode())


def _write_shards(
    config: LabelsExportConfig,
    labels: LabelSet,
    name: str,
    write: Callable[[int, ShardFile, Path], None],
) -> list[Path]:
    """Write one file per shard, unless it exists; return all files.

    ``name`` has the field ``number``. ``write`` receives the number, the shard and the path.
    """
    paths = []
    for number, file in shards(labels):
        path = config.output / f"{labels.split}-{name.format(number=number)}"
        paths.append(path)
        if not path.exists():
            with atomic_file(path) as temporary:
                write(number, file, temporary)
    return paths


# --- FKD ------------------------------------------------------------------------------------------


def _fkd(config: LabelsExportConfig, labels: LabelSet) -> Export:
    """Write SPLIT/CLASS/STEM.tar for every image, in the folder where the training looks for it."""
    label_type = fkd.with_k(config.label_type)
    try:
        kept = fkd.num_kept(label_type, labels.num_classes)
    except LabelSetError as error:
        raise ConfigError(f"--label-type {config.label_type}: {error}") from None
    names = fkd.label_names(labels.keys())
    boxes_of(labels, labels.blocks[0][1][0])  # raises without image sizes
    split = labels.manifest["plan"]["roles"]["train"]["split"]
    folder = config.output / _data_set_name(config) / split

    def export() -> list[Path]:
        for number, file in shards(labels):
            paths = [folder / name for name in map(names.__getitem__, file.keys())]
            if all(path.exists() for path in paths):
                continue
            boxes, flips = boxes_of(labels, file)
            exact = top_k(rows_of(labels, number).labels.to_dense(), kept)
            packed = fkd.pack(exact, label_type)
            by_image = packed.reshape(file.num_images, labels.num_views, *packed.shape[1:])
            for row, path in enumerate(paths):
                path.parent.mkdir(parents=True, exist_ok=True)
                fkd.write_file(path, boxes[row].astype(np.float32), flips[row], by_image[row])
        return [folder / name for name in names.values()]

    return export


def _fkd_plan(config: LabelsExportConfig) -> dict[str, str]:
    """Return what the plan of an export keeps beside the label set."""
    layout = {"data_set": _data_set_name(config)} if config.layout == "mealv2" else {}
    return {"label_type": fkd.with_k(config.label_type), **layout}


def _data_set_name(config: LabelsExportConfig) -> str:
    """Return the folder above the split: none for FKD, the data set's name for MEAL V2.

    FKD's training looks for SOFT/train/CLASS/STEM.tar, official code of MEAL V2: for
    SOFT/DATASET/train/CLASS/STEM.tar, DATASET as in the paths of its images.
    """
    if config.layout == "fkd":
        return ""
    assert config.data_dir is not None
    name = str(plain(config.data_dir)).rstrip("/").rpartition("/")[2]
    require(name, f"--layout mealv2: {config.data_dir} has no name; give a data set in a folder")
    return name


# --- WebDataset -----------------------------------------------------------------------------------


def _webdataset(config: LabelsExportConfig, labels: LabelSet) -> Export:
    """Write classes.json, and a tar of images and labels for every shard.

    Raises LabelSetError for an image that is not the one that was labelled.
    """
    assert config.data_dir is not None
    plan = labels.manifest["plan"]
    has_extra = "extra" in plan["roles"][labels.split]
    source = None if has_extra else open_labelled(config, config.data_dir, plan, labels.split)
    if source is None or is_unlabelled(source):
        raise ConfigError(
            f"{labels.folder} has labels of unlabelled pictures, and a sample of a tar file needs "
            "a class; use --to parquet"
        )
    check_same_data(labels, source, allow_missing=True)
    position_of = {key: position for position, key in enumerate(source.keys)}
    check = image_check(labels, source, "always")

    def write(number: int, file: ShardFile, path: Path) -> None:
        keys = file.keys()
        blocks = blocks_of(labels, number)
        with path.open("xb") as stream, tar_writer(stream) as writer:
            for key, name, block in zip(keys, sample_names(keys), blocks, strict=True):
                position = position_of[key]
                class_id, image = source.labels[position], source.read(position)
                if check is not None:
                    try:
                        check(position, source.original_hash(position, image))
                    except DataError as error:
                        where = f"{source.name}/{key}"
                        raise LabelSetError(
                            f"image {where}: {error}; give the data that was labelled"
                        ) from None
                writer.write(sample(name, key, class_id, image, mealv2=member_bytes(key, block)))

    def export() -> list[Path]:
        write_atomic(config.output / "classes.json", canonical_json(source.classes).encode())
        return _write_shards(config, labels, "{number:06d}.tar", write)

    return export


# --- Parquet --------------------------------------------------------------------------------------


def _parquet(config: LabelsExportConfig, labels: LabelSet) -> Export:
    """Write a table of labels for every shard, one row per view."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ConfigError("--to parquet needs pyarrow: pip install 'mealv2[parquet]'")
    import pyarrow
    import pyarrow.parquet

    def write(number: int, file: ShardFile, path: Path) -> None:
        table = pyarrow.table(_columns(labels, file, rows_of(labels, number), pyarrow))
        pyarrow.parquet.write_table(table, path, compression="zstd")

    return partial(_write_shards, config, labels, "{number:05d}.parquet", write)


def _columns(labels: LabelSet, file: ShardFile, rows: Rows, pyarrow: Any) -> dict[str, Any]:
    """Return the columns of a shard's table by name."""
    kept = rows.labels.kept()
    if isinstance(rows.labels, EncodedLabels) and rows.labels.shares_models:
        kept = kept.by_probability()  # records are in this order, with their logits
    counts = kept.is_kept_NK.sum(dim=1)
    ends = np.concatenate([[0], np.cumsum(counts.numpy())]).astype(np.int32)

    def lists(values_NK: torch.Tensor, kind: str) -> Any:
        flat = values_NK[kept.is_kept_NK].numpy().astype(kind)
        return pyarrow.ListArray.from_arrays(ends, pyarrow.array(flat))

    columns: dict[str, Any] = {
        "key": np.repeat(np.array(file.keys(), dtype=object), labels.num_views),
        "view": np.tile(np.arange(labels.num_views, dtype=np.int32), file.num_images),
        "classes": lists(kept.indices_NK, "int32"),
        "probs": lists(kept.probs_NK, "float32"),
        "prob_of_each_other": kept.tail_N.numpy(),
    }
    if rows.logits is not None:
        logits = rows.logits
        logits = logits.of_kept(kept) if isinstance(logits, FittedLogits) else logits
        columns["mean_logits"] = lists(logits.values_NK[:, : kept.is_kept_NK.shape[1]], "float32")
        columns["mean_logit_of_others"] = logits.rest_N.float().numpy()
    if file.images is not None:
        columns["true_class"] = np.repeat(file.images.classes_N.astype(np.int32), labels.num_views)
    has_sizes = file.images is not None or file.stored_views is not None
    if labels.split == "train" and has_sizes and has_plain_boxes(labels):
        boxes, flips = boxes_of(labels, file)
        for position, name in enumerate(("top", "left", "height", "width")):
            columns[f"box_{name}"] = boxes[..., position].reshape(-1)
        columns["flip"] = flips.reshape(-1)
    return columns
